"""The format page is enough to read a store: here it is, with plain h5py and nothing of ours."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest

import embedcache
from embedcache.encoders.base import Encoded, EncoderRecord, Prepared
from embedcache.store import layout

OLD = Path(__file__).with_name("written_by_0.1.0")
D, D_TOKEN = 8, 6


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def document(line: bytes) -> dict[str, Any]:
    """A document, its digest compared."""
    read = json.loads(line)
    digest = read.pop("digest")
    assert digest == hashlib.sha256(canonical(read)).hexdigest()
    assert read["format"].split(".")[0] == "1"
    return read


def values(codes: np.ndarray, scales: np.ndarray | None, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (codes.astype("<u4") << 16).view("<f4")
    if dtype == "int8":
        return codes.astype("<f4") * scales[..., None]
    return codes


def read_shard(file: h5py.File, store: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    """Everything in a shard, and every rule of the page that a file can break."""
    index = ("record", "failures", "ids", "views", "input_digests", "token_offsets")
    data = b"".join(file[name][()].tobytes() for name in index if name in file)
    assert said["index_sha256"] == hashlib.sha256(data).hexdigest()
    assert file.attrs["encoding-type"] == b"embedcache-shard"
    assert file.attrs["fingerprint"].decode() == store["fingerprint"]
    assert json.loads(file["record"][()].tobytes()) == store
    kind, tokens = store["layout"]["dtype"], store["layout"].get("tokens")
    expected = {"record", "failures", "ids", "views", "input_digests", "embeddings", "block_digests"}
    expected |= {"scales"} if kind == "int8" else set()
    expected |= {"tokens"} if tokens else set()
    expected |= {"token_offsets"} if tokens and tokens["length"] is None else set()
    expected |= {"token_scales"} if tokens and kind == "int8" else set()
    assert set(file) == expected
    for name, dataset in file.items():
        offset = dataset.id.get_offset()
        if offset is not None and dataset.size:
            assert dataset.chunks is None
            assert offset % 64 == 0
            assert offset % 4096 != 0 or name not in ("embeddings", "tokens")
    found: dict[str, Any] = {
        "ids": [i.decode() for i in file["ids"][()].tolist()],
        "views": file["views"][()],
        "failures": json.loads(file["failures"][()].tobytes()),
        "embeddings": values(file["embeddings"][()], file["scales"][()] if kind == "int8" else None, kind),
    }
    n, b = len(found["ids"]), int(file["block_digests"].attrs["block_rows"])
    offsets = file["token_offsets"][()] if "token_offsets" in file else None
    for k in range(-(-n // b)):
        start, stop = k * b, min((k + 1) * b, n)
        digest = hashlib.sha256()
        for name in ("embeddings", "scales", "tokens", "token_scales"):
            if name in file:
                ragged = offsets is not None and name.startswith("token")
                part = slice(*offsets[[start, stop]].tolist()) if ragged else slice(start, stop)
                digest.update(file[name][part].tobytes())
        assert file["block_digests"][k].tobytes() == digest.digest()
    if tokens:
        read = values(file["tokens"][()], file["token_scales"][()] if kind == "int8" else None, kind)
        found["tokens"] = list(read) if offsets is None else np.split(read, offsets[1:-1])
    return found


def read_store(path: Path) -> dict[str, Any]:
    """A directory of one shard, or a packed file."""
    if path.is_file():
        data = path.read_bytes()
        said = document(data[:1024].rstrip(b" "))
        assert said["encoding-type"] == "embedcache-packed-store"
        assert (said["sha256"], said["size"]) == (hashlib.sha256(data[1024:]).hexdigest(), len(data))
        with h5py.File(path) as file:
            return read_shard(file, json.loads(file["record"][()].tobytes()), said)
    store = document((path / "store.json").read_bytes())
    fingerprinted = {"encoder": store["encoder_fingerprint"], "format": "1", "layout": store["layout"]}
    assert store["fingerprint"] == hashlib.sha256(canonical(fingerprinted)).hexdigest()
    said = document((path / "shard-00000.json").read_bytes())
    file_path = path / said["file"]
    data = file_path.read_bytes()
    assert (hashlib.sha256(data).hexdigest(), len(data)) == (said["sha256"], said["size"])
    assert said["file"] == f"shard-00000-{said['sha256'][:12]}.h5"
    with h5py.File(file_path) as file:
        return read_shard(file, store, said)


def make(path: Path, dtype: str, kind: str, n: int = 300) -> embedcache.store.store.Store:
    rng = np.random.default_rng(0)
    tokens: Any = {
        "none": None,
        "fixed": rng.normal(size=(n, 3, D_TOKEN)).astype(np.float32),
        "ragged": [rng.normal(size=(k % 4, D_TOKEN)).astype(np.float32) for k in range(n)],
    }[kind]
    ids = [f"é{k}" for k in range(n)]
    embeddings = rng.normal(size=(n, D)).astype(np.float32)
    return embedcache.save_store(path, ids, embeddings, tokens=tokens, store_dtype=dtype)


@pytest.mark.parametrize("kind", ["none", "fixed", "ragged"])
@pytest.mark.parametrize("dtype", list(layout.STORED_DTYPES))
@pytest.mark.parametrize("packed", [False, True], ids=["directory", "packed"])
def test_a_store_is_read_from_its_page_alone(tmp_path: Path, dtype: str, kind: str, packed: bool) -> None:
    store, path = make(tmp_path / "s", dtype, kind), tmp_path / "s"
    if packed:
        path = tmp_path / "s.h5"
        store = embedcache.pack_store(tmp_path / "s", path)
    read = read_store(path)
    assert read["ids"] == store.ids
    np.testing.assert_array_equal(read["embeddings"], store.embeddings)
    np.testing.assert_array_equal(read["views"], store.views)
    if kind != "none":
        for ours, theirs in zip(store.tokens[:], read["tokens"], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_the_page_names_every_dataset_and_key() -> None:
    page = (Path(__file__).parents[2] / "cache" / "README.md").read_text()
    full = layout.Layout("int8", D, 1, layout.TokenLayout(D_TOKEN, None))
    assert set(re.findall(r"^\| `/(\w+)` \|", page, re.M)) == full.datasets()
    keys = {"encoding-type", "encoder", "encoder_fingerprint", "fingerprint", "layout", "modality"}
    assert keys <= set(re.findall(r"`([\w-]+)`", page))
    assert f'`"{layout.FORMAT}"`' in page


@pytest.mark.parametrize("tool", ["h5ls", "h5dump"])
def test_the_tools_of_hdf5_list_a_shard(tmp_path: Path, tool: str) -> None:
    if shutil.which(tool) is None:
        assert not os.environ.get("CI"), f"CI must have {tool}"
        pytest.skip(f"needs {tool} (Debian: apt-get install hdf5-tools)")
    make(tmp_path / "s", "int8", "ragged", n=5)
    embedcache.pack_store(tmp_path / "s", tmp_path / "s.h5")
    for file in (next((tmp_path / "s").glob("*.h5")), tmp_path / "s.h5"):
        arguments = ["-r", str(file)] if tool == "h5ls" else ["-d", "/ids", "-d", "/token_offsets", str(file)]
        listed = subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout
        if tool == "h5ls":
            assert re.search(rf"/embeddings\s+Dataset \{{5, {D}\}}", listed)
            assert re.search(rf"/tokens\s+Dataset \{{6, {D_TOKEN}\}}", listed)
        else:
            assert "H5T_CSET_UTF8" in listed
            assert "(0): 0, 0, 1, 3, 6, 6" in listed


# stores of earlier versions


def test_a_store_of_version_1_0_still_opens(tmp_path: Path) -> None:
    """Written by the code as it stood at format 1.0, and kept as it was written."""
    store = embedcache.open_store(OLD / "shards", verify="digest")
    assert json.loads((OLD / "shards" / "store.json").read_bytes())["format"] == "1.0"
    assert store.ids == ["a", "b", "c", "x", "é"]
    assert [(f.id, f.reason) for f in store.failures] == [("y", "truncated")]
    expected = [
        np.random.default_rng(seed).normal(size=(n, 8)).astype(np.float32) for seed, n in enumerate([2, 1, 0, 2])
    ]
    np.testing.assert_array_equal(store.embeddings, np.concatenate(expected))
    assert store.n_pending_shards == 0
    other = embedcache.open_store(OLD / "bfloat16", verify="digest")
    made = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    np.testing.assert_allclose(other.embeddings, made, rtol=2**-8)
    for name in ("shards", "bfloat16"):
        assert embedcache.verify_store(OLD / name) == []


def test_a_store_of_version_1_0_packs_drops_repairs_and_grows(tmp_path: Path) -> None:
    shutil.copytree(OLD / "shards", tmp_path / "s")
    packed = embedcache.pack_store(tmp_path / "s", tmp_path / "s.h5")
    assert packed.ids == ["a", "b", "c", "x", "é"]
    assert packed.fingerprint == embedcache.open_store(OLD / "shards").fingerprint
    dropped = embedcache.drop_ids(tmp_path / "s", ["b", "y"], tmp_path / "d")
    assert (dropped.n_rows, dropped.n_dropped, dropped.n_failures_dropped) == (4, 1, 1)
    (tmp_path / "s" / "store.json").write_bytes(b"{}")
    assert embedcache.repair_store(tmp_path / "s").restored == ("store.json",)
    assert (tmp_path / "s" / "store.json").read_bytes() == (OLD / "shards" / "store.json").read_bytes()


def test_a_store_of_version_1_0_grows(tmp_path: Path) -> None:
    """Its failure is tried again, and an id is new to it."""

    class Encoder:
        modality, dim, fingerprint, record = "text", D, "f", EncoderRecord("made", {})

        def prepare(self, sample: str) -> Prepared:
            return Prepared(sample, hashlib.sha256(sample.encode()).digest()[:16], len(sample))

        def encode(self, batch: list[Prepared], *, tokens: bool = False) -> Encoded:
            return Encoded(np.array([[len(p.inputs)] * (D - 1) + [1.0] for p in batch], np.float32))

    shutil.copytree(OLD / "shards", tmp_path / "s")
    before = embedcache.open_store(tmp_path / "s")
    frame = pd.DataFrame({"id": ["y", "new"], "image": "x", "report": ["of y", "of the new one"]})
    manifest = embedcache.Manifest(frame, name="grown", root=tmp_path)
    report = embedcache.extract(manifest, Encoder(), tmp_path / "s", store_dtype="float32", retry_failed=True)
    assert (report.n_asked, report.n_embedded, report.n_failed) == (2, 2, 0)
    grown = embedcache.open_store(tmp_path / "s", verify="digest")
    assert grown.ids == [*before.ids, "y", "new"]
    np.testing.assert_array_equal(grown.embeddings[:5], before.embeddings)
    assert embedcache.verify_store(tmp_path / "s") == []


def test_a_newer_minor_version_is_read_and_what_it_adds_is_kept(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(layout, "FORMAT", "1.7")
    record = {"from": "the future", "nested": {"digest": "x"}}
    embedcache.save_store(tmp_path / "s", ["a", "b"], [[1.0, 2], [3, 4]], record=record)
    path = tmp_path / "s" / "store.json"
    changed = {**document(path.read_bytes()), "new-key": [1]}
    # the record inside the shard is of the same future, so write it there too
    shutil.rmtree(tmp_path / "s")
    monkeypatch.setattr(layout, "store_document", lambda **_: {k: v for k, v in changed.items() if k != "format"})
    embedcache.save_store(tmp_path / "s", ["a", "b"], [[1.0, 2], [3, 4]], record=record)
    monkeypatch.undo()
    store = embedcache.open_store(tmp_path / "s", verify="digest")
    assert store.encoder == record
    assert store.document["new-key"] == [1]
    packed = embedcache.pack_store(tmp_path / "s", tmp_path / "s.h5")
    assert packed.document == store.document
    embedcache.drop_ids(tmp_path / "s", ["a"], tmp_path / "d")
    assert document((tmp_path / "d" / "store.json").read_bytes())["new-key"] == [1]


def test_an_attribute_of_a_newer_minor_version_does_not_hinder(tmp_path: Path) -> None:
    store = make(tmp_path / "s", "float16", "none", n=3)
    file = next((tmp_path / "s").glob("*.h5"))
    with h5py.File(file, "r+") as shard:
        shard.attrs["new-attribute"] = 1
        shard["ids"].attrs["new-attribute"] = 1
    data = file.read_bytes()
    path = tmp_path / "s" / "shard-00000.json"
    said, sha256 = document(path.read_bytes()), hashlib.sha256(data).hexdigest()
    file.rename(tmp_path / "s" / layout.shard_file_name(0, sha256))
    path.write_bytes(
        layout.seal({**said, "file": layout.shard_file_name(0, sha256), "sha256": sha256, "size": len(data)})
    )
    assert embedcache.open_store(tmp_path / "s", verify="digest").ids == store.ids
    assert embedcache.verify_store(tmp_path / "s") == []
