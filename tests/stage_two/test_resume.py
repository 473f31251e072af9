"""Runs that are stopped, killed, finished, or not what the directory holds."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import embedcache
from embedcache import TrainConfig
from embedcache.errors import RunStateError
from embedcache.stage_two import fit as fit_module
from embedcache.stage_two.train import grid, train_many

# dropout and mixup draw random numbers; a checkpoint after every step
CONFIG = TrainConfig(
    epochs=6, batch_size=32, lr=3e-3, projection_dim=48, n_heads=4, ff_dim=64, dropout=0.2, mixup=0.5, checkpoint_s=0.0
)


class Stopped(Exception):
    """What stands for a kill, right after a checkpoint."""


def stop_after(monkeypatch: pytest.MonkeyPatch, n_checkpoints: int) -> None:
    write, written = fit_module.write_checkpoint, []

    def counted(*args: object, **kwargs: object) -> None:
        write(*args, **kwargs)  # type: ignore[arg-type]
        written.append(1)
        if len(written) == n_checkpoints:
            raise Stopped

    monkeypatch.setattr(fit_module, "write_checkpoint", counted)


def outcome(run_dir: Path) -> tuple[bytes, bytes, list[dict]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    timed = ("seconds", "pairs_per_s")
    history = [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]
    return (run_dir / "adaptor.safetensors").read_bytes(), (run_dir / "last.safetensors").read_bytes(), history


@pytest.mark.parametrize("n_checkpoints", [1, 8, 9, 20, 47])
@pytest.mark.parametrize("data", ["resident", "streamed"])
def test_a_run_that_was_stopped_anywhere_ends_in_the_same_bits(
    world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_checkpoints: int, data: str
) -> None:
    config = replace(CONFIG, data=data)  # type: ignore[arg-type]
    embedcache.train(world.manifest, world.image, world.text, tmp_path / "straight", config=config)
    with monkeypatch.context() as patch:
        stop_after(patch, n_checkpoints)
        with pytest.raises(Stopped):
            embedcache.train(world.manifest, world.image, world.text, tmp_path / "broken", config=config)
    torch.rand(7)  # whatever else drew random numbers meanwhile
    result = embedcache.train(world.manifest, world.image, world.text, tmp_path / "broken", config=config)
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "straight")
    assert len(result.history) == 6


def test_many_runs_that_were_stopped_end_in_the_same_bits(
    world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = replace(CONFIG, epochs=12, patience=1, lr=1e-2, mixup=0.0)
    configs = grid(base, {"lr": [3e-3, 3e-2]}, n_seeds=2)
    straight = train_many(world.manifest, world.image, world.text, tmp_path / "straight", configs=configs)
    assert len({len(result.history) for result in straight.values()}) > 1  # some stop before others
    for n_checkpoints in (30, 50):
        with monkeypatch.context() as patch:
            stop_after(patch, n_checkpoints)
            with pytest.raises(Stopped):
                train_many(world.manifest, world.image, world.text, tmp_path / "broken", configs=configs)
    train_many(world.manifest, world.image, world.text, tmp_path / "broken", configs=configs)
    for name in configs:
        assert outcome(tmp_path / "broken" / name) == outcome(tmp_path / "straight" / name)


def test_a_killed_process_goes_on_and_ends_in_the_same_bits(world, tmp_path: Path) -> None:
    world.manifest.write(tmp_path / "m.parquet")

    settings = {"epochs": 16, "batch_size": 16, "projection_dim": 96, "ff_dim": 256, "checkpoint_s": 0.0}

    options = [f"--set={key}={value}" for key, value in settings.items()]

    def command(run_dir: str) -> list[str]:
        return [
            sys.executable, "-m", "embedcache", "train", str(tmp_path / "m.parquet"), str(world.image.path),
            str(world.text.path), "--run-dir", str(tmp_path / run_dir), *options,
        ]  # fmt: skip

    checkpoint = tmp_path / "killed" / "checkpoint.safetensors"
    for wait_s in (0.0, 0.1):
        known = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == known):
            time.sleep(0.001)
        time.sleep(wait_s)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL  # it did not end before
    for run_dir in ("killed", "straight"):  # in processes of their own: this one may have fewer threads by now
        subprocess.run(command(run_dir), check=True, capture_output=True)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "straight")


def test_a_finished_run_is_read_and_not_run_again(world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=CONFIG)
    before = outcome(tmp_path / "run")
    monkeypatch.setattr("embedcache.stage_two.steps.Steps.step", lambda *a: pytest.fail("it trained again"))
    again = embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=CONFIG)
    assert again.history == first.history
    assert again.best_epoch == first.best_epoch
    assert outcome(tmp_path / "run") == before
    for a, b in zip(again.adaptor.state_dict().values(), first.adaptor.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_best_and_last_weights_are_both_kept(world, tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=60, patience=2, lr=1e-2, mixup=0.0)
    result = embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=config)
    assert result.best_epoch < len(result.history) - 1
    best, last = (load_file(tmp_path / "run" / f"{name}.safetensors") for name in ("adaptor", "last"))
    assert set(best) == set(last)
    assert any(not torch.equal(best[name], last[name]) for name in best)


def test_another_run_in_the_directory_is_refused(world, tmp_path: Path) -> None:
    embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=CONFIG)
    before = outcome(tmp_path / "run")
    with pytest.raises(RunStateError, match="a run of other settings, stores or pairs; name another run directory"):
        embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=replace(CONFIG, lr=1e-3))
    noisy = embedcache.save_store(tmp_path / "noisy", world.image.ids, world.values + 1, store_dtype="float32")
    with pytest.raises(RunStateError, match="other settings"):
        embedcache.train(world.manifest, noisy, world.text, tmp_path / "run", config=CONFIG)
    frame = world.manifest.frame.assign(split="train")
    with pytest.raises(RunStateError, match="other settings"):
        embedcache.train(
            embedcache.Manifest(frame, name="m", root="."), world.image, world.text, tmp_path / "run", config=CONFIG
        )
    assert outcome(tmp_path / "run") == before
    where = replace(CONFIG, data="streamed", checkpoint_s=9.0)  # these change no result
    assert embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=where).best_epoch >= 0


def test_the_middle_of_an_epoch_goes_on_with_what_it_began(
    world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stopped):
            embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=CONFIG)
    monkeypatch.setattr(fit_module._Run, "_makers", lambda self: "2 processes on cuda")
    with pytest.raises(RunStateError, match="middle of an epoch by 1 process on cpu; with 2 processes on cuda"):
        embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=CONFIG)


def test_an_adaptor_of_unknown_origin_is_not_overwritten(world, tmp_path: Path) -> None:
    embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=CONFIG)
    before = outcome(tmp_path / "run")
    (tmp_path / "run" / "checkpoint.safetensors").unlink()
    with pytest.raises(RunStateError, match="other settings"):
        embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=replace(CONFIG, seed=1))
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(RunStateError, match="other settings"):
        embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=CONFIG)
    assert outcome(tmp_path / "run") == before


@pytest.mark.parametrize("damage", ["cut", "foreign", "pickle", "version"])
def test_a_damaged_checkpoint_is_refused_and_said(world, tmp_path: Path, damage: str) -> None:
    config = replace(CONFIG, epochs=1)
    embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=config)
    path = tmp_path / "run" / "checkpoint.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-5] if len(path.read_bytes()) < 9 else path.read_bytes()[:9])
    elif damage == "foreign":
        path.write_bytes((tmp_path / "run" / "last.safetensors").read_bytes())
    elif damage == "pickle":
        torch.save({"epoch": 1}, path)
    else:
        path.write_bytes(path.read_bytes().replace(b'\\"version\\": 1', b'\\"version\\": 7'))
    with pytest.raises(RunStateError, match=r"checkpoint\.safetensors: .*delete it to start the run again"):
        embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=config)
