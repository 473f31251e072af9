"""Batches: the right rows, wherever they lie and however they are stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import embedcache
from embedcache import Manifest, TrainConfig
from embedcache.errors import JoinError, SettingsError
from embedcache.stage_two.batches import Planner
from embedcache.stage_two.distributed import Share
from embedcache.stage_two.feed import Feed, ahead, fits
from embedcache.stage_two.pairs import Pairs, pairs_of_split
from embedcache.stage_two.tensors import join
from embedcache.store.store import Store


def pairs_of(world, config: TrainConfig | None = None, image: Store | None = None, split: str = "train") -> Pairs:
    image = image or world.image
    joined = join(world.manifest, image, world.text)
    return pairs_of_split(world.manifest, image, world.text, joined, split, config or TrainConfig())


def planner_of(pairs: Pairs, **changes: object) -> Planner:
    planner = Planner(pairs.reports, (pairs.image.n_views, pairs.text.n_views), None, 64, True, 0.0)
    return replace(planner, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("resident", [True, False])
def test_batches_hold_the_rows_of_their_ids(world, resident: bool) -> None:
    pairs = pairs_of(world)
    plans = [planner_of(pairs).plan(seed=seed, epoch=0) for seed in (0, 1)]
    batches = list(Feed(pairs, "cpu", resident=resident).epoch(plans))
    assert len(batches) == 4
    for s, batch in enumerate(batches):
        for i, plan in enumerate(plans):
            ids = pairs.ids[plan.pairs[plan.starts[s] : plan.starts[s + 1]]]
            rows = world.image.rows(ids.tolist())
            assert torch.equal(batch.image[i], torch.from_numpy(world.image.embeddings[rows]))
            assert torch.equal(batch.text[i], torch.from_numpy(world.text.embeddings[world.text.rows(ids.tolist())]))
            assert len(set(batch.codes[i].tolist())) == len(ids)
    assert batches[0].image_mask is None
    assert torch.equal(batches[0].codes, batches[0].all_codes)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_every_stored_dtype_gives_the_values_of_the_store(world, tmp_path: Path, dtype: str) -> None:
    image = embedcache.save_store(tmp_path / dtype, world.image.ids, world.values, store_dtype=dtype)
    pairs = pairs_of(world, image=image)
    plan = planner_of(pairs).plan(seed=0, epoch=0)
    expected = torch.from_numpy(image.gather(image.rows(pairs.ids[plan.pairs].tolist()))).float()
    for resident in (True, False):
        found = torch.cat([batch.image[0] for batch in Feed(pairs, "cpu", resident=resident).epoch([plan])])
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


def test_an_order_by_shards_gives_the_same_rows(world, tmp_path: Path) -> None:
    pairs = pairs_of(world)
    plan = planner_of(pairs, shards=np.arange(len(pairs)) // 50, batch_size=2).plan(seed=0, epoch=0)
    streamed = torch.cat([b.image[0] for b in Feed(pairs, "cpu", resident=False).epoch([plan])])
    assert torch.equal(
        streamed, torch.from_numpy(world.image.embeddings[world.image.rows(pairs.ids[plan.pairs].tolist())])
    )
    assert len(plan.windows) - 1 < plan.n_batches


@pytest.mark.parametrize("resident", [True, False])
def test_an_epoch_goes_on_in_its_middle(world, resident: bool) -> None:
    pairs = pairs_of(world)
    feed, plan = Feed(pairs, "cpu", resident=resident), planner_of(pairs, batch_size=10).plan(seed=0, epoch=0)
    whole, rest = list(feed.epoch([plan])), list(feed.epoch([plan], first=17))
    assert len(rest) == len(whole) - 17
    assert all(torch.equal(a.image, b.image) for a, b in zip(whole[17:], rest, strict=True))


@pytest.mark.parametrize("resident", [True, False])
def test_processes_share_a_batch_without_gap_or_overlap(world, resident: bool) -> None:
    pairs = pairs_of(world)
    plan = planner_of(pairs, batch_size=50, mixup=0.5).plan(seed=0, epoch=0)
    whole = list(Feed(pairs, "cpu", resident=resident).epoch([plan]))
    parts = [list(Feed(pairs, "cpu", resident=resident, share=Share(r, 3)).epoch([plan])) for r in range(3)]
    for s, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[s].image for part in parts], 1), batch.image)
        assert torch.equal(torch.cat([part[s].codes for part in parts], 1), batch.codes)
        assert torch.equal(parts[2][s].all_codes, batch.codes)


def test_mixtures_are_of_one_share_in_both_modalities(world) -> None:
    pairs = pairs_of(world)
    plan = planner_of(pairs, mixup=1.0).plan(seed=0, epoch=0)
    assert plan.partners is not None
    a, b = plan.starts[1], plan.starts[2]
    own, other = pairs.ids[plan.pairs[a:b]].tolist(), pairs.ids[plan.pairs[plan.partners[a:b]]].tolist()
    batch = list(Feed(pairs, "cpu", resident=True).epoch([plan]))[1]
    share = plan.shares[1]
    for store, found in ((world.image, batch.image[0]), (world.text, batch.text[0])):
        expected = share * store.gather(store.rows(own)) + (1 - share) * store.gather(store.rows(other))
        torch.testing.assert_close(found, torch.from_numpy(expected.astype(np.float32)))
    assert len(set(batch.codes[0].tolist())) == len(own)


def test_mixtures_of_equal_texts_are_equal(world) -> None:
    frame = world.manifest.frame.assign(report=[f"text {k % 2}" for k in range(400)])
    manifest = Manifest(frame, name="m", root=".")
    pairs = pairs_of_split(
        manifest, world.image, world.text, join(manifest, world.image, world.text), "train", TrainConfig()
    )
    plan = planner_of(pairs, mixup=1.0).plan(seed=0, epoch=0)
    codes = next(iter(Feed(pairs, "cpu", resident=True).epoch([plan]))).codes[0]
    assert len(set(codes.tolist())) == 4


def test_all_views_are_drawn_and_validation_sees_the_first(
    make_manifest, image_encoder, text_encoder, tmp_path: Path
) -> None:
    manifest = make_manifest(40)
    embedcache.extract(manifest, image_encoder, tmp_path / "views", views=3)
    embedcache.extract(manifest, text_encoder, tmp_path / "text")
    image, text = embedcache.open_store(tmp_path / "views"), embedcache.open_store(tmp_path / "text")
    joined = join(manifest, image, text)

    def pairs_under(views: str, split: str) -> Pairs:
        return pairs_of_split(manifest, image, text, joined, split, TrainConfig(views=views))  # type: ignore[arg-type]

    pairs = pairs_under("all", "train")
    plan = planner_of(pairs).plan(seed=0, epoch=0)
    assert set(plan.image_views.tolist()) == {0, 1, 2}
    for resident in (True, False):
        values = torch.cat([b.image[0] for b in Feed(pairs, "cpu", resident=resident).epoch([plan])])
        for k, (at, view) in enumerate(zip(plan.pairs, plan.image_views, strict=True)):
            expected = image.gather(image.rows([pairs.ids[at]], view=int(view)))[0]
            assert torch.equal(values[k], torch.from_numpy(expected).float())
    assert pairs_under("all", "valid").image.n_views == 1
    assert pairs_under("first", "train").image.n_views == 1


@pytest.mark.parametrize("positives", ["text_digest", "report_id", "row"])
def test_who_is_a_positive_of_whom(world, positives: str) -> None:
    frame = world.manifest.frame.copy()
    frame.loc[[0, 1], "report_id"], frame.loc[[0, 1, 2], "report"] = "i000", "one text"
    manifest = Manifest(frame, name="m", root=".")
    text = embedcache.save_store(world.text.path.with_name("t"), world.text.ids, world.text.embeddings, modality="text")
    config = TrainConfig(positives=positives)  # type: ignore[arg-type]
    pairs = pairs_of_split(manifest, world.image, text, join(manifest, world.image, text), "train", config)
    equal = {k for k in range(3) if pairs.codes[k] == pairs.codes[0]}
    assert equal == {"text_digest": {0, 1, 2}, "report_id": {0, 1}, "row": {0}}[positives]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_rows_that_are_of_no_use_are_named_when_they_are_read(world, bad: float) -> None:
    world.image.embeddings[1] = bad  # in memory: no store would take it
    pairs = pairs_of(world)
    with pytest.raises(JoinError, match="not finite or zero throughout under ids 'i001'"):
        Feed(pairs, "cpu", resident=True)
    plan = planner_of(pairs).plan(seed=0, epoch=0)
    with pytest.raises(JoinError, match="not finite or zero throughout under ids 'i001'"):
        list(Feed(pairs, "cpu", resident=False).epoch([plan]))


@pytest.fixture
def tokens_world(tmp_path: Path):
    """Images with 5 tokens, reports with 1 to 40."""
    rng = np.random.default_rng(0)
    n = 60
    ids = [f"i{k:02d}" for k in range(n)]
    frame = pd.DataFrame(
        {"id": ids, "image": ids, "report": [f"text {k}" for k in range(n)], "patient": ids, "split": "train"}
    )
    lengths = rng.integers(1, 41, n)
    text_tokens = [rng.normal(size=(m, 6)).astype(np.float32) for m in lengths]
    image_tokens = rng.normal(size=(n, 5, 8)).astype(np.float32)
    image = embedcache.save_store(
        tmp_path / "image", ids, image_tokens.mean(1), tokens=image_tokens, store_dtype="float32"
    )
    text = embedcache.save_store(
        tmp_path / "text",
        ids,
        np.stack([t.mean(0) for t in text_tokens]),
        tokens=text_tokens,
        modality="text",
        store_dtype="float32",
    )
    return Manifest(frame, name="tokens", root=tmp_path), image, text, image_tokens, text_tokens


@pytest.mark.parametrize("resident", [True, False])
def test_tokens_come_with_a_mask_of_those_that_are_there(tokens_world, resident: bool) -> None:
    manifest, image, text, image_tokens, text_tokens = tokens_world
    config = TrainConfig(image="tokens", text="tokens")
    pairs = pairs_of_split(manifest, image, text, join(manifest, image, text), "train", config)
    plan = planner_of(pairs, batch_size=16).plan(seed=0, epoch=0)
    for s, batch in enumerate(Feed(pairs, "cpu", resident=resident).epoch([plan])):
        at = plan.pairs[plan.starts[s] : plan.starts[s + 1]]
        assert torch.equal(batch.image[0], torch.from_numpy(image_tokens[at]))
        assert batch.image_mask is None
        assert batch.text_mask is not None
        assert batch.text.shape[2] % 32 == 0
        for k, row in enumerate(at.tolist()):
            mask = batch.text_mask[0, k]
            assert mask.sum() == len(text_tokens[row])
            assert torch.equal(batch.text[0, k][mask], torch.from_numpy(text_tokens[row]))


def test_ragged_tokens_train_alike_resident_and_streamed(tokens_world, tmp_path: Path) -> None:
    manifest, image, text, _, _ = tokens_world
    base = TrainConfig(
        epochs=2, batch_size=16, image="tokens", text="tokens", projection_dim=24, ff_dim=32, lr=1e-3, dropout=0.1
    )
    found = {}
    for data in ("resident", "streamed"):
        config = replace(base, data=data)  # type: ignore[arg-type]
        result = embedcache.train(manifest, image, text, tmp_path / data, config=config)
        assert np.isfinite([entry["train_loss"] for entry in result.history]).all()
        found[data] = (tmp_path / data / "adaptor.safetensors").read_bytes()
    assert found["resident"] == found["streamed"]


def test_a_text_without_tokens_is_named(tmp_path: Path, tokens_world) -> None:
    manifest, image, _, _, text_tokens = tokens_world
    text_tokens[4] = text_tokens[4][:0]
    means = np.ones((60, 6), np.float32)
    text = embedcache.save_store(tmp_path / "none", image.ids, means, tokens=text_tokens, modality="text")
    config = TrainConfig(text="tokens")
    pairs = pairs_of_split(manifest, image, text, join(manifest, image, text), "train", config)
    for resident in (True, False):
        with pytest.raises(JoinError, match="under ids 'i04'"):
            list(Feed(pairs, "cpu", resident=resident).epoch([planner_of(pairs).plan(seed=0, epoch=0)]))


def test_a_large_side_is_read_in_pieces(world, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = pairs_of(world)
    plan = planner_of(pairs).plan(seed=0, epoch=0)
    whole = [batch.image for batch in Feed(pairs, "cpu", resident=True).epoch([plan])]
    monkeypatch.setattr("embedcache.stage_two.feed._PIECE", 7)
    monkeypatch.setattr("embedcache.stage_two.feed._CHUNK", 9)
    feed = Feed(pairs, "cpu", resident=True)
    assert all(torch.equal(a, b.image) for a, b in zip(whole, feed.epoch([plan]), strict=True))
    images = torch.cat([image.values for image, _ in feed.chunks()])
    assert torch.equal(images, torch.from_numpy(world.image.gather(world.image.rows(pairs.ids.tolist()))))


def test_tokens_of_a_store_without_any_are_refused(world) -> None:
    with pytest.raises(SettingsError, match="holds no tokens; train on embeddings, or extract with --tokens"):
        pairs_of(world, TrainConfig(image="tokens"))


def test_what_does_not_fit_is_not_resident(world, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = pairs_of(world)
    needed = 240 * (16 + 12) * 4
    for free, expected in ((2 * needed, True), (needed, False)):
        monkeypatch.setattr("embedcache.stage_two.feed.available_bytes", lambda free=free: free)
        assert fits([pairs], "cpu") is expected


def test_what_fails_ahead_fails_here() -> None:
    def items():
        yield 1
        raise OSError("gone")

    found = ahead(items())
    assert next(found) == 1
    with pytest.raises(OSError, match="gone"):
        next(found)
