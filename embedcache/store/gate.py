"""The gate: a shard file to mapped arrays, after checking that it is what format 1 allows and nothing else.

HDF5 follows links, external files and virtual datasets silently, and its parser has had memory faults. So nothing of a
file is read or mapped before all of it has been looked over, by name, by kind, and by where its bytes lie.

Shape notation: n rows, d embedding width, l tokens in a row, s tokens in all rows.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py._objects import phil as h5py_lock

from embedcache.errors import StoreFormatError
from embedcache.fingerprint import INPUT_DIGEST_BYTES
from embedcache.store import layout
from embedcache.store.id_index import key_array
from embedcache.store.layout import Layout
from embedcache.store.mapping import map_file
from embedcache.store.shard import INDEX, Failure, ShardRows, byte_view, index_digest

_SIGNATURE = b"\x89HDF\r\n\x1a\n\x03"  # superblock version 3, whose metadata carries checksums
_DIGEST_BYTES = 32
_LINKS = {h5py.h5l.TYPE_SOFT: "a soft link", h5py.h5l.TYPE_EXTERNAL: "an external link"}

_VALUES = {np.dtype(d) for d in layout.STORED_DTYPES.values()}
_BYTES = {np.dtype(np.uint8)}
_FLOATS = {np.dtype("<f4")}
# every dataset that format 1 knows: the dtypes and ranks it may have
_KNOWN: dict[str, tuple[set[np.dtype] | None, tuple[int, ...]]] = {
    "record": (_BYTES, (1,)),
    "failures": (_BYTES, (1,)),
    "ids": (None, (1,)),
    "views": ({np.dtype("<u2")}, (1,)),
    "input_digests": (_BYTES, (2,)),
    "block_digests": (_BYTES, (2,)),
    "embeddings": (_VALUES, (2,)),
    "scales": (_FLOATS, (1,)),
    "tokens": (_VALUES, (2, 3)),
    "token_offsets": ({np.dtype("<i8")}, (1,)),
    "token_scales": (_FLOATS, (1, 2)),
}


@dataclass(frozen=True)
class Shard:
    """A shard as read. Arrays are views of one copy-on-write map of the file, and it holds no open file.

    Args:
        keys: ids as UTF-8 bytes padded with NUL, (n,).
        views: (n,) uint16.
        codes: (n, d) stored dtype.
        input_digests: (n, 16) uint8.
        record: the store's document as the shard carries it.
        layout: the layout in it.
        block_rows: rows to a block of `block_digests`.
        block_digests: (ceil(n / block_rows), 32) uint8.
        scales, tokens, token_offsets, token_scales: as in `ShardRows`; None where the layout has none.
        index: the datasets of `INDEX` as they are in the file.
    """

    path: Path
    keys: np.ndarray
    views: np.ndarray
    codes: np.ndarray
    input_digests: np.ndarray
    failure_ledger: bytes
    record: dict[str, Any]
    layout: Layout
    block_rows: int
    block_digests: np.ndarray
    scales: np.ndarray | None
    tokens: np.ndarray | None
    token_offsets: np.ndarray | None
    token_scales: np.ndarray | None
    index: tuple[np.ndarray, ...]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What its document must say of it, beside file, SHA-256 and size."""
        return {
            "fingerprint": self.record["fingerprint"],
            "n": len(self),
            "n_failed": len(self.failures),
            "index_sha256": index_digest(byte_view(part) for part in self.index),
        }

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def ids(self) -> list[str]:
        """(n,) str."""
        return decoded(self.keys, self.path)

    @cached_property
    def failures(self) -> list[Failure]:
        """Inputs without a row."""
        known = ("id", "reason", "message")
        try:
            failures = [Failure(*(str(f[name]) for name in known)) for f in json.loads(self.failure_ledger)]
            key_array([f.id for f in failures])
            return failures
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise StoreFormatError(
                f"{self.path}: /failures is not a list of failures ({type(error).__name__}); "
                f"run 'embedcache verify {self.path.parent}'"
            ) from error

    def rows(self) -> ShardRows:
        """The same as what a shard is written from."""
        return ShardRows(
            self.ids,
            self.views,
            self.codes,
            self.input_digests,
            self.failures,
            self.scales,
            self.tokens,
            self.token_offsets,
            self.token_scales,
        )


