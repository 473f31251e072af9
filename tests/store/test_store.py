"""The store as a reader and a library user see it."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import embedcache
from embedcache.errors import MissingIdsError, StoreFormatError, StoreNotFoundError, StoreWriteError
from embedcache.store import layout
from embedcache.store.catalogue import Catalogue, Plan, open_or_create, publish_plan
from embedcache.store.commit import publish_shard
from embedcache.store.layout import Layout
from embedcache.store.shard import Failure, ShardImage, ShardRows


def rows(n: int, d: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def document(store_layout: Layout) -> dict:
    return layout.store_document(
        encoder={"name": "made"}, encoder_fingerprint="f", modality="image", store_layout=store_layout
    )


def write_shards(path: Path, parts: list[tuple[list[str], list[str]]], d: int = 8) -> np.ndarray:
    """A store of several shards, each with embedded and failed ids; gives all embedded rows in order."""
    catalogue = open_or_create(path, document(Layout("float32", d)))
    written = []
    for number, (embedded, failed) in enumerate(parts):
        codes = rows(len(embedded), d, seed=number)
        plan = Plan([*embedded, *failed], [0, len(embedded) + len(failed)], number, 4)
        assert publish_plan(path, number, plan)
        shard = ShardRows(
            embedded,
            np.zeros(len(embedded), np.uint16),
            codes,
            np.ones((len(embedded), 16), np.uint8),
            [Failure(i, "truncated", "cut short") for i in failed],
        )
        image = ShardImage(shard, catalogue.document)
        publish_shard(path, number, image, image.facts)
        written.append(codes)
    return np.concatenate(written)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_come_back(tmp_path: Path, dtype: str) -> None:
    values = rows(300)
    store = embedcache.save_store(tmp_path / "s", [f"i{k}" for k in range(300)], values, store_dtype=dtype)
    expected = torch.from_numpy(values).to(getattr(torch, dtype)).float().numpy()
    np.testing.assert_array_equal(np.asarray(store.embeddings, np.float32), expected)
    assert embedcache.verify_store(tmp_path / "s") == []


def mapped_file(array: np.ndarray) -> str:
    """The file that the system has mapped where an array's bytes are; empty for plain memory."""
    at = array.ctypes.data
    for line in Path("/proc/self/maps").read_text().splitlines():
        bounds, *fields = line.split(maxsplit=5)
        start, stop = (int(bound, 16) for bound in bounds.split("-"))
        if start <= at < stop:
            return fields[4] if len(fields) == 5 and fields[4].startswith("/") else ""
    raise AssertionError("an address that is not mapped")


def row_offset(path: Path) -> int:
    with h5py.File(shard_file(path)) as file:
        return file["embeddings"].id.get_offset()


def test_one_shard_is_mapped_not_copied(tmp_path: Path) -> None:
    store = embedcache.save_store(tmp_path / "s", ["a", "b"], rows(2))
    assert mapped_file(store.embeddings) == str(shard_file(tmp_path / "s"))
    tensor = torch.from_numpy(store.embeddings)
    assert tensor.data_ptr() == store.embeddings.ctypes.data


def test_writing_to_the_map_reaches_neither_file_nor_others(tmp_path: Path) -> None:
    store = embedcache.save_store(tmp_path / "s", ["a", "b"], rows(2))
    store.embeddings[:] = 7
    assert embedcache.verify_store(tmp_path / "s") == []
    np.testing.assert_array_equal(embedcache.open_store(tmp_path / "s").embeddings, rows(2))


@pytest.mark.parametrize("n", range(1, 200, 13))
def test_rows_start_on_a_cache_line_and_off_a_page(tmp_path: Path, n: int) -> None:
    embedcache.save_store(tmp_path / "s", [f"i{k}" * (n % 7 + 1) for k in range(n)], rows(n))
    assert row_offset(tmp_path / "s") % 64 == 0
    assert row_offset(tmp_path / "s") % 4096 != 0


def test_an_empty_store_is_legal(tmp_path: Path) -> None:
    store = embedcache.save_store(tmp_path / "s", [], np.empty((0, 4), np.float32))
    assert len(store) == 0
    assert store.embeddings.shape == (0, 4)
    assert embedcache.verify_store(tmp_path / "s") == []


def test_many_shards_read_as_one(tmp_path: Path) -> None:
    written = write_shards(tmp_path / "s", [(["a", "b"], ["x"]), (["c"], []), ([], ["y"])])
    store = embedcache.open_store(tmp_path / "s", verify="digest")
    assert store.ids == ["a", "b", "c"]
    np.testing.assert_array_equal(store.embeddings, written)
    assert [f.id for f in store.failures] == ["x", "y"]
    np.testing.assert_array_equal(store.rows(["c", "a"]), [2, 0])
    np.testing.assert_array_equal(store[2]["embedding"], written[2])
    assert [s["id"] for s in store.__getitems__([1, 0])] == ["b", "a"]


