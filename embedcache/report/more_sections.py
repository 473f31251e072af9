"""Parts of the page beyond probes: masks, retrieval, prompts, encoders, maps, training, examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import pandas as pd

from embedcache.report.contents import EmbeddingMap, MaskExample, RetrievalExample
from embedcache.report.curve_plots import MOST_POINTS, class_name, embedding_map, training_curves
from embedcache.report.html_table import Cell, Table, bytes_cell, count, interval_cell, number, table_of
from embedcache.report.mask_text import MASK_METRICS
from embedcache.report.plain_table import counted, gain_words, metric_words, pair_name, plain_words
from embedcache.report.plots import intervals_plot
from embedcache.report.retrieval_text import metric_number
from embedcache.report.score_text import amount_words
from embedcache.report.sections import Plot, Section, by_task, named

_PICTURES = ("data:image/png;base64,", "data:image/jpeg;base64,", "data:image/webp;base64,")
Example = TypeVar("Example", RetrievalExample, MaskExample)


def masks(tables: Mapping[str, pd.DataFrame]) -> Iterator[Section]:
    """Dice, and beside it what an empty mask scores and Dice where there is something to find."""
    if (table := tables.get("mask_scores")) is None:
        return
    plots = []
    largest = table[table["fraction"] == table["fraction"].max()]
    columns = [name for name in ("data", "decoder") if name in table]
    for key, of in largest.groupby(columns, sort=False):
        empty = of.loc[of["metric"] == "empty_mask_dice", "value"]
        for metric, chance in (("dice", empty.iloc[0] if len(empty) else None), ("dice_on_positives", None)):
            some = of[of["metric"] == metric]
            if some.empty:
                continue
            words, where = metric_words(metric), f"{', '.join(map(str, key))} decoder"
            svg = intervals_plot(some, metric=metric, title=f"{words} with intervals, {where}", chance=chance)
            line = " The dotted line is what an empty mask everywhere scores." if chance is not None else ""
            plots.append(Plot(svg, f"{words}, {where}. Bars are 95% intervals over patients and seeds.{line}"))
    words = (
        "An empty prediction on an empty mask counts as a Dice of 1, so a model that finds nothing can score high: "
        "read Dice beside the empty mask and beside Dice on positives."
    )
    made = [_mask_table(table)]
    if (over := tables.get("mask_gains")) is not None:
        made.append(_mask_gains(over))
    yield Section("Masks", "masks", words=[words], plots=plots, tables=made)


def retrieval(tables: Mapping[str, pd.DataFrame]) -> Iterator[Section]:
    """Each metric beside chance and the best order for all queries."""
    if (table := tables.get("retrieval_scores")) is None:
        return
    columns = [name for name in ("data", "direction") if name in table]
    parts = []
    for key, some in table.groupby(columns, sort=False):
        words = ", ".join(plain_words(str(name)) for name in key)
        plots = []
        if len(recalls := [name for name in dict.fromkeys(some["metric"]) if name.startswith("recall@")]):
            of = some[some["metric"] == recalls[-1]]
            svg = intervals_plot(
                of, metric=recalls[-1], title=f"{recalls[-1]}, {words}", chance=float(of["chance"].iloc[0])
            )
            plots.append(
                Plot(svg, f"{recalls[-1]}, {words}, with 95% intervals over patients and seeds. Dotted: chance.")
            )
        parts.append(Section(words, plots=plots, tables=[_retrieval_table(some, words)]))
    words = "Beside chance stands what one fixed order of all candidates scores for every query alike."
    yield Section("Retrieval", "retrieval", words=[words], parts=parts)


def zero_shot(tables: Mapping[str, pd.DataFrame]) -> Iterator[Section]:
    """Labels by prompts, with the range over single wordings."""
    if (table := tables.get("zeroshot_scores")) is None:
        return
    plots, rows = [], []
    for task, _, some in by_task(table):
        ranked = some[some["metric"] == "auroc"]
        if len(ranked):
            svg = intervals_plot(
                ranked.assign(control=""), metric="auroc", title=f"AUROC of {task} by prompts", chance=0.5
            )
            plots.append(
                Plot(svg, f"AUROC of {task} by prompts, with 95% intervals over patients and seeds. Dotted: chance.")
            )
        for r in named(some).to_dict("records"):
            spread = f"{r['worst_wording']:.3f} to {r['best_wording']:.3f} ({r['n_wordings']:.0f})"
            rows.append(
                [
                    r["pair"],
                    task,
                    metric_words(r["metric"]),
                    interval_cell(r["value"], r["low"], r["high"]),
                    Cell(spread if r["n_wordings"] > 1 else "", float(r["worst_wording"])),
                    count(r["n_test"]),
                    count(r["n_positive"]),
                    "the prompts say the opposite" if str(r["inverted"]).lower() == "true" else "",
                ]
            )
    heads = ["encoders", "label", "metric", "value", "by single wordings", "test", "positives", "note"]
    made = table_of(heads, rows, caption="labels by prompts (95% interval over patients and seeds)")
    yield Section("Zero-shot by prompts", "zero-shot", plots=plots, tables=[made])


def encoders(table: pd.DataFrame) -> Iterator[Section]:
    """What each encoder is, costs, and has seen."""
    if table.empty:
        return
    cost, seen = [], []
    for r in table.to_dict("records"):
        sizes = [count(r["dim"]), count(r["parameters"]), bytes_cell(r["disk_bytes"])]
        seconds = number(r["seconds_per_1000"], places=1)
        cost.append([r["name"], r["modality"], r["model"], r["weights"], *sizes, seconds])
        seen.append([r["name"], r["exposure"], r["said"]])
    heads = ["encoder", "modality", "model", "weights", "dimension", "parameters", "on disk", "seconds per 1,000"]
    tables = [
        table_of(heads, cost, caption="encoders: what they are and what they cost"),
        table_of(["encoder", "exposure", "where that is said"], seen, caption="encoders: exposure to the test data"),
    ]
    yield Section("Encoders", "encoders", tables=tables)


def maps(found: Sequence[EmbeddingMap]) -> Iterator[Section]:
    """Where the test images lie."""
    plots = []
    for of in found:
        values = np.asarray(of.values, float)
        rows: list[list[object]] = []
        for value in np.unique(values[np.isfinite(values)]):
            x, y = of.points[values == value].mean(axis=0)
            rows.append([class_name(of, float(value)), int((values == value).sum()), float(x), float(y)])
        if n_blank := int((~np.isfinite(values)).sum()):
            rows.append(["blank", n_blank, None, None])
        few = f" {MOST_POINTS:,} of {len(values):,} images are drawn." if len(values) > MOST_POINTS else ""
        name = f"embeddings by {of.encoder}, coloured by {of.label}"
        table = table_of([of.label, "images", "mean x", "mean y"], rows, caption=name)
        caption = f"{name}: {of.how.rstrip('.')}.{few}"
        plots.append(Plot(embedding_map(of, title=f"map of {name}"), caption, table))
    if plots:
        words = "Distances between far clusters mean little in a map; scores above are what counts."
        yield Section("Embedding maps", "maps", words=[words], plots=plots)


def training(curves: pd.DataFrame) -> Iterator[Section]:
    """Losses of the Adaptors."""
    if curves.empty:
        return
    rows = [
        [r["pair"], count(r["epoch"]), number(float(r["train_loss"])), number(float(r["valid_loss"]))]
        for r in named(curves).to_dict("records")
    ]
    table = table_of(["encoders", "epoch", "training loss", "validation loss"], rows, caption="losses by epoch")
    svg = training_curves(curves, title="training and validation loss of each Adaptor over epochs")
    caption = "Losses of each Adaptor. The state with the lowest validation loss is the one that was kept."
    yield Section("Training", "training", plots=[Plot(svg, caption, table)])


def examples(found: Sequence[RetrievalExample], drawn: Sequence[MaskExample], *, has_images: bool) -> Iterator[Section]:
    """Queries and masks that went best and worst; pictures only where they may be shown."""
    parts = []
    for pair, of in _by_pair(found):
        ordered = sorted(of, key=lambda example: example.own_rank)
        name = pair_name(*pair)
        best = len(ordered) - len(ordered) // 2
        parts.append(Section(f"{name}: reports found best", found=[_pictured(e, has_images) for e in ordered[:best]]))
        if worst := ordered[best:][::-1]:
            parts.append(Section(f"{name}: reports found worst", found=[_pictured(e, has_images) for e in worst]))
    for pair, of_masks in _by_pair(drawn):
        some = sorted(of_masks, key=lambda example: -example.dice)
        parts.append(Section(f"{pair_name(*pair)}: masks", masks=[_pictured(e, has_images) for e in some]))
    if parts:
        words = [] if has_images else ["This page was made without pictures of patients."]
        yield Section("Examples", "examples", words=words, parts=parts)


def _by_pair(some: Sequence[Example]) -> Iterator[tuple[tuple[str, str], list[Example]]]:
    for pair in dict.fromkeys(tuple(example.pair) for example in some):
        yield (pair[0], pair[1]), [example for example in some if tuple(example.pair) == pair]


def _pictured(example: Example, has_images: bool) -> Example:
    """Without what is no picture, or must not be shown."""
    return example if has_images and example.picture.startswith(_PICTURES) else replace(example, picture="")


def _mask_table(table: pd.DataFrame) -> Table:
    extra = [name for name in dict.fromkeys(table["metric"]) if name not in MASK_METRICS]
    metrics = MASK_METRICS | {name: metric_words(name) for name in extra}
    data = ["data"] if "data" in table else []
    rows = []
    for key, of in named(table).groupby([*data, "pair", "control", "decoder", "fraction"], sort=False):
        *front, pair, control, decoder, fraction = key
        cells = {r.metric: interval_cell(r.value, r.low, r.high) for r in of.itertuples()}
        cells |= {r.metric: number(r.value) for r in of.itertuples() if r.metric == "empty_mask_dice"}
        first = of.iloc[0]
        share = f"{amount_words((fraction, 0))}: {first['n_train']} ({first['n_train_positive']} not empty)"
        scores = [cells.get(metric, Cell("", np.nan)) for metric in metrics]
        rows.append([pair, *front, control or "result", decoder, Cell(share, float(fraction)), *scores])
    heads = ["encoders", *data, "setting", "decoder", "masks to learn from", *metrics.values()]
    tested = f"test {counted(table['n_test'])}, {counted(table['n_positive'])} of them with a mask"
    return table_of(heads, rows, caption=f"masks ({tested}; 95% interval over patients and seeds)")


def _mask_gains(table: pd.DataFrame) -> Table:
    metrics = {name: MASK_METRICS.get(name, metric_words(name)) for name in dict.fromkeys(table["metric"])}
    data = ["data"] if "data" in table else []
    rows = []
    for key, of in named(table).groupby([*data, "pair", "control", "decoder", "fraction"], sort=False):
        *front, pair, control, decoder, fraction = key
        cells = {
            r.metric: Cell(gain_words(r.value, r.low, r.high, r.p_holm) if r.value == r.value else "undefined", r.value)
            for r in of.itertuples()
        }
        amount = Cell(amount_words((fraction, 0)), float(fraction))
        gains = [cells.get(metric, Cell("", np.nan)) for metric in metrics]
        rows.append([pair, *front, control, decoder, amount, *gains])
    heads = ["encoders", *data, "control", "decoder", "masks", *metrics.values()]
    return table_of(heads, rows, caption="gain of masks over each control (paired; p adjusted for their number)")


def _retrieval_table(table: pd.DataFrame, words: str) -> Table:
    columns = list(dict.fromkeys(zip(table["metric"], table["label"], strict=True)))
    rows: list[list[object]] = []
    for (pair, control), of in named(table).groupby(["pair", "control"], sort=False):
        cells = {(r["metric"], r["label"]): _retrieved(r) for r in of.to_dict("records")}
        rows.append([pair, control or "result", *(cells.get(column, Cell("", np.nan)) for column in columns)])
    once = table.drop_duplicates(["metric", "label"])
    for name, said in (("chance", "chance"), ("one_order", "one order for all")):
        values = [Cell(metric_number(float(r[name]), r["metric"]), float(r[name])) for r in once.to_dict("records")]
        rows.append([said, "", *values])
    heads = [metric_words(metric) + (f" of {label}" if label else "") for metric, label in columns]
    asked = f"{counted(table['n_queries'])} queries among {counted(table['n_candidates'])}"
    return table_of(
        ["encoders", "setting", *heads], rows, caption=f"{words}: {asked} (95% interval over patients and seeds)"
    )


def _retrieved(row: Mapping[str, float | str]) -> Cell:
    value, metric = float(row["value"]), str(row["metric"])
    if value != value:
        return Cell("undefined", np.nan)
    shown, low, high = (metric_number(float(row[name]), metric) for name in ("value", "low", "high"))
    return Cell(f"{shown} [{low}, {high}]", value)
