"""Stores made to do harm: each a sound store with one thing changed, and digests made to fit, as an attacker could."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

import embedcache
from embedcache.store import layout

N, D = 4, 8
UNKNOWN_FILTER = 32_999


def make_sound(path: Path) -> None:
    """A store with everything in it that a shard may hold."""
    rng = np.random.default_rng(0)
    ragged = [rng.normal(size=(k + 1, 6)).astype(np.float32) for k in range(N)]
    ids = [f"id{k}" for k in range(N)]
    embedcache.save_store(path, ids, rng.normal(size=(N, D)), tokens=ragged, store_dtype="int8")


def _put(file: h5py.File, name: str, **options: Any) -> None:
    del file[name]
    file.create_dataset(name, **options)


def _link(file: h5py.File, name: str, link: object) -> None:
    del file[name]
    file[name] = link


def _low_level(file: h5py.File, name: str, *, filters: int = 0, compact: bool = False, typ: Any = None) -> None:
    del file[name]
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    if compact:
        creation.set_layout(h5py.h5d.COMPACT)
    if filters:
        creation.set_chunk((2, D))
        creation.set_filter(filters, h5py.h5z.FLAG_OPTIONAL, ())
    space = h5py.h5s.create_simple((N, D))
    h5py.h5d.create(file.id, name.encode(), typ or h5py.h5t.STD_I8LE, space, dcpl=creation)


def _virtual(file: h5py.File, source: str) -> None:
    del file["embeddings"]
    wanted = h5py.VirtualLayout((N, D), "i1")
    wanted[:] = h5py.VirtualSource(source, "x", (N, D), dtype="i1")
    file.create_virtual_dataset("embeddings", wanted)


def _loop(file: h5py.File) -> None:
    del file["embeddings"]
    group = file.create_group("embeddings")
    group["again"] = group


def _deep(file: h5py.File) -> None:
    del file["views"]
    group = file.create_group("views")
    for _ in range(200):
        group = group.create_group("g")


def _record(change: Callable[[dict[str, Any]], Any]) -> Callable[[h5py.File, Path], None]:
    def changed(file: h5py.File, _: Path) -> None:
        record = json.loads(file["record"][()].tobytes())
        made = change(record)
        data = made if isinstance(made, bytes) else json.dumps(record if made is None else made).encode()
        _put(file, "record", data=np.frombuffer(data, np.uint8))

    return changed


def _array(name: str, values: Any) -> Callable[[h5py.File, Path], None]:
    return lambda file, _: _put(file, name, data=values)


def _json(name: str, data: bytes) -> Callable[[h5py.File, Path], None]:
    return _array(name, np.frombuffer(data, np.uint8))


def _external(name: str, shape: tuple[int, ...], dtype: str) -> Callable[[h5py.File, Path], None]:
    def changed(file: h5py.File, canary: Path) -> None:
        _put(file, name, shape=shape, dtype=dtype, external=[(str(canary), 0, h5py.h5f.UNLIMITED)])

    return changed


def _both(name: str, attribute: str, value: Any) -> Callable[[h5py.File, Path], None]:
    return lambda file, _: (file[name] if name else file).attrs.__setitem__(attribute, value)


RAGGED = np.array([0, 1, 3, 6, 10], "<i8")
DEEP_JSON = b"[" * 200_000 + b"]" * 200_000

# what is changed inside a shard; each gets the file and the path of a canary that nobody may open
INSIDE: dict[str, Callable[[h5py.File, Path], object]] = {
    "external storage of embeddings": _external("embeddings", (N, D), "i1"),
    "external storage of ids": _external("ids", (N,), "S8"),
    "external storage of tokens": _external("tokens", (10, 6), "i1"),
    "external storage of the record": _external("record", (64,), "u1"),
    "external storage of failures": _external("failures", (64,), "u1"),
    "external link to embeddings": lambda f, c: _link(f, "embeddings", h5py.ExternalLink(str(c), "/x")),
    "external link to record": lambda f, c: _link(f, "record", h5py.ExternalLink(str(c), "/x")),
    "external link of another name": lambda f, c: f.__setitem__("more", h5py.ExternalLink(str(c), "/x")),
    "soft link to embeddings": lambda f, _: _link(f, "embeddings", h5py.SoftLink("/tokens")),
    "soft link to itself": lambda f, _: _link(f, "embeddings", h5py.SoftLink("/embeddings")),
    "soft link of another name": lambda f, _: f.__setitem__("more", h5py.SoftLink("/embeddings")),
    "virtual dataset": lambda f, c: _virtual(f, str(c)),
    "virtual dataset of itself": lambda f, _: _virtual(f, "."),
    "chunked": lambda f, _: _put(f, "embeddings", data=np.ones((N, D), "i1"), chunks=(1, D)),
    "resizable": lambda f, _: _put(f, "embeddings", data=np.ones((N, D), "i1"), maxshape=(None, D)),
    "gzip": lambda f, _: _put(f, "embeddings", data=np.ones((N, D), "i1"), compression="gzip"),
    "lzf": lambda f, _: _put(f, "embeddings", data=np.ones((N, D), "i1"), compression="lzf"),
    "fletcher32": lambda f, _: _put(f, "embeddings", data=np.ones((N, D), "i1"), fletcher32=True),
    "scaleoffset": lambda f, _: _put(f, "embeddings", data=np.ones((N, D), "i1"), scaleoffset=0),
    "shuffled ids": lambda f, _: _put(f, "ids", data=np.array([b"a", b"b", b"c", b"d"]), shuffle=True, chunks=(2,)),
    "unknown filter": lambda f, _: _low_level(f, "embeddings", filters=UNKNOWN_FILTER),
    "compact": lambda f, _: _low_level(f, "embeddings", compact=True),
    "never allocated": lambda f, _: _low_level(f, "embeddings"),
    "shape bomb": lambda f, _: _put(f, "embeddings", shape=(2**40, D), dtype="i1"),
    "shape that overflows": lambda f, _: _put(f, "embeddings", shape=(2**31, 2**31), dtype="i1", chunks=(1, 2**20)),
    "bomb of ids": lambda f, _: _put(f, "ids", shape=(2**40,), dtype="S8"),
    "bomb in the width of an id": lambda f, _: _put(f, "ids", shape=(N,), dtype="S2000000000"),
    "object ids": lambda f, _: _put(f, "ids", data=["a", "b", "c", "d"]),
    "arrays of variable length": lambda f, _: _put(f, "embeddings", shape=(N, D), dtype=h5py.vlen_dtype(np.int8)),
    "references": lambda f, _: _put(f, "embeddings", shape=(N, D), dtype=h5py.ref_dtype),
    "region references": lambda f, _: _put(f, "embeddings", shape=(N, D), dtype=h5py.regionref_dtype),
    "compound": lambda f, _: _put(f, "embeddings", shape=(N, D), dtype=[("a", "i1"), ("b", "O")][:1]),
    "enum": lambda f, _: _put(f, "views", shape=(N,), dtype=h5py.enum_dtype({"a": 1}, basetype="i8")),
    "opaque": lambda f, _: _put(f, "embeddings", shape=(N, D), dtype=h5py.opaque_dtype(np.dtype("V1"))),
    "big-endian": _array("views", np.zeros(N, ">u2")),
    "float64": _array("embeddings", np.ones((N, D))),
    "complex": _array("embeddings", np.ones((N, D), "c8")),
    "no dimension": _array("embeddings", np.int8(1)),
    "no extent": lambda f, _: _put(f, "embeddings", data=h5py.Empty("i1")),
    "32 dimensions": _array("embeddings", np.ones((1,) * 32, "i1")),
    "a group": lambda f, _: (f.__delitem__("views"), f.create_group("views")),
    "a group that holds itself": lambda f, _: _loop(f),
    "deep groups": lambda f, _: _deep(f),
    "a named type": lambda f, _: (f.__delitem__("views"), f.__setitem__("views", np.dtype("u2"))),
    "another dataset": lambda f, _: f.create_dataset("extra", data=[1]),
    "another group": lambda f, _: f.create_group("extra"),
    "a thousand names": lambda f, _: [f.create_dataset(f"x{k}", data=[k]) for k in range(1000)],
    "no embeddings": lambda f, _: f.__delitem__("embeddings"),
    "no record": lambda f, _: f.__delitem__("record"),
    "no block digests": lambda f, _: f.__delitem__("block_digests"),
    "no scales": lambda f, _: f.__delitem__("scales"),
    "fewer views": _array("views", np.zeros(2, "<u2")),
    "more rows than ids": _array("embeddings", np.ones((N + 3, D), "i1")),
    "another width": _array("embeddings", np.ones((N, D + 1), "i1")),
    "offsets that fall": _array("token_offsets", RAGGED[::-1].copy()),
    "offsets beyond the end": _array("token_offsets", RAGGED * 10**12),
    "offsets below zero": _array("token_offsets", RAGGED - 5),
    "offsets of too many rows": _array("token_offsets", np.arange(9, dtype="<i8")),
    "blocks of no rows": _both("block_digests", "block_rows", np.uint32(0)),
    "blocks of text": _both("block_digests", "block_rows", "many"),
    "no encoding type": lambda f, _: f.attrs.__delitem__("encoding-type"),
    "another encoding type": _both("", "encoding-type", np.bytes_("anndata")),
    "encoding type of objects": _both("", "encoding-type", ["a", "b"]),
    "version 2": _both("", "encoding-version", np.bytes_("2.0")),
    "version of a number": _both("", "encoding-version", 1.0),
    "record that is no JSON": _json("record", b"{"),
    "record that is a list": _json("record", b"[1]"),
    "record that is very deep": _json("record", DEEP_JSON),
    "record of pickle": _json("record", b"\x80\x04cos\nsystem\n"),
    "record of another store": _record(lambda r: r.__setitem__("fingerprint", "0" * 64)),
    "record of an unknown dtype": _record(lambda r: r["layout"].__setitem__("dtype", "float8")),
    "record without layout": _record(lambda r: r.__delitem__("layout")),
    "record of a width below zero": _record(lambda r: r["layout"].__setitem__("dim", -8)),
    "record of a huge width": _record(lambda r: r["layout"].__setitem__("dim", 10**400)),
    "record of an endless width": _record(lambda r: r["layout"].__setitem__("dim", float("inf"))),
    "record of another encoder": _record(lambda r: r.__setitem__("encoder_fingerprint", "0" * 64)),
    "a failure with a NUL in its id": _json("failures", b'[{"id": "a\\u0000", "reason": "x", "message": "y"}]'),
    "a failure that is no Unicode": _json("failures", b'[{"id": "\\ud800", "reason": "x", "message": "y"}]'),
    "failures that are no list": _json("failures", b'{"a": 1}'),
    "failures without an id": _json("failures", b'[{"reason": "x"}]'),
    "failures that are very deep": _json("failures", DEEP_JSON),
}


def write_inside(store: Path, change: Callable[[h5py.File, Path], object], canary: Path) -> None:
    """Changes a shard within HDF5, and makes its name and document fit."""
    file = next(store.glob("*.h5"))
    with h5py.File(file, "r+", alignment_threshold=1, alignment_interval=64) as opened:
        change(opened, canary)
    publish_again(store, file, file.read_bytes())


def publish_again(store: Path, file: Path, data: bytes) -> None:
    """Puts other bytes in a shard's place with documents that fit them."""
    file.unlink()
    document_path = store / layout.shard_doc_name(0)
    document = layout.unseal(document_path.read_bytes(), document_path)
    sha256 = hashlib.sha256(data).hexdigest()
    document |= {"file": layout.shard_file_name(0, sha256), "sha256": sha256, "size": len(data)}
    document_path.write_bytes(layout.seal(document))
    (store / document["file"]).write_bytes(data)


