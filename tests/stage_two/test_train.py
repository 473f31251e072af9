from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import embedcache
from embedcache import Manifest, TrainConfig
from embedcache.errors import JoinError, TrainingError
from embedcache.stage_two.train import linear_schedule

SMALL = TrainConfig(epochs=12, batch_size=64, lr=3e-3, projection_dim=48, n_heads=4, ff_dim=64, dropout=0.0)


def test_it_learns_which_text_goes_with_which_image(world, tmp_path: Path) -> None:
    result = embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=SMALL)
    assert (result.n_train, result.n_valid, result.n_failed) == (240, 80, 0)
    first, best = result.history[0], result.history[result.best_epoch]
    assert best["valid_loss"] < first["valid_loss"] - 0.5
    assert best["valid_loss"] == min(entry["valid_loss"] for entry in result.history)
    assert not result.adaptor.training


def test_a_run_directory_holds_what_it_needs(world, tmp_path: Path) -> None:
    result = embedcache.train(world.manifest, world.image.path, world.text.path, tmp_path / "run", config=SMALL)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["train"] == dataclasses.asdict(SMALL)
    assert config["stores"]["image"]["fingerprint"] == world.image.fingerprint
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert logged == result.history
    adaptor = embedcache.Adaptor.from_pretrained(tmp_path / "run")
    assert adaptor.notes == {"image": world.image.encoder_fingerprint, "text": world.text.encoder_fingerprint}
    image = torch.from_numpy(world.values[:4])
    torch.testing.assert_close(adaptor.encode_image(image), result.adaptor.encode_image(image))


def test_the_same_seed_gives_the_same_weights_and_leaves_the_callers_alone(world, tmp_path: Path) -> None:
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    for name in ("a", "b"):
        embedcache.train(world.manifest, world.image, world.text, tmp_path / name, config=SMALL)
    torch.testing.assert_close(torch.rand(3), expected)
    a, b = ((tmp_path / name / "adaptor.safetensors").read_bytes() for name in ("a", "b"))
    assert a == b
    other = dataclasses.replace(SMALL, seed=1)
    embedcache.train(world.manifest, world.image, world.text, tmp_path / "c", config=other)
    assert (tmp_path / "c" / "adaptor.safetensors").read_bytes() != a


def test_it_stops_early_and_keeps_the_best(world, tmp_path: Path) -> None:
    eager = dataclasses.replace(SMALL, epochs=200, lr=1e-2, patience=3)
    result = embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=eager)
    assert len(result.history) == result.best_epoch + 1 + 3 < 200


def test_without_validation_the_last_epoch_is_kept(world, tmp_path: Path) -> None:
    frame = world.manifest.frame.assign(split="train")
    result = embedcache.train(
        Manifest(frame, name="m", root="."), world.image, world.text, tmp_path / "run", config=SMALL
    )
    assert result.best_epoch == 11
    assert np.isnan(result.history[-1]["valid_loss"])
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["valid_loss"] is None


def test_a_batch_larger_than_the_set(world, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, epochs=2, batch_size=10_000)
    result = embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=config)
    assert np.isfinite([entry["train_loss"] for entry in result.history]).all()


def test_too_few_pairs_are_refused(world, tmp_path: Path) -> None:
    frame = world.manifest.frame.assign(split="test")
    with pytest.raises(JoinError, match="0 training pairs, expected at least 2"):
        embedcache.train(Manifest(frame, name="m", root="."), world.image, world.text, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_report_for_all_has_nothing_to_contrast(world, tmp_path: Path) -> None:
    frame = world.manifest.frame.assign(report="same", report_id="i000")
    with pytest.raises(JoinError, match="all training rows share one report_id"):
        embedcache.train(Manifest(frame, name="m", root="."), world.image, world.text, tmp_path / "run")


def test_a_validation_loss_that_is_not_finite_is_never_the_best(world, tmp_path: Path) -> None:
    world.image.embeddings[np.flatnonzero(world.manifest.in_split("valid"))[0]] = 3e38  # its norm overflows
    with pytest.raises(TrainingError, match="validation loss became nan"):
        embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=SMALL)


def test_a_loss_that_is_not_finite_stops_the_run(world, tmp_path: Path) -> None:
    wild = dataclasses.replace(SMALL, lr=1e30, warmup=0.0)
    with pytest.raises(TrainingError, match=r"loss became nan.*began with 'i.*lower the learning rate"):
        embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=wild)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0, "patience": 0}, "epochs is 0, expected at least 1; patience is 0"),
        ({"batch_size": 1}, "batch_size is 1, expected at least 2"),
        ({"n_heads": 5}, "must be divisible by n_heads"),
        ({"lr": float("nan")}, "lr is nan, expected above 0"),
    ],
)
def test_wrong_settings(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**fields)


def test_the_schedule_rises_then_falls_to_nothing() -> None:
    factor = linear_schedule(20, 2)
    assert [factor(s) for s in (0, 1, 2, 11, 20)] == [0.0, 0.5, 1.0, 0.5, 0.0]
    assert linear_schedule(5, 0)(0) == 1.0
