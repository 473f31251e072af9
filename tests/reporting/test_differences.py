"""Differences of a run behind several Adaptors, computed again from what its steps left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from embedcache.recipe.run import RunResult


def of_kind(finished: RunResult, kind: str) -> pd.DataFrame:
    """Rows of one kind of task; the recipe compares one pair of pairs."""
    found = finished.comparison.differences
    assert set(found["a"]) == {"vit + bert"}
    assert set(found["b"]) == {"again + bert"}
    return found[found["task"] == kind]


def left(finished: RunResult, file: str) -> list[pd.DataFrame]:
    """What both pairs left."""
    return [pd.read_parquet(Path(finished.run_dir) / pair / file) for pair in ("vit+bert", "again+bert")]


def test_masks_are_compared_over_decoders_on_two_of_three_adaptors(finished: RunResult) -> None:
    rows = of_kind(finished, "masks").set_index("metric")
    first, second = left(finished, "masks/images.parquet")
    assert set(first["seed"]) == {0, 1}
    assert rows.loc["dice", "value"] == pytest.approx(first["dice"].mean() - second["dice"].mean(), abs=1e-6)
    assert rows["n_runs"].tolist() == [2, 2]
    assert rows.loc["dice", "n_units"] == first["id"].nunique()


def test_prompts_are_compared_over_the_spaces_of_three_adaptors(finished: RunResult) -> None:
    rows = of_kind(finished, "zero-shot").set_index("label")
    sides = left(finished, "zeroshot/predictions.parquet")
    assert set(rows.index) == {"effusion", "opacity"}
    for label, row in rows.iterrows():
        means = []
        for side in sides:
            known = side[side["label"] == label].dropna(subset="truth")
            of_seeds = [roc_auc_score(of["truth"], of["probability"]) for _, of in known.groupby("seed")]
            assert len(of_seeds) == 3
            means.append(np.mean(of_seeds))
        assert row["value"] == pytest.approx(means[0] - means[1], abs=1e-6)
        assert row["n_runs"] == 3


def test_retrieval_is_compared_over_the_spaces_of_three_adaptors(finished: RunResult) -> None:
    rows = of_kind(finished, "retrieval")
    first, second = left(finished, "retrieval/first_own.parquet")
    for row in rows.to_dict("records"):
        k = int(row["metric"].removeprefix("recall@"))
        asked = row["setting"].replace(" ", "_")
        hits = [(side["first_own"][side["direction"] == asked] <= k).mean() for side in (first, second)]
        assert row["value"] == pytest.approx(hits[0] - hits[1], abs=1e-6)
        assert row["n_runs"] == 3
    assert len(rows) == 2
