"""One shard: rows to HDF5 bytes, and a shard file to mapped arrays behind a gate.

Shape notation: n rows, d embedding width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from embedcache.errors import StoreFormatError
from embedcache.fingerprint import INPUT_DIGEST_BYTES, canonical_json
from embedcache.store import layout

_BLOCK_ROWS = 256
_ALIGN = 64  # rows start on a cache line ...
_ALIAS = 4096  # ... but not on a page, where they would alias with numpy's own buffers


@dataclass(frozen=True)
class Failure:
    """One input that has no row: why, as a stable code and in words."""

    id: str
    reason: str
    message: str


@dataclass(frozen=True)
class ShardRows:
    """What goes into a shard.

    Args:
        ids: sample ids, n of them.
        views: which view of the sample each row is, (n,) uint16.
        codes: embeddings in their stored dtype, (n, d).
        input_digests: (n, 16) uint8.
        failures: inputs of the shard that have no row.
    """

    ids: Sequence[str]
    views: np.ndarray
    codes: np.ndarray
    input_digests: np.ndarray
    failures: Sequence[Failure]


@dataclass(frozen=True)
class Shard:
    """A shard as read: ids in memory, embeddings mapped from the file.

    Args:
        ids: (n,) str.
        views: (n,) uint16.
        codes: (n, d) stored dtype, copy-on-write map of the file.
        input_digests: (n, 16) uint8.
        failures: inputs without a row.
        record: the store's document as the shard carries it.
        block_rows: rows to a block of `block_digests`.
        block_digests: (ceil(n / block_rows), 32) uint8.
    """

    ids: list[str]
    views: np.ndarray
    codes: np.ndarray
    input_digests: np.ndarray
    failures: list[Failure]
    record: dict[str, Any]
    block_rows: int
    block_digests: np.ndarray


def build_shard(rows: ShardRows, store_document: dict[str, Any]) -> bytes:
    """The bytes of a shard file; equal rows give equal bytes.

    Args:
        store_document: the store's own document: a shard describes itself in full.
    """
    record = canonical_json(store_document)
    for padding in (b"", b" " * _ALIGN):  # trailing spaces shift the rows off a page boundary
        image, offset = _build(rows, record + padding, store_document["fingerprint"])
        if offset is None or offset % _ALIAS:
            return image
    raise StoreFormatError(f"embeddings at offset {offset}: no padding keeps them off a page boundary")


def _build(rows: ShardRows, record: bytes, fingerprint: str) -> tuple[bytes, int | None]:
    encoded = [i.encode("utf-8") for i in rows.ids]
    width = max((len(i) for i in encoded), default=1)
    failures = canonical_json([asdict(failure) for failure in rows.failures])
    file = h5py.File.in_memory(
        libver=("v110", "v110"), alignment_threshold=1, alignment_interval=_ALIGN, track_order=False
    )
    with file:
        file.attrs["encoding-type"] = np.bytes_(layout.SHARD_ENCODING)
        file.attrs["encoding-version"] = np.bytes_(layout.FORMAT)
        file.attrs["fingerprint"] = np.bytes_(fingerprint)

        def add(name: str, data: np.ndarray) -> h5py.Dataset:
            return file.create_dataset(name, data=data, track_times=False)

        add("record", np.frombuffer(record, np.uint8))
        add("failures", np.frombuffer(failures, np.uint8))
        add("ids", np.array(encoded, dtype=f"S{width}").astype(h5py.string_dtype("utf-8", width)))
        add("views", rows.views.astype("<u2"))
        add("input_digests", rows.input_digests.reshape(-1, INPUT_DIGEST_BYTES))
        blocks = add("block_digests", digest_blocks(rows.codes, _BLOCK_ROWS))
        blocks.attrs["block_rows"] = np.uint32(_BLOCK_ROWS)
        offset = add("embeddings", rows.codes).id.get_offset()
        file.flush()
        return file.id.get_file_image(), offset


def digest_blocks(codes: np.ndarray, block_rows: int) -> np.ndarray:
    """SHA-256 of the bytes of every `block_rows` rows, (ceil(n / block_rows), 32) uint8."""
    digests = [
        hashlib.sha256(np.ascontiguousarray(codes[start : start + block_rows]).view(np.uint8).data).digest()
        for start in range(0, len(codes), block_rows)
    ]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)


def open_shard(path: Path) -> Shard:
    """Maps a shard after checking that it holds what format 1 allows and nothing else.

    Raises:
        StoreFormatError: the gate refused it; the message says what was found where.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            return _read(file, path)
    except StoreFormatError:
        raise
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise StoreFormatError(
            f"{path}: cannot be read as a shard ({error}); run 'embedcache verify {path.parent}'"
        ) from error


