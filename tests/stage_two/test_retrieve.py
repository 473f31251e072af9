"""Retrieval against a dense reference, at chance for strangers, and by the command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from made import World

import embedcache
from embedcache import Adaptor, Manifest
from embedcache.data.reports import ReportPolicy
from embedcache.encoders.random_init import write_tiny
from embedcache.errors import FingerprintMismatchError, JoinError, ManifestError, MissingIdsError, SettingsError
from embedcache.metrics.retrieval import precision_at, weighted_medians
from embedcache.stage_two.ranks import find
from embedcache.stage_two.retrieve import retrieve
from embedcache.stage_two.retrieve_config import RetrieveConfig
from embedcache.stage_two.sentence_scores import sentence_scores

QUICK = RetrieveConfig(n_draws=200)


@pytest.fixture
def run_dir(world: World, tmp_path: Path) -> Path:
    """An Adaptor whose projections give both modalities their common eight values."""
    stores = {"image": world.image, "text": world.text}
    encoders = {
        m: {"name": m, "fingerprint": s.encoder_fingerprint, "features": "embeddings"} for m, s in stores.items()
    }
    adaptor = Adaptor(16, 12, kind="linear", projection_dim=8, encoders=encoders)
    with torch.no_grad():
        for tower, dim in ((adaptor.towers.image_tower, 16), (adaptor.towers.text_tower, 12)):
            tower.weight.copy_(torch.eye(8, dim))  # type: ignore[operator,union-attr]
    adaptor.save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def value(scores: pd.DataFrame, direction: str, metric: str, control: str = "") -> pd.Series:
    rows = scores[(scores["direction"] == direction) & (scores["metric"] == metric) & (scores["control"] == control)]
    assert len(rows) == 1
    return rows.iloc[0]


def test_pairs_that_belong_together_are_found_and_by_others_not(world: World, run_dir: Path) -> None:
    result = retrieve(world.manifest, world.image, world.text, run_dir, labels=["y"], config=QUICK)
    for direction in ("image_to_report", "report_to_image"):
        first = value(result.scores, direction, "recall@1")
        assert first["value"] == 1.0  # the image's first eight values are the text's
        assert first["chance"] == pytest.approx(1 / 80)
        assert first["one_order"] == 1 / 80
        assert (first["n_queries"], first["n_candidates"]) == (80, 80)
        assert value(result.scores, direction, "median_rank")["value"] == 1
        assert value(result.scores, direction, "median_rank")["chance"] == 40.5
        assert value(result.scores, direction, "recall@10", "untrained-adaptor")["value"] < 0.5
        precision = value(result.scores, direction, "precision@1")
        assert precision["value"] == 1.0
        y = world.manifest.frame.query("split == 'test'")["label.y"].to_numpy(float)
        assert precision["chance"] == pytest.approx(y.mean())
        assert precision["n_queries"] == y.sum()
    best = result.matches.query("direction == 'image_to_report' and rank == 1")
    assert best["is_own"].all()
    assert (best["query"] == best["match"]).all()
    assert (best["first_own"] == 1).all()


def test_shuffled_pairs_are_found_as_by_chance(world: World, run_dir: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    ids = world.text.ids
    shuffled = embedcache.save_store(
        tmp_path / "shuffled", ids, world.text.embeddings[rng.permutation(len(ids))], modality="text",
        store_dtype="float32", record=world.text.encoder,
    )  # fmt: skip
    encoders = {
        m: {"name": m, "fingerprint": s.encoder_fingerprint, "features": "embeddings"}
        for m, s in (("image", world.image), ("text", shuffled))
    }
    adaptor = Adaptor.from_pretrained(run_dir)
    adaptor.config["encoders"] = encoders
    adaptor.save_pretrained(tmp_path / "again")
    result = retrieve(world.manifest, world.image, shuffled, tmp_path / "again", config=QUICK)
    for direction in ("image_to_report", "report_to_image"):
        row = value(result.scores, direction, "recall@10")
        assert row["low"] <= row["chance"] <= row["high"]


def test_equal_texts_are_one_candidate(world: World, run_dir: Path) -> None:
    """Reports of two words only: two candidates for each image, forty images for each text."""
    frame = world.manifest.frame.copy()
    frame["report"] = [f"says {y}" for y in frame["label.y"]]
    digests_unknown = embedcache.open_store(world.text.path)
    result = retrieve(Manifest(frame, name="two", root="."), world.image, digests_unknown, run_dir, config=QUICK)
    row = value(result.scores, "image_to_report", "recall@1")
    assert row["n_candidates"] == 2
    assert row["chance"] == 0.5
    positive = frame.loc[frame["split"] == "test", "label.y"].mean()
    assert row["one_order"] == pytest.approx(max(positive, 1 - positive))  # the commoner text, named always
    assert value(result.scores, "image_to_report", "median_rank")["one_order"] == 1
    assert value(result.scores, "report_to_image", "recall@1")["one_order"] == 0.5
    assert value(result.scores, "report_to_image", "recall@1")["n_queries"] == 2
    assert value(result.scores, "image_to_report", "recall@5")["value"] == 1


def test_sentences_are_scored_by_the_token_that_is_most_like_them(tmp_path: Path) -> None:
    """Through real text encoders of both units, against loops."""
    rng, n = np.random.default_rng(0), 9
    ids = [f"i{k}" for k in range(n)]
    words = ("clear", "opacity", "effusion", "heart", "large", "left")
    reports = [
        " ".join(" ".join(rng.choice(words, 3)).capitalize() + "." for _ in range(rng.integers(1, 4))) for _ in ids
    ]
    frame = pd.DataFrame({"id": ids, "image": ids, "report": reports, "split": "test"})
    manifest = Manifest(frame, name="said", root=tmp_path)
    checkpoint = write_tiny("tiny-bert", tmp_path / "bert", seed=0, reports=reports)
    stores = {}
    for unit in ("caption", "sentence"):
        encoder = embedcache.load_encoder(
            f"hf:{checkpoint}", modality="text", pooling="mean", device="cpu", report=ReportPolicy(unit=unit)
        )
        embedcache.extract(manifest, encoder, tmp_path / unit, store_dtype="float32")
        stores[unit] = embedcache.open_store(tmp_path / unit)
    tokens = rng.normal(size=(n, 4, 16)).astype(np.float32)
    images = embedcache.save_store(tmp_path / "image", ids, tokens.mean(1), tokens=tokens, store_dtype="float32")
    encoders = {
        m: {"name": m, "fingerprint": s.encoder_fingerprint, "features": "embeddings"}
        for m, s in (("image", images), ("text", stores["caption"]))
    }
    dim = stores["caption"].layout.dim
    adaptor = Adaptor(16, dim, kind="linear", projection_dim=8, encoders=encoders).eval()
    adaptor.save_pretrained(tmp_path / "run")
    with torch.inference_mode():
        seen = adaptor.encode_image(torch.from_numpy(tokens)).numpy()
        said = adaptor.encode_text(torch.from_numpy(np.array(stores["sentence"].embeddings))).numpy()
    of = [np.array([i.split("#")[0] == report for i in stores["sentence"].ids]) for report in ids]
    expected = np.array([[(seen[k] @ said[rows].T).max(axis=0).mean() for rows in of] for k in range(n)])
    got = sentence_scores(adaptor, images, images.rows(ids), manifest, stores["caption"], stores["sentence"], ids)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-5)
    result = retrieve(
        manifest, images, stores["caption"], tmp_path / "run", sentence_store=stores["sentence"], config=QUICK
    )
    ranks = [1 + (expected[k] > expected[k, k]).sum() for k in range(n)]
    assert len(set(reports)) == n
    row = value(result.scores, "image_to_report", "median_rank", "by-sentences")
    assert row["value"] == np.median(ranks)
    with pytest.raises(JoinError, match="holds texts of the unit 'caption', expected sentences"):
        sentence_scores(adaptor, images, images.rows(ids), manifest, stores["caption"], stores["caption"], ids)
    with pytest.raises(JoinError, match="not of the text encoder of"):
        sentence_scores(adaptor, images, images.rows(ids), manifest, images, stores["sentence"], ids)
    with pytest.raises(MissingIdsError, match="1 of 1 reports have no sentence there: 'other'"):
        sentence_scores(adaptor, images, images.rows(ids), manifest, stores["caption"], stores["sentence"], ["other"])


def test_pairs_that_attend_to_each_other_are_refused(world: World, tmp_path: Path) -> None:
    encoders = {
        m: {"name": m, "fingerprint": s.encoder_fingerprint, "features": "embeddings"}
        for m, s in (("image", world.image), ("text", world.text))
    }
    Adaptor(16, 12, projection_dim=8, n_heads=2, ff_dim=8, attention="cross-modal", encoders=encoders).save_pretrained(
        tmp_path / "cross"
    )
    with pytest.raises(SettingsError, match="each would find itself"):
        retrieve(world.manifest, world.image, world.text, tmp_path / "cross")


def test_what_cannot_be_retrieved_is_refused(world: World, run_dir: Path) -> None:
    one = world.manifest.frame.assign(report="always the same")
    with pytest.raises(ManifestError, match="1 distinct texts in split 'test'"):
        retrieve(Manifest(one, name="one", root="."), world.image, world.text, run_dir)
    with pytest.raises(FingerprintMismatchError):
        retrieve(world.manifest, world.image, embedcache.save_store(
            run_dir / "x", world.text.ids, world.text.embeddings + 1, modality="text"), run_dir)  # fmt: skip
    with pytest.raises(ValueError, match="at 1, 1: expected"):
        RetrieveConfig(at=(1, 1))


def test_ranks_and_best_matches_equal_a_dense_reference_in_parts_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    queries, candidates = (torch.from_numpy(rng.normal(size=(n, 5))).float() for n in (37, 53))
    owner, codes = torch.from_numpy(rng.integers(0, 9, 53)), torch.from_numpy(rng.integers(0, 9, 37))
    scores = (queries @ candidates.T).numpy()
    order = np.argsort(-scores, axis=1)
    ranks = [(owner.numpy()[order[q]] == codes.numpy()[q]).argmax() + 1 for q in range(37)]
    for room in (1, 53, 53 * 5, 2**26):
        monkeypatch.setattr("embedcache.stage_two.ranks._SIMILARITIES_AT_ONCE", room)
        found = find(queries, candidates, owner, codes, k=7)
        assert found.ranks.tolist() == ranks
        np.testing.assert_array_equal(found.top, order[:, :7])


def test_medians_under_weights_are_medians_of_repeated_values() -> None:
    rng = np.random.default_rng(0)
    values, weights = rng.integers(0, 20, 15).astype(float), rng.integers(0, 4, (30, 15)).astype(np.uint8)
    for k, median in enumerate(weighted_medians(values, weights)):
        assert median == np.median(np.repeat(values, weights[k]))
    assert np.isnan(weighted_medians(values, np.zeros((1, 15), np.uint8)))[0]


def test_precision_leaves_unknown_candidates_out() -> None:
    relevant = np.array([1.0, np.nan, 0.0, 0.5])
    top = np.array([[0, 1, 2], [1, 1, 1], [3, 0, 1]])
    np.testing.assert_allclose(precision_at(relevant, top), [0.5, np.nan, 0.75])