def _document(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path, Path], None]:
    def changed(store: Path, _: Path) -> None:
        document = layout.unseal((store / name).read_bytes(), store / name)
        change(document)
        (store / name).write_bytes(layout.seal(document))

    return changed


def _bytes(data: bytes) -> Callable[[Path, Path], None]:
    return lambda store, _: publish_again(store, next(store.glob("*.h5")), data)


def _old_superblock(store: Path, _: Path) -> None:
    file = next(store.glob("*.h5"))
    old = store.parent / "old.h5"
    with h5py.File(file) as source, h5py.File(old, "w", libver=("earliest", "v108")) as target:
        for name in source:
            source.copy(name, target)
        target.attrs.update(source.attrs)
    publish_again(store, file, old.read_bytes())
    old.unlink()


def _user_block(store: Path, _: Path) -> None:
    file = next(store.glob("*.h5"))
    publish_again(store, file, b" " * 512 + file.read_bytes())


def _in_place_of_the_shard(make: Callable[[Path, Path], object]) -> Callable[[Path, Path], None]:
    def changed(store: Path, canary: Path) -> None:
        file = next(store.glob("*.h5"))
        file.unlink()
        make(file, canary)

    return changed


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _linked_out(path: Path, canary: Path) -> None:
    """A link to the same bytes outside the store."""
    target = canary.with_name(f"{path.parent.name}-{path.name}")
    path.rename(target)
    path.symlink_to(target)


