"""The tables of probes as plain text: scores beside their controls, gains, calibration, subgroups.

Tables may come from several probes, told apart by columns `label`, `image` and `text`.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from embedcache.report.plain_table import aligned, counted, gain_words, head_row, interval, places


def probe_text(scores: pd.DataFrame, gains: pd.DataFrame, calibration: pd.DataFrame, subgroups: pd.DataFrame) -> str:
    """All tables: scores and gains by every head, calibration and subgroups by the first one at all labels."""
    parts = [score_table(scores), gain_table(gains), calibration_table(calibration), subgroup_table(subgroups)]
    return "\n\n".join(part for part in parts if part)


def score_table(scores: pd.DataFrame, *, metric: str | None = None) -> str:
    """One metric: a row for each encoder, setting and head, a column for each amount of labels.

    Args:
        metric: by default the one that settings are compared by.
    """
    shown = scores[scores["headline"].astype(bool) if metric is None else scores["metric"] == metric]
    parts = []
    for (metric, label, test, class_name), table in shown.groupby(["metric", "label", "test", "class"], sort=False):
        where = f"test {counted(table['n_test'])}" if test != "difference" else "internal - external"
        heading = f"{metric} of {label}" + (f", {class_name}" if class_name else "")
        heading += "" if test == "internal" else f", {test}"
        amounts = {
            _amount(row): f"{_words(row)} ({counted(of['n_train'])} labels, {counted(of['n_valid'])} to choose by)"
            for row, of in table.groupby(["fraction", "shots"], sort=False, dropna=False)
        }
        rows = [[*head_row(table, "control", "head"), *amounts.values()]]
        for key, group in table.groupby([*places(table), "control", "head"], sort=False):
            cells = {_amount((r.fraction, r.shots)): interval(r.value, r.low, r.high) for r in group.itertuples()}
            names = [str(part) for part in key]
            names[-2] = names[-2] or "result"
            rows.append([*names, *(cells.get(amount, "") for amount in amounts)])
        parts.append(f"{heading} ({where}, 95% interval over patients and seeds)\n{aligned(rows)}")
    return "\n\n".join(parts)


def gain_table(gains: pd.DataFrame) -> str:
    """What the result has over each control, on the same patients; blank without controls."""
    if gains.empty:
        return ""
    parts = []
    for (label, test), table in gains.groupby(["label", "test"], sort=False):
        amounts = list(dict.fromkeys(map(_amount, zip(table["fraction"], table["shots"], strict=True))))
        rows = [[*head_row(table, "control", "head"), *map(_words, amounts)]]
        for key, group in table.groupby([*places(table), "control", "head"], sort=False):
            cells = {
                _amount((r.fraction, r.shots)): gain_words(r.value, r.low, r.high, r.p_holm) for r in group.itertuples()
            }
            rows.append([*map(str, key), *(cells.get(amount, "") for amount in amounts)])
        on = "" if test == "internal" else f", {test}"
        parts.append(
            f"gain in {table['metric'].iloc[0]} of {label} over each control{on} "
            f"(paired; p adjusted for their number)\n{aligned(rows)}"
        )
    return "\n\n".join(parts)


def calibration_table(calibration: pd.DataFrame) -> str:
    """Brier score, ECE, slope and intercept before and after."""
    rows = [[*head_row(calibration, "label", "class", "test", "method"), "Brier", "ECE", "slope", "intercept"]]
    some = _first_head(calibration)
    for r in some.to_dict("records"):
        rows.append(
            [
                *(str(r[c]) for c in (*places(some), "label", "class", "test", "method")),
                interval(r["brier"], r["brier_low"], r["brier_high"]),
                f"{r['ece']:.3f}",
                interval(r["slope"], r["slope_low"], r["slope_high"]),
                interval(r["intercept"], r["intercept_low"], r["intercept_high"]),
            ]
        )
    return f"calibration{_of_first(some)}, perfect: slope 1, intercept 0\n{aligned(rows)}"


def subgroup_table(subgroups: pd.DataFrame) -> str:
    """Scores by sex, age, view and site, at one threshold; blank where the manifest has none of them."""
    if subgroups.empty:
        return ""
    some = _first_head(subgroups)
    names = ("auroc", "sensitivity", "specificity", "underdiagnosis")
    heading = [*head_row(some, "label", "class", "test", "attribute", "group"), "n", "positives", *names]
    rows = [heading]
    for r in some.to_dict("records"):
        is_gap = r["n"] != r["n"]
        counts = ["", ""] if is_gap else [f"{r['n']:.0f}", f"{r['n_positive']:.0f}"]
        cells = [interval(r.get(n), r.get(f"{n}_low"), r.get(f"{n}_high")) for n in names]
        cells = ["too few", "", "", ""] if r["suppressed"] else cells
        rows.append(
            [
                *(str(r[c]) for c in (*places(some), "label", "class", "test", "attribute", "group")),
                *counts,
                *cells,
            ]
        )
    return f"subgroups{_of_first(some)}\n{aligned(rows)}"


def _first_head(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of the first head, at the largest fraction, else the most shots."""
    some = table[table["head"] == table["head"].iloc[0]]
    by = "fraction" if some["fraction"].notna().any() else "shots"
    return some[some[by] == some[by].max()]


def _of_first(some: pd.DataFrame) -> str:
    first = some.iloc[0]
    return f" ({first['head']} head, {_words((first['fraction'], first['shots']))}: {first['n_train']} labels)"


def _amount(amount: Sequence[float]) -> tuple[float, float]:
    """A fraction and shots as a key: no fraction is -1, as NaN equals nothing."""
    fraction, shots = amount
    return (fraction if fraction == fraction else -1.0), shots


def _words(amount: Sequence[float]) -> str:
    fraction, shots = _amount(amount)
    return f"{100 * fraction:.3g}%" if fraction >= 0 else f"{shots:.0f} a class"
