from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

import embedcache
from embedcache import Manifest, TrainConfig
from embedcache.errors import JoinError, MissingIdsError, OutputError, SettingsError, TrainingError
from embedcache.stage_two.adaptor import read_adaptor
from embedcache.stage_two.config import schedule
from embedcache.stage_two.train import grid, train_many

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
    assert {"image_to_text_recall@1", "text_to_image_median_rank", "modality_gap", "pairs_per_s"} <= set(logged[0])
    adaptor = embedcache.Adaptor.from_pretrained(tmp_path / "run")
    assert {modality: encoder["fingerprint"] for modality, encoder in adaptor.encoders.items()} == {
        "image": world.image.encoder_fingerprint,
        "text": world.text.encoder_fingerprint,
    }
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


def test_one_report_for_all_has_nothing_to_contrast(world, tmp_path: Path) -> None:
    frame = world.manifest.frame.assign(report="same", report_id="i000")
    with pytest.raises(JoinError, match="all training rows share one report_id"):
        embedcache.train(Manifest(frame, name="m", root="."), world.image, world.text, tmp_path / "run")


def test_a_validation_loss_that_is_not_finite_is_never_the_best(world, tmp_path: Path) -> None:
    first = np.flatnonzero(world.manifest.in_split("valid"))[0]
    world.image.embeddings[first] = 3e38  # its norm overflows
    with pytest.raises(TrainingError, match=f"validation loss became nan with the pairs '{world.image.ids[first]}'"):
        embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=SMALL)


def test_a_loss_that_is_not_finite_stops_the_run(world, tmp_path: Path) -> None:
    wild = dataclasses.replace(SMALL, lr=1e30, warmup=0.0)
    with pytest.raises(TrainingError, match=r"loss became nan in epoch 1, step \d, in the batch of 'i.*lower lr"):
        embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=wild)


def test_a_store_with_an_overflowing_row_names_its_batch(world, tmp_path: Path) -> None:
    first = np.flatnonzero(world.manifest.in_split("train"))[0]
    world.image.embeddings[first] = 3e38
    small = dataclasses.replace(SMALL, batch_size=4)
    with pytest.raises(TrainingError, match=rf"in the batch of ('i\d+', )*'{world.image.ids[first]}'"):
        embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=small)


def test_one_text_for_all_has_nothing_to_contrast(world, tmp_path: Path) -> None:
    manifest = Manifest(world.manifest.frame.assign(report="same"), name="m", root=".")
    text = embedcache.save_store(tmp_path / "t", world.text.ids, world.text.embeddings, modality="text")
    with pytest.raises(JoinError, match=r"all 240 training rows are positives of each other under .*'text_digest'"):
        embedcache.train(manifest, world.image, text, tmp_path / "run", config=SMALL)
    row = dataclasses.replace(SMALL, positives="row", epochs=1)
    assert len(embedcache.train(manifest, world.image, text, tmp_path / "run", config=row).history) == 1


def test_missing_ids_are_refused_or_left_out_by_name(world, tmp_path: Path) -> None:
    fewer = embedcache.save_store(tmp_path / "fewer", world.image.ids[3:], world.values[3:], store_dtype="float32")
    with pytest.raises(MissingIdsError, match="'i000', 'i001', 'i002'"):
        embedcache.train(world.manifest, fewer, world.text, tmp_path / "run", config=SMALL)
    config = dataclasses.replace(SMALL, epochs=1, allow_missing=True)
    result = embedcache.train(world.manifest, fewer, world.text, tmp_path / "run", config=config)
    assert (result.missing, result.n_train) == (("i000", "i001", "i002"), 237)


@pytest.mark.parametrize(
    "changes",
    [
        {"adaptor": "mlp"},
        {"adaptor": "linear"},
        {"loss": "siglip"},
        {"mixup": 1.0},
        {"schedule": "cosine", "clip_norm": 1.0},
        {"normalise": "whiten"},
        {"precision": "bfloat16"},
        {"order": "shards"},
        {"report_once": False},
    ],
    ids=str,
)
def test_every_way_of_training_learns(world, tmp_path: Path, changes: dict) -> None:
    config = dataclasses.replace(SMALL, **changes)
    result = embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=config)
    assert result.best["valid_loss"] < result.history[0]["valid_loss"] - 0.3
    assert result.best["image_to_text_recall@10"] > 3 * result.best["image_to_text_chance@10"]
    read = read_adaptor(tmp_path / "run")
    image = torch.from_numpy(world.values[:4])
    torch.testing.assert_close(read.encode_image(image), result.adaptor.encode_image(image), atol=0, rtol=0)


