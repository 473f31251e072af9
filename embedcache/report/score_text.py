"""The tables of probes for people: scores beside their controls, gains, calibration, subgroups.

Tables may come from several probes, told apart by columns `label`, `image`, `text` and, of several datasets, `data`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from embedcache.report.grid import Grid, by_data, grid, plain_text
from embedcache.report.plain_table import counted, gain_words, head_row, interval, metric_words, places


def probe_text(scores: pd.DataFrame, gains: pd.DataFrame, calibration: pd.DataFrame, subgroups: pd.DataFrame) -> str:
    """All tables: scores and gains by every head, calibration and subgroups by the first one at all labels."""
    parts = [score_table(scores), gain_table(gains), calibration_table(calibration), subgroup_table(subgroups)]
    return "\n\n".join(part for part in parts if part)


def score_table(scores: pd.DataFrame, *, metric: str | None = None) -> str:
    """`score_grids` as plain text."""
    return plain_text(score_grids(scores, metric=metric))


def score_grids(scores: pd.DataFrame, *, metric: str | None = None) -> Iterator[Grid]:
    """One metric: a row for each encoder, setting and head, a column for each amount of labels.

    Args:
        metric: by default the one that settings are compared by.
    """
    shown = scores[scores["headline"].astype(bool) if metric is None else scores["metric"] == metric]
    for before, on, of_data in by_data(shown):
        for (metric, label, test, class_name), table in of_data.groupby(
            ["metric", "label", "test", "class"], sort=False
        ):
            where = f"test {counted(table['n_test'])}" if test != "difference" else "internal - external"
            of = f"{label}" + (f", {class_name}" if class_name else "") + ("" if test == "internal" else f", {test}")
            amounts = {
                amount_key(key): f"{amount_words(key)} ({_labels(some)})"
                for key, some in table.groupby(["fraction", "shots"], sort=False, dropna=False)
            }
            rows, controls = [[*head_row(table, "control", "head"), *amounts.values()]], []
            for key, group in table.groupby([*places(table), "control", "head"], sort=False):
                cells = {
                    amount_key((r.fraction, r.shots)): interval(r.value, r.low, r.high) for r in group.itertuples()
                }
                names = [str(part) for part in key]
                controls.append(names[-2])
                names[-2] = names[-2] or "result"
                rows.append([*names, *(cells.get(amount, "") for amount in amounts)])
            n = f"n = {counted(table['n_test'])}" if test != "difference" else "internal less external"
            yield grid(
                f"{before}{metric} of {of} ({where}, 95% interval over patients and seeds)",
                f"{metric_words(metric)} of {of}{on}, by the amount of labels. Test set: {n}. In brackets: 95% "
                "interval over patients and seeds.",
                rows,
                len(names),
                controls=controls,
            )


def gain_table(gains: pd.DataFrame) -> str:
    """`gain_grids` as plain text; blank without controls."""
    return plain_text(gain_grids(gains))


def gain_grids(gains: pd.DataFrame) -> Iterator[Grid]:
    """What the result has over each control, on the same patients."""
    if gains.empty:
        return
    for before, on_data, of_data in by_data(gains):
        for (label, test), table in of_data.groupby(["label", "test"], sort=False):
            amounts = list(dict.fromkeys(map(amount_key, zip(table["fraction"], table["shots"], strict=True))))
            rows = [[*head_row(table, "control", "head"), *map(amount_words, amounts)]]
            for key, group in table.groupby([*places(table), "control", "head"], sort=False):
                cells = {
                    amount_key((r.fraction, r.shots)): gain_words(r.value, r.low, r.high, r.p_holm)
                    for r in group.itertuples()
                }
                rows.append([*map(str, key), *(cells.get(amount, "") for amount in amounts)])
            on, metric = "" if test == "internal" else f", {test}", table["metric"].iloc[0]
            yield grid(
                f"{before}gain in {metric} of {label} over each control{on} (paired; p adjusted for their number)",
                f"Gain in {metric_words(metric)} of {label}{on_data} over each control{on}, on the same patients. In "
                "brackets: 95% interval. p adjusted for the number of controls.",
                rows,
                len(places(table)) + 2,
            )


def calibration_table(calibration: pd.DataFrame) -> str:
    """`calibration_grids` as plain text."""
    return plain_text(calibration_grids(calibration))


def calibration_grids(calibration: pd.DataFrame) -> Iterator[Grid]:
    """Brier score, ECE, slope and intercept before and after."""
    for before, on, table in by_data(calibration):
        some = first_head(table)
        columns = ("label", "class", "test", "method")
        rows = [[*head_row(some, *columns), "Brier", "ECE", "slope", "intercept"]]
        for r in some.to_dict("records"):
            rows.append(
                [
                    *(str(r[c]) for c in (*places(some), *columns)),
                    interval(r["brier"], r["brier_low"], r["brier_high"]),
                    f"{r['ece']:.3f}",
                    interval(r["slope"], r["slope_low"], r["slope_high"]),
                    interval(r["intercept"], r["intercept_low"], r["intercept_high"]),
                ]
            )
        yield grid(
            f"{before}calibration{_of_first(some)}, perfect: slope 1, intercept 0",
            f"Calibration{on}{_of_first(some)}; perfect: slope 1, intercept 0. In brackets: 95% interval.",
            rows,
            len(places(some)) + len(columns),
        )


def subgroup_table(subgroups: pd.DataFrame) -> str:
    """`subgroup_grids` as plain text; blank where the manifest has none of them."""
    return plain_text(subgroup_grids(subgroups))


def subgroup_grids(subgroups: pd.DataFrame) -> Iterator[Grid]:
    """Scores by sex, age, view and site, at one threshold."""
    if subgroups.empty:
        return
    names = ("auroc", "sensitivity", "specificity", "underdiagnosis")
    columns = ("label", "class", "test", "attribute", "group")
    for before, on, table in by_data(subgroups):
        some = first_head(table)
        rows = [[*head_row(some, *columns), "n", "positives", *names]]
        for r in some.to_dict("records"):
            is_gap = r["n"] != r["n"]
            counts = ["", ""] if is_gap else [f"{r['n']:.0f}", f"{r['n_positive']:.0f}"]
            cells = [interval(r.get(n), r.get(f"{n}_low"), r.get(f"{n}_high")) for n in names]
            cells = ["too few", "", "", ""] if r["suppressed"] else cells
            rows.append([*(str(r[c]) for c in (*places(some), *columns)), *counts, *cells])
        yield grid(
            f"{before}subgroups{_of_first(some)}",
            f"Subgroups{on}{_of_first(some)}, at one threshold. In brackets: 95% interval.",
            rows,
            len(places(some)) + len(columns),
        )


def first_head(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of the first head, at the largest fraction, else the most shots."""
    some = table[table["head"] == table["head"].iloc[0]]
    by = "fraction" if some["fraction"].notna().any() else "shots"
    return some[some[by] == some[by].max()]


def _labels(table: pd.DataFrame) -> str:
    return f"{counted(table['n_train'])} labels, {counted(table['n_valid'])} to choose by"


def _of_first(some: pd.DataFrame) -> str:
    first = some.iloc[0]
    return f" ({first['head']} head, {amount_words((first['fraction'], first['shots']))}: {first['n_train']} labels)"


def amount_key(amount: Sequence[float]) -> tuple[float, float]:
    """A fraction and shots as a key: no fraction is -1, as NaN equals nothing."""
    fraction, shots = amount
    return (fraction if fraction == fraction else -1.0), shots


def amount_words(amount: Sequence[float]) -> str:
    """A share of the labels, or how many of each class."""
    fraction, shots = amount_key(amount)
    return f"{100 * fraction:.3g}%" if fraction >= 0 else f"{shots:.0f} a class"
