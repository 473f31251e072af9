"""Segmentation: what can be learnt is, nothing of the test masks leaks, and an empty mask is called one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import embedcache
from embedcache import Adaptor, Manifest
from embedcache.data.masks import boxes_mask
from embedcache.data.views import ViewPolicy
from embedcache.encoders.random_init import write_tiny
from embedcache.errors import (
    FingerprintMismatchError,
    ManifestError,
    MissingIdsError,
    NoTokensError,
    SettingsError,
)
from embedcache.stage_two.kept import KeptDecoder, read_kept
from embedcache.stage_two.mask_targets import has_mask, read_targets
from embedcache.stage_two.segment import segment
from embedcache.stage_two.segment_config import SegmentConfig
from embedcache.stage_two.segment_tables import SegmentResult
from embedcache.stage_two.token_feed import TokenFeed
from embedcache.store.store import Store

N, GRID, DIM, SIDE = 240, 6, 8, 24
QUICK = SegmentConfig(
    decoders=("linear",), size=SIDE, fractions=(0.2, 1.0), n_seeds=2, epochs=40, min_steps=150, lr=3e-2, n_draws=200
)


@dataclass(frozen=True)
class Masked:
    manifest: Manifest
    store: Store


@pytest.fixture
def masked(tmp_path: Path) -> Masked:
    """Two thirds of the images have a box of whole cells as their mask, which their tokens show amid noise."""
    rng = np.random.default_rng(0)
    ids = [f"i{k:03d}" for k in range(N)]
    cells = np.zeros((N, GRID, GRID), bool)
    texts = []
    for k in range(N):
        boxes = []
        if k % 3:
            x, y = rng.integers(0, GRID - 2, 2)
            w, h = rng.integers(1, 4, 2)
            cells[k, y : y + h, x : x + w] = True
            boxes = [tuple(float(v) * 20 for v in (x, y, min(w, GRID - x), min(h, GRID - y)))]
        texts.append(boxes_mask(boxes, (GRID * 20, GRID * 20)))  # type: ignore[arg-type]
    tokens = rng.normal(size=(N, GRID * GRID, DIM)).astype(np.float32) / 2
    tokens[..., 0] += 3 * cells.reshape(N, -1) - 1.5
    frame = pd.DataFrame(
        {
            "id": ids,
            "image": [f"{i}.png" for i in ids],
            "patient": [f"p{k // 2}" for k in range(N)],
            "split": [("train", "train", "train", "valid", "test")[k // 2 % 5] for k in range(N)],
            "mask": texts,
        }
    )
    store = embedcache.save_store(tmp_path / "tokens", ids, tokens.mean(1), tokens=tokens, store_dtype="float32")
    return Masked(Manifest(frame, name="masked", root=tmp_path), store)


def value(result: SegmentResult, metric: str, *, control: str = "", fraction: float = 1.0) -> float:
    rows = result.scores.query("metric == @metric and control == @control and fraction == @fraction")
    assert len(rows) == 1
    return float(rows["value"].iloc[0])


def test_masks_that_tokens_show_are_learnt_the_right_way_round(masked: Masked) -> None:
    result = segment(masked.manifest, masked.store, config=QUICK)
    assert value(result, "dice_on_positives") > 0.8
    assert value(result, "dice") > value(result, "empty_mask_dice")
    assert value(result, "empty_mask_dice") == pytest.approx(1 / 3, abs=0.05)
    assert value(result, "dice_on_positives", control="mean-mask") < 0.6
    gain = result.gains.query("control == 'mean-mask' and metric == 'dice_on_positives' and fraction == 1.0").iloc[0]
    assert gain["low"] > 0.1
    assert gain["p_holm"] < 0.05
    row = result.scores.query("metric == 'dice' and control == '' and fraction == 0.2").iloc[0]
    assert (row["n_train"], row["n_test"], row["n_positive"], row["n_seeds"]) == (29, 48, 32, 2)
    assert row["low"] <= row["patients_low"] + 0.05
    assert row["choice"] == "valid"
    assert not result.notes


def test_what_each_image_got_stands_by_id(masked: Masked, tmp_path: Path) -> None:
    result = segment(masked.manifest, masked.store, config=replace(QUICK, fractions=(1.0,)))
    result.write(tmp_path / "out")
    images = pd.read_parquet(tmp_path / "out" / "images.parquet")
    assert len(images) == 48 * 2
    assert images.groupby("seed")["dice"].mean().mean() == pytest.approx(value(result, "dice"), abs=1e-6)
    tests = masked.manifest.frame.query("split == 'test'")
    assert set(images["id"]) == set(tests["id"])
    assert (images["true_pixels"] > 0).to_numpy()[:48].tolist() == [int(i[1:]) % 3 > 0 for i in tests["id"]]
    scores = pd.read_csv(tmp_path / "out" / "scores.csv", keep_default_na=False)
    assert set(scores["control"]) == {"", "mean-mask"}


def test_a_model_that_predicts_nothing_scores_as_an_empty_mask_and_is_called_collapsed(masked: Masked) -> None:
    config = replace(QUICK, fractions=(1.0,), threshold=1 - 1e-9)
    result = segment(masked.manifest, masked.store, config=config)
    assert value(result, "dice") == value(result, "empty_mask_dice")
    assert value(result, "dice_on_positives") == 0
    assert value(result, "predicted_empty") == 1
    (note,) = [note for note in result.notes if note.startswith("result")]
    assert "predicts an empty mask for every image" in note
    assert f"its Dice of {value(result, 'dice'):.3f} is what an empty mask scores" in note


@pytest.mark.parametrize("decoder", ["linear", "conv"])
def test_streamed_tokens_give_the_same_decoder_as_resident_ones(masked: Masked, decoder: str) -> None:
    config = replace(QUICK, decoders=(decoder,), fractions=(1.0,), n_seeds=1, epochs=2, min_steps=0, size=24)
    resident = segment(masked.manifest, masked.store, config=replace(config, data="resident"))
    streamed = segment(masked.manifest, masked.store, config=replace(config, data="streamed"))
    pd.testing.assert_frame_equal(resident.scores, streamed.scores)
    for name, tensor in resident.kept[decoder].state.items():
        assert torch.equal(tensor, streamed.kept[decoder].state[name])


def test_test_masks_choose_nothing(masked: Masked) -> None:
    """With other masks on the test split, decoders come out the same to the bit."""
    frame = masked.manifest.frame.copy()
    is_test = frame["split"] == "test"
    frame.loc[is_test, "mask"] = boxes_mask([(0.0, 0.0, 60.0, 60.0)], (120, 120))
    config = replace(QUICK, fractions=(1.0,), n_seeds=1)
    own = segment(masked.manifest, masked.store, config=config)
    other = segment(Manifest(frame, name="masked", root=masked.manifest.root), masked.store, config=config)
    for name, tensor in own.kept["linear"].state.items():
        assert torch.equal(tensor, other.kept["linear"].state[name])
    assert value(own, "dice") > value(other, "dice") + 0.2


def test_an_adaptor_stands_beside_itself_untrained_and_none(masked: Masked, tmp_path: Path) -> None:
    encoders = {"image": {"name": "x", "fingerprint": masked.store.encoder_fingerprint, "features": "embeddings"}}
    adaptor = Adaptor(DIM, 4, projection_dim=8, n_layers=1, n_heads=2, ff_dim=16, encoders=encoders)
    adaptor.save_pretrained(tmp_path / "run")
    config = replace(QUICK, fractions=(1.0,), n_seeds=1, epochs=2)
    result = segment(masked.manifest, masked.store, run_dir=tmp_path / "run", config=config)
    assert list(dict.fromkeys(result.scores["control"])) == ["", "no-adaptor", "untrained-adaptor", "mean-mask"]
    alone = segment(masked.manifest, masked.store, config=config)
    assert value(alone, "dice") == value(result, "dice", control="no-adaptor")
    stranger = {"image": {"name": "x", "fingerprint": "0" * 64, "features": "embeddings"}}
    Adaptor(DIM, 4, projection_dim=8, n_layers=1, n_heads=2, ff_dim=16, encoders=stranger).save_pretrained(
        tmp_path / "other"
    )
    with pytest.raises(FingerprintMismatchError, match="Adaptor was trained on image encoder"):
        segment(masked.manifest, masked.store, run_dir=tmp_path / "other", config=config)


def test_mirrored_grids_go_with_mirrored_masks(masked: Masked) -> None:
    """Under flips a decoder that looks at each cell alone learns the same task."""
    result = segment(masked.manifest, masked.store, config=replace(QUICK, flips=True, fractions=(1.0,), n_seeds=1))
    assert value(result, "dice_on_positives") > 0.8


def test_bfloat16_learns_too(masked: Masked) -> None:
    config = replace(QUICK, precision="bfloat16", fractions=(1.0,), n_seeds=1)
    assert value(segment(masked.manifest, masked.store, config=config), "dice_on_positives") > 0.75


def test_rows_without_a_known_mask_are_left_out_and_counted(masked: Masked) -> None:
    frame = masked.manifest.frame.copy()
    frame.loc[:9, "mask"] = ""
    config = replace(QUICK, fractions=(1.0,), n_seeds=1, epochs=1, min_steps=0)
    result = segment(Manifest(frame, name="masked", root="."), masked.store, config=config)
    assert "masked: 10 images left out, as their mask is not known" in result.notes


def test_a_mask_that_is_missing_as_none_is_unknown(masked: Masked) -> None:
    frame = masked.manifest.frame.copy()
    frame["mask"] = frame["mask"].where(frame.index >= 10, None)
    assert has_mask(Manifest(frame, name="masked", root=".")).tolist() == [False] * 10 + [True] * (N - 10)


def test_masks_too_small_to_see_are_counted(masked: Masked) -> None:
    frame = masked.manifest.frame.copy()
    frame.loc[[3, 8], "mask"] = boxes_mask([(0.0, 0.0, 1.0, 1.0)], (120, 120))
    config = replace(QUICK, fractions=(1.0,), n_seeds=1, epochs=1, min_steps=0)
    result = segment(Manifest(frame, name="masked", root="."), masked.store, config=config)
    assert any("2 masks (1 of them on test) lie outside what the encoder saw" in note for note in result.notes)


def test_streamed_maps_of_an_adaptor_are_rounded_as_resident_ones(masked: Masked, tmp_path: Path) -> None:
    tokens = np.asarray(masked.store.tokens[np.arange(N)])
    half = embedcache.save_store(tmp_path / "half", masked.store.ids, tokens.mean(1), tokens=tokens)
    adaptor = Adaptor(DIM, 4, projection_dim=8, n_layers=1, n_heads=2, ff_dim=16)
    rows, chosen = half.rows(masked.store.ids)[:, None], [(np.arange(7), 0), (np.arange(50, 90), 0)]
    feeds = [TokenFeed(half, rows, adaptor, "cpu", data=data) for data in ("resident", "streamed")]
    assert [feed.is_resident for feed in feeds] == [True, False]
    for one, other in zip(*(feed.batches(chosen) for feed in feeds), strict=True):
        torch.testing.assert_close(
            one, other, atol=2e-4, rtol=0
        )  # one rounding apart, where batches are summed otherwise
        assert (one == other).float().mean() > 0.95


def test_few_validation_masks_choose_no_epoch(masked: Masked) -> None:
    config = replace(QUICK, fractions=(0.02,), epochs=1, min_steps=0)
    result = segment(masked.manifest, masked.store, config=config)
    assert (result.scores["choice"] == "fixed").all()
    assert (result.scores["n_valid"] == 0).all()


def test_what_cannot_be_segmented_is_refused(masked: Masked, tmp_path: Path) -> None:
    frame = masked.manifest.frame
    with pytest.raises(ManifestError, match="no row has a mask"):
        segment(Manifest(frame.assign(mask=""), name="m", root="."), masked.store, config=QUICK)
    bad = frame.copy()
    bad.loc[3, "mask"], bad.loc[7, "mask"] = "nowhere.png", "rle:4x4:3 99"
    with pytest.raises(ManifestError, match=r"2 of 240 masks cannot be read: 'i003', 'i007'"):
        segment(Manifest(bad, name="m", root=tmp_path), masked.store, config=QUICK)
    with pytest.raises(SettingsError, match=r"the paper's decoder takes 16 x 16 tokens .* found 6 x 6 tokens"):
        segment(masked.manifest, masked.store, config=SegmentConfig(protocol="paper-rsna"))
    plain = embedcache.save_store(tmp_path / "plain", frame["id"].tolist(), np.ones((N, 4), np.float32))
    with pytest.raises((SettingsError, NoTokensError), match="holds no tokens"):
        segment(masked.manifest, plain, config=QUICK)
    odd = embedcache.save_store(
        tmp_path / "odd", frame["id"].tolist(), np.ones((N, 4), np.float32), tokens=np.ones((N, 7, 4), np.float32)
    )
    with pytest.raises(SettingsError, match="7 tokens of an image make no grid"):
        segment(masked.manifest, odd, config=QUICK)
    with pytest.raises(ManifestError, match="no image of split 'test' has tokens and a mask"):
        segment(Manifest(frame.assign(split="train"), name="m", root="."), masked.store, config=QUICK)


def test_a_decoder_that_is_kept_predicts_as_it_was_scored(masked: Masked, tmp_path: Path) -> None:
    config = replace(QUICK, fractions=(1.0,), n_seeds=1, epochs=2, min_steps=0)
    result = segment(masked.manifest, masked.store, config=config)
    result.write(tmp_path)
    kept = read_kept(tmp_path / "decoder-linear.safetensors")
    assert isinstance(kept, KeptDecoder)
    assert (kept.name, kept.size, kept.grid) == ("linear", (SIDE, SIDE), (GRID, GRID))
    rows = np.flatnonzero((masked.manifest.frame["split"] == "test").to_numpy())
    store_rows = masked.store.rows(masked.manifest.frame["id"].tolist())
    feed = TokenFeed(masked.store, store_rows[:, None], None, "cpu")
    (maps,) = feed.batches([(rows, np.zeros(len(rows), np.int64))])
    with torch.inference_mode():
        masks = kept.module()(maps)[:, 0].sigmoid().numpy() > kept.threshold
    assert masks.sum(axis=(1, 2)).tolist() == result.images["predicted_pixels"].tolist()


def test_settings_that_contradict_a_protocol_are_refused() -> None:
    assert SegmentConfig(protocol="paper-siim").size == 896
    with pytest.raises(ValueError, match=r"protocol 'paper-rsna' fixes lr; leave them out, or the protocol"):
        SegmentConfig(protocol="paper-rsna", lr=1e-3)
    with pytest.raises(ValueError, match="unknown decoders unet"):
        SegmentConfig(decoders=("unet",))


def test_masks_of_views_lie_where_stage_one_put_the_views(tmp_path: Path) -> None:
    """Images that are their own masks, through a real encoder's preparation and extraction."""
    rng, ids = np.random.default_rng(0), [f"i{k}" for k in range(12)]
    for name in ids:
        pixels = np.zeros((90, 120), np.uint8)
        y, x = rng.integers(20, 40), rng.integers(20, 60)
        pixels[y : y + 30, x : x + 20] = pixels[y + 20 : y + 30, x : x + 40] = 255
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    files = [f"{i}.png" for i in ids]
    split = ["train"] * 8 + ["valid"] * 2 + ["test"] * 2
    frame = pd.DataFrame({"id": ids, "image": files, "mask": files, "split": split})
    manifest = Manifest(frame, name="own", root=tmp_path)
    checkpoint = write_tiny("tiny-vit", tmp_path / "vit", seed=0, reports=[])
    encoder = embedcache.load_encoder(f"hf:{checkpoint}", modality="image", pooling="mean", device="cpu")
    policy = ViewPolicy(rotation_degrees=40, min_area=0.5, brightness=0, contrast=0)
    embedcache.extract(manifest, encoder, tmp_path / "store", tokens=True, views=3, view_policy=policy)
    store = embedcache.open_store(tmp_path / "store")
    targets = read_targets(manifest, np.arange(12), store, (64, 64), n_views=3)
    for k, file in enumerate(files):
        for view, prepared in enumerate(encoder.prepare_views(tmp_path / file, 3, policy)):
            values = prepared.inputs[0]
            seen = torch.nn.functional.interpolate(values[None, None], (64, 64), mode="area")[0, 0].numpy()
            seen = seen > (seen.min() + seen.max()) / 2
            mask = targets.take(np.array([k]), view)[0].bool().numpy()
            assert (mask & seen).sum() / (mask | seen).sum() > 0.85
    config = SegmentConfig(
        decoders=("linear",), size=32, fractions=(1.0,), n_seeds=1, epochs=3, min_steps=0, views="all", n_draws=50
    )
    result = segment(manifest, store, config=config)
    assert value(result, "dice") > 0
    without = store.restricted(store.views != 1)
    with pytest.raises(MissingIdsError, match="have no row of view 1"):
        segment(manifest, without, config=config)


def test_views_that_were_drawn_elsewhere_have_no_masks(masked: Masked) -> None:
    with pytest.raises(SettingsError, match="does not say how its views were drawn"):
        read_targets(masked.manifest, np.arange(10), masked.store, (SIDE, SIDE), n_views=3)
