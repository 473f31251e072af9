"""The tables of a segmentation as plain text: Dice, and beside it what an empty mask scores."""

from __future__ import annotations

import pandas as pd

from embedcache.report.plain_table import aligned, counted, gain_words, head_row, interval, places

_SHOWN = {
    "dice": "Dice",
    "empty_mask_dice": "empty mask",
    "dice_on_positives": "Dice on positives",
    "iou": "IoU",
    "predicted_empty": "predicted empty",
}


def mask_text(scores: pd.DataFrame, gains: pd.DataFrame) -> str:
    """Scores, and what the result has over each control."""
    parts = [mask_table(scores), mask_gain_table(gains)]
    return "\n\n".join(part for part in parts if part)


def mask_table(scores: pd.DataFrame) -> str:
    """A row for each encoder, setting, decoder and number of masks, metrics side by side."""
    rows = [[*head_row(scores, "control", "decoder"), "masks to learn from", "to choose by", *_SHOWN.values()]]
    keys = [*places(scores), "control", "decoder", "fraction"]
    for key, group in scores.groupby(keys, sort=False):
        first, of = group.iloc[0], group.set_index("metric")
        names = [str(part) for part in key[:-1]]
        names[-2] = names[-2] or "result"
        cells = [interval(of.loc[m, "value"], of.loc[m, "low"], of.loc[m, "high"]) for m in _SHOWN]
        cells[1] = f"{of.loc['empty_mask_dice', 'value']:.3f}"  # it is no estimate of a model
        share = f"{100 * first['fraction']:.3g}%: {first['n_train']} ({first['n_train_positive']} not empty)"
        rows.append([*names, share, str(first["n_valid"]), *cells])
    tested = f"test {counted(scores['n_test'])}, {counted(scores['n_positive'])} of them with a mask"
    return f"masks ({tested}; 95% interval over patients and seeds)\n{aligned(rows)}"


def mask_gain_table(gains: pd.DataFrame) -> str:
    """Differences on the same patients; blank without controls."""
    if gains.empty:
        return ""
    names = {metric: _SHOWN[metric] for metric in gains["metric"].unique()}
    rows = [[*head_row(gains, "control", "decoder"), "masks", *names.values()]]
    for key, group in gains.groupby([*places(gains), "control", "decoder", "fraction"], sort=False):
        of = group.set_index("metric").loc[list(names), ["value", "low", "high", "p_holm"]]
        cells = ["undefined" if gain[1] != gain[1] else gain_words(*gain) for gain in of.itertuples(index=False)]
        rows.append([*map(str, key[:-1]), f"{100 * key[-1]:.3g}%", *cells])
    return f"gain of masks over each control (paired; p adjusted for their number)\n{aligned(rows)}"