def test_it_is_a_dataset_for_a_loader_with_workers(tmp_path: Path) -> None:
    written = write_shards(tmp_path / "s", [([f"i{k}" for k in range(10)], []), ([f"j{k}" for k in range(6)], [])])
    store = embedcache.open_store(tmp_path / "s")
    loader = torch.utils.data.DataLoader(store, batch_size=5, num_workers=2)
    batches = list(loader)
    np.testing.assert_array_equal(torch.cat([b["embedding"] for b in batches]).numpy(), written)
    assert [i for b in batches for i in b["id"]] == store.ids


def test_the_latest_record_of_an_id_holds(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", [(["a"], ["b"]), (["b", "a"], []), ([], ["c"])])
    store = embedcache.open_store(tmp_path / "s")
    assert store.ids == ["b", "a"]
    np.testing.assert_array_equal(store.embeddings, rows(2, seed=1))
    assert [f.id for f in store.failures] == ["c"]


def test_missing_ids_are_named(tmp_path: Path) -> None:
    store = embedcache.save_store(tmp_path / "s", ["a"], rows(1))
    with pytest.raises(MissingIdsError, match=r"2 of 3 ids .*'z', 'y'.*embedcache extract"):
        store.rows(["z", "a", "y"])
    with pytest.raises(KeyError):
        store.rows(["z"])


def test_no_store_says_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match=r"found nothing.*embedcache extract"):
        embedcache.open_store(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="an empty directory"):
        embedcache.open_store(tmp_path)


@pytest.mark.parametrize(
    ("ids", "values", "message"),
    [
        (["a"], rows(2), r"expected \(1, d\)"),
        (["a", "a"], rows(2), "duplicate ids: 'a'"),
        (["a", "b"], np.array([[1.0, 2], [np.nan, 1]]), "not finite.*'b'"),
        (["a", "b"], np.array([[0.0, 0], [2, 1]]), "zero throughout: 'a'"),
        (["a", "a\0"], rows(2), "NUL"),
        (["a", ""], rows(2), "is empty"),
        (["a", "\ud800"], rows(2), "not valid Unicode"),
    ],
)
def test_what_cannot_be_saved(tmp_path: Path, ids: list[str], values: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embedcache.save_store(tmp_path / "s", ids, values)
    assert not (tmp_path / "s").exists()


def test_a_nan_that_bfloat16_would_round_away_is_refused(tmp_path: Path) -> None:
    values = np.full((1, 2), 0xFFFFFFFF, np.uint32).view(np.float32)
    with pytest.raises(ValueError, match="not finite"):
        embedcache.save_store(tmp_path / "s", ["a"], values, store_dtype="bfloat16")


def test_an_unknown_modality_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="modality 'sound', expected 'image' or 'text'"):
        embedcache.save_store(tmp_path / "s", ["a"], rows(1), modality="sound")


def test_values_that_overflow_the_stored_dtype_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not finite as float16.*'b'"):
        embedcache.save_store(tmp_path / "s", ["a", "b"], np.array([[1.0], [1e6]]), store_dtype="float16")


def test_a_store_is_not_overwritten(tmp_path: Path) -> None:
    embedcache.save_store(tmp_path / "s", ["a"], rows(1))
    with pytest.raises(StoreWriteError, match="holds a store already"):
        embedcache.save_store(tmp_path / "s", ["a"], rows(1))


def test_without_a_record_the_contents_are_the_fingerprint(tmp_path: Path) -> None:
    one = embedcache.save_store(tmp_path / "1", ["a", "b"], rows(2))
    same = embedcache.save_store(tmp_path / "2", ["a", "b"], rows(2))
    other = embedcache.save_store(tmp_path / "3", ["a", "c"], rows(2))
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("1", "2"):
        write_shards(tmp_path / name, [(["a", "b"], ["c"])])
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("1", "2"))
    assert first == second


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    embedcache.save_store(tmp_path / "s", ["a"], rows(1))
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o700
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "s").iterdir()} == {0o600}


# what a damaged or foreign store looks like


def shard_file(path: Path) -> Path:
    return next(p for p in path.iterdir() if p.suffix == ".h5")


def test_a_flipped_bit_is_found_and_its_rows_are_named(tmp_path: Path) -> None:
    ids = [f"i{k}" for k in range(600)]
    embedcache.save_store(tmp_path / "s", ids, rows(600))
    file, at = shard_file(tmp_path / "s"), row_offset(tmp_path / "s") + 300 * 8 * 4 + 5
    damaged = bytearray(file.read_bytes())
    damaged[at] ^= 1
    file.write_bytes(damaged)
    (problem,) = embedcache.verify_store(tmp_path / "s")
    assert problem.kind == "damaged"
    assert problem.ids == tuple(ids[256:512])
    with pytest.raises(StoreFormatError, match="SHA-256"):
        embedcache.open_store(tmp_path / "s", verify="digest")