def open_shard(path: Path, *, user_block: int = 0) -> Shard:
    """Maps a shard after checking that it holds what format 1 allows and nothing else.

    Args:
        user_block: bytes before the HDF5 part.

    Raises:
        StoreFormatError: the gate refused it; the message says what was found where.
    """
    try:
        with path.open("rb") as handle:
            handle.seek(user_block)
            start, size = handle.read(len(_SIGNATURE)), handle.seek(0, 2)
        if start != _SIGNATURE:
            raise StoreFormatError(
                f"{path}: begins with {start!r}, expected an HDF5 superblock of version 3: not a shard of embedcache"
            )
        with without_plugins(), h5py.File(path, "r", locking=False, driver="sec2") as file:
            if file.userblock_size != user_block:
                raise StoreFormatError(f"{path}: a user block of {file.userblock_size} bytes, expected {user_block}")
            return _read(file, path, size)
    except StoreFormatError:
        raise
    except (
        OSError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
        MemoryError,
    ) as error:
        raise StoreFormatError(
            f"{path}: cannot be read as a shard ({error}); run 'embedcache verify {path.parent}'"
        ) from error


def decoded(keys: np.ndarray, path: Path) -> list[str]:
    """Ids as text, (n,).

    Raises:
        StoreFormatError: one that is not UTF-8.
    """
    try:
        ids = [key.decode("utf-8") for key in keys.tolist()]
    except UnicodeDecodeError as error:
        raise StoreFormatError(f"{path}: an id is not UTF-8 ({error}); run 'embedcache verify {path}'") from error
    if "\0" in "".join(ids):
        raise StoreFormatError(f"{path}: an id holds a NUL character; run 'embedcache verify {path}'")
    return ids


@contextlib.contextmanager
def without_plugins() -> Iterator[None]:
    """HDF5 looks for filters in folders of shared libraries; while the gate looks at a file there are none."""
    with h5py_lock:
        folders = [h5py.h5pl.get(k) for k in range(h5py.h5pl.size())]
        for _ in folders:
            h5py.h5pl.remove(0)
        try:
            yield
        finally:
            for folder in folders:
                h5py.h5pl.append(folder)


def _read(file: h5py.File, path: Path, size: int) -> Shard:
    kind = file.attrs.get("encoding-type")
    if kind != np.bytes_(layout.SHARD_ENCODING):
        raise StoreFormatError(
            f"{path}: encoding-type is {kind!r}, expected {layout.SHARD_ENCODING!r}: not a shard of embedcache"
        )
    layout.check_version(bytes(file.attrs["encoding-version"]).decode(), path)
    names = {name.decode("utf-8", "backslashreplace") for name in file.id}
    _check_names(names, path, known=set(_KNOWN), needed={"record", "block_digests"})
    places = {name: _looked_over(file, name, path, size) for name in sorted(names)}
    rows_each = int(file["block_digests"].attrs["block_rows"])
    whole = map_file(path, size)
    arrays = {name: place(whole) for name, place in places.items()}
    record = json.loads(arrays["record"].tobytes())
    layout.check_store_document(record, path)
    store_layout = Layout.from_json(record["layout"])
    _check_names(names, path, known=store_layout.datasets(), needed=store_layout.datasets())
    _check_shapes(arrays, store_layout, rows_each, path)
    return Shard(
        path=path,
        keys=arrays["ids"],
        views=arrays["views"],
        codes=arrays["embeddings"],
        input_digests=arrays["input_digests"],
        failure_ledger=arrays["failures"].tobytes(),
        record=record,
        layout=store_layout,
        block_rows=rows_each,
        block_digests=arrays["block_digests"],
        scales=arrays.get("scales"),
        tokens=arrays.get("tokens"),
        token_offsets=arrays.get("token_offsets"),
        token_scales=arrays.get("token_scales"),
        index=tuple(arrays[name] for name in INDEX if name in arrays),
    )


def _check_names(found: set[str], path: Path, *, known: set[str], needed: set[str]) -> None:
    unknown, missing = sorted(found - known), sorted(needed - found)
    if unknown or missing:
        raise StoreFormatError(
            f"{path}: unknown datasets {unknown[:5]}, missing datasets {missing}; format {layout.FORMAT} allows "
            f"{sorted(known)} here; what a newer embedcache wrote, a newer one reads"
        )


