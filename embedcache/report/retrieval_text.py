"""Scores of retrieval and of zero-shot prompts as plain text."""

from __future__ import annotations

import pandas as pd

from embedcache.report.plain_table import aligned, head_row, interval, places


def retrieval_text(scores: pd.DataFrame) -> str:
    """A row for each encoder, setting and direction, each metric beside what chance gives."""
    parts = []
    for direction, table in scores.groupby("direction", sort=False):
        metrics = list(dict.fromkeys(zip(table["metric"], table["label"], strict=True)))
        headings = [metric + (f" of {label}" if label else "") for metric, label in metrics]
        rows = [[*head_row(table, "control"), *headings]]
        for key, group in table.groupby([*places(table), "control"], sort=False):
            of = {(r.metric, r.label): r for r in group.itertuples()}
            names = [str(part) for part in key]
            names[-1] = names[-1] or "result"
            rows.append([*names, *(_cell(of[metric]) if metric in of else "" for metric in metrics)])
        first = next(iter(group for group in table.groupby("metric", sort=False)))[1].iloc[0]
        rows.append([*[""] * len(places(table)), "chance", *(_chance(table, metric) for metric in metrics)])
        words = str(direction).replace("_", " ")
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


def _cell(row: object) -> str:
    value, low, high = (getattr(row, name) for name in ("value", "low", "high"))
    if value != value:
        return "undefined"
    digits = 1 if getattr(row, "metric") == "median_rank" else 3  # noqa: B009  # a namedtuple of pandas
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _chance(table: pd.DataFrame, metric: tuple[str, str]) -> str:
    chance = table[(table["metric"] == metric[0]) & (table["label"] == metric[1])]["chance"].iloc[0]
    if chance != chance:
        return ""
    return f"{chance:.1f}" if metric[0] == "median_rank" else f"{chance:.3f}"
