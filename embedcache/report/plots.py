"""Plots of scores, as SVG: dots with intervals, a heat map, label efficiency, paired differences.

Texts in the tables may be strangers'. A pair is an image encoder and a text encoder; `text` may be blank.
"""

from __future__ import annotations

from textwrap import wrap
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from embedcache.report.plain_table import metric_words, pair_name, row_pairs
from embedcache.report.svg import (
    CARD,
    HEAT,
    INK,
    LINE,
    MARKERS,
    N_LOW,
    ON_HIGH,
    ON_LOW,
    QUIET,
    SERIES,
    WIDTH,
    blank,
    legend,
    legend_height,
    mark,
    outer_labels,
    quiet_grid,
    shown,
    styled,
    svg_text,
)

Pair = tuple[str, str]  # names of an image and of a text encoder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

DASHED_CONTROL = "no-adaptor"
MOST_ROWS = 40  # of differences in one plot
_MOST_LINES = 5  # in one panel with bands around them
_MARGIN = 0.45  # of a row
_LEAST_ROOM = 9  # letters: narrower columns have their names aslant


def marks(pairs: list[Pair]) -> dict[Pair, tuple[str, str]]:
    """Colour and marker of each pair: by its image and its text encoder where there are several of both."""
    images, texts = (list(dict.fromkeys(names)) for names in zip(*pairs, strict=True)) if pairs else ([], [])
    if len(texts) == 1:
        return {pair: mark(k) for k, pair in enumerate(pairs)}
    if len(images) == 1:
        return {pair: mark(texts.index(pair[1])) for pair in pairs}
    return {(i, t): (SERIES[images.index(i) % len(SERIES)], MARKERS[texts.index(t) % len(MARKERS)]) for i, t in pairs}


def pairs_of(table: pd.DataFrame) -> list[Pair]:
    """Pairs of encoders in the table's order."""
    return list(dict.fromkeys(row_pairs(table)))


def intervals_plot(scores: pd.DataFrame, *, metric: str, title: str, chance: float | None = None) -> str:
    """A row for each pair: a dot with its interval, and its controls as hollow marks below.

    Args:
        scores: of one task: `image`, `text`, `control`, `value`, `low`, `high`.
        chance: what a guess scores, as a line.
    """
    pairs = pairs_of(scores)
    looks = marks(pairs)
    controls = [name for name in dict.fromkeys(scores["control"]) if name]
    pitch = 42 if controls else 30
    names = ["result", *(shown(name) for name in controls)] if controls else []
    with styled():
        figure = blank(WIDTH, 62 + pitch * len(pairs) + legend_height(names))
        axes = figure.subplots()
        for row, (pair, group) in enumerate((pair, of_pair(scores, pair)) for pair in pairs):
            colour, marker = looks[pair]
            for one in group[group["control"] == ""].itertuples():
                _dot(axes, one, row - (0.14 if controls else 0), colour, marker)
            for k, control in enumerate(controls):
                value = group.loc[group["control"] == control, "value"]
                at = np.full(len(value), row + 0.24)
                axes.plot(value, at, MARKERS[(k + 1) % 10], ms=5.5, mfc=CARD, mec=QUIET, mew=1.2, zorder=3)
        if chance is not None:
            axes.axvline(chance, color=QUIET, lw=1, ls=(0, (1, 2)), zorder=1)
        _rows(axes, [pair_name(*pair) for pair in pairs])
        axes.set_xlabel(shown(metric_words(metric)))
        handles = [_handle(QUIET, "o", "result, 95% interval", filled=True)] if controls else []
        handles += [_handle(QUIET, MARKERS[(k + 1) % 10], shown(name)) for k, name in enumerate(controls)]
        legend(figure, handles)
        return svg_text(figure, title=title)


