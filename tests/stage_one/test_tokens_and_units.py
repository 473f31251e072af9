"""Tokens, text units and truncation on their way from the encoder into a store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import embedcache
from embedcache import Manifest
from embedcache.data.reports import ReportPolicy
from embedcache.errors import ManifestError


def reports(tmp_path: Path, texts: dict[str, str]) -> Manifest:
    frame = pd.DataFrame({"id": list(texts), "image": "x.png", "report": list(texts.values())})
    return Manifest(frame, name="texts", root=tmp_path)


@pytest.mark.parametrize("store_dtype", ["float32", "float16", "bfloat16", "int8"])
def test_tokens_of_images_are_the_encoders_own(make_manifest, checkpoints, tmp_path: Path, store_dtype: str) -> None:
    manifest = make_manifest(9)
    (manifest.root / manifest.frame["image"][4]).write_bytes(b"")
    encoder = embedcache.load_encoder(f"hf:{checkpoints / 'vit'}", pooling="cls", token_grid=4, device="cpu")
    report = embedcache.extract(
        manifest, encoder, tmp_path / "s", tokens=True, store_dtype=store_dtype, shard_rows=4, batch_size=2
    )
    assert (report.n_embedded, report.n_failed) == (8, 1)
    store = embedcache.open_store(tmp_path / "s", verify="digest")
    assert embedcache.verify_store(tmp_path / "s") == []
    ids = [i for i in manifest.frame["id"] if i != "s004"]
    rows = store.rows(ids)
    files = dict(zip(manifest.frame["id"], manifest.frame["image"], strict=True))
    expected = encoder.encode([encoder.prepare(manifest.path(files[i])) for i in ids], tokens=True)
    got = np.asarray(store.tokens[rows], np.float32)
    assert got.shape == (8, 16, 96)
    tolerance = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2, "int8": 5e-2}[store_dtype]
    np.testing.assert_allclose(got, expected.tokens, atol=tolerance)
    np.testing.assert_allclose(np.asarray(store.embeddings[rows], np.float32), expected.embeddings, atol=tolerance)


@pytest.mark.parametrize("store_dtype", ["float32", "int8"])
def test_tokens_of_texts_are_as_many_as_there_are(checkpoints, tmp_path: Path, store_dtype: str) -> None:
    texts = {
        "a": "The lungs are clear.",
        "b": "Heart size is normal. There is an opacity.",
        "c": " ",
        "d": "The lungs are clear.",
    }
    encoder = embedcache.load_encoder(f"hf:{checkpoints / 'bert'}", device="cpu")
    report = embedcache.extract(
        reports(tmp_path, texts), encoder, tmp_path / "s", tokens=True, store_dtype=store_dtype, batch_size=2
    )
    assert [f.id for f in report.failures] == ["c"]
    store = embedcache.open_store(tmp_path / "s", verify="digest")
    assert embedcache.verify_store(tmp_path / "s") == []
    for i in ("a", "b", "d"):
        prepared = encoder.prepare(texts[i])
        expected = encoder.encode([prepared], tokens=True).tokens[0]
        got = np.asarray(store.tokens[int(store.rows([i])[0])], np.float32)
        assert got.shape == (prepared.n_tokens, 128)
        np.testing.assert_allclose(got, expected, atol=1e-5 if store_dtype == "float32" else 5e-2)


def test_a_store_with_tokens_is_not_the_one_without(make_manifest, image_encoder, tmp_path: Path) -> None:
    manifest = make_manifest(4)
    plain = embedcache.extract(manifest, image_encoder, tmp_path / "a")
    with_tokens = embedcache.extract(manifest, image_encoder, tmp_path / "b", tokens=True)
    assert plain.n_embedded == with_tokens.n_embedded == 4
    a, b = embedcache.open_store(tmp_path / "a"), embedcache.open_store(tmp_path / "b")
    assert a.fingerprint != b.fingerprint
    np.testing.assert_array_equal(a.embeddings, b.embeddings)
    assert b.tokens[b.rows(["s002"])].shape == (1, 64, 96)


def test_sentences_are_rows_of_their_own(checkpoints, tmp_path: Path) -> None:
    texts = {
        "r1": "FINDINGS: The lungs are clear. Heart size is normal.\n\nIMPRESSION: Normal.",
        "r2": "Clear.",
        "r3": "  ",
    }
    encoder = embedcache.load_encoder(f"hf:{checkpoints / 'bert'}", report=ReportPolicy(unit="sentence"), device="cpu")
    report = embedcache.extract(reports(tmp_path, texts), encoder, tmp_path / "s")
    store = embedcache.open_store(tmp_path / "s")
    assert sorted(store.ids) == ["r1#s00", "r1#s01", "r1#s02", "r2#s00"]
    assert [f.id for f in report.failures] == ["r3"]
    first = encoder.encode([encoder.prepare("Normal.")]).embeddings[0]
    np.testing.assert_allclose(np.asarray(store.embeddings[store.rows(["r1#s00"])[0]], np.float32), first, atol=5e-3)
    with pytest.raises(ManifestError, match="'r2#s00'; give changed inputs new ids"):
        embedcache.extract(reports(tmp_path, {**texts, "r2": "Opaque."}), encoder, tmp_path / "s")


@pytest.mark.parametrize(
    ("unit", "encoded", "reason"),
    [("impression", "Normal.", "no-section"), ("findings", "The lungs are clear.", "no-section"),
     ("caption", "Normal. The lungs are clear.", None)],
)  # fmt: skip
def test_sections_and_captions(checkpoints, tmp_path: Path, unit: str, encoded: str, reason: str | None) -> None:
    whole = "FINDINGS: The lungs are clear.\n\nIMPRESSION: Normal."
    only = "FINDINGS: The lungs are clear." if unit == "impression" else "IMPRESSION: Normal."
    encoder = embedcache.load_encoder(f"hf:{checkpoints / 'bert'}", report=ReportPolicy(unit=unit), device="cpu")
    report = embedcache.extract(
        reports(tmp_path, {"a": whole, "b": only}), encoder, tmp_path / "s", store_dtype="float32"
    )
    assert [f.reason for f in report.failures] == ([reason] if reason else [])
    as_is = embedcache.load_encoder(f"hf:{checkpoints / 'bert'}", report=ReportPolicy(unit="report"), device="cpu")
    expected = as_is.encode([as_is.prepare(encoded)]).embeddings[0]
    store = embedcache.open_store(tmp_path / "s")
    np.testing.assert_allclose(store.embeddings[store.rows(["a"])[0]], expected, atol=1e-5)


def test_truncation_is_counted_by_id(checkpoints, tmp_path: Path) -> None:
    texts = {"short": "Clear.", "long": "The lungs are clear. " * 30}
    encoder = embedcache.load_encoder(f"hf:{checkpoints / 'bert'}", max_length=20, device="cpu")
    report = embedcache.extract(reports(tmp_path, texts), encoder, tmp_path / "s")
    assert report.truncated == {"long": 30 * 5 + 2 - 20}
    assert report.to_json()["truncated"] == report.truncated
    assert embedcache.extract(reports(tmp_path, texts), encoder, tmp_path / "s").truncated == {}