def test_resident_and_streamed_rows_train_alike(world, tmp_path: Path) -> None:
    weights = {}
    for data in ("resident", "streamed"):
        config = dataclasses.replace(SMALL, epochs=3, data=data, dropout=0.1, mixup=0.5)
        embedcache.train(world.manifest, world.image, world.text, tmp_path / data, config=config)
        weights[data] = (tmp_path / data / "adaptor.safetensors").read_bytes()
    assert weights["resident"] == weights["streamed"]


def test_normalisation_is_fitted_on_training_rows_alone_and_kept(world, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, epochs=1, normalise="zscore")
    embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=config)
    norm = read_adaptor(tmp_path / "run").image_norm
    of_train = world.values[world.manifest.in_split("train")]
    np.testing.assert_allclose(norm.mean.numpy(), of_train.mean(0), atol=1e-5)
    np.testing.assert_allclose(norm.scale.numpy(), 1 / of_train.std(0), rtol=1e-5)


def test_cross_modal_attention_is_warned_of(world, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(400, 3, 8)).astype(np.float32)
    image = embedcache.save_store(tmp_path / "i", world.image.ids, tokens.mean(1), tokens=tokens)
    text = embedcache.save_store(tmp_path / "t", world.text.ids, tokens.mean(1), tokens=tokens, modality="text")
    config = dataclasses.replace(SMALL, epochs=1, image="tokens", text="tokens")
    assert embedcache.train(world.manifest, image, text, tmp_path / "self", config=config).warning == ""
    asked = dataclasses.replace(config, attention="cross-modal")
    result = embedcache.train(world.manifest, image, text, tmp_path / "cross", config=asked)
    assert "each image was embedded with its own report" in result.warning


def test_tensorboard_gets_what_the_log_says(world, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = dataclasses.replace(SMALL, epochs=3, tensorboard=True)
    result = embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=config)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    found = [event.value for event in events.Scalars("valid_loss")]
    assert found == pytest.approx([entry["valid_loss"] for entry in result.history])


# many at once


def test_a_grid_has_every_combination_and_its_names() -> None:
    configs = grid(SMALL, {"lr": [1e-3, 3e-3], "n_layers": [1, 2]}, n_seeds=2)
    assert len(configs) == 8
    of_name = configs["lr=0.003,n_layers=1,seed=1"]
    assert (of_name.lr, of_name.n_layers, of_name.seed) == (3e-3, 1, 1)
    assert list(grid(SMALL, {}, n_seeds=3)) == ["seed=0", "seed=1", "seed=2"]
    with pytest.raises(SettingsError, match="'depth' is no field of training"):
        grid(SMALL, {"depth": [1]})


def test_many_runs_are_each_as_alone(world, tmp_path: Path) -> None:
    """Over different shapes, with batches of two sizes, and with ends at different times: noise is learnt by heart."""
    noise = np.random.default_rng(0).normal(size=(400, 12)).astype(np.float32)
    text = embedcache.save_store(tmp_path / "noise", world.text.ids, noise, modality="text")
    base = dataclasses.replace(SMALL, epochs=30, patience=2, batch_size=65)
    frame = world.manifest.frame.copy()
    frame.loc[np.flatnonzero(world.manifest.in_split("test"))[:2], "split"] = "train"  # 242 pairs in 4 batches
    manifest = Manifest(frame, name="m", root=".")
    configs = grid(base, {"lr": [1e-3, 3e-3], "ff_dim": [32, 64]}, n_seeds=2)
    together = train_many(manifest, world.image, text, tmp_path / "many", configs=configs)
    lengths = set()
    for name, config in configs.items():
        alone = embedcache.train(manifest, world.image, text, tmp_path / "alone" / name, config=config)
        assert together[name].best_epoch == alone.best_epoch
        lengths.add(len(alone.history))
        assert together[name].history[0]["train_loss"] == pytest.approx(alone.history[0]["train_loss"], rel=1e-6)
        for ours, theirs in zip(together[name].history, alone.history, strict=True):
            assert ours["valid_loss"] == pytest.approx(theirs["valid_loss"], rel=2e-3)
        read = read_adaptor(tmp_path / "many" / name)
        for a, b in zip(read.state_dict().values(), alone.adaptor.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, atol=5e-3, rtol=5e-3)
    assert len(lengths) > 1
    table = pd.read_csv(tmp_path / "many" / "runs.csv")
    assert list(table["run"]) != list(configs)
    assert table["valid_loss"].is_monotonic_increasing
    assert set(table["run"]) == set(configs)
    assert {"lr", "ff_dim", "seed", "best_epoch"} <= set(table)