def heat_map(values: pd.DataFrame, *, title: str) -> str:
    """Rows by columns, the value in each cell, shaded over each column's own range.

    Args:
        values: (n_rows, n_columns), NaN where there is none; its index and columns are shown, a column's name in lines.
    """
    from matplotlib.patches import Rectangle

    lines = [[shown(line, 32) for line in str(name).split("\n")] for name in values.columns]
    room = int((WIDTH - 220) / max(len(lines), 1) / 6.8)  # letters that a column is wide
    steep = room < _LEAST_ROOM
    if not steep:
        lines = [[part for line in name for part in wrap(line, room)] for name in lines]
    top = 50 + 4.4 * max((len(" ".join(n)) for n in lines), default=0) if steep else 24 + 17 * max(map(len, lines))
    with styled():
        figure = blank(WIDTH, top + 34 * max(len(values), 1))
        axes = figure.subplots()
        for column, (_, of) in enumerate(values.items()):
            levels = _levels(of.to_numpy(float))
            for row, (value, level) in enumerate(zip(of, levels, strict=True)):
                if level < 0:
                    axes.text(column + 0.5, row + 0.5, "none", color=QUIET, ha="center", va="center_baseline")
                    continue
                axes.add_patch(Rectangle((column + 0.02, row + 0.05), 0.96, 0.9, color=HEAT[level], lw=0))
                colour = ON_LOW if level < N_LOW else ON_HIGH
                axes.text(column + 0.5, row + 0.5, f"{value:.3f}", color=colour, ha="center", va="center_baseline")
        axes.set(xlim=(0, max(values.shape[1], 1)), ylim=(max(len(values), 1), 0))
        axes.xaxis.tick_top()
        words = [(" " if steep else "\n").join(name) for name in lines]
        axes.set_xticks(np.arange(len(lines)) + (0.35 if steep else 0.5), labels=words)
        if steep:
            for name in axes.get_xticklabels():
                name.set(rotation=35, ha="left", rotation_mode="anchor")
        axes.set_yticks(np.arange(len(values)) + 0.5, labels=[shown(name) for name in values.index], color=INK)
        axes.spines[:].set_visible(False)
        return svg_text(figure, title=title)


