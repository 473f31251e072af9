"""The join: by id, complete or refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import embedcache
from embedcache import Manifest
from embedcache.errors import JoinError, MissingIdsError
from embedcache.stage_two.tensors import join, resident, text_codes


def test_rows_meet_by_id_whatever_the_order_of_a_store(world, tmp_path: Path) -> None:
    order = np.random.default_rng(1).permutation(400)
    shuffled = embedcache.save_store(
        tmp_path / "shuffled", [world.image.ids[k] for k in order], world.values[order], store_dtype="float32"
    )
    joined = join(world.manifest, shuffled, world.text)
    np.testing.assert_array_equal(resident(shuffled, joined.image_rows, "cpu").numpy(), world.values)
    assert [world.text.ids[r] for r in joined.text_rows] == world.manifest.frame["id"].tolist()


def test_an_id_that_a_store_does_not_hold_is_named(world, tmp_path: Path) -> None:
    short = embedcache.save_store(tmp_path / "short", world.image.ids[:-2], world.values[:-2])
    with pytest.raises(MissingIdsError, match=r"2 of 400 image ids .*'i398', 'i399'; run 'embedcache extract'"):
        join(world.manifest, short, world.text)


def test_stores_of_two_datasets_are_refused(world, tmp_path: Path) -> None:
    other = embedcache.save_store(tmp_path / "o", [f"o{k}" for k in range(400)], world.values, modality="text")
    with pytest.raises(JoinError, match=r"holds none of the 400 ids of dataset 'made' .*a store of another dataset"):
        join(world.manifest, world.image, other)


def test_swapped_stores_are_refused(world) -> None:
    with pytest.raises(JoinError, match="modality 'text', expected 'image'"):
        join(world.manifest, world.text, world.image)


def test_recorded_failures_are_left_out_and_counted(make_manifest, image_encoder, text_encoder, tmp_path: Path) -> None:
    manifest = make_manifest(12)
    (manifest.root / manifest.frame["image"][3]).write_bytes(b"")
    frame = manifest.frame.copy()
    frame.loc[7, "report"] = " "
    manifest = Manifest(frame, name="m", root=manifest.root)
    embedcache.extract(manifest, image_encoder, tmp_path / "image")
    embedcache.extract(manifest, text_encoder, tmp_path / "text")
    image, text = embedcache.open_store(tmp_path / "image"), embedcache.open_store(tmp_path / "text")
    joined = join(manifest, image, text)
    assert joined.n_failed == 2
    assert joined.rows.tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10, 11]
    assert [image.ids[r] for r in joined.image_rows] == [text.ids[r] for r in joined.text_rows]


def test_a_report_edited_since_is_refused(make_manifest, image_encoder, text_encoder, tmp_path: Path) -> None:
    manifest = make_manifest(6)
    embedcache.extract(manifest, image_encoder, tmp_path / "image")
    embedcache.extract(manifest, text_encoder, tmp_path / "text")
    frame = manifest.frame.copy()
    frame.loc[4, "report"] = "Something else."
    edited = Manifest(frame, name="m", root=manifest.root)
    with pytest.raises(JoinError, match="1 reports of 'm' are not the texts that were encoded: 's004'"):
        join(edited, embedcache.open_store(tmp_path / "image"), embedcache.open_store(tmp_path / "text"))


def test_values_that_are_not_finite_are_named(world) -> None:
    world.image.embeddings[5, 2] = np.nan  # the map is copy-on-write: the file stays as it is
    with pytest.raises(JoinError, match="not finite or zero throughout under ids 'i005'"):
        resident(world.image, np.arange(10), "cpu")


def test_equal_texts_share_a_code(world) -> None:
    frame = world.manifest.frame.copy()
    frame["report"] = ["a b", "b", "a  b\n", "c"] * 100  # white space is folded before a text is encoded
    codes = text_codes(Manifest(frame, name="m", root="."), np.array([0, 1, 2, 3, 6]), world.text)
    assert codes[0] == codes[2] == codes[4]
    assert len(set(codes.tolist())) == 3


def test_ids_in_one_store_only_can_be_left_out_and_are_named(world, tmp_path: Path) -> None:
    ids = world.image.ids
    fewer = embedcache.save_store(tmp_path / "fewer", ids[3:], world.values[3:], store_dtype="float32")
    texts = embedcache.save_store(
        tmp_path / "texts", ids[:-2], world.values[:-2], modality="text", store_dtype="float32"
    )
    with pytest.raises(MissingIdsError, match=r"3 of 400 image ids .*'i000', 'i001', 'i002'.*--allow-missing"):
        join(world.manifest, fewer, texts)
    joined = join(world.manifest, fewer, texts, allow_missing=True)
    assert joined.missing == ("i000", "i001", "i002", "i398", "i399")
    assert (len(joined.rows), joined.n_failed) == (395, 0)


def test_another_dataset_is_refused_even_where_rows_may_be_missing(world, tmp_path: Path) -> None:
    other = embedcache.save_store(tmp_path / "other", ["x", "y"], world.values[:2], store_dtype="float32")
    with pytest.raises(JoinError, match="a store of another dataset"):
        join(world.manifest, other, allow_missing=True)


def test_texts_are_equal_where_what_was_encoded_is(make_manifest, text_encoder, tmp_path: Path) -> None:
    """The default encodes captions: another indication makes no other text."""
    manifest = make_manifest(4)
    said = [("Cough", "Normal"), ("Fever", "Normal"), ("Cough", "Effusion"), ("Cough", "Normal")]
    reports = [f"INDICATION: {why}.\nFINDINGS: Clear lungs.\nIMPRESSION: {what}." for why, what in said]
    manifest = Manifest(manifest.frame.assign(report=reports), name="m", root=manifest.root)
    embedcache.extract(manifest, text_encoder, tmp_path / "captions")
    captions = embedcache.open_store(tmp_path / "captions")
    assert np.array_equal(captions.gather([0]), captions.gather([1]))
    assert text_codes(manifest, np.arange(4), captions).tolist() == [0, 0, 1, 0]
    elsewhere = embedcache.save_store(tmp_path / "else", captions.ids, captions.embeddings, modality="text")
    assert text_codes(manifest, np.arange(4), elsewhere).tolist() == [0, 1, 2, 0]
