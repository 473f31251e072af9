"""Reading: tokens, dtypes, many shards, many ids, other processes."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from test_store import document, mapped_file, rows, write_shards

import embedcache
from embedcache.errors import MissingIdsError, NoTokensError, StoreFormatError
from embedcache.fingerprint import digest_file
from embedcache.store import source
from embedcache.store.catalogue import open_or_create
from embedcache.store.commit import publish_shard
from embedcache.store.id_index import IdIndex, key_array
from embedcache.store.layout import Layout, TokenLayout
from embedcache.store.mapping import map_file
from embedcache.store.save import write_store
from embedcache.store.shard import ShardImage, ShardRows
from embedcache.store.values import from_stored, to_stored


def write_token_shards(
    path: Path, counts: list[int], dtype: str, *, ragged: bool
) -> tuple[np.ndarray, list[np.ndarray]]:
    """A store of several shards with tokens; gives what its readers must get: embeddings and tokens by row."""
    rng = np.random.default_rng(0)
    store_layout = Layout(dtype, 8, tokens=TokenLayout(6, None if ragged else 3))
    all_embeddings, all_tokens, shards, start = [], [], [], 0
    for n in counts:
        codes, scales = to_stored(rng.normal(size=(n, 8)), dtype)
        lengths = [(start + k) % 4 if ragged else 3 for k in range(n)]
        token_codes, token_scales = to_stored(rng.normal(size=(sum(lengths), 6)), dtype)
        values = from_stored(token_codes, dtype, token_scales)
        all_tokens += np.split(values, np.cumsum(lengths)[:-1]) if n else []
        all_embeddings.append(from_stored(codes, dtype, scales))
        shape = (n, 3) if not ragged else (sum(lengths),)
        shards.append(
            ShardRows(
                [f"i{start + k}" for k in range(n)],
                np.zeros(n, np.uint16),
                codes,
                np.zeros((n, 16), np.uint8),
                [],
                scales,
                token_codes.reshape(*shape, 6),
                np.cumsum([0, *lengths]) if ragged else None,
                None if token_scales is None else token_scales.reshape(shape),
            )
        )
        start += n
    write_store(path, document(store_layout), shards, batch_size=4)
    return np.concatenate(all_embeddings), all_tokens


@pytest.mark.parametrize("ragged", [False, True], ids=["fixed", "ragged"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_tokens_and_embeddings_of_many_shards(tmp_path: Path, dtype: str, ragged: bool) -> None:
    embeddings, tokens = write_token_shards(tmp_path / "s", [5, 0, 3, 7], dtype, ragged=ragged)
    store = embedcache.open_store(tmp_path / "s", verify="digest")
    assert embedcache.verify_store(tmp_path / "s") == []
    order = np.array([14, 0, 7, 7, 5, 2, 9, 4, 8])
    np.testing.assert_array_equal(store.gather(order), embeddings[order])
    assert "embeddings" not in store.__dict__  # gathered straight from the shards
    np.testing.assert_array_equal(store.embeddings, embeddings)
    np.testing.assert_array_equal(store.gather(order), embeddings[order])
    assert len(store.tokens) == 15
    for got, row in zip(store.tokens[order], order, strict=True):
        np.testing.assert_array_equal(got, tokens[row])
    np.testing.assert_array_equal(store.tokens[-1], tokens[14])
    for got, expected in zip(store.tokens[3:11], tokens[3:11], strict=True):
        np.testing.assert_array_equal(got, expected)
    assert store.embeddings.dtype == store.tokens[0].dtype == ("float16" if dtype == "float16" else "float32")
    np.testing.assert_array_equal(store[6]["tokens"], tokens[6])
    assert [s["id"] for s in store.__getitems__([6, 0])] == ["i6", "i0"]
    packed = embedcache.pack_store(tmp_path / "s", tmp_path / "s.h5")
    np.testing.assert_array_equal(packed.embeddings, embeddings)
    for got, expected in zip(packed.tokens[:], tokens, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_fixed_tokens_of_one_shard_are_not_copied(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).normal(size=(4, 3, 6)).astype(np.float16)
    store = embedcache.save_store(tmp_path / "s", list("abcd"), rows(4), tokens=tokens, store_dtype="float16")
    whole = np.asarray(store.tokens)
    assert mapped_file(whole).endswith(".h5")
    np.testing.assert_array_equal(whole, tokens)
    assert store.tokens.shape == (4, 3, 6)


def test_a_store_without_tokens_says_so(tmp_path: Path) -> None:
    store = embedcache.save_store(tmp_path / "s", ["a"], rows(1))
    with pytest.raises(NoTokensError, match="holds embeddings and no tokens"):
        _ = store.tokens
    assert "tokens" not in store[0]


@pytest.mark.parametrize("bad", [[5], [-6], np.array([0, 7])])
def test_rows_outside_the_store_are_refused(tmp_path: Path, bad) -> None:
    store = embedcache.save_store(tmp_path / "s", list("abcde"), rows(5))
    with pytest.raises(IndexError, match="of a store of 5 rows"):
        store.gather(bad)
    with pytest.raises(IndexError, match="expected integers"):
        store.gather([0.5])
    np.testing.assert_array_equal(store.gather([-1]), rows(5)[-1:])
    np.testing.assert_array_equal(store.gather(np.array([True, False, False, False, True])), rows(5)[[0, 4]])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.ones((3, 2, 4)), "tokens of 3 rows for 2 ids"),
        ([np.ones((1, 4)), np.ones((2, 5))], r"expected \(n, l, d\), or n arrays \(l_i, d\) of one d"),
        ([np.ones(4), np.ones(4)], "expected"),
        ([np.ones((1, 4)), np.array([[1, 1, np.nan, 1]])], "1 rows are not finite .*'b'"),
        (np.array([[[1.0, 2]], [[np.inf, 1]]]), "1 rows are not finite .*'b'"),
    ],
)
def test_tokens_that_cannot_be_saved(tmp_path: Path, tokens, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embedcache.save_store(tmp_path / "s", ["a", "b"], rows(2), tokens=tokens)
    assert not (tmp_path / "s").exists()


# values


def test_int8_is_within_half_a_scale(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(200, 64)).astype(np.float32) * np.logspace(-6, 6, 200)[:, None]
    store = embedcache.save_store(tmp_path / "s", [f"i{k}" for k in range(200)], values, store_dtype="int8")
    error = np.abs(store.embeddings - values).max(axis=1)
    largest = np.abs(values).max(axis=1)
    assert (error <= largest / 254 * (1 + 1e-5)).all()
    assert store.raw.dtype == np.int8
    np.testing.assert_allclose(store.scales, largest / 127, rtol=1e-6)


def test_int8_of_hard_rows() -> None:
    values = np.array([[0, 0], [1e-45, 0], [3e38, -3e38], [np.nan, 1], [np.inf, 1]], np.float32)
    codes, scales = to_stored(values, "int8")
    np.testing.assert_array_equal(from_stored(codes, "int8", scales)[0], [0, 0])
    np.testing.assert_allclose(from_stored(codes, "int8", scales)[2], values[2], rtol=1e-6)
    assert not np.isfinite(from_stored(codes, "int8", scales)[3:]).all(axis=1).any()


def test_without_scales_int8_is_not_guessed() -> None:
    with pytest.raises(ValueError, match="without their scales"):
        from_stored(np.zeros((1, 2), np.int8), "int8")


# ids


@pytest.mark.parametrize("n", [0, 1, 2, 1000, 5000])
def test_the_index_finds_every_key_and_no_other(n: int) -> None:
    ids = [f"{'é' if k % 7 == 0 else ''}{k * 7919}-{'x' * (k % 13)}" for k in range(n)]
    index = IdIndex(key_array(ids))
    order = np.random.default_rng(0).permutation(n)
    np.testing.assert_array_equal(index.find(key_array([ids[k] for k in order])), order)
    np.testing.assert_array_equal(index.find(key_array(ids)), np.arange(n))
    np.testing.assert_array_equal(index.find(key_array(["no", "nor this one, which is much longer" * 9])), [-1, -1])
    np.testing.assert_array_equal(index.firsts(), np.arange(n))


def test_of_equal_keys_the_first_counts() -> None:
    keys = key_array([f"k{k % 37}" for k in range(500)])
    np.testing.assert_array_equal(IdIndex(keys).firsts(), np.arange(500) % 37)


def test_keys_that_hash_alike_are_told_apart(monkeypatch) -> None:
    from embedcache.store import id_index

    monkeypatch.setattr(id_index, "_hashes", lambda keys: np.zeros(len(keys), np.uint64))
    ids = [f"k{k}" for k in range(200)]
    index = IdIndex(key_array(ids))
    np.testing.assert_array_equal(index.find(key_array(ids[::-1])), np.arange(200)[::-1])


def test_ids_are_compared_byte_for_byte(tmp_path: Path) -> None:
    ids = ["1", " 1", "1 ", "1.0", "é", "e\u0301", "A", "a"]
    store = embedcache.save_store(tmp_path / "s", ids, rows(8))
    np.testing.assert_array_equal(store.rows(ids[::-1]), np.arange(8)[::-1])
    for absent in ("1\0", "\ud800", "", "E", "É"):
        assert absent not in store
        with pytest.raises(MissingIdsError, match="1 of 2 ids"):
            store.rows(["1", absent])
    assert 1 not in store
    np.testing.assert_array_equal(store.find(["a", "1\0", "1"]), [7, -1, 0])


# processes


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_loader_read_the_same(tmp_path: Path, context: str) -> None:
    written = write_shards(tmp_path / "s", [([f"i{k}" for k in range(10)], []), ([f"j{k}" for k in range(6)], [])])
    store = embedcache.open_store(tmp_path / "s")
    store.rows(["i3"])
    loader = torch.utils.data.DataLoader(store, batch_size=5, num_workers=2, multiprocessing_context=context)
    batches = list(loader)
    np.testing.assert_array_equal(torch.cat([b["embedding"] for b in batches]).numpy(), written)
    assert [i for b in batches for i in b["id"]] == store.ids


def test_a_pickled_store_opens_the_shards_it_had(tmp_path: Path) -> None:
    """A store that has grown meanwhile must not move the rows under somebody's indices."""
    write_shards(tmp_path / "s", [(["a"], []), (["b"], [])])
    pickled = pickle.dumps(embedcache.open_store(tmp_path / "s"))
    assert len(pickled) < 4000
    catalogue = open_or_create(tmp_path / "s", document(Layout("float32", 8)))
    shard = ShardRows(["a"], np.zeros(1, np.uint16), rows(1, seed=9), np.zeros((1, 16), np.uint8), [])
    image = ShardImage(shard, catalogue.document)
    publish_shard(tmp_path / "s", 2, image, image.facts)
    assert pickle.loads(pickled).ids == ["a", "b"]  # noqa: S301  # written above
    assert embedcache.open_store(tmp_path / "s").ids == ["b", "a"]