def test_many_runs_go_on_where_they_were(world, tmp_path: Path) -> None:
    configs = grid(dataclasses.replace(SMALL, epochs=2), {"lr": [1e-3, 3e-3]})
    first = train_many(world.manifest, world.image, world.text, tmp_path / "many", configs=configs)
    second = train_many(world.manifest, world.image, world.text, tmp_path / "many", configs=configs)
    assert [r.history for r in second.values()] == [r.history for r in first.values()]


def test_names_of_runs_must_be_fit_for_directories(world, tmp_path: Path) -> None:
    for configs in ({}, {"": SMALL}, {"../x": SMALL}, {"..": SMALL}):
        with pytest.raises(SettingsError, match="fit for a directory"):
            train_many(world.manifest, world.image, world.text, tmp_path / "many", configs=configs)


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_pairs_are_refused(world, tmp_path: Path, n: int) -> None:
    split = ["train" if k < n else "test" for k in range(400)]
    manifest = Manifest(world.manifest.frame.assign(split=split), name="m", root=".")
    with pytest.raises(JoinError, match=f"{n} training pairs, expected at least 2"):
        embedcache.train(manifest, world.image, world.text, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_finite_are_no_result(world, tmp_path: Path) -> None:
    """Without validation, and in a single step, no loss has seen them yet."""
    manifest = Manifest(world.manifest.frame.assign(split="train"), name="m", root=".")
    wild = dataclasses.replace(SMALL, lr=1e30, warmup=0.0, epochs=1, batch_size=1000, weight_decay=1e30)
    with pytest.raises(TrainingError, match="weights are not finite after epoch 1; lower lr"):
        embedcache.train(manifest, world.image, world.text, tmp_path / "run", config=wild)
    assert not (tmp_path / "run" / "adaptor.safetensors").exists()


def test_a_run_directory_that_cannot_be_is_said_before_training(
    world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("embedcache.stage_two.steps.Steps.step", lambda *a: pytest.fail("it trained"))
    for run_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="cannot be written"):
            embedcache.train(world.manifest, world.image, world.text, run_dir, config=SMALL)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_adaptor_trained_on_tokens_is_not_probed_on_embeddings(world, tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).normal(size=(400, 3, 16)).astype(np.float32)
    image = embedcache.save_store(tmp_path / "i", world.image.ids, tokens.mean(1), tokens=tokens)
    config = dataclasses.replace(SMALL, epochs=1, image="tokens")
    embedcache.train(world.manifest, image, world.text, tmp_path / "run", config=config)
    with pytest.raises(SettingsError, match="was trained on tokens, a probe reads embeddings"):
        embedcache.probe(world.manifest, image, label="y", run_dir=tmp_path / "run")


def test_grids_that_make_no_sense_are_refused() -> None:
    with pytest.raises(SettingsError, match="lr has a value twice"):
        grid(SMALL, {"lr": [1e-4, 0.0001]})
    with pytest.raises(SettingsError, match="adaptor=linear,image=tokens: adaptor 'linear' with tokens"):
        grid(SMALL, {"adaptor": ["attention", "linear"], "image": ["embeddings", "tokens"]})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0, "patience": 0}, "epochs is 0, expected at least 1; patience is 0"),
        ({"batch_size": 1}, "batch_size is 1, expected at least 2"),
        ({"n_heads": 5}, "must be divisible by n_heads"),
        ({"lr": float("nan")}, "lr is nan, expected above 0"),
        (
            {"loss": "triplet", "clip_norm": 0.0},
            "clip_norm is 0.0, expected above 0; loss is 'triplet', expected one of",
        ),
        ({"image": "tokens", "adaptor": "mlp"}, "'mlp' with tokens, expected attention"),
        ({"attention": "cross-modal"}, "'cross-modal' without tokens"),
        ({"image": "tokens", "mixup": 0.5}, "mixup with tokens"),
        ({"order": "shards", "data": "resident"}, "'shards' with resident data"),
    ],
)
def test_wrong_settings(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**fields)


def test_the_schedule_rises_then_falls_to_nothing() -> None:
    factor = schedule("linear", 20, 2)
    assert [factor(s) for s in (0, 1, 2, 11, 20)] == [0.0, 0.5, 1.0, 0.5, 0.0]
    assert schedule("linear", 5, 0)(0) == 1.0
    cosine = schedule("cosine", 20, 2)
    assert [round(cosine(s), 3) for s in (0, 2, 11, 20)] == [0, 1, 0.5, 0]