def label_efficiency(scores: pd.DataFrame, *, metric: str, title: str) -> str:
    """Scores over the number of labels, on a log scale; dashed without the Adaptor.

    Many pairs get a panel for each image encoder, with the others behind it in grey.

    Args:
        scores: of one task: `image`, `text`, `control`, `n_train`, `value`, `low`, `high`.
    """
    scores = scores[scores["control"].isin(["", DASHED_CONTROL])].sort_values("n_train", kind="stable")
    pairs = pairs_of(scores)
    looks = marks(pairs)
    groups = [pairs]
    if len(pairs) > _MOST_LINES:
        groups = [[p for p in pairs if p[0] == image] for image in dict.fromkeys(p[0] for p in pairs)]
    columns = min(len(groups), 3)
    n_rows = -(-len(groups) // columns) if groups else 1
    with styled():
        handles = _efficiency_handles(pairs, looks, split=len(groups) > 1)
        if (scores["control"] != "").any():
            handles.append(_handle(QUIET, "", "without the Adaptor", line="--"))
        height = (310 if n_rows == 1 else 235 * n_rows) + legend_height([str(h.get_label()) for h in handles]) + 20
        figure = blank(WIDTH, height)
        panels = figure.subplots(n_rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for axes in panels[len(groups) :]:
            axes.set_visible(False)
        for axes, group in zip(panels, groups, strict=False):
            for pair in (p for p in pairs if p not in group):
                of = _result(scores, pair)
                axes.plot(of["n_train"], of["value"], color=LINE, lw=1.1, zorder=1)
            for pair in group:
                _curve(axes, scores, pair, looks[pair])
            axes.set_xscale("log")
            _count_ticks(axes, scores["n_train"])
            quiet_grid(axes, "y")
            if len(groups) > 1:
                axes.set_title(shown(group[0][0], 28))
        outer_labels(list(panels[: len(groups)]), columns, x="labels to learn from", y=shown(metric_words(metric)))
        legend(figure, handles)
        return svg_text(figure, title=title)


def differences_plot(differences: pd.DataFrame, *, metric: str, title: str) -> str:
    """A row for each two compared, with the line of no difference; filled where one is better.

    Beyond `MOST_ROWS` those with the smallest p are shown.

    Args:
        differences: `a`, `b`, `value`, `low`, `high`, `p_adjusted`, `verdict`, and `setting`,
            named where there are several.
    """
    if len(differences) > MOST_ROWS:
        first = differences["p_adjusted"].to_numpy(float).argsort(kind="stable")[:MOST_ROWS]
        differences = differences.iloc[np.sort(first)]
    has_settings = differences["setting"].nunique() > 1
    rows = differences.to_dict("records")
    names = [f"{shown(r['a'], 26)} − {shown(r['b'], 26)}" for r in rows]
    if has_settings:
        names = [f"{name} ({shown(r['setting'], 24)})" for name, r in zip(names, rows, strict=True)]
    with styled():
        figure = blank(WIDTH, 62 + 30 * max(len(rows), 1))
        axes = figure.subplots()
        for row, one in enumerate(differences.itertuples()):
            _dot(axes, one, row, SERIES[0], "o", filled=bool(one.verdict))
        axes.axvline(0, color=INK, lw=1.1, zorder=1)
        _rows(axes, names, length=90)
        axes.set_xlabel(f"difference in {shown(metric_words(metric))}: first − second")
        return svg_text(figure, title=title)


def of_pair(table: pd.DataFrame, pair: Pair) -> pd.DataFrame:
    """The rows of one pair."""
    some = table[table["image"] == pair[0]]
    return some[some["text"] == pair[1]] if "text" in some else some


def _result(table: pd.DataFrame, pair: Pair, control: str = "") -> pd.DataFrame:
    some = of_pair(table, pair)
    return some[some["control"] == control]


def _dot(axes: Axes, one: object, row: float, colour: str, marker: str, *, filled: bool = True) -> None:
    """A value with its interval; nothing where it is undefined."""
    value, low, high = (float(getattr(one, name)) for name in ("value", "low", "high"))
    axes.plot([low, high], [row, row], color=colour, lw=2, zorder=2)
    face = colour if filled else CARD
    axes.plot([value], [row], marker, color=colour, mfc=face, mec=colour if not filled else CARD, ms=8, zorder=4)


def _rows(axes: Axes, names: list[str], length: int = 34) -> None:
    axes.set_yticks(range(len(names)), labels=[shown(name, length) for name in names], color=INK)
    axes.set_ylim(len(names) - 1 + _MARGIN + 0.1, -_MARGIN - 0.1)
    axes.locator_params(axis="x", nbins=7)
    quiet_grid(axes, "x")


def _levels(values: np.ndarray) -> np.ndarray:
    """Which colour each value has, -1 for none; a range is at least 0.1 wide, so that noise is not painted as gain."""
    levels = np.full(len(values), -1)
    known = np.isfinite(values)
    if known.any():
        low, high = values[known].min(), values[known].max()
        middle, span = (low + high) / 2, max(high - low, 0.1)
        share = (values[known] - middle) / span + 0.5
        levels[known] = np.clip((share * len(HEAT)).astype(int), 0, len(HEAT) - 1)
    return levels


def _curve(axes: Axes, scores: pd.DataFrame, pair: Pair, look: tuple[str, str]) -> None:
    colour, marker = look
    of = _result(scores, pair)
    axes.fill_between(of["n_train"], of["low"], of["high"], color=colour, alpha=0.13, lw=0, zorder=1)
    axes.plot(of["n_train"], of["value"], marker=marker, color=colour, mec=CARD, ms=7, zorder=4)
    without = _result(scores, pair, DASHED_CONTROL)
    axes.plot(without["n_train"], without["value"], color=colour, ls=(0, (4, 2.5)), lw=1.4, zorder=3)


def _efficiency_handles(pairs: list[Pair], looks: dict[Pair, tuple[str, str]], *, split: bool) -> list[Line2D]:
    """What lines stand for; panels of one image encoder each leave the text encoders to be told apart."""
    if not split:
        return [_handle(*looks[pair], shown(pair_name(*pair)), filled=True, line="-") for pair in pairs]
    markers = {text: looks[(image, text)][1] for image, text in reversed(pairs)}
    texts = list(dict.fromkeys(text for _, text in pairs))
    handles = [_handle(QUIET, markers[t], shown(t), filled=True, line="-") for t in texts] if len(texts) > 1 else []
    return [*handles, _handle(LINE, "", "other image encoders", line="-")]


def _count_ticks(axes: Axes, counts: pd.Series) -> None:
    """Ticks where there are values, but no two so near that they would touch."""
    ticks: list[float] = []
    for count in sorted({float(c) for c in counts if c > 0}):
        if not ticks or count > 1.35 * ticks[-1]:
            ticks.append(count)
    axes.set_xticks(ticks, labels=[f"{tick:,.0f}" for tick in ticks])
    axes.set_xticks([], minor=True)


def _handle(colour: str, marker: str, label: str, *, filled: bool = False, line: str = "") -> Line2D:
    from matplotlib.lines import Line2D

    face = colour if filled else CARD
    return Line2D([], [], color=colour, marker=marker, ls=line, mfc=face, mec=colour, ms=6.5, lw=1.6, label=label)