def test_many_shards_hold_no_open_files(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", [([f"i{k}"], []) for k in range(60)])
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    store = embedcache.open_store(tmp_path / "s")
    _ = store.embeddings, store.ids
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_map_may_be_larger_than_memory(tmp_path: Path) -> None:
    """Copy-on-write maps count against memory unless nothing is reserved for them."""
    size = 4 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(size)
    mapped = map_file(tmp_path / "sparse", size)
    assert len(mapped) == size
    assert mapped[-1] == 0
    with pytest.raises(OSError, match="shorter than"):
        map_file(tmp_path / "sparse", size + 1)


def test_an_id_that_is_no_text_is_a_typed_error(tmp_path: Path) -> None:
    store = embedcache.save_store(tmp_path / "s", ["aa", "bb"], rows(2))
    store._keys[0] = b"\xff\xfe"
    with pytest.raises(StoreFormatError, match="an id is not UTF-8"):
        _ = store.ids


# what is easily forgotten: no rows, no tokens, odd numbers


def test_no_rows_may_be_asked_of_many_shards(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", [(["a", "b"], []), (["c"], [])])
    store = embedcache.open_store(tmp_path / "s")
    assert store.gather([]).shape == (0, 8)
    assert store.__getitems__([]) == []
    assert store.rows([]).shape == (0,)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_tokens_of_no_rows_and_rows_of_no_tokens(tmp_path: Path, dtype: str) -> None:
    none = embedcache.save_store(tmp_path / "none", [], np.empty((0, 8)), tokens=np.empty((0, 3, 6)), store_dtype=dtype)
    assert none.tokens.shape == (0, 3, 6)
    empty = [np.empty((0, 6))] * 2
    empty = embedcache.save_store(tmp_path / "empty", ["a", "b"], rows(2), tokens=empty, store_dtype=dtype)
    assert [t.shape for t in empty.tokens[:]] == [(0, 6), (0, 6)]
    for name in ("none", "empty"):
        assert embedcache.verify_store(tmp_path / name) == []
        packed = embedcache.pack_store(tmp_path / name, tmp_path / f"{name}.h5")
        assert len(packed.tokens) == len(packed)


def test_a_store_without_a_counted_shard_packs_and_drops(tmp_path: Path) -> None:
    made = embedcache.save_store(tmp_path / "s", ["a"], rows(1), tokens=[np.ones((2, 6))], store_dtype="int8")
    next((tmp_path / "s").glob("shard-*.json")).unlink()
    store = embedcache.open_store(tmp_path / "s")
    assert (len(store), store.n_pending_shards) == (0, 1)
    packed = embedcache.pack_store(tmp_path / "s", tmp_path / "s.h5")
    assert (len(packed), packed.fingerprint) == (0, made.fingerprint)


NANS = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F800001, 0xFF800001], np.uint32).view(np.float32)


