"""Scores of retrieval and of zero-shot prompts for people."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import pandas as pd

from embedcache.report.grid import Grid, by_data, grid, plain_text
from embedcache.report.plain_table import head_row, interval, places


def retrieval_text(scores: pd.DataFrame) -> str:
    """`retrieval_grids` as plain text."""
    return plain_text(retrieval_grids(scores))


def retrieval_grids(scores: pd.DataFrame) -> Iterator[Grid]:
    """A row for each encoder, setting and direction, each metric beside chance and the best order for all queries."""
    for before, on, of_data in by_data(scores):
        for direction, table in of_data.groupby("direction", sort=False):
            columns = table[["metric", "label"]].drop_duplicates().itertuples(index=False, name=None)
            metrics = {(metric, label): metric + (f" of {label}" if label else "") for metric, label in columns}
            rows, controls = [[*head_row(table, "control"), *metrics.values()]], []
            for key, group in table.groupby([*places(table), "control"], sort=False):
                of = {(r["metric"], r["label"]): r for r in group.to_dict("records")}
                *names, control = map(str, key)
                controls.append(control)
                rows.append([*names, control or "result", *(_cell(of[m]) if m in of else "" for m in metrics)])
            once = table.drop_duplicates(["metric", "label"])
            for column, named in (("chance", "chance"), ("one_order", "one order for all")):
                cells = [metric_number(value, metric) for value, (metric, _) in zip(once[column], metrics, strict=True)]
                controls.append(named)
                rows.append([*[""] * len(places(table)), named, *cells])
            first, words = table.iloc[0], str(direction).replace("_", " ")
            n_queries, n_candidates = first["n_queries"], first["n_candidates"]
            yield grid(
                f"{before}{words}: {n_queries} queries among {n_candidates} (95% interval over patients and seeds)",
                f"Retrieval{on}, {words}: n = {n_queries} queries among {n_candidates}. In brackets: 95% interval over "
                "patients and seeds.",
                rows,
                len(places(table)) + 1,
                controls=controls,
            )


def zero_shot_text(scores: pd.DataFrame) -> str:
    """`zero_shot_grids` as plain text."""
    return plain_text(zero_shot_grids(scores))


def zero_shot_grids(scores: pd.DataFrame) -> Iterator[Grid]:
    """A row for each encoder and label, with the range over single wordings."""
    for before, on, table in by_data(scores):
        heads = ["AUROC", "by single wordings", "average precision", "test", "positives", ""]
        rows = [[*head_row(table, "label"), *heads]]
        for key, group in table.groupby([*places(table), "label"], sort=False):
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
        yield grid(
            f"{before}zero-shot by prompts (95% interval over patients and seeds)",
            f"Zero-shot by prompts{on}; the column test holds n. In brackets: 95% interval over patients and seeds.",
            rows,
            len(places(table)) + 1,
        )


def _cell(row: Mapping[Hashable, Any]) -> str:
    if row["value"] != row["value"]:
        return "undefined"
    value, low, high = (metric_number(row[name], row["metric"]) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def metric_number(value: float, metric: str) -> str:
    """A value as its metric is written; blank for NaN."""
    return "" if value != value else f"{value:.1f}" if metric == "median_rank" else f"{value:.3f}"