@pytest.mark.parametrize("damage", ["truncate", "append", "remove"])
def test_a_file_of_another_size_never_opens(tmp_path: Path, damage: str) -> None:
    embedcache.save_store(tmp_path / "s", ["a", "b"], rows(2))
    file = shard_file(tmp_path / "s")
    data = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(data[:-7] if damage == "truncate" else data + b"\0")
    with pytest.raises(StoreFormatError, match=r"embedcache verify"):
        embedcache.open_store(tmp_path / "s")
    (problem,) = embedcache.verify_store(tmp_path / "s")
    assert problem.kind == ("missing" if damage == "remove" else "damaged")
    assert set(problem.ids) <= {"a", "b"}
    assert problem.ids


def test_an_edited_document_is_refused(tmp_path: Path) -> None:
    embedcache.save_store(tmp_path / "s", ["a"], rows(1))
    document = tmp_path / "s" / layout.STORE_NAME
    document.write_bytes(document.read_bytes().replace(b'"dim":8', b'"dim":9'))
    with pytest.raises(StoreFormatError, match="damaged or edited"):
        embedcache.open_store(tmp_path / "s")


def test_a_damaged_shard_document_is_a_problem_beside_others(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", [(["a"], []), (["b"], [])])
    (tmp_path / "s" / layout.shard_doc_name(0)).write_bytes(b"{}")
    (problem,) = embedcache.verify_store(tmp_path / "s")
    assert (problem.shard, problem.kind) == ("shard-00000.json", "damaged")
    with pytest.raises(StoreFormatError, match="not a sealed store document"):
        embedcache.open_store(tmp_path / "s")


def test_a_document_that_names_another_file_is_refused(tmp_path: Path) -> None:
    embedcache.save_store(tmp_path / "s", ["a"], rows(1))
    path = tmp_path / "s" / layout.shard_doc_name(0)
    document = layout.unseal(path.read_bytes(), path)
    path.write_bytes(layout.seal({**document, "file": "../other/" + document["file"]}))
    with pytest.raises(StoreFormatError, match="which is not this shard's"):
        embedcache.open_store(tmp_path / "s")


def test_a_plan_that_was_taken_away_is_noticed(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", [(["a"], []), (["b"], [])])
    (tmp_path / "s" / layout.plan_name(0)).unlink()
    with pytest.raises(StoreFormatError, match=r"plans \[1\], expected 0 to 0: a plan was taken away"):
        Catalogue.read(tmp_path / "s")


def test_another_major_version_is_refused_and_a_minor_one_is_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(layout, "FORMAT", "1.7")
    embedcache.save_store(tmp_path / "minor", ["a"], rows(1), record={"from": "the future"})
    monkeypatch.setattr(layout, "FORMAT", "2.0")
    embedcache.save_store(tmp_path / "major", ["a"], rows(1))
    monkeypatch.undo()
    assert embedcache.open_store(tmp_path / "minor").encoder == {"from": "the future"}
    with pytest.raises(StoreFormatError, match=r"format '2.0', this embedcache reads 1\.x"):
        embedcache.open_store(tmp_path / "major")


def test_a_shard_of_another_store_is_refused(tmp_path: Path) -> None:
    one = embedcache.save_store(tmp_path / "1", ["a", "b"], rows(2))
    embedcache.save_store(tmp_path / "2", ["a", "b"], rows(2, seed=5))
    foreign = shard_file(tmp_path / "2")
    shard_file(tmp_path / "1").unlink()
    os.link(foreign, tmp_path / "1" / foreign.name)
    document_path = tmp_path / "1" / layout.shard_doc_name(0)
    document = layout.unseal((tmp_path / "2" / layout.shard_doc_name(0)).read_bytes(), document_path)
    document_path.write_bytes(layout.seal({**document, "fingerprint": one.fingerprint}))
    with pytest.raises(StoreFormatError, match="a shard of another store"):
        embedcache.open_store(tmp_path / "1")


def test_unfinished_shards_are_counted(tmp_path: Path) -> None:
    catalogue = open_or_create(tmp_path / "s", document(Layout("float32", 4)))
    publish_plan(catalogue.path, 0, Plan(["a", "b", "c"], [0, 2, 3], 0, 2))
    store = embedcache.open_store(tmp_path / "s")
    assert len(store) == 0
    assert store.n_pending_shards == 2
    assert [shard.ids for shard in Catalogue.read(tmp_path / "s").pending()] == [["a", "b"], ["c"]]