def _read(file: h5py.File, path: Path) -> Shard:
    kind = file.attrs.get("encoding-type")
    if kind != np.bytes_(layout.SHARD_ENCODING):
        raise StoreFormatError(
            f"{path}: encoding-type is {kind!r}, expected {layout.SHARD_ENCODING!r}: not a shard of embedcache"
        )
    layout.check_version(bytes(file.attrs["encoding-version"]).decode(), path)
    expected = {
        "record": ("uint8", 1),
        "failures": ("uint8", 1),
        "ids": ("S", 1),
        "views": ("uint16", 1),
        "input_digests": ("uint8", 2),
        "block_digests": ("uint8", 2),
        "embeddings": (None, 2),
    }
    unknown, missing = sorted(set(file) - set(expected)), sorted(set(expected) - set(file))
    if unknown or missing:
        raise StoreFormatError(
            f"{path}: unknown datasets {unknown}, missing datasets {missing}; "
            f"format {layout.FORMAT} holds exactly {sorted(expected)}"
        )
    maps = {name: _map(file, name, *wanted, path) for name, wanted in expected.items()}
    record = json.loads(maps["record"].tobytes())
    _check_shapes(maps, record, path)
    return Shard(
        ids=[i.decode("utf-8") for i in maps["ids"].tolist()],
        views=np.array(maps["views"]),
        codes=maps["embeddings"],
        input_digests=np.array(maps["input_digests"]),
        failures=[Failure(**f) for f in json.loads(maps["failures"].tobytes())],
        record=record,
        block_rows=int(file["block_digests"].attrs["block_rows"]),
        block_digests=np.array(maps["block_digests"]),
    )


def _map(file: h5py.File, name: str, dtype: str | None, rank: int, path: Path) -> np.ndarray:
    """Maps one dataset; every check comes before any of its bytes are read."""

    def refuse(found: str, wanted: str) -> StoreFormatError:
        return StoreFormatError(f"{path}: /{name} {found}, expected {wanted}; refused before reading it")

    link = file.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink):
        raise refuse(f"is a {type(link).__name__}", "a hard link")
    if file.get(name, getclass=True) is not h5py.Dataset:
        raise refuse("is no dataset", "a dataset")
    dataset = file[name]
    if dataset.is_virtual:
        raise refuse("is virtual", "contiguous bytes in this file")
    if dataset.external is not None:
        raise refuse("lies in external files", "contiguous bytes in this file")
    creation = dataset.id.get_create_plist()
    if creation.get_layout() != h5py.h5d.CONTIGUOUS or creation.get_nfilters():
        raise refuse("is chunked, compact or filtered", "contiguous and unfiltered")
    found = dataset.dtype
    allowed = {np.dtype(d) for d in layout.STORED_DTYPES.values()}
    fits = found in allowed if dtype is None else found.kind == "S" if dtype == "S" else found == np.dtype(dtype)
    if not fits or (found.kind == "S" and h5py.check_string_dtype(found).length is None):
        raise refuse(f"has dtype {found}", dtype or "a stored dtype")
    if dataset.ndim != rank:
        raise refuse(f"has rank {dataset.ndim}", f"rank {rank}")
    n_bytes = int(np.prod(dataset.shape, dtype=object)) * found.itemsize
    if n_bytes == 0:
        return np.empty(dataset.shape, found)
    offset, size = dataset.id.get_offset(), path.stat().st_size
    if dataset.id.get_storage_size() != n_bytes or offset is None or offset + n_bytes > size:
        raise refuse(f"claims {n_bytes} bytes at {offset} of a file of {size}", "allocated bytes inside the file")
    return np.memmap(path, dtype=found.newbyteorder("<"), mode="c", offset=offset, shape=dataset.shape)


def _check_shapes(maps: dict[str, np.ndarray], record: dict[str, Any], path: Path) -> None:
    n, dim = len(maps["ids"]), record["layout"]["dim"]
    stored = np.dtype(layout.STORED_DTYPES[record["layout"]["dtype"]])
    wanted = {"views": (n,), "embeddings": (n, dim), "input_digests": (n, INPUT_DIGEST_BYTES)}
    for name, shape in wanted.items():
        if maps[name].shape != shape:
            raise StoreFormatError(f"{path}: /{name} has shape {maps[name].shape}, expected {shape}")
    if maps["embeddings"].dtype != stored:
        raise StoreFormatError(f"{path}: /embeddings has dtype {maps['embeddings'].dtype}, its record says {stored}")