@pytest.mark.parametrize("nan", NANS, ids=[hex(k) for k in NANS.view(np.uint32)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_no_nan_becomes_a_number(tmp_path: Path, dtype: str, nan: np.float32) -> None:
    values = np.array([[1, nan, 1, 1]], np.float32)
    assert not np.isfinite(from_stored(*_with_dtype(to_stored(values, dtype), dtype))).all()
    with pytest.raises(ValueError, match="1 rows are not finite"):
        embedcache.save_store(tmp_path / "s", ["a"], values, store_dtype=dtype)
    with pytest.raises(ValueError, match="1 rows are not finite"):
        embedcache.save_store(tmp_path / "s", ["a"], rows(1), tokens=values[None], store_dtype=dtype)


def _with_dtype(stored: tuple[np.ndarray, np.ndarray | None], dtype: str) -> tuple:
    return stored[0], dtype, stored[1]


@pytest.mark.parametrize(
    ("ids", "values", "message"),
    [
        (["a", None], rows(2), "id 1 is None, a NoneType, expected str"),
        ([1.0, "a"], rows(2), "id 0 is 1.0, a float, expected str"),
        ([b"a", "b"], rows(2), "a bytes, expected str"),
        (["a", "b"], rows(2).astype(complex), "embeddings of dtype complex128, expected real numbers"),
        (["a", "b"], np.ma.masked_array(rows(2), rows(2) > 0), "masked values"),
        (["a", "b"], np.array([["x"], ["y"]]), "of dtype <U1"),
        (["a", "b"], np.array([[object()], [None]]), "of dtype object"),
        (["a", "b"], np.zeros((2, 1), "M8[s]"), "of dtype datetime64"),
    ],
)
def test_what_is_no_id_or_no_number_is_not_made_one(tmp_path: Path, ids, values, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embedcache.save_store(tmp_path / "s", ids, values)
    assert not (tmp_path / "s").exists()


def test_a_restricted_store_stays_so_when_pickled(tmp_path: Path) -> None:
    written = write_shards(tmp_path / "s", [(["a", "b"], []), (["c"], [])])
    store = embedcache.open_store(tmp_path / "s")
    seen = pickle.loads(pickle.dumps(store.restricted(np.array([False, True, True]))))  # noqa: S301
    assert seen.ids == ["b", "c"]
    np.testing.assert_array_equal(seen.embeddings, written[1:])
    parts = [pickle.loads(pickle.dumps(part)).ids for part in store.by_shard()]  # noqa: S301
    assert parts == [["a", "b"], ["c"]]


def test_a_scale_that_is_no_number_is_found(tmp_path: Path) -> None:
    """A foreign writer's fault: the digests fit."""
    values, scales = to_stored(rows(2), "int8")
    made = document(Layout("int8", 8))
    shard = ShardRows(
        ["a", "b"], np.zeros(2, np.uint16), values, np.zeros((2, 16), np.uint8), [], scales * np.float32(np.nan)
    )
    write_store(tmp_path / "s", made, [shard], batch_size=2)
    (problem,) = embedcache.verify_store(tmp_path / "s")
    assert "/scales holds a number that is not finite" in problem.message


def test_rows_that_do_not_fit_their_layout_are_not_written(tmp_path: Path) -> None:
    shard = ShardRows(["a"], np.zeros(1, np.uint16), rows(1).astype(np.int8), np.zeros((1, 16), np.uint8), [])
    with pytest.raises(StoreFormatError, match="but the layout has"):
        write_store(tmp_path / "s", document(Layout("int8", 8)), [shard], batch_size=1)
    assert not list((tmp_path / "s").glob("*.h5"))


def test_a_file_that_cannot_be_read_is_a_problem_beside_others(tmp_path: Path, monkeypatch) -> None:
    write_shards(tmp_path / "s", [(["a"], []), (["b"], [])])
    bad = sorted((tmp_path / "s").glob("*.h5"))[0]

    def bad_sector(path: Path, *, skip: int = 0) -> str:
        if path == bad:
            raise OSError(5, "Input/output error")
        return digest_file(path, skip=skip)

    monkeypatch.setattr(source, "digest_file", bad_sector)
    (problem,) = embedcache.verify_store(tmp_path / "s")
    assert problem.shard == bad.name
    assert "cannot be read (Input/output error)" in problem.message
    with pytest.raises(StoreFormatError, match="cannot be read"):
        embedcache.open_store(tmp_path / "s", verify="digest")