def _moved_out(store: Path, canary: Path) -> None:
    _linked_out(next(store.glob("*.h5")), canary)


def _traversal(store: Path, canary: Path) -> None:
    """A digest that makes the name of the shard a way out of the store."""
    target = canary.with_name("v.h5")
    next(store.glob("*.h5")).rename(target)
    (store / "shard-00000-").mkdir()
    digest = "/../../../v"
    change = _document(SHARD_DOC, lambda d: d.update(sha256=digest, file=layout.shard_file_name(0, digest)))
    change(store, canary)
    assert (store / layout.shard_file_name(0, digest)).resolve() == target.resolve()


def _reworded(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


SHARD_DOC = layout.shard_doc_name(0)

# what is changed around the shard
OUTSIDE: dict[str, Callable[[Path, Path], object]] = {
    "a text file": _bytes(b"hello"),
    "an empty file": _bytes(b""),
    "a zip file": _bytes(b"PK\x03\x04" + bytes(500)),
    "only a signature": _bytes(b"\x89HDF\r\n\x1a\n\x03"),
    "a signature and noise": _bytes(b"\x89HDF\r\n\x1a\n\x03" + bytes(range(256)) * 20),
    "an old superblock": _old_superblock,
    "a user block that nobody announced": _user_block,
    "a FIFO": _in_place_of_the_shard(lambda file, _: os.mkfifo(file)),
    "a directory": _in_place_of_the_shard(lambda file, _: file.mkdir()),
    "a link to another file": _in_place_of_the_shard(lambda file, _: file.symlink_to("/etc/hostname")),
    "a link to the same bytes elsewhere": lambda store, canary: _moved_out(store, canary),
    "a shard's document that is a FIFO": lambda store, _: _fifo(store / SHARD_DOC),
    "a shard's document that is a link": lambda store, canary: _linked_out(store / SHARD_DOC, canary),
    "a file above the store": _document(SHARD_DOC, lambda d: d.__setitem__("file", "../canary")),
    "an absolute file": _document(SHARD_DOC, lambda d: d.__setitem__("file", "/etc/passwd")),
    "a digest that leads elsewhere": lambda store, canary: _traversal(store, canary),
    "a digest that is a number": _document(SHARD_DOC, lambda d: d.__setitem__("sha256", 5)),
    "a size that is text": _document(SHARD_DOC, lambda d: d.__setitem__("size", "1")),
    "rows below zero": _document(SHARD_DOC, lambda d: d.__setitem__("n", -1)),
    "rows that are not there": _document(SHARD_DOC, lambda d: d.__setitem__("n", 10**9)),
    "no fingerprint": _document(SHARD_DOC, lambda d: d.__delitem__("fingerprint")),
    "store of another kind": _document("store.json", lambda d: d.__setitem__("encoding-type", "zarr")),
    "store without layout": _document("store.json", lambda d: d.__delitem__("layout")),
    "store whose layout is a list": _document("store.json", lambda d: d.__setitem__("layout", [1])),
    "store of an unknown modality": _document("store.json", lambda d: d.__setitem__("modality", "sound")),
    "store whose encoder is text": _document("store.json", lambda d: d.__setitem__("encoder", "x")),
    "store of version 2": _document("store.json", lambda d: d.__setitem__("format", "2.0")),
    "store of a number that is none": lambda store, _: _reworded(store / "store.json", b'"dim":8', b'"dim":NaN'),
    "store that is no Unicode": lambda store, _: _reworded(store / "store.json", b'"image"', b'"\\ud800"'),
    "store of another width than its fingerprint": _document("store.json", lambda d: d["layout"].__setitem__("dim", 9)),
    "store that is very deep": lambda store, _: (store / "store.json").write_bytes(DEEP_JSON),
    "store that is a FIFO": lambda store, _: ((store / "store.json").unlink(), os.mkfifo(store / "store.json")),
}


def build(root: Path) -> list[str]:
    """Writes every hostile store below `root`, each in a folder of its number; gives their names."""
    sound, canary = root / "sound", root.parent / "canary"
    make_sound(sound)
    with h5py.File(canary, "w") as file:
        file["x"] = np.ones((N, D), "i1")
    cases: list[tuple[str, Callable[[Path], object]]] = []
    cases += [(name, lambda s, c=change: write_inside(s, c, canary)) for name, change in INSIDE.items()]
    cases += [(name, lambda s, c=change: c(s, canary)) for name, change in OUTSIDE.items()]
    for k, (_, make) in enumerate(cases):
        shutil.copytree(sound, root / str(k))
        make(root / str(k))
    shutil.rmtree(sound)
    return [name for name, _ in cases]
