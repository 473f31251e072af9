"""Scores of retrieval and of zero-shot prompts as plain text."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd

from embedcache.report.plain_table import aligned, head_row, interval, places


def retrieval_text(scores: pd.DataFrame) -> str:
    """A row for each encoder, setting and direction, each metric beside chance and the best order for all queries."""
    parts = []
    for direction, table in scores.groupby("direction", sort=False):
        columns = table[["metric", "label"]].drop_duplicates().itertuples(index=False, name=None)
        metrics = {(metric, label): metric + (f" of {label}" if label else "") for metric, label in columns}
        rows = [[*head_row(table, "control"), *metrics.values()]]
        for key, group in table.groupby([*places(table), "control"], sort=False):
            of = {(r["metric"], r["label"]): r for r in group.to_dict("records")}
            *names, control = map(str, key)
            rows.append([*names, control or "result", *(_cell(of[m]) if m in of else "" for m in metrics)])
        once = table.drop_duplicates(["metric", "label"])
        for column, named in (("chance", "chance"), ("one_order", "one order for all")):
            cells = [_number(value, metric) for value, (metric, _) in zip(once[column], metrics, strict=True)]
            rows.append([*[""] * len(places(table)), named, *cells])
        first, words = table.iloc[0], str(direction).replace("_", " ")
        parts.append(
            f"{words}: {first['n_queries']} queries among {first['n_candidates']} (95% interval over patients)\n"
            f"{aligned(rows)}"
        )
    return "\n\n".join(parts)


def zero_shot_text(scores: pd.DataFrame) -> str:
    """A row for each encoder and label, with the range over single wordings."""
    rows = [[*head_row(scores, "label"), "AUROC", "by single wordings", "average precision", "test", "positives", ""]]
    for key, group in scores.groupby([*places(scores), "label"], sort=False):
        of = group.set_index("metric")
        auroc, precision = of.loc["auroc"], of.loc["average_precision"]
        spread = f"{auroc['worst_wording']:.3f} to {auroc['best_wording']:.3f} ({auroc['n_wordings']})"
        rows.append(
            [
                *map(str, key),
                interval(auroc["value"], auroc["low"], auroc["high"]),
                spread if auroc["n_wordings"] > 1 else "",
                interval(precision["value"], precision["low"], precision["high"]),
                str(auroc["n_test"]),
                str(auroc["n_positive"]),
                "the prompts say the opposite" if auroc["inverted"] else "",
            ]
        )
    return f"zero-shot by prompts (95% interval over patients)\n{aligned(rows)}"


def _cell(row: Mapping[Hashable, Any]) -> str:
    if row["value"] != row["value"]:
        return "undefined"
    value, low, high = (_number(row[name], row["metric"]) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _number(value: float, metric: str) -> str:
    return "" if value != value else f"{value:.1f}" if metric == "median_rank" else f"{value:.3f}"
