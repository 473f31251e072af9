"""A run that was trained from several seeds: each run of what is scored on it is as on that seed's Adaptor alone."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from made import World
from sklearn.metrics import roc_auc_score

import embedcache
from embedcache import Adaptor, ProbeConfig, TrainConfig
from embedcache.data.masks import boxes_mask
from embedcache.data.prompts import PromptSet
from embedcache.errors import RunStateError, SettingsError
from embedcache.metrics.intervals import Sampled
from embedcache.stage_two.adaptor import read_adaptor, read_adaptors
from embedcache.stage_two.heads import HeadConfig
from embedcache.stage_two.retrieve import retrieve
from embedcache.stage_two.retrieve_config import RetrieveConfig
from embedcache.stage_two.segment import segment
from embedcache.stage_two.segment_config import SegmentConfig
from embedcache.stage_two.train import grid, train_many
from embedcache.stage_two.zeroshot import ZeroShotConfig, zero_shot

SMALL = TrainConfig(
    epochs=4, batch_size=64, lr=3e-3, projection_dim=48, n_heads=4, ff_dim=64, dropout=0.0, n_seeds=2, seed=5
)
QUICK = ProbeConfig(
    n_seeds=3, n_draws=100, heads=("linear",), fractions=(1.0,), head=HeadConfig(epochs=1, min_steps=40)
)


def say_seeds(run_dir: Path, n: int) -> None:
    """What `train` writes down of a run."""
    (run_dir / "config.yaml").write_text(yaml.safe_dump({"train": {"n_seeds": n}}))


@pytest.fixture
def runs(world: World, tmp_path: Path) -> list[Path]:
    """A run of two seeds, and each of its trainings as a run of its own."""
    whole = tmp_path / "run"
    embedcache.train(world.manifest, world.image, world.text, whole, config=SMALL)
    first = shutil.copytree(whole, tmp_path / "first", ignore=shutil.ignore_patterns("seeds"))
    say_seeds(first, 1)
    return [whole, first, shutil.copytree(whole / "seeds" / "1", tmp_path / "second")]


def test_each_training_is_as_alone_with_its_seed(world: World, runs: list[Path], tmp_path: Path) -> None:
    result = embedcache.train(world.manifest, world.image, world.text, runs[0], config=SMALL)  # done: it is read
    both = read_adaptors(runs[0])
    assert len(both) == 2
    assert torch.equal(both[0].state_dict()["logit_scale"], result.adaptor.state_dict()["logit_scale"])
    for seed, adaptor in zip((5, 6), both, strict=True):
        config = replace(SMALL, seed=seed, n_seeds=None)
        alone = embedcache.train(world.manifest, world.image, world.text, tmp_path / f"alone-{seed}", config=config)
        for name, tensor in alone.adaptor.state_dict().items():
            torch.testing.assert_close(adaptor.state_dict()[name], tensor, atol=1e-5, rtol=1e-4)
    assert len(read_adaptors(runs[1])) == 1
    assert not torch.equal(*(read_adaptor(run).state_dict()["logit_scale"] for run in runs[1:]))


def test_seeds_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = ["", *(f"seeds/{k}" for k in range(1, 12))]
    assert list(replace(SMALL, n_seeds=12).trainings) == names
    for k, name in enumerate(names):
        encoders = {"image": {"name": f"of {k}", "fingerprint": "0" * 64}}
        Adaptor(4, 4, kind="identity", encoders=encoders).save_pretrained(tmp_path / name)
    say_seeds(tmp_path, 12)
    assert [adaptor.encoders["image"]["name"] for adaptor in read_adaptors(tmp_path)] == [f"of {k}" for k in range(12)]


def test_runs_of_heads_take_turns(world: World, runs: list[Path]) -> None:
    elsewhere = world.manifest.with_frame(world.manifest.frame.iloc[:60].drop(columns="split"))

    def predictions(run_dir: Path) -> pd.Series:
        config = replace(QUICK, controls=("untrained-adaptor", "no-adaptor"))
        more = {"config": config, "test_manifest": elsewhere, "test_store": world.image}
        result = embedcache.probe(world.manifest, world.image, label="y", run_dir=run_dir, **more)
        assert set(result.scores["control"]) == {"", "untrained-adaptor", "no-adaptor"}
        return result.predictions.set_index(["test", "seed", "id"])["probability"].sort_index()

    whole, first, second = map(predictions, runs)
    for test, n in (("internal", 80), ("external", 60)):
        for seed, alone, other in ((0, first, second), (1, second, first), (2, first, second)):
            assert len(whole[test, seed]) == n
            np.testing.assert_allclose(whole[test, seed], alone[test, seed], atol=1e-5)
            assert np.abs(whole[test, seed] - other[test, seed]).max() > 1e-3


def test_as_published_each_run_is_scored_by_its_own_adaptor(world: World, runs: list[Path]) -> None:
    frame, rng = world.manifest.frame.copy(), np.random.default_rng(0)
    frame["label.y"] = np.where(rng.random(len(frame)) < 0.3, 1 - frame["label.y"], frame["label.y"])
    manifest = world.manifest.with_frame(frame)

    def auroc(run_dir: Path, n_seeds: int) -> float:
        """Mean of the runs of seeds 0, 1, ..."""
        config = replace(QUICK, n_seeds=n_seeds, heads=("logistic",), controls=(), as_published=True)
        config = replace(config, head=replace(QUICK.head, batch_size=16))  # images of a batch attend to each other
        found = embedcache.probe(manifest, world.image, label="y", run_dir=run_dir, config=config).scores
        return float(found.query("control == 'as-published' and metric == 'auroc'")["value"].item())

    whole, *alone = runs
    of_seed_0 = [auroc(run, 1) for run in alone]
    of_seed_1 = [2 * auroc(run, 2) - first for run, first in zip(alone, of_seed_0, strict=True)]
    assert auroc(whole, 2) == pytest.approx((of_seed_0[0] + of_seed_1[1]) / 2, abs=1e-6)
    assert np.diff(sorted([*of_seed_0, *of_seed_1])).min() > 1e-4  # or it would show nothing


def test_the_kept_head_is_the_first_adaptors(world: World, runs: list[Path]) -> None:
    whole, first = (
        embedcache.probe(world.manifest, world.image, label="y", run_dir=run, config=replace(QUICK, controls=()))
        for run in runs[:2]
    )
    assert whole.kept["linear"].source == first.kept["linear"].source
    for name, tensor in first.kept["linear"].state.items():
        torch.testing.assert_close(whole.kept["linear"].state[name], tensor, atol=1e-5, rtol=1e-4)


def test_texts_are_found_in_the_space_of_each_seed(world: World, runs: list[Path]) -> None:
    config = RetrieveConfig(n_draws=100)
    whole, *alone = (retrieve(world.manifest, world.image, world.text, run, config=config) for run in runs)
    pd.testing.assert_frame_equal(whole.matches, alone[0].matches)
    assert set(whole.first_own["seed"]) == {0, 1}
    for seed, one in enumerate(alone):
        mine = whole.first_own[whole.first_own["seed"] == seed].drop(columns="seed").reset_index(drop=True)
        pd.testing.assert_frame_equal(mine, one.first_own.drop(columns="seed"))
    first, second = (one.scores.query("control == ''")["value"] for one in alone)
    pd.testing.assert_series_equal(whole.scores.query("control == ''")["value"], (first + second) / 2)
    for column in ("chance", "one_order", "n_queries"):
        pd.testing.assert_series_equal(whole.scores[column], alone[0].scores[column])
    recall = whole.scores.query("control == '' and metric == 'recall@1'").iloc[0]
    of_first = alone[0].scores.query("control == '' and metric == 'recall@1'").iloc[0]
    assert recall["high"] - recall["low"] > of_first["high"] - of_first["low"]  # seeds differ too


def test_prompts_speak_in_the_space_of_each_seed(world: World, runs: list[Path], tmp_path: Path) -> None:
    prompts = PromptSet("mine", 0.5, (("{}", "no {}"), ("there is {}", "there is no {}")), {"y": "pneumonia"})
    texts = prompts.texts(["y"])
    x = np.random.default_rng(0).normal(size=(len(texts), 12)).astype(np.float32)
    store = embedcache.save_store(tmp_path / "prompts", list(texts), x, modality="text")
    spaces = []
    for run in runs:
        for adaptor_dir in (run, *run.glob("seeds/*")):  # as if these prompts were through its text encoder
            adaptor = read_adaptor(adaptor_dir)
            adaptor.encoders["text"]["fingerprint"] = store.encoder_fingerprint
            adaptor.save_pretrained(adaptor_dir)
        config = ZeroShotConfig(n_draws=100)
        spaces.append(zero_shot(world.manifest, world.image, store, run, prompts=prompts, labels=["y"], config=config))
    whole, *alone = spaces
    for seed, one in enumerate(alone):
        mine = whole.predictions.loc[whole.predictions["seed"] == seed, "probability"].to_numpy()
        np.testing.assert_array_equal(mine, one.predictions["probability"])
    for table in ("scores", "wordings"):
        column = {"scores": "value", "wordings": "auroc"}[table]
        first, second = (getattr(one, table)[column] for one in alone)
        pd.testing.assert_series_equal(getattr(whole, table)[column], (first + second) / 2)


def test_decoders_take_turns(tmp_path: Path) -> None:
    rng, n, grid, dim = np.random.default_rng(0), 60, 4, 8
    cells = rng.random((n, grid, grid)) < 0.4
    tokens = rng.normal(size=(n, grid * grid, dim)).astype(np.float32)
    tokens[..., 0] += 3 * cells.reshape(n, -1)
    ids = [f"i{k}" for k in range(n)]
    store = embedcache.save_store(tmp_path / "tokens", ids, tokens.mean(1), tokens=tokens, store_dtype="float32")
    frame = pd.DataFrame(
        {"id": ids, "image": ids, "split": [("train", "train", "valid", "test")[k % 4] for k in range(n)]}
    )
    masks = [[(float(x), float(y), 1.0, 1.0) for y, x in np.argwhere(of_image)] for of_image in cells]
    manifest = embedcache.Manifest(
        frame.assign(mask=[boxes_mask(boxes, (grid, grid)) for boxes in masks]), name="masked", root=tmp_path
    )
    for k, name in enumerate(("first", "second", "run", "run/seeds/1")):
        torch.manual_seed(k % 2)
        encoders = {"image": {"name": "x", "fingerprint": store.encoder_fingerprint, "features": "embeddings"}}
        adaptor = Adaptor(dim, 4, projection_dim=8, n_layers=1, n_heads=2, ff_dim=16, encoders=encoders)
        adaptor.save_pretrained(tmp_path / name)
    say_seeds(tmp_path / "run", 2)
    config = SegmentConfig(decoders=("linear",), size=8, fractions=(1.0,), n_seeds=3, epochs=2, n_draws=50, min_steps=5)
    results = [segment(manifest, store, run_dir=tmp_path / name, config=config) for name in ("run", "first", "second")]
    whole, first, second = (result.images.set_index(["seed", "id"])["dice"] for result in results)
    assert not np.array_equal(first, second)
    for seed, alone in ((0, first), (1, second), (2, first)):
        np.testing.assert_array_equal(whole[seed], alone[seed])
    kept, of_first, of_second = (result.kept["linear"] for result in results)
    assert kept.source == of_first.source != of_second.source
    for name, tensor in of_first.state.items():
        assert torch.equal(kept.state[name], tensor)


def test_runs_that_share_an_adaptor_are_averaged() -> None:
    parts = [Sampled(np.float64(k), np.full(4, 10.0 * k)) for k in range(5)]
    turns = Sampled.of_runs(parts).by_turn(3)
    np.testing.assert_array_equal(turns.value, [1.5, 2.5, 2.0])
    np.testing.assert_array_equal(turns.samples, np.tile([15.0, 25.0, 20.0], (4, 1)))
    assert Sampled.of_runs(parts[:2]).by_turn(3).value.tolist() == [0.0, 1.0]
    assert Sampled.of_runs(parts).by_turn(1).value.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    many = Sampled(np.arange(8.0).reshape(4, 2), np.zeros((3, 4, 2))).by_turn(2)
    assert many.value.tolist() == [[2.0, 3.0], [4.0, 5.0]]
    assert many.samples.shape == (3, 2, 2)


def test_a_run_that_lacks_a_seed_is_refused_and_another_number_too(world: World, runs: list[Path]) -> None:
    (runs[0] / "seeds" / "1" / "config.json").unlink()
    with pytest.raises(RunStateError, match="to be trained from 2 seeds, and seeds/1 is not there"):
        embedcache.probe(world.manifest, world.image, label="y", run_dir=runs[0], config=QUICK)
    for n_seeds in (None, 3):
        config = replace(SMALL, n_seeds=n_seeds)
        with pytest.raises(RunStateError, match="holds a run of other settings"):
            embedcache.train(world.manifest, world.image, world.text, runs[0], config=config)


def test_several_runs_have_a_seed_each(world: World, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="n_seeds is of one run"):
        train_many(
            world.manifest, world.image, world.text, tmp_path / "many", configs=grid(SMALL, {"lr": [1e-3, 1e-4]})
        )


def test_shots_on_two_adaptors_are_two_independent_runs(world: World, runs: list[Path]) -> None:
    config = replace(QUICK, fractions=(), shots=(4,), n_shot_draws=6, controls=("no-adaptor",))
    result = embedcache.probe(world.manifest, world.image, label="y", run_dir=runs[0], config=config)
    aurocs = {
        seed: roc_auc_score(of_seed["label"], of_seed["probability"])
        for seed, of_seed in result.predictions.groupby("seed")
    }
    by_adaptor = [np.mean([value for seed, value in aurocs.items() if seed % 2 == turn]) for turn in (0, 1)]
    row = result.scores.query("metric == 'auroc' and control == ''").iloc[0]
    assert len(aurocs) == 6
    assert row["value"] == pytest.approx(np.mean(by_adaptor), abs=1e-6)
    reach = 12.706 * np.std(by_adaptor, ddof=1) / np.sqrt(2)  # Student's t of one degree of freedom
    assert row["seeds_high"] == pytest.approx(min(row["value"] + reach, 1), abs=1e-3)
    alone = result.scores.query("metric == 'auroc' and control == 'no-adaptor'").iloc[0]
    assert alone["seeds_high"] - alone["value"] < 3 * np.std(list(aurocs.values()), ddof=1)  # six runs stand for six
