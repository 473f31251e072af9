"""Plots of training and of embeddings, as SVG."""

from __future__ import annotations

import numpy as np
import pandas as pd

from embedcache.report.contents import EmbeddingMap
from embedcache.report.plain_table import pair_name
from embedcache.report.plots import of_pair, pairs_of
from embedcache.report.svg import (
    CARD,
    INK,
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

MOST_POINTS = 2000  # of a map: each is an element of the page
_FEW_EPOCHS = 12  # that get a mark each: a line of one point is none
_MAP = 440.0  # width of a map


def training_curves(curves: pd.DataFrame, *, title: str) -> str:
    """A panel for each pair: losses over epochs, the lowest validation loss marked.

    Args:
        curves: `image`, `text`, `epoch`, `train_loss`, `valid_loss`.
    """
    from matplotlib.lines import Line2D

    pairs = pairs_of(curves)
    columns = min(max(len(pairs), 1), 3)
    n_rows = max(-(-len(pairs) // columns), 1)
    with styled():
        figure = blank(WIDTH, (270 if n_rows == 1 else 210 * n_rows) + 64)
        panels = figure.subplots(n_rows, columns, sharey=True, squeeze=False).ravel()
        for axes in panels[len(pairs) :]:
            axes.set_visible(False)
        for axes, pair in zip(panels, pairs, strict=False):
            of = of_pair(curves, pair).sort_values("epoch", kind="stable")
            few = len(of) <= _FEW_EPOCHS
            epochs, valid = of["epoch"].to_numpy(float), of["valid_loss"].to_numpy(float)
            axes.plot(epochs, of["train_loss"], color=QUIET, ls=(0, (4, 2.5)), lw=1.5, marker="s" if few else "", ms=4)
            axes.plot(epochs, valid, color=SERIES[0], marker="o" if few else "", ms=4)
            if np.isfinite(valid).any():
                best = int(np.nanargmin(valid))
                axes.plot(epochs[best], valid[best], "o", ms=9, mfc=CARD, mec=SERIES[0], mew=2, zorder=4)
                where = f"{valid[best]:.3g} at {epochs[best]:.0f}"
                near_end = epochs[best] > epochs.mean()
                axes.annotate(
                    where,
                    (epochs[best], valid[best]),
                    xytext=(0, -10),
                    textcoords="offset points",
                    va="top",
                    ha="right" if near_end and len(of) > 1 else "left",
                    color=INK,
                )
            axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
            axes.margins(y=0.18)
            quiet_grid(axes, "y")
            axes.set_title(shown(pair_name(*pair), 30), fontsize=12)
        outer_labels(list(panels[: max(len(pairs), 1)]), columns, x="epoch", y="loss")
        handles = [
            Line2D([], [], color=QUIET, ls="--", lw=1.5, label="training"),
            Line2D([], [], color=SERIES[0], label="validation, lowest marked"),
        ]
        legend(figure, handles)
        return svg_text(figure, title=title)


def embedding_map(of: EmbeddingMap, *, title: str) -> str:
    """Points coloured and shaped by their class; blank ones in grey below. At most `MOST_POINTS`, drawn at random."""
    n = len(of.points)
    drawn = np.sort(np.random.default_rng(0).permutation(n)[:MOST_POINTS])  # every k-th would follow any order of rows
    points, values = of.points[drawn], np.asarray(of.values, float)[drawn]
    kinds = [float(value) for value in np.unique(values[np.isfinite(values)])]
    names = [class_name(of, value) for value in kinds]
    has_blank = bool((~np.isfinite(values)).any())
    words = [shown(name, 30) for name in (*names, *(["blank"] if has_blank else []))]
    with styled():
        figure = blank(_MAP, 350 + legend_height(words, width=_MAP))
        axes = figure.subplots()
        looks = [mark(k) for k in range(len(kinds))] + [(QUIET, "h")]
        groups = [values == value for value in kinds] + ([~np.isfinite(values)] if has_blank else [])
        handles = []
        for (colour, marker), member, name in zip(looks, groups, words, strict=False):
            (line,) = axes.plot(*points[member].T, marker, ms=5.5, color=colour, mec=CARD, mew=0.5, label=name)
            handles.append(line)
        axes.set(xticks=[], yticks=[])
        axes.margins(0.05)
        legend(figure, handles, width=_MAP)
        return svg_text(figure, title=title)


def class_name(of: EmbeddingMap, value: float) -> str:
    """A class by its name where it has one."""
    return of.classes[int(value)] if 0 <= value < len(of.classes) else f"{value:g}"
