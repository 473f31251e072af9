"""The command that scores embeddings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from calling import call

import embedcache
from embedcache import Manifest

QUICK = ("--set", "n_seeds=1", "--set", "n_draws=50", "--set", "heads=logistic,knn", "--set", "fractions=0.2,1.0")


@pytest.fixture
def made(tmp_path: Path) -> list[Path]:
    """A manifest and a store of its images, in which a label shows."""
    rng = np.random.default_rng(0)
    ids, y = [f"i{k:03d}" for k in range(120)], rng.integers(0, 2, 120)
    frame = pd.DataFrame(
        {
            "id": ids,
            "image": [f"radiograph-{i}.png" for i in ids],
            "split": ["train", "train", "valid", "test"] * 30,
            "label.y": y,
        }
    )
    Manifest(frame.assign(sex=rng.choice(["F", "M"], 120)), name="made", root=tmp_path).write(tmp_path / "m.parquet")
    embedcache.save_store(tmp_path / "image", ids, rng.normal(size=(120, 8)).astype(np.float32) + 2 * y[:, None])
    return [tmp_path / "m.parquet", tmp_path / "image"]


def test_it_prints_all_tables_and_writes_them(made: list[Path], tmp_path: Path) -> None:
    done = call("probe", *made, "--label", "y", *QUICK, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    for said in (
        "auroc of y (test 30, 95% interval over patients and seeds)", "gain in auroc of y over each control",
        "calibration (logistic head, 100%: 60 labels)", "subgroups (logistic head", "metadata-only",
        f"tables, predictions, heads: {tmp_path / 'out'}",
    ):  # fmt: skip
        assert said in done.output
    assert len(pd.read_parquet(tmp_path / "out" / "predictions.parquet")) == 30 * 2 * 2  # heads, fractions
    said = json.loads(call("probe", *made, "--label", "y", *QUICK, "--json").stdout)
    assert set(said) == {"scores", "gains", "calibration", "subgroups"}
    assert {row["metric"] for row in said["scores"]} >= {"auroc", "average_precision", "f1", "sensitivity"}


def test_another_dataset_is_named_with_its_store(made: list[Path], tmp_path: Path) -> None:
    done = call("probe", *made, "--label", "y", *QUICK, "--test", made[0])
    assert done.exit_code == 2
    assert "a test manifest and no store of its images; name it as test_store" in done.output
    for lonely in ("--test-store", "--labelmap"):
        done = call("probe", *made, "--label", "y", lonely, tmp_path / "nothing")
        assert done.exit_code == 2
        assert "no test manifest that it belongs to" in done.output
    done = call("probe", *made, "--label", "y", *QUICK, "--test", made[0], "--test-store", made[1])
    assert done.exit_code == 0, done.output
    assert "auroc of y, external (test 30" in done.output
    assert "auroc of y, difference (internal - external" in done.output
    assert "60 names stand in made:train and in made:train: the external score is too good" in done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--set", "heads=svm"), "unknown heads svm"),
        (("--set", "head.lr=fast"), "head.lr: Input should be a valid number"),
        (("--set", "head=mlp", "--set", "head.lr=1"), "head was given a value of its own, and head.lr"),
        (("--set", "depth=3"), "depth: Unexpected keyword argument"),
        (("--set", "units"), "--set 'units': expected FIELD=VALUE"),
        (("--protocol", "paper-rsna", "--set", "heads=knn"), "protocol 'paper-rsna' fixes heads"),
        (("--label", "z"), "no label 'z'; it has y"),
    ],
)
def test_wrong_settings_are_a_users_mistake(made: list[Path], options: tuple[str, ...], message: str) -> None:
    done = call("probe", *made, "--label", "y", *options)
    assert done.exit_code == 2
    assert message in done.output
