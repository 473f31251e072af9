"""Which differences between pairs of encoders are real: on the same units, patients and runs, for all tasks at once.

Two pairs are compared where they differ in one encoder: what differs then is that encoder's doing. P-values are
adjusted for all comparisons of a study together (Holm 1979), so that those called real all hold at once with 95%.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from embedcache.comparing.exposure import FAIR, NOT_FAIR, Exposed, fairness
from embedcache.comparing.study import Pair, Study
from embedcache.comparing.task_comparisons import LEAST_DRAWS, comparisons
from embedcache.metrics.paired import holm
from embedcache.report.plain_table import p_words

REAL_AT = 0.05
_DRAWS_EACH = 100  # of each comparison: k draws give no p-value below 2 / (k + 1), which is then multiplied
COLUMNS = (
    "data", "task", "label", "setting", "metric", "a", "b", "value", "low", "high", "p_value", "p_adjusted", "method",
    "fairness", "verdict", "head", "fraction", "shots", "test", "n_units", "n_runs", "a_image", "a_text", "b_image",
    "b_text",
)  # fmt: skip

Exposures = Mapping[tuple[str, str], Exposed]  # by encoder and dataset


def differences(study: Study, exposures: Exposures) -> pd.DataFrame:
    """Every comparison, a row each: how much a exceeds b, columns as `COLUMNS`.

    `verdict` is `a`, `b` or blank: which is really better; never of a single training each (`n_runs` 1), which says
    nothing of how trainings differ. Intervals hold 95% each, p-values are adjusted for all rows.

    Args:
        study: all of whose steps are done.
        exposures: of each encoder to each dataset.
    """
    asked = [found for task in study.tasks for found in comparisons(study, task)]
    n_draws = max(_DRAWS_EACH * len(asked), LEAST_DRAWS)
    rows = []
    for one in asked:
        outcome = one.make(n_draws)
        a, b = one.pairs
        rows.append(
            {
                **one.names,
                "a": a.name,
                "b": b.name,
                "a_image": a.image,
                "a_text": a.text,
                "b_image": b.image,
                "b_text": b.text,
                **vars(outcome.difference),
                "n_units": outcome.n_units,
                "n_runs": outcome.n_runs,
                "fairness": fairness(*_swapped(a, b, str(one.names["data"]), exposures)),
            }
        )
    for row, adjusted in zip(rows, holm([row["p_value"] for row in rows]).tolist(), strict=True):
        is_real = adjusted <= REAL_AT and row["value"] != 0 and row["n_runs"] != 1
        row |= {"p_adjusted": adjusted, "verdict": ("a" if row["value"] > 0 else "b") if is_real else ""}
    return pd.DataFrame(rows, columns=list(COLUMNS))


def verdicts(found: pd.DataFrame, exposures: Exposures) -> list[str]:
    """A sentence on each comparison: what is real first, and what makes it unfair."""
    order = found.assign(_real=found["verdict"] == "").sort_values("_real", kind="stable")
    named = found["data"].nunique() > 1
    return [_sentence(row, exposures, named=named) for row in order.to_dict("records")]


def _sentence(row: Mapping[str, object], exposures: Exposures, *, named: bool) -> str:
    """What a comparison says.

    Args:
        named: whether there are several datasets.
    """
    pairs = {side: Pair(str(row[f"{side}_image"]), str(row[f"{side}_text"])) for side in ("a", "b")}
    a, b = _swapped_names(pairs["a"], pairs["b"])
    shared = pairs["a"].text if pairs["a"].image != pairs["b"].image else pairs["a"].image
    what = f"{row['metric']} of {row['label']}" if row["label"] else str(row["metric"])
    where = f"{row['data']}, {what}" if named else what
    where += f" ({', '.join(filter(None, [str(row['setting']), shared and f'with {shared}']))})"
    value, low, high, p = (float(str(row[name])) for name in ("value", "low", "high", "p_adjusted"))
    if p != p:
        return f"{where}: {a} and {b} cannot be compared: a score is undefined"
    if not row["verdict"] and p <= REAL_AT and value:
        said = f"{a} and {b} differ by {value:+.3f} [{low:+.3f}, {high:+.3f}], {p_words(p)}, in one run each"
        more = "not called real, as other runs may differ; take three at least (n_seeds of Adaptors, heads, decoders)"
        return f"{where}: {said}: {more}"
    if not row["verdict"]:
        said = f"no difference between {a} and {b} is shown: {value:+.3f} [{low:+.3f}, {high:+.3f}]"
        return f"{where}: {said}, {p_words(p)}"
    better, worse, size = (a, b, (value, low, high)) if row["verdict"] == "a" else (b, a, (-value, -high, -low))
    said = f"{better} is better than {worse} by {size[0]:.3f} [{size[1]:.3f}, {size[2]:.3f}], {p_words(p)}"
    if row["fairness"] == FAIR:
        return f"{where}: {said}"
    seen = [f"{name} {exposures[name, str(row['data'])].level}" for name in (better, worse)]
    return f"{where}: {said}; {row['fairness']}: exposure to {row['data']} is {', '.join(seen)}"


def unfair(found: pd.DataFrame, exposures: Exposures) -> list[str]:
    """A warning for each two encoders of unequal exposure to test data."""
    said = {}
    for row in found[found["fairness"] == NOT_FAIR].to_dict("records"):
        pairs = (Pair(row[f"{side}_image"], row[f"{side}_text"]) for side in ("a", "b"))
        names = _swapped_names(*pairs)
        levels = " and ".join(f"{name} ({exposures[name, row['data']].level})" for name in names)
        said[names, row["data"]] = f"{row['data']}: not a fair comparison: {levels} differ in exposure to its images"
    return list(said.values())


def _swapped_names(a: Pair, b: Pair) -> tuple[str, str]:
    return (a.image, b.image) if a.image != b.image else (a.text, b.text)


def _swapped(a: Pair, b: Pair, data: str, exposures: Exposures) -> tuple[Exposed, Exposed]:
    first, second = _swapped_names(a, b)
    return exposures[first, data], exposures[second, data]
