"""What an extraction will take, told before it starts."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import embedcache
from embedcache import Manifest
from embedcache.errors import FingerprintMismatchError, InputError, StoreWriteError
from embedcache.stage_one import estimate as estimate_module
from embedcache.stage_one.estimate import bytes_on_disk, in_bytes
from embedcache.stage_one.extract import plan_extraction
from embedcache.store.layout import Layout, TokenLayout


def size_of(store: Path) -> int:
    return sum(p.stat().st_size for p in store.glob("*.h5"))


@pytest.mark.parametrize(("tokens", "store_dtype"), [(False, "float32"), (True, "float16"), (True, "int8")])
def test_bytes_of_images_are_as_foretold(make_manifest, image_encoder, tmp_path: Path, tokens, store_dtype) -> None:
    manifest, options = make_manifest(60), {"tokens": tokens, "store_dtype": store_dtype, "views": 2}
    found = plan_extraction(manifest, image_encoder, tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()
    assert (found.n_asked, found.n_present, found.n_to_do, found.n_distinct, found.n_shards) == (60, 0, 60, 60, 1)
    assert found.bytes_embeddings < found.bytes_tokens
    assert found.bytes_needed == (found.bytes_tokens if tokens else found.bytes_embeddings)
    assert found.prepare_per_s > 0 < found.encode_per_s
    assert found.seconds == pytest.approx(120 * (1 / found.prepare_per_s + 1 / found.encode_per_s))
    assert found.fits
    embedcache.extract(manifest, image_encoder, tmp_path / "s", **options)
    assert size_of(tmp_path / "s") == pytest.approx(found.bytes_needed, rel=0.1, abs=16_000)


def test_bytes_of_texts_follow_their_lengths(make_manifest, text_encoder, tmp_path: Path) -> None:
    manifest = make_manifest(200)
    found = plan_extraction(manifest, text_encoder, tmp_path / "s", tokens=True, batch_size=8)
    embedcache.extract(manifest, text_encoder, tmp_path / "s", tokens=True, batch_size=8)
    assert size_of(tmp_path / "s") == pytest.approx(found.bytes_needed, rel=0.15)


def test_the_tokens_of_a_large_dataset_are_told_before_the_start() -> None:
    """217,000 images at 257 x 768 in float16."""
    layout = Layout("float16", 768, tokens=TokenLayout(768, 257))
    assert in_bytes(bytes_on_disk(layout, 217_000, 0)) == "86 GB"


def test_what_is_done_and_what_is_said_twice_is_left_out(make_manifest, text_encoder, tmp_path: Path) -> None:
    manifest = make_manifest(30)
    frame = manifest.frame.copy()
    frame["report"] = [f"{'Clear lungs' if i % 2 else 'An opacity'} again." for i in range(30)]
    same = Manifest(frame, name="same", root=manifest.root)
    first = Manifest(frame.iloc[:10], name="same", root=manifest.root)
    embedcache.extract(first, text_encoder, tmp_path / "s")
    found = plan_extraction(same, text_encoder, tmp_path / "s")
    assert (found.n_asked, found.n_present, found.n_to_do, found.n_distinct) == (30, 10, 20, 2)
    assert "18 of them the same text as another" in "\n".join(found.lines())
    embedcache.extract(same, text_encoder, tmp_path / "s")
    done = plan_extraction(same, text_encoder, tmp_path / "s")
    assert (done.n_present, done.n_to_do, done.seconds, done.bytes_needed) == (30, 0, None, 0)


def test_a_part_takes_its_share(make_manifest, image_encoder, tmp_path: Path) -> None:
    manifest = make_manifest(30)
    shares = [
        plan_extraction(manifest, image_encoder, tmp_path / "s", shard_rows=4, part=(k, 3)).n_to_do for k in (1, 2, 3)
    ]
    assert shares == [12, 10, 8]


def test_bad_inputs_are_seen_in_the_probe(make_manifest, image_encoder, tmp_path: Path) -> None:
    manifest = make_manifest(6)
    for file in manifest.frame["image"][:2]:
        (manifest.root / file).write_bytes(b"")
    found = plan_extraction(manifest, image_encoder, tmp_path / "s")
    assert found.n_bad == 2
    assert "2 of the samples probed" in "\n".join(found.lines())
    for file in manifest.frame["image"]:
        (manifest.root / file).write_bytes(b"")
    with pytest.raises(InputError, match="no bytes"):
        plan_extraction(manifest, image_encoder, tmp_path / "s")


def test_another_encoders_store_is_refused_by_the_plan_too(
    make_manifest, image_encoder, text_encoder, tmp_path: Path
) -> None:
    manifest = make_manifest(4)
    embedcache.extract(manifest, image_encoder, tmp_path / "s")
    with pytest.raises(FingerprintMismatchError, match="another encoder"):
        plan_extraction(manifest, text_encoder, tmp_path / "s")


def test_what_the_disk_cannot_hold_is_not_started(make_manifest, image_encoder, tmp_path: Path, monkeypatch) -> None:
    manifest = make_manifest(20)
    monkeypatch.setattr(estimate_module, "free_bytes", lambda store: 5_000)
    with pytest.raises(StoreWriteError, match=r"needs about 5\.1 kB, and 5\.0 kB are free there; nothing was started"):
        embedcache.extract(manifest, image_encoder, tmp_path / "s")
    assert not list((tmp_path / "s").glob("plan-*")) + list((tmp_path / "s").glob("shard-*"))
    assert not plan_extraction(manifest, image_encoder, tmp_path / "s").fits
    few = Manifest(manifest.frame.iloc[:10], name="few", root=manifest.root)
    assert embedcache.extract(few, image_encoder, tmp_path / "s").n_embedded == 10


@pytest.mark.parametrize(
    ("n", "words"), [(640, "640 bytes"), (1234, "1.2 kB"), (12_345_678, "12 MB"), (86e9, "86 GB"), (1.5e12, "1.5 TB")]
)
def test_sizes_for_people(n: float, words: str) -> None:
    assert in_bytes(int(n)) == words


def test_an_automatic_batch_size_on_a_cpu_is_the_usual_one(make_manifest, image_encoder, tmp_path: Path) -> None:
    from embedcache.store.catalogue import Catalogue

    embedcache.extract(make_manifest(4), image_encoder, tmp_path / "s", batch_size="auto")
    assert Catalogue.read(tmp_path / "s").plans[0].batch_size == estimate_module.DEFAULT_BATCH
    with pytest.raises(ValueError, match="batch_size is 'most'"):
        embedcache.extract(make_manifest(2, name="b"), image_encoder, tmp_path / "b", batch_size="most")


def test_an_empty_manifest_takes_nothing(image_encoder, tmp_path: Path) -> None:
    empty = Manifest(pd.DataFrame({"id": [], "image": []}, dtype=str), name="none", root=tmp_path)
    assert plan_extraction(empty, image_encoder, tmp_path / "s").n_to_do == 0
