"""Parts of the page that come from probes: overview, scores, label efficiency, gains, subgroups, calibration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd

from embedcache.report.html_table import Cell, Table, cell_of, count, interval_cell, number, table_of
from embedcache.report.plain_table import counted, metric_words, p_words, plain_words
from embedcache.report.plots import (
    DASHED_CONTROL,
    MOST_ROWS,
    differences_plot,
    heat_map,
    intervals_plot,
    label_efficiency,
)
from embedcache.report.score_text import amount_key, amount_words, first_head
from embedcache.report.sections import Plot, Section, by_task, named

CHANCE = {"auroc": 0.5}
_GROUP_METRICS = ("auroc", "sensitivity", "specificity", "underdiagnosis")


def overview(tables: Mapping[str, pd.DataFrame]) -> Iterator[Section]:
    """Every pair on every task, shaded."""
    columns: dict[str, pd.Series] = {}
    if (scores := tables.get("scores")) is not None:
        for task, (metric,), some in by_task(scores[scores["headline"]], "metric"):
            if "internal - external" not in task:
                columns[f"{task}\n{metric_words(metric)}"] = _by_pair(first_head(some))
    if (masks := tables.get("mask_scores")) is not None:
        some = masks[(masks["metric"] == "dice_on_positives") & (masks["fraction"] == masks["fraction"].max())]
        for key, of in some.groupby([c for c in ("data", "decoder") if c in some], sort=False):
            columns[f"masks, {', '.join(map(str, key))}\nDice on positives"] = _by_pair(of)
    if (found := tables.get("retrieval_scores")) is not None:
        for key, of in found[found["metric"] == "recall@10"].groupby(
            [c for c in ("data", "direction") if c in found], sort=False
        ):
            columns[f"{', '.join(plain_words(str(name)) for name in key)}\nrecall@10"] = _by_pair(of)
    if (prompts := tables.get("zeroshot_scores")) is not None:
        for task, _, of in by_task(prompts[prompts["metric"] == "auroc"]):
            columns[f"{task} by prompts\nAUROC"] = _by_pair(of)
    columns = {name: values for name, values in columns.items() if len(values)}
    if not columns:
        return
    pairs = list(dict.fromkeys(pair for values in columns.values() for pair in values.index))
    frame = pd.DataFrame({name: values.reindex(pairs) for name, values in columns.items()}, index=pairs)
    heads = ["encoders", *(name.replace("\n", ": ") for name in frame.columns)]
    rows = [[pair, *(number(float(value)) for value in frame.loc[pair])] for pair in pairs]
    caption = (
        "Each score at the largest number of labels, by the first head. A column is shaded over its own range, "
        "which counts as at least 0.1 wide; whether a difference is real, the intervals and tests below say."
    )
    table = table_of(heads, rows, caption="scores of every pair of encoders on every task")
    plot = Plot(heat_map(frame, title="heat map of scores: encoders by tasks"), caption, table)
    yield Section("Overview", "overview", plots=[plot])


def scores(tables: Mapping[str, pd.DataFrame]) -> Iterator[Section]:
    """For each task: dots with intervals, every setting in a table, and the other metrics."""
    if (table := tables.get("scores")) is None:
        return
    parts = []
    for task, (metric,), some in by_task(table[table["headline"]], "metric"):
        largest = first_head(some)
        first = largest.iloc[0]
        words = metric_words(metric)
        where = f"{first['head']} head, {amount_words((first['fraction'], first['shots']))}"
        where += " of the labels" if pd.notna(first["fraction"]) else ""
        svg = intervals_plot(
            largest, metric=metric, title=f"{words} of {task} with intervals", chance=CHANCE.get(metric)
        )
        guess = " Dotted: chance." if metric in CHANCE else ""
        caption = f"{words} of {task}, {where}. Bars are 95% intervals over patients and seeds.{guess}"
        same = table[np.logical_and.reduce([table[c] == first[c] for c in ("label", "class", "test")])]
        same = same[same["data"] == first["data"]] if "data" in same else same
        other = _other_metrics(first_head(same), f"every metric of {task} ({where})")
        parts.append(
            Section(
                f"{task}: {words}",
                plots=[Plot(svg, caption)],
                tables=[_by_amount(some, f"{words} of {task} by setting, head and labels{_tested(some)}")],
                folded=[other] if other else [],
            )
        )
    if parts:
        words = (
            "The result and its controls were scored on the same patients. A control shows what the score owes to "
            "something else than the method: the embeddings alone, an Adaptor that learnt nothing, labels without "
            "meaning, what is known of the patient without an image."
        )
        yield Section("Scores and their controls", "scores", words=[words], parts=parts)


def efficiency(tables: Mapping[str, pd.DataFrame]) -> Iterator[Section]:
    """For each task: how the score grows with labels."""
    if (table := tables.get("scores")) is None:
        return
    plots = []
    some = table[table["headline"] & table["control"].isin(["", DASHED_CONTROL]) & (table["test"] != "difference")]
    for task, (metric,), of in by_task(some, "metric"):
        of = of[of["head"] == of["head"].iloc[0]]
        for kind in (of[of["fraction"].notna()], of[of["fraction"].isna()]):
            if kind["n_train"].nunique() < 2:
                continue
            words = metric_words(metric)
            per = "a share of the labels" if kind["fraction"].notna().any() else "so many labels of each class"
            svg = label_efficiency(kind, metric=metric, title=f"{words} of {task} over the number of labels")
            caption = (
                f"{words} of {task}, {of['head'].iloc[0]} head, learnt from {per}. Bands are 95% intervals; "
                "dashed: the same encoder without the Adaptor."
            )
            rows = [
                (r["pair"], r["control"] or "result", count(r["n_train"]), *_value_and_interval(r))
                for r in named(kind).to_dict("records")
            ]
            heads = ["encoders", "setting", "labels", words, "95% interval"]
            plots.append(Plot(svg, caption, table_of(heads, rows, caption=f"{words} of {task}, {per}")))
    if plots:
        yield Section("Label efficiency", "efficiency", plots=plots)


def differences(table: pd.DataFrame) -> Iterator[Section]:
    """For each task a forest of paired differences; then all of them as a table."""
    if table.empty:
        return
    plots = []
    for task, (metric,), some in by_task(table.assign(test="internal"), "metric"):
        kind = next((name for name in some["task"] if name), "") if "task" in some else ""
        words, name = metric_words(metric), ", ".join(part for part in (kind, task) if part)
        few = f" The {MOST_ROWS} of {len(some)} with the smallest p are drawn." if len(some) > MOST_ROWS else ""
        caption = (
            f"Paired differences in {words} of {name} on the same patients, with 95% intervals. Filled: one is "
            f"called better: the p adjusted for all comparisons is at most 0.05, and not of one run alone.{few}"
        )
        svg = differences_plot(some, metric=metric, title=f"paired differences in {words} of {name}")
        plots.append(Plot(svg, caption))
    heads = [
        "first", "second", "task", "metric", "difference", "95% interval", "adjusted p", "verdict", "setting", "p",
        "method", "fairness",
    ]  # fmt: skip
    rows = []
    for r in table.to_dict("records"):
        task = ": ".join(str(r[name]) for name in ("data", "task", "label") if r.get(name))
        found = [*_value_and_interval(r, sign=True), _p(r["p_adjusted"]), r["verdict"]]
        how = [r["setting"], _p(r["p_value"]), r["method"], r["fairness"]]
        rows.append([r["a"], r["b"], task, metric_words(r["metric"]), *found, *how])
    every = table_of(heads, rows, caption="all paired differences, first minus second")
    yield Section("Differences between encoders", "differences", plots=plots, tables=[every])


def gains(tables: Mapping[str, pd.DataFrame]) -> Iterator[Section]:
    """What the result has over each control, at the largest number of labels."""
    if (table := tables.get("gains")) is None:
        return
    made = []
    for task, (metric,), some in by_task(table, "metric"):
        words, largest = metric_words(metric), first_head(some)
        first = largest.iloc[0]
        rows = [
            [r["pair"], r["control"], *_value_and_interval(r, sign=True), _p(r["p_value"]), _p(r["p_holm"])]
            for r in named(largest).to_dict("records")
        ]
        heads = ["encoders", "control", f"gain in {words}", "95% interval", "p", "adjusted p"]
        amount = amount_words((first["fraction"], first["shots"]))
        made.append(
            table_of(heads, rows, caption=f"gain in {words} of {task} over each control ({first['head']}, {amount})")
        )
    yield Section("Gains over the controls", "gains", words=["Paired, on the same patients."], tables=made)


def subgroups(tables: Mapping[str, pd.DataFrame]) -> Iterator[Section]:
    """Scores by sex, age, view and site, at one threshold."""
    if (table := tables.get("subgroups")) is None:
        return
    made = []
    for task, _, some in by_task(table):
        largest = first_head(some)
        rows: list[list[object]] = []
        for r in named(largest).to_dict("records"):
            cells = [interval_cell(*(r.get(n, np.nan) for n in (m, f"{m}_low", f"{m}_high"))) for m in _GROUP_METRICS]
            if str(r["suppressed"]).lower() == "true":
                cells = [Cell("too few", np.nan)] * len(_GROUP_METRICS)
            rows.append([r["pair"], r["attribute"], r["group"], count(r["n"]), count(r["n_positive"]), *cells])
        heads = ["encoders", "by", "group", "images", "positives", *map(metric_words, _GROUP_METRICS)]
        made.append(table_of(heads, rows, caption=f"{task}, {_of(largest)}"))
    words = "All groups share one threshold. Groups with too few patients are not scored."
    yield Section("Subgroups", "subgroups", words=[words], tables=made)


def calibration(tables: Mapping[str, pd.DataFrame]) -> Iterator[Section]:
    """How far probabilities can be taken at their word."""
    if (table := tables.get("calibration")) is None:
        return
    made = []
    for task, _, some in by_task(table):
        largest = first_head(some)
        rows = [
            [
                r["pair"],
                r["method"],
                interval_cell(r["brier"], r["brier_low"], r["brier_high"]),
                number(r["ece"]),
                interval_cell(r["slope"], r["slope_low"], r["slope_high"]),
                interval_cell(r["intercept"], r["intercept_low"], r["intercept_high"]),
            ]
            for r in named(largest).to_dict("records")
        ]
        heads = ["encoders", "method", "Brier score", "ECE", "slope", "intercept"]
        made.append(table_of(heads, rows, caption=f"calibration of {task}, {_of(largest)}"))
    words = "Perfect: slope 1, intercept 0. The methods were fitted on validation data."
    yield Section("Calibration", "calibration", words=[words], tables=made)


def _by_pair(table: pd.DataFrame) -> pd.Series:
    result = named(table[table["control"] == ""] if "control" in table else table)
    return result.drop_duplicates("pair").set_index("pair")["value"].astype(float)


def _by_amount(table: pd.DataFrame, caption: str) -> Table:
    """A row for each pair, setting and head, a column for each amount of labels."""
    table = named(table)
    amounts = {
        amount_key(key): f"{amount_words(key)}: {counted(of['n_train'])} labels, {counted(of['n_valid'])} to choose by"
        for key, of in table.groupby(["fraction", "shots"], sort=False, dropna=False)
    }
    rows = []
    for (pair, control, head), of in table.groupby(["pair", "control", "head"], sort=False):
        cells = {amount_key((r.fraction, r.shots)): interval_cell(r.value, r.low, r.high) for r in of.itertuples()}
        rows.append([pair, control or "result", head, *(cells.get(amount, Cell("", np.nan)) for amount in amounts)])
    return table_of(["encoders", "setting", "head", *amounts.values()], rows, caption=caption)


def _other_metrics(table: pd.DataFrame, caption: str) -> Table | None:
    metrics = list(dict.fromkeys(table["metric"]))
    if len(metrics) < 2:
        return None
    rows = []
    for (pair, control), of in named(table).groupby(["pair", "control"], sort=False):
        cells = {r.metric: interval_cell(r.value, r.low, r.high) for r in of.itertuples()}
        rows.append([pair, control or "result", *(cells.get(metric, Cell("", np.nan)) for metric in metrics)])
    return table_of(["encoders", "setting", *map(metric_words, metrics)], rows, caption=caption)


def _tested(table: pd.DataFrame) -> str:
    known = table["n_test"].dropna()
    if known.empty:
        return ""
    positives = table["n_positive"].dropna() if "n_positive" in table else known[:0]
    return f" (test {counted(known)}" + (f", {counted(positives)} positive)" if len(positives) else ")")


def _value_and_interval(row: Mapping[str, float], *, sign: bool = False) -> tuple[Cell, Cell]:
    value, low, high = (float(row[name]) for name in ("value", "low", "high"))
    if value != value:
        return Cell("undefined", np.nan), Cell("", np.nan)
    plus = "+" if sign else ""
    return number(value, sign=sign), Cell(f"[{low:{plus}.3f}, {high:{plus}.3f}]", low)


def _p(value: float) -> Cell:
    return Cell(p_words(value).removeprefix("p = ").removeprefix("p "), float(value))


def _of(some: pd.DataFrame) -> str:
    first = some.iloc[0]
    amount = amount_words((first["fraction"], first["shots"]))
    return f"{first['head']} head, {amount}: {cell_of(first['n_train']).text} labels"