def _looked_over(file: h5py.File, name: str, path: Path, size: int) -> Callable[[np.ndarray], np.ndarray]:
    """Where the bytes of one dataset lie, checked before any of them is read; gives what cuts them out of a map."""

    def refuse(found: str, wanted: str) -> StoreFormatError:
        return StoreFormatError(f"{path}: /{name} {found}, expected {wanted}; refused before reading it")

    # h5py's low-level calls: its high-level ones cost as much for one dataset as these for a whole file
    key = name.encode()
    kind = file.id.links.get_info(key).type
    if kind != h5py.h5l.TYPE_HARD:
        raise refuse(f"is {_LINKS.get(kind, 'a link of another kind')}", "a hard link")
    if h5py.h5o.get_info(file.id, key).type != h5py.h5o.TYPE_DATASET:
        raise refuse("is no dataset", "a dataset")
    dataset = h5py.h5d.open(file.id, key)
    creation = dataset.get_create_plist()
    kept = creation.get_layout()
    if kept == h5py.h5d.VIRTUAL:
        raise refuse("is virtual", "contiguous bytes in this file")
    if creation.get_external_count():
        raise refuse("lies in external files", "contiguous bytes in this file")
    if kept != h5py.h5d.CONTIGUOUS or creation.get_nfilters():
        raise refuse("is chunked, compact or filtered", "contiguous and unfiltered")
    dtypes, ranks = _KNOWN[name]
    found = dataset.dtype
    text = h5py.check_string_dtype(found) if found.kind in "SO" else None
    fits = found in dtypes if dtypes is not None else text is not None and text.length is not None
    if not fits:
        wanted = " or ".join(sorted(map(str, dtypes))) if dtypes else "text of fixed length"
        raise refuse(f"has dtype {found}", wanted)
    if dataset.rank not in ranks:
        raise refuse(f"has rank {dataset.rank}", f"rank {' or '.join(map(str, ranks))}")
    shape = dataset.shape
    n_bytes = int(np.prod(shape, dtype=object)) * found.itemsize
    if n_bytes == 0:
        return lambda _: np.empty(shape, found)
    offset = dataset.get_offset()
    if dataset.get_storage_size() != n_bytes or offset is None or offset + n_bytes > size:
        raise refuse(f"claims {n_bytes} bytes at {offset} of a file of {size}", "allocated bytes inside the file")
    if offset % layout.ALIGN_BYTES:
        raise refuse(f"starts at {offset}", f"a multiple of {layout.ALIGN_BYTES}")
    plain = np.dtype(f"S{found.itemsize}") if text else found
    return lambda whole: whole[offset : offset + n_bytes].view(plain).reshape(shape)


def _check_shapes(arrays: dict[str, np.ndarray], store_layout: Layout, rows_each: int, path: Path) -> None:
    n = len(arrays["ids"])
    if n and rows_each < 1:
        raise StoreFormatError(f"{path}: /block_digests has block_rows {rows_each}, expected at least 1")
    wanted: dict[str, tuple[int, ...]] = {
        "views": (n,),
        "embeddings": (n, store_layout.dim),
        "input_digests": (n, INPUT_DIGEST_BYTES),
        "block_digests": (-(-n // rows_each) if n else 0, _DIGEST_BYTES),
        "scales": (n,),
    }
    tokens = store_layout.tokens
    if tokens is not None and tokens.length is not None:
        wanted |= {"tokens": (n, tokens.length, tokens.dim), "token_scales": (n, tokens.length)}
    elif tokens is not None:
        offsets = arrays["token_offsets"]
        if offsets.shape != (n + 1,) or offsets[0] != 0 or (offsets[1:] < offsets[:-1]).any():
            raise StoreFormatError(f"{path}: /token_offsets are not {n + 1} numbers that rise from 0")
        n_tokens = int(offsets[-1])
        wanted |= {"tokens": (n_tokens, tokens.dim), "token_scales": (n_tokens,)}
    stored = np.dtype(layout.STORED_DTYPES[store_layout.dtype])
    for name, shape in wanted.items():
        if name in arrays and arrays[name].shape != shape:
            raise StoreFormatError(f"{path}: /{name} has shape {arrays[name].shape}, expected {shape}")
    for name in ("embeddings", "tokens"):
        if name in arrays and arrays[name].dtype != stored:
            raise StoreFormatError(
                f"{path}: /{name} has dtype {arrays[name].dtype}, its record says {store_layout.dtype}"
            )
