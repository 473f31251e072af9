"""The tables of a segmentation for people: Dice, and beside it what an empty mask scores."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from embedcache.report.grid import Grid, by_data, grid, plain_text
from embedcache.report.plain_table import counted, gain_words, head_row, interval, places

MASK_METRICS = {
    "dice": "Dice",
    "empty_mask_dice": "empty mask",
    "dice_on_positives": "Dice on positives",
    "iou": "IoU",
    "predicted_empty": "predicted empty",
}


def mask_text(scores: pd.DataFrame, gains: pd.DataFrame) -> str:
    """Scores, and what the result has over each control, as plain text."""
    return plain_text([*mask_grids(scores), *mask_gain_grids(gains)])


def mask_grids(scores: pd.DataFrame) -> Iterator[Grid]:
    """A row for each encoder, setting, decoder and number of masks, metrics side by side."""
    for before, on, table in by_data(scores):
        rows = [[*head_row(table, "control", "decoder"), "masks to learn from", "to choose by", *MASK_METRICS.values()]]
        keys, controls = [*places(table), "control", "decoder", "fraction"], []
        for key, group in table.groupby(keys, sort=False):
            first, of = group.iloc[0], group.set_index("metric")
            names = [str(part) for part in key[:-1]]
            controls.append(names[-2])
            names[-2] = names[-2] or "result"
            cells = [interval(of.loc[m, "value"], of.loc[m, "low"], of.loc[m, "high"]) for m in MASK_METRICS]
            cells[1] = f"{of.loc['empty_mask_dice', 'value']:.3f}"  # it is no estimate of a model
            share = f"{100 * first['fraction']:.3g}%: {first['n_train']} ({first['n_train_positive']} not empty)"
            rows.append([*names, share, str(first["n_valid"]), *cells])
        n, n_positive = counted(table["n_test"]), counted(table["n_positive"])
        yield grid(
            f"{before}masks (test {n}, {n_positive} of them with a mask; 95% interval over patients and seeds)",
            f"Masks{on}. Test set: n = {n}, {n_positive} of them with a mask. In brackets: 95% interval over patients "
            "and seeds.",
            rows,
            len(keys) + 1,
            controls=controls,
        )


def mask_gain_grids(gains: pd.DataFrame) -> Iterator[Grid]:
    """Differences on the same patients; none without controls."""
    if gains.empty:
        return
    for before, on, table in by_data(gains):
        names = {metric: MASK_METRICS[metric] for metric in table["metric"].unique()}
        rows = [[*head_row(table, "control", "decoder"), "masks", *names.values()]]
        keys = [*places(table), "control", "decoder", "fraction"]
        for key, group in table.groupby(keys, sort=False):
            of = group.set_index("metric").loc[list(names), ["value", "low", "high", "p_holm"]]
            cells = ["undefined" if gain[1] != gain[1] else gain_words(*gain) for gain in of.itertuples(index=False)]
            rows.append([*map(str, key[:-1]), f"{100 * key[-1]:.3g}%", *cells])
        yield grid(
            f"{before}gain of masks over each control (paired; p adjusted for their number)",
            f"Gain of masks{on} over each control, on the same patients. In brackets: 95% interval. p adjusted for "
            "the number of controls.",
            rows,
            len(keys),
        )
