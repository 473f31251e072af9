"""The commands that compare and report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from calling import call

import embedcache

QUICK = ("--set", "heads=logistic", "--set", "fractions=1", "--set", "n_seeds=1", "--set", "n_draws=100")


@pytest.fixture
def stores(tmp_path: Path) -> dict[str, Path]:
    """A manifest of 80 images, a store that tells the label, and one of noise."""
    rng, n = np.random.default_rng(0), 80
    y = rng.integers(0, 2, n)
    frame = pd.DataFrame(
        {
            "id": [f"i{k}" for k in range(n)],
            "image": [f"i{k}.png" for k in range(n)],
            "split": np.array(["train", "train", "valid", "test", "test"])[np.arange(n) % 5],
            "label.opacity": y,
        }
    )
    embedcache.Manifest(frame, name="made", root=tmp_path).write(tmp_path / "made.parquet")
    ids = frame["id"].tolist()
    embedcache.save_store(tmp_path / "good", ids, (rng.normal(size=(n, 6)) + 3 * y[:, None]).astype(np.float32))
    embedcache.save_store(tmp_path / "noise", ids, rng.normal(size=(n, 6)).astype(np.float32))
    return {name: tmp_path / name for name in ("made.parquet", "good", "noise")}


def test_stores_are_compared_and_reported(stores: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    called = call(
        "compare", stores["good"], f"other={stores['noise']}", "--manifest", stores["made.parquet"], *QUICK,
        "--run-dir", run, "--workers", 1, "--exposure", "good=seen", "--exposure", "other=none",
    )  # fmt: skip
    assert called.exit_code == 0, called.output
    assert "rows made: 80 that every store has, 0 left out" in called.output
    assert "good is better than other by" in called.output
    assert "not a fair comparison: exposure to made is good seen, other none" in called.output
    assert f"report: {run / 'report.html'}" in called.output
    for name in ("report.html", "methods.md", "differences.csv", "encoders.csv", "tables.md", "tables.tex"):
        assert (run / name).is_file()
    (run / "report.html").unlink()
    reported = call("report", run)
    assert reported.exit_code == 0, reported.output
    assert reported.output.splitlines()[0] == str(run / "report.html")
    assert "not a fair comparison" in (run / "report.html").read_text()


def test_as_json(stores: dict[str, Path], tmp_path: Path) -> None:
    called = call(
        "compare", stores["good"], stores["noise"], "--manifest", stores["made.parquet"], *QUICK, "--run-dir",
        tmp_path / "run", "--workers", 1, "--json",
    )  # fmt: skip
    assert called.exit_code == 0, called.output
    found = json.loads(called.stdout.splitlines()[-1])
    assert found["differences"][0]["a"] == "good"
    assert found["report"] == str(tmp_path / "run" / "report.html")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("good",), "expected two pairs at least"),
        (("good", "good"), "have one name; give each its own as NAME=PATH"),
        (("good", "nothing"), "no store there"),
        (("good", "noise", "--segment", "size=32"), "give --masks as well"),
        (("good", "noise", "--exposure", "good=much"), "exposure 'much' of good, expected one of"),
        (("good", "noise", "--label", "opacty"), "no label 'opacty'"),
        (("good", "noise", "--set", "n_seed=3"), "n_seed"),
    ],
)
def test_mistakes_are_told(stores: dict[str, Path], tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    given = [stores.get(a, tmp_path / a if a == "nothing" else a) for a in arguments]
    called = call(
        "compare", *given, "--manifest", stores["made.parquet"], "--run-dir", tmp_path / "run", "--workers", 1
    )
    assert called.exit_code == 2, called.output
    assert said in called.output


def test_a_directory_without_a_run_is_told(tmp_path: Path) -> None:
    called = call("report", tmp_path)
    assert called.exit_code == 2
    assert "no run of a recipe or of 'embedcache compare' there" in called.output
