"""Scores within groups, and how far they lie apart."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from embedcache.metrics.intervals import PatientDraws
from embedcache.stage_two.scoring import Said
from embedcache.stage_two.subgroups import subgroup_rows
from embedcache.stage_two.targets import Target


def rows(label: str, frame: pd.DataFrame, y: np.ndarray, p: np.ndarray, threshold: float = 0.5) -> pd.DataFrame:
    target = Target(label, "binary", (label,), (label,))
    said = Said(p[None, :, None], np.full((1, 1), threshold))
    draws = PatientDraws(np.arange(len(y)), 400, seed=0)
    return pd.DataFrame(subgroup_rows(said, frame, y[:, None].astype(float), target, draws))


@pytest.fixture
def made() -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 600)
    frame = pd.DataFrame({"sex": rng.choice(["F", "M", ""], 600), "age": rng.integers(10, 100, 600).astype(str)})
    noise = np.where(frame["sex"] == "F", 0.2, 1.0)
    return y, 1 / (1 + np.exp(-(2 * y - 1 + noise * rng.normal(size=600)))), frame


def test_each_group_is_scored_by_itself(made) -> None:
    y, p, frame = made
    table = rows("edema", frame, y, p).set_index(["attribute", "group"])
    for sex in ("F", "M"):
        of = (frame["sex"] == sex).to_numpy()
        found = table.loc[("sex", sex)]
        assert (found["n"], found["n_positive"]) == (of.sum(), y[of].sum())
        assert found["auroc"] == pytest.approx(roc_auc_score(y[of], p[of]))
        assert found["auroc_low"] <= found["auroc"] <= found["auroc_high"]
        missed = (p[of & (y == 1)] < 0.5).mean()
        assert found["underdiagnosis"] == pytest.approx(missed) == 1 - found["sensitivity"]
    ages = table.loc["age"].index[:-1].tolist()
    assert ages == ["<40", "40-60", "60-80", ">=80"]
    gap = table.loc[("sex", "largest gap: F - M")]
    assert gap["auroc"] == pytest.approx(table.loc[("sex", "F"), "auroc"] - table.loc[("sex", "M"), "auroc"])
    assert gap["auroc_low"] > 0


def test_no_finding_is_missed_where_it_is_called_present(made) -> None:
    y, p, frame = made
    found = rows("No Finding", frame, y, p).iloc[0]
    assert found["underdiagnosis"] == pytest.approx(1 - found["specificity"])


def test_a_group_of_few_positives_is_counted_and_not_scored(made) -> None:
    y, p, frame = made
    few = frame.assign(sex=np.where(np.cumsum(y) <= 19, "F", "M"))
    table = rows("edema", few, y, p)
    row = table[table["group"] == "F"].iloc[0]
    assert row["suppressed"]
    assert row["n_positive"] == 19
    assert np.isnan(row["auroc"])
    assert not table["group"].str.contains("largest gap: .*F", regex=True).any()


def test_groups_that_differ_by_chance_alone_are_seldom_said_to_differ() -> None:
    """Of many groups the largest gap is large by chance, and its interval knows."""
    rng, excluded = np.random.default_rng(0), []
    for _ in range(40):
        y = rng.integers(0, 2, 480)
        p = 1 / (1 + np.exp(-(2 * y - 1 + rng.normal(size=480))))
        frame = pd.DataFrame({"site": rng.choice(list("abcdefgh"), 480)})
        table = rows("edema", frame, y, p)
        gap = table[table["group"].str.startswith("largest gap")].iloc[0]
        excluded.append(gap["auroc_low"] > 0)
    assert np.mean(excluded) <= 0.15


def test_without_attributes_there_are_no_rows() -> None:
    assert rows("edema", pd.DataFrame({"sex": ["", ""], "age": ["", ""]}), np.array([0, 1]), np.array([0.1, 0.9])).empty
