"""A store written out for other tools, and read back."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import embedcache
from embedcache.errors import ImportFormatError, StoreWriteError
from embedcache.store import commit, layout
from embedcache.store.catalogue import Plan, open_or_create, publish_plan
from embedcache.store.exchange import export_store, import_store
from embedcache.store.layout import Layout
from embedcache.store.shard import ShardImage, ShardRows

IDS = ["a", "NA", "007", " é\n", *(f"i{k}" for k in range(296))]


def rows(n: int = len(IDS), d: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


@pytest.fixture
def make_store(tmp_path: Path):
    def make(dtype: str = "float16") -> embedcache.store.store.Store:
        return embedcache.save_store(tmp_path / "s", IDS, rows(), store_dtype=dtype)

    return make


def two_views(path: Path) -> embedcache.store.store.Store:
    document = layout.store_document(
        encoder={"name": "made"}, encoder_fingerprint="f", modality="image", store_layout=Layout("float32", 8, views=2)
    )
    catalogue = open_or_create(path, document)
    assert publish_plan(path, 0, Plan(["a"], [0, 1], 0, 4))
    shard = ShardRows(["a", "a"], np.arange(2).astype(np.uint16), rows(2), np.zeros((2, 16), np.uint8), [])
    image = ShardImage(shard, catalogue.document)
    commit.publish_shard(path, 0, image, image.facts)
    return embedcache.open_store(path)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_parquet_is_read_by_pandas(tmp_path: Path, make_store, dtype: str, monkeypatch) -> None:
    monkeypatch.setattr("embedcache.store.exchange.exporting._GROUP_BYTES", 70 * 4 * 8)
    store = make_store(dtype)
    assert export_store(str(store.path), str(tmp_path / "x.parquet")) == [tmp_path / "x.parquet"]
    frame = pd.read_parquet(tmp_path / "x.parquet")
    assert frame["id"].tolist() == IDS
    assert frame["view"].dtype == np.uint16
    np.testing.assert_array_equal(np.stack(frame["embedding"]), np.asarray(store.embeddings, np.float32))
    file = pq.ParquetFile(tmp_path / "x.parquet")
    assert file.metadata.num_row_groups == 5
    assert json.loads(file.schema_arrow.metadata[b"embedcache"]) == store.document


def test_safetensors_are_read_by_their_library(tmp_path: Path, make_store) -> None:
    store = make_store("bfloat16")
    export_store(store.path, tmp_path / "x", kind="safetensors")
    tensors = load_file(tmp_path / "x.safetensors")
    assert tensors["embeddings"].dtype == torch.bfloat16
    np.testing.assert_array_equal(tensors["embeddings"].float().numpy(), store.embeddings)
    np.testing.assert_array_equal(tensors["views"].numpy(), store.views)
    assert json.loads(tensors["ids_json"].numpy().tobytes()) == IDS
    with safe_open(tmp_path / "x.safetensors", "np") as file:
        assert json.loads(file.metadata()["embedcache"]) == store.document


@pytest.mark.parametrize("kind", ["parquet", "npy", "safetensors"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_what_goes_out_comes_back(tmp_path: Path, make_store, kind: str, dtype: str) -> None:
    store = make_store(dtype)
    written = export_store(store.path, tmp_path / "out" / f"x.{kind}")
    assert all(path.stat().st_mode & 0o077 == 0 for path in written)
    assert sorted((tmp_path / "out").iterdir()) == sorted(written)
    options = {"ids": written[1]} if kind == "npy" else {}
    asked = {"store_dtype": dtype} if dtype == "float16" and kind == "parquet" else {}
    back = import_store(written[0], tmp_path / "back", **options, **asked)
    assert back.ids == IDS
    np.testing.assert_array_equal(back.embeddings, store.embeddings)
    kept = {"float16": "float16", "bfloat16": "bfloat16" if kind == "safetensors" else "float32"}
    assert back.layout.dtype == kept.get(dtype, "float32")


def test_a_store_of_no_rows(tmp_path: Path) -> None:
    embedcache.save_store(tmp_path / "s", [], np.empty((0, 4), np.float32))
    for kind in ("parquet", "npy", "safetensors"):
        written = export_store(tmp_path / "s", tmp_path / "x", kind=kind)
        options = {"ids": written[1]} if kind == "npy" else {}
        assert import_store(written[0], tmp_path / f"from-{kind}", **options).embeddings.shape == (0, 4)


def test_several_views_are_kept_apart(tmp_path: Path) -> None:
    store = two_views(tmp_path / "s")
    export_store(store.path, tmp_path / "x.parquet")
    assert pd.read_parquet(tmp_path / "x.parquet")["view"].tolist() == [0, 1]
    with pytest.raises(ImportFormatError, match=r"several views of an id.*--kind parquet"):
        export_store(store.path, tmp_path / "x.npy")
    with pytest.raises(ImportFormatError, match="both have the id 'a'"):
        import_store(tmp_path / "x.parquet", tmp_path / "t")


@pytest.mark.parametrize("kind", ["parquet", "npy", "safetensors"])
def test_nothing_is_overwritten(tmp_path: Path, make_store, kind: str) -> None:
    store = make_store()
    out = tmp_path / "out" / f"x.{kind}"
    out.parent.mkdir()
    out.write_text("mine")
    with pytest.raises(StoreWriteError, match=rf"x.{kind}: is there already; name another file"):
        export_store(store.path, out)
    assert out.read_text() == "mine"
    assert list(out.parent.iterdir()) == [out]
    if kind == "npy":
        out.rename(tmp_path / "out" / "x.ids.json")
        with pytest.raises(StoreWriteError, match=r"x.ids.json: is there already"):
            export_store(store.path, out)
        assert [path.read_text() for path in out.parent.iterdir()] == ["mine"]


class Faulty(commit.Disk):
    """A disk on which one system call fails."""

    def __init__(self, call: str, code: int) -> None:
        def fail(*_: object) -> None:
            raise OSError(code, errno.errorcode[code])

        setattr(self, call, fail)


@pytest.mark.parametrize("kind", ["parquet", "npy", "safetensors"])
@pytest.mark.parametrize("call", ["create", "fsync", "link"])
def test_a_fault_leaves_nothing_behind(tmp_path: Path, make_store, kind: str, call: str, monkeypatch) -> None:
    store = make_store()
    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(commit, "disk", Faulty(call, errno.ENOSPC))
        with pytest.raises(StoreWriteError, match="ENOSPC"):
            export_store(store.path, tmp_path / "out" / f"x.{kind}")
        assert list((tmp_path / "out").iterdir()) == []
    export_store(store.path, tmp_path / "out" / f"x.{kind}")


def test_a_name_taken_while_the_file_was_written(tmp_path: Path, make_store, monkeypatch) -> None:
    store, out = make_store(), tmp_path / "out" / "x.npy"
    link = commit.Disk.link

    def late(self: commit.Disk, source: Path, target: Path) -> None:
        if target == out:
            out.write_text("theirs")
        link(self, source, target)

    monkeypatch.setattr(commit.Disk, "link", late)
    with pytest.raises(StoreWriteError, match=r"x.npy: is there already"):
        export_store(store.path, out)
    assert [path.read_text() for path in out.parent.iterdir()] == ["theirs"]


def test_kinds_that_are_not_known(tmp_path: Path, make_store) -> None:
    with pytest.raises(ImportFormatError, match="kind 'csv', expected one of parquet, npy, safetensors"):
        export_store(make_store().path, tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "'ids_json' of shape .*cut short"),
        (lambda data: data[:6], "no header of a .safetensors"),
        (lambda data: b"\xff" * 8 + data[8:], "no header of a .safetensors"),
        (lambda data: data.replace(b'"embeddings"', b'"embeddinks"'), "no usable tensor 'embeddings' among"),
        (lambda data: data.replace(b'"F16"', b'"I16"'), "'embeddings' of I16, expected F64 or F32"),
        (lambda data: data.replace(b"[300, 8]", b"[301, 8]"), r"'embeddings' of shape \(301, 8\)"),
        (lambda data: data.replace(b"[300, 8]", b"[8, 300]"), "8 rows, but 300 ids"),
        (lambda data: data[:8] + b"[" + data[9:], "its header is not readable"),
    ],
)
def test_safetensors_that_are_refused(tmp_path: Path, make_store, change, message: str) -> None:
    out = tmp_path / "x.safetensors"
    export_store(make_store().path, out)
    out.write_bytes(change(out.read_bytes()))
    with pytest.raises(ImportFormatError, match=message):
        import_store(out, tmp_path / "t")


def test_parquet_larger_than_memory(tmp_path: Path) -> None:
    """One row group of 64 MB is read in pieces."""
    values = rows(250_000, 64).reshape(-1)
    table = pa.table(
        {"id": [str(k) for k in range(250_000)], "embedding": pa.FixedSizeListArray.from_arrays(values, 64)}
    )
    pq.write_table(table, tmp_path / "x.parquet")
    code = (
        "import sys, pyarrow as pa; from pathlib import Path; from embedcache.store.exchange import parquet, source\n"
        "found = parquet.read(Path(sys.argv[1]), source.Asked('image', Path(sys.argv[1]).parent))\n"
        "print(found.embeddings.shape[0], pa.default_memory_pool().max_memory())"
    )
    out = subprocess.run([sys.executable, "-c", code, tmp_path / "x.parquet"], capture_output=True, check=True)
    n, most = map(int, out.stdout.split())
    assert n == 250_000
    assert most < 16 * 2**20
