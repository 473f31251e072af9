"""Several processes that share each batch, through gloo on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import embedcache
from embedcache import Manifest, TrainConfig
from embedcache.errors import SettingsError
from embedcache.stage_two import distributed
from embedcache.stage_two.adaptor import read_adaptor
from embedcache.stage_two.distributed import Group, joined_group

ROOT = Path(__file__).parents[2]


def torchrun(world, tmp_path: Path, run_dir: str, *options: str, n: int = 2) -> subprocess.CompletedProcess[str]:
    manifest = tmp_path / "m.parquet"
    if not manifest.exists():
        world.manifest.write(manifest)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), "-m", "embedcache",
        "train", str(manifest), str(world.image.path), str(world.text.path), "--run-dir", str(tmp_path / run_dir),
        *options,
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=240)


SETTINGS = {"epochs": 3, "batch_size": 50, "lr": 3e-3, "projection_dim": 48, "n_heads": 4, "ff_dim": 64, "dropout": 0.0}


@pytest.mark.parametrize("more", [{}, {"loss": "siglip", "clip_norm": 0.5}], ids=str)
def test_two_processes_train_as_one(world, tmp_path: Path, more: dict) -> None:
    """Batches of 49 and 48 pairs, so that parts are of two sizes, and texts that are equal across them."""
    frame = world.manifest.frame.copy()
    frame.loc[np.flatnonzero(world.manifest.in_split("test"))[:2], "split"] = "train"
    frame["report"] = [f"report {k % 60}" for k in range(400)]
    world = replace(
        world,
        manifest=Manifest(frame, name="m", root=tmp_path),
        text=embedcache.save_store(tmp_path / "texts", world.text.ids, world.text.embeddings, modality="text"),
    )
    settings = {**SETTINGS, **more}
    done = torchrun(world, tmp_path, "two", *[f"--set={k}={v}" for k, v in settings.items()], "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout)  # one of them speaks
    alone = embedcache.train(world.manifest, world.image, world.text, tmp_path / "one", config=TrainConfig(**settings))
    assert len(said["history"]) == 3
    for together, single in zip(said["history"], alone.history, strict=True):
        for name in ("train_loss", "valid_loss", "logit_scale"):
            assert together[name] == pytest.approx(single[name], rel=1e-4), name
    two = read_adaptor(tmp_path / "two")
    for a, b in zip(two.state_dict().values(), alone.adaptor.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert (tmp_path / "two" / "checkpoint.safetensors").exists()
    assert len((tmp_path / "two" / "metrics.jsonl").read_text().splitlines()) == 3


def test_several_runs_in_several_processes_are_refused(world, tmp_path: Path) -> None:
    done = torchrun(world, tmp_path, "two", "--seeds", "3")
    assert done.returncode != 0
    assert "3 runs in 2 processes: start several runs without torchrun" in done.stderr


def test_a_batch_smaller_than_the_processes_is_refused(world, tmp_path: Path) -> None:
    done = torchrun(world, tmp_path, "three", "--batch-size", "2", n=3)
    assert done.returncode != 0
    assert "3 processes for a batch of 2 pairs, expected no more than its pairs" in done.stderr


def test_one_process_alone_sends_nothing() -> None:
    with joined_group("auto") as group:
        assert (group.rank, group.size, group.is_first) == (0, 1, True)
    x = torch.randn(3, 2)
    assert Group().gathered(x, 3) is x
    assert Group().told("a") == "a"


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "1"), ("LOCAL_WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "count_gpus", lambda: 4)
    assert distributed._own_device("auto") == "cuda:1"
    assert distributed._own_device("cpu") == "cpu"
    with pytest.raises(SettingsError, match=r"device 'cuda:0' for several processes, expected auto"):
        distributed._own_device("cuda:0")
    monkeypatch.setattr(distributed, "count_gpus", lambda: 2)
    with pytest.raises(SettingsError, match="4 processes for 2 GPUs"), joined_group("auto"):
        pass
