"""Commands of stage two."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from calling import call

import embedcache
from embedcache import Manifest


@pytest.fixture
def made(tmp_path: Path) -> list[Path]:
    """A manifest, an image store and a text store."""
    rng = np.random.default_rng(0)
    ids = [f"i{k:02d}" for k in range(60)]
    frame = pd.DataFrame(
        {"id": ids, "image": ids, "report": [f"text {k}" for k in range(60)], "split": ["train", "train", "valid"] * 20}
    )
    Manifest(frame, name="made", root=tmp_path).write(tmp_path / "m.parquet")
    values = rng.normal(size=(60, 8)).astype(np.float32)
    embedcache.save_store(tmp_path / "image", ids, values)
    embedcache.save_store(tmp_path / "text", ids, values, modality="text")
    return [tmp_path / name for name in ("m.parquet", "image", "text")]


QUICK = ("--epochs", 2, "--batch-size", 16, "--set", "projection_dim=24", "--set", "ff_dim=32")


def test_one_run_says_what_it_reached(made: list[Path], tmp_path: Path) -> None:
    done = call("train", *made, "--run-dir", tmp_path / "run", *QUICK, "--lr", "1e-3", "--tensorboard")
    assert done.exit_code == 0, done.output
    assert "40 training pairs, 20 validation pairs, best epoch 2 of 2: validation loss" in done.output
    assert "image to text: recall @1 " in done.output
    assert "(chance 0.050)" in done.output
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    said = json.loads(call("train", *made, "--run-dir", tmp_path / "run", *QUICK, "--lr", "1e-3", "--json").stdout)
    assert len(said["history"]) == 2
    assert said["missing"] == []


def test_wandb_that_is_not_installed_is_said_before_training(
    made: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    done = call("train", *made, "--run-dir", tmp_path / "run", *QUICK, "--wandb", "mine")
    assert (done.exit_code, "run pip install 'embedcache[wandb]'" in done.output) == (2, True)
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_any_setting_can_be_set_and_every_mistake_is_said(made: list[Path], tmp_path: Path) -> None:
    done = call("train", *made, "--run-dir", tmp_path / "run", *QUICK, "--set", "lr=3e-4", "--set", "loss=siglip")
    assert done.exit_code == 0, done.output
    assert embedcache.Adaptor.from_pretrained(tmp_path / "run").config["logit_bias"] == -10
    done = call("train", *made, "--run-dir", tmp_path / "other", "--set", "loss=hinge", "--set", "epochs=none")
    assert done.exit_code == 2
    assert "epochs: Input should be a valid integer" in done.output
    assert "loss: Input should be 'clip' or 'siglip'" in done.output
    done = call("train", *made, "--run-dir", tmp_path / "other", "--set", "depth=3")
    assert (done.exit_code, "depth: " in done.output) == (2, True)
    done = call("train", *made, "--run-dir", tmp_path / "other", "--set", "depth")
    assert (done.exit_code, "--set 'depth': expected FIELD=VALUE" in done.output) == (2, True)
    assert not (tmp_path / "other").exists()


def test_seeds_and_a_grid_make_a_table(made: list[Path], tmp_path: Path) -> None:
    done = call(
        "train", *made, "--run-dir", tmp_path / "many", *QUICK, "--seeds", 2, "--grid", "lr=1e-3,1e-2", "--grid",
        "adaptor=linear,mlp",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    table = pd.read_csv(tmp_path / "many" / "runs.csv")
    assert len(table) == 8
    assert {"lr", "adaptor", "seed"} <= set(table)
    assert "lr=0.001,adaptor=linear,seed=1" in done.output
    assert (tmp_path / "many" / "lr=0.01,adaptor=mlp,seed=0" / "adaptor.safetensors").is_file()
    again = call(
        "train", *made, "--run-dir", tmp_path / "many", *QUICK, "--seeds", 2, "--grid", "lr=1e-3,1e-2", "--grid",
        "adaptor=linear,mlp", "--json",
    )  # fmt: skip
    assert len(json.loads(again.stdout)) == 8


def test_rows_that_a_store_lacks_are_refused_or_left_out(made: list[Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    fewer = tmp_path / "fewer"
    embedcache.save_store(fewer, [f"i{k:02d}" for k in range(4, 60)], rng.normal(size=(56, 8)).astype(np.float32))
    done = call("train", made[0], fewer, made[2], "--run-dir", tmp_path / "run", *QUICK)
    assert (done.exit_code, "4 of 60 image ids" in done.output) == (2, True)
    done = call("train", made[0], fewer, made[2], "--run-dir", tmp_path / "run", *QUICK, "--allow-missing")
    assert done.exit_code == 0, done.output
    assert "left out: 4 rows that a store does not account for: 'i00', 'i01', 'i02', 'i03'" in done.output


def test_parameters_are_counted(made: list[Path]) -> None:
    done = call("params", *made[1:])
    assert done.exit_code == 0, done.output
    assert f"{12_207_617 - 2 * 768 * (768 - 8):,}" in done.output
    assert "unknown" in done.output
    (row,) = json.loads(call("params", *made[1:], "--set", "adaptor=linear", "--json").stdout)
    assert row["trained"] == 768 * 16 + 1
    assert row["fewer"] is None
