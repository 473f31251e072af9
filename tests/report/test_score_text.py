"""Tables of probes as text."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from embedcache.report.plain_table import p_words
from embedcache.report.score_text import calibration_table, gain_table, probe_text, score_table, subgroup_table

SCORE = {
    "label": "opacity", "test": "internal", "control": "", "head": "mlp", "fraction": 0.01, "shots": 0,
    "metric": "auroc", "class": "", "value": 0.75, "low": 0.7, "high": 0.8, "n_train": 4, "n_valid": 0, "n_test": 80,
    "headline": True,
}  # fmt: skip


def table(*changes: dict, of: dict = SCORE) -> pd.DataFrame:
    return pd.DataFrame([of | change for change in changes])


def test_both_counts_of_labels_and_the_test_set_stand_in_the_table() -> None:
    scores = table({}, {"fraction": 1.0, "n_train": 240, "n_valid": 60}, {"control": "no-adaptor", "value": 0.6})
    heading, columns, result, control = score_table(scores).splitlines()
    assert heading == "auroc of opacity (test 80, 95% interval over patients and seeds)"
    assert "1% (4 labels, 0 to choose by)  100% (240 labels, 60 to choose by)" in columns
    assert result.startswith("result")
    assert "0.750 [0.700, 0.800]" in result
    assert control.startswith("no-adaptor")
    assert "0.600 [0.700, 0.800]" in control


def test_classes_test_sets_and_shots_have_tables_of_their_own() -> None:
    scores = table(
        {"class": "macro"},
        {"test": "difference", "n_test": np.nan, "value": np.nan},
        {"fraction": np.nan, "shots": 16},
        {"metric": "accuracy", "value": 0.11, "headline": False},
    )
    said = score_table(scores)
    assert "auroc of opacity, macro (test 80" in said
    assert "auroc of opacity, difference (internal - external" in said
    assert "16 a class (4 labels" in said
    assert "undefined" in said
    assert "0.110" not in said
    assert "0.110" in score_table(scores, metric="accuracy")
    assert "auroc of" in score_table(scores, metric="auroc")


def test_fractions_that_are_near_each_other_are_two_columns() -> None:
    said = score_table(table({"fraction": 0.05}, {"fraction": 0.052, "value": 0.9}, {"fraction": 0.001}))
    assert [column for column in ("5% (", "5.2% (", "0.1% (") if column in said] == ["5% (", "5.2% (", "0.1% ("]


def test_gains_say_their_p_value() -> None:
    gain = {k: SCORE[k] for k in ("label", "test", "head", "fraction", "shots", "metric")} | {
        "control": "no-adaptor", "value": 0.04, "low": -0.01, "high": 0.09, "p_holm": 0.123
    }  # fmt: skip
    said = gain_table(table({}, {"control": "text-as-label", "value": -0.1, "p_holm": 0.001}, of=gain))
    assert "+0.040 [-0.010, +0.090] p = 0.12" in said
    assert "-0.100 [-0.010, +0.090] p < 0.01" in said
    assert gain_table(pd.DataFrame(columns=list(gain))) == ""


def test_all_tables_together_show_the_first_head_at_all_labels() -> None:
    names = {k: SCORE[k] for k in ("label", "test", "head", "shots", "n_train")} | {"class": ""}
    interval = {f"{name}_{end}": 0.5 for name in ("brier", "slope", "intercept") for end in ("low", "high")}
    calibration = table(
        {"fraction": 0.01, "method": "none", "ece": 0.99},
        {"fraction": 1.0, "method": "platt", "ece": 0.02},
        {"fraction": 1.0, "method": "platt", "ece": 0.77, "head": "linear"},
        of=names | interval | {"brier": 0.1, "slope": 1.1, "intercept": 0.0},
    )
    said = calibration_table(calibration)
    assert "(mlp head, 100%: 4 labels)" in said
    assert "platt   0.100 [0.500, 0.500]  0.020" in said
    assert "0.990" not in said
    assert "0.770" not in said
    subgroups = table(
        {
            "group": "F",
            "n": 40,
            "n_positive": 30,
            "suppressed": False,
            "auroc": 0.9,
            "auroc_low": 0.8,
            "auroc_high": 1.0,
        },
        {"group": "M", "n": 40, "n_positive": 9, "suppressed": True},
        {
            "group": "largest gap (auroc: F over M)",
            "suppressed": False,
            "auroc": 0.2,
            "auroc_low": 0.1,
            "auroc_high": 0.3,
        },
        of=names | {"fraction": 1.0, "attribute": "sex"},
    )
    groups = subgroup_table(subgroups).splitlines()
    assert "0.900 [0.800, 1.000]" in groups[2]
    assert groups[3].split()[-3:] == ["9", "too", "few"]
    assert "0.200 [0.100, 0.300]" in groups[4]
    whole = probe_text(table({}), pd.DataFrame(), calibration, pd.DataFrame())
    assert whole.count("\n\n") == 1


@pytest.mark.parametrize(
    ("p", "words"),
    [
        (0.05, "p = 0.05"), (0.0496, "p = 0.0496"), (0.05004, "p = 0.05004"), (0.048, "p = 0.048"), (0.2, "p = 0.20"),
        (0.0099, "p < 0.01"), (math.nan, "undefined"),
    ],
)  # fmt: skip
def test_a_p_value_says_on_which_side_of_five_in_a_hundred_it_lies(p: float, words: str) -> None:
    assert p_words(p) == words
