"""Zero-shot: the stated arithmetic, prompts verified by their text, and an inverted prompt called one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made import World

import embedcache
from embedcache import Adaptor, Manifest
from embedcache.data.prompts import PromptSet, Wordings
from embedcache.encoders.random_init import write_tiny
from embedcache.errors import FingerprintMismatchError, JoinError, MissingIdsError
from embedcache.stage_two.zeroshot import ZeroShotConfig, zero_shot
from embedcache.store.store import Store

QUICK = ZeroShotConfig(n_draws=200)
MINE = PromptSet("mine", 0.5, (("{}", "no {}"), ("there is {}", "there is no {}")), {"y": "pneumonia"})


def adaptor_for(images: Store, prompts: Store, run_dir: Path, **settings: object) -> Path:
    """A run directory with an Adaptor of these encoders."""
    encoders = {
        m: {"name": m, "fingerprint": s.encoder_fingerprint, "features": "embeddings"}
        for m, s in (("image", images), ("text", prompts))
    }
    Adaptor(16, prompts.layout.dim, encoders=encoders, **settings).save_pretrained(run_dir)  # type: ignore[arg-type]
    return run_dir


@pytest.fixture
def asked(world: World, tmp_path: Path) -> tuple[Store, Path]:
    """Prompts of which those for the finding lie where it shows in images, and an Adaptor that leaves them there."""
    direction = np.linalg.lstsq(world.values, 2.0 * world.manifest.frame["label.y"] - 1, rcond=None)[0]
    rng, texts = np.random.default_rng(0), MINE.texts(["y"])
    signs = np.array([-1.0 if "no " in text else 1.0 for text in texts.values()])
    vectors = signs[:, None] * direction / np.linalg.norm(direction) + 0.1 * rng.normal(size=(4, 16))
    store = embedcache.save_store(
        tmp_path / "prompts", list(texts), vectors.astype(np.float32), modality="text", store_dtype="float32"
    )
    return store, adaptor_for(world.image, store, tmp_path / "run", kind="identity")


def test_scores_are_the_softmax_over_two_cosines(world: World, asked: tuple[Store, Path]) -> None:
    store, run_dir = asked
    result = zero_shot(world.manifest, world.image, store, run_dir, prompts=MINE, labels=["y"], config=QUICK)
    row = result.scores.query("metric == 'auroc'").iloc[0]
    assert row["value"] > 0.8
    assert row["low"] <= row["value"] <= row["high"]
    assert not row["inverted"]
    assert (row["n_test"], row["n_wordings"]) == (80, 2)
    assert row["worst_wording"] == result.wordings["auroc"].min()
    assert row["best_wording"] == result.wordings["auroc"].max()
    assert result.wordings["negative"].tolist() == ["no pneumonia", "there is no pneumonia"]
    rows = np.flatnonzero((world.manifest.frame["split"] == "test").to_numpy())
    images = world.image.embeddings[rows] / np.linalg.norm(world.image.embeddings[rows], axis=1, keepdims=True)
    prompts = store.embeddings / np.linalg.norm(store.embeddings, axis=1, keepdims=True)
    sides = np.stack([prompts[:2].mean(0), prompts[2:].mean(0)])
    sides /= np.linalg.norm(sides, axis=1, keepdims=True)
    expected = torch.from_numpy(images @ sides.T / 0.5).softmax(1)[:, 0].numpy()
    np.testing.assert_allclose(result.predictions["probability"], expected, atol=1e-5)
    assert result.predictions["id"].tolist() == world.manifest.frame["id"].iloc[rows].tolist()


def test_an_inverted_prompt_is_called_one_and_polarity_turns_it(world: World, asked: tuple[Store, Path]) -> None:
    """The label is that nothing was found, and the prompts for it speak of pneumonia."""
    frame = world.manifest.frame.assign(**{"label.none": 1 - world.manifest.frame["label.y"]})
    manifest, inverted = Manifest(frame, name="made", root="."), replace(MINE, labels={"none": "pneumonia"})
    store = embedcache.save_store(
        asked[1] / "renamed", list(inverted.texts(["none"])), asked[0].embeddings, modality="text",
        store_dtype="float32",
    )  # fmt: skip
    run_dir = adaptor_for(world.image, store, asked[1] / "again", kind="identity")
    result = zero_shot(manifest, world.image, store, run_dir, prompts=inverted, labels=["none"], config=QUICK)
    row = result.scores.query("metric == 'auroc'").iloc[0]
    assert row["high"] < 0.5
    assert row["inverted"]
    (note,) = result.notes
    assert "lies wholly below 0.5: the prompts say the opposite (for it 'pneumonia', against it 'no pneumonia')" in note
    said = replace(MINE.wordings("y"), polarity="negative")
    turned = zero_shot(
        manifest, world.image, store, run_dir, prompts=replace(inverted, labels={"none": said}), labels=["none"],
        config=QUICK,
    )  # fmt: skip
    assert turned.scores["value"].iloc[0] == pytest.approx(1 - row["value"])
    assert not turned.notes


def test_prompts_that_are_missing_or_of_another_encoder_are_refused(world: World, asked: tuple[Store, Path]) -> None:
    store, run_dir = asked
    more = replace(MINE, templates=(*MINE.templates, ("{} is seen", "{} is not seen")))
    with pytest.raises(MissingIdsError, match=r"2 of 6 prompts are not there: 'y/positive/02', 'y/negative/02'"):
        zero_shot(world.manifest, world.image, store, run_dir, prompts=more, labels=["y"], config=QUICK)
    with pytest.raises(FingerprintMismatchError):
        zero_shot(world.manifest, world.image, world.text, run_dir, prompts=MINE, labels=["y"], config=QUICK)


def test_prompts_through_stage_one_are_known_by_their_text(world: World, tmp_path: Path) -> None:
    checkpoint = write_tiny("tiny-bert", tmp_path / "bert", seed=0, reports=["no pneumonia there is"])
    encoder = embedcache.load_encoder(f"hf:{checkpoint}", modality="text", pooling="mean", device="cpu")
    embedcache.extract(MINE.manifest(["y"]), encoder, tmp_path / "prompts")
    store = embedcache.open_store(tmp_path / "prompts")
    assert store.ids == list(MINE.texts(["y"]))
    run_dir = adaptor_for(world.image, store, tmp_path / "run", kind="linear", projection_dim=8)
    result = zero_shot(world.manifest, world.image, store, run_dir, prompts=MINE, labels=["y"], config=QUICK)
    assert 0 < result.scores["value"].iloc[0] < 1
    other = replace(MINE, labels={"y": Wordings(("effusion", "much"), ("no effusion", "none"))})
    with pytest.raises(JoinError, match="4 prompts are not the texts that were encoded"):
        zero_shot(world.manifest, world.image, store, run_dir, prompts=other, labels=["y"], config=QUICK)
