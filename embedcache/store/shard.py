"""One shard: rows to the bytes of an HDF5 file.

HDF5 lays the file out and writes its metadata into a file object of ours; the rows themselves never pass through it. So
a shard is made of a few kilobytes of metadata and of the caller's own buffers, in file order, in one pass: it needs no
copy in memory, may be larger than memory, and a full disk never meets libhdf5.

Shape notation: n rows, d embedding width, l tokens in a row, s tokens in all rows.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import h5py
import numpy as np

from embedcache.errors import StoreFormatError
from embedcache.fingerprint import INPUT_DIGEST_BYTES, canonical_json
from embedcache.store import layout

_BLOCK_ROWS = 256  # most rows under one block digest ...
_BLOCK_BYTES = 2**20  # ... and about how many bytes, where rows are large
_SMALL_BYTES = 2**17  # pieces below are joined, so that a write is worth its call
_MOST_PADDING = 64  # steps of alignment to try; a handful is enough


# what says whose the rows are: small beside them, and so compared whenever a store is opened
INDEX = ("record", "failures", "ids", "views", "input_digests", "token_offsets")

Pieces = Callable[[], Iterator[bytes | memoryview]]


class Rows(Protocol):
    """Anything with rows that come by slices: an array, a map of a file, a column of another store."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


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
        scales: for int8, (n,) float32.
        tokens: in their stored dtype, (n, l, d), or ragged (s, d).
        token_offsets: for ragged tokens, (n + 1,) int64: row i has tokens `offsets[i]` to `offsets[i + 1]`.
        token_scales: for int8, (n, l), or ragged (s,), float32.
    """

    ids: Sequence[str]
    views: np.ndarray
    codes: Rows
    input_digests: np.ndarray
    failures: Sequence[Failure]
    scales: Rows | None = None
    tokens: Rows | None = None
    token_offsets: np.ndarray | None = None
    token_scales: Rows | None = None

    def per_row(self) -> dict[str, tuple[Rows, np.ndarray | None]]:
        """The datasets that block digests cover, in order: what each holds, and offsets where rows are ragged."""
        parts = {
            "embeddings": (self.codes, None),
            "scales": (self.scales, None),
            "tokens": (self.tokens, self.token_offsets),
            "token_scales": (self.token_scales, self.token_offsets),
        }
        return {name: (rows, offsets) for name, (rows, offsets) in parts.items() if rows is not None}


@dataclass(frozen=True)
class _Region:
    """A dataset of the file to be: its type, its shape, and its bytes, made when they are written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: Pieces

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


class ShardImage:
    """The bytes of a shard file, in order, piece by piece; equal rows give equal bytes.

    Args:
        rows: read once while the image is written.
        store_document: the store's own document: a shard describes itself in full.
        user_block: bytes to leave before the HDF5 part, for a packed store's document; they are not among the pieces.

    Attributes:
        size: bytes of the whole file, the user block included.
        facts: what the shard's document says of it beside file, SHA-256 and size.
    """

    def __init__(self, rows: ShardRows, store_document: dict[str, Any], *, user_block: int = 0) -> None:
        self._user_block = user_block
        rows_each = _block_rows(rows)
        for step in range(_MOST_PADDING):  # trailing spaces in the record shift the rows off a page boundary
            record = canonical_json(store_document) + b" " * (layout.ALIGN_BYTES * step)
            self._regions = _regions(rows, record, rows_each)
            metadata, self._offsets = _lay_out(
                self._regions, store_document["fingerprint"], rows_each=rows_each, user_block=user_block
            )
            if not any(self._aliases(region) for region in self._regions):
                break
        else:
            raise StoreFormatError("no padding keeps the rows off a page boundary")
        self._metadata, self.size = metadata.pieces, metadata.size
        made, wanted = {region.name for region in self._regions}, layout.Layout.from_json(store_document["layout"])
        if made != wanted.datasets():
            raise StoreFormatError(f"rows for {sorted(made)}, but the layout has {sorted(wanted.datasets())}")
        index = {r.name: r for r in self._regions if r.name in INDEX}
        self.facts = {
            "fingerprint": store_document["fingerprint"],
            "n": len(rows.ids),
            "n_failed": len(rows.failures),
            "index_sha256": index_digest(piece for name in INDEX if name in index for piece in index[name].pieces()),
        }

    def _aliases(self, region: _Region) -> bool:
        is_rows = region.name in ("embeddings", "tokens") and region.n_bytes > 0
        return is_rows and self._offsets[region.name] % layout.ALIAS_BYTES == 0

    def __iter__(self) -> Iterator[bytes | memoryview]:
        small = bytearray()
        for piece in self._pieces():
            if len(piece) < _SMALL_BYTES:
                small += piece
            if small and (len(piece) >= _SMALL_BYTES or len(small) >= _SMALL_BYTES):
                yield bytes(small)
                small.clear()
            if len(piece) >= _SMALL_BYTES:
                yield piece
        yield bytes(small)

    def _pieces(self) -> Iterator[bytes | memoryview]:
        parts = [(at, len(data), _one(data)) for at, data in self._metadata.items()]
        parts += [(self._offsets[r.name], r.n_bytes, r.pieces) for r in self._regions if r.n_bytes]
        at = self._user_block
        for offset, n_bytes, pieces in sorted(parts, key=lambda part: part[0]):
            if offset < at:
                raise StoreFormatError(f"HDF5 laid out two things at offset {offset}: a fault of this HDF5 version")
            yield bytes(offset - at)
            written = 0
            for piece in pieces():
                written += len(piece)
                yield piece
            if written != n_bytes:
                raise StoreFormatError(
                    f"{written} bytes at offset {offset}, expected {n_bytes}: rows changed under way"
                )
            at = offset + n_bytes
        yield bytes(self.size - at)


def _regions(rows: ShardRows, record: bytes, rows_each: int) -> list[_Region]:
    encoded = [i.encode("utf-8") for i in rows.ids]
    width = max((len(i) for i in encoded), default=1)
    ids = np.array(encoded, dtype=f"S{width}")
    failures = canonical_json([asdict(failure) for failure in rows.failures])
    small: list[tuple[str, np.ndarray]] = [
        ("record", np.frombuffer(record, np.uint8)),
        ("failures", np.frombuffer(failures, np.uint8)),
        ("ids", ids.astype(h5py.string_dtype("utf-8", width))),
        ("views", np.asarray(rows.views).astype("<u2")),
        ("input_digests", np.asarray(rows.input_digests).reshape(-1, INPUT_DIGEST_BYTES)),
    ]
    if rows.token_offsets is not None:
        small.append(("token_offsets", np.asarray(rows.token_offsets).astype("<i8")))
    regions = [_Region(name, a.dtype, a.shape, _one(byte_view(a))) for name, a in small]
    bounds = block_bounds(len(rows.ids), rows_each)
    blocks = [hashlib.sha256() for _ in bounds]
    for name, (part, offsets) in rows.per_row().items():
        pieces = _hashed_pieces(part, _scaled(bounds, offsets), blocks)
        regions.append(_Region(name, part.dtype, part.shape, pieces))
    digests = _Region(
        "block_digests",
        np.dtype(np.uint8),
        (len(blocks), hashlib.sha256().digest_size),
        lambda: (block.digest() for block in blocks),
    )
    return [*regions, digests]


def _one(data: bytes | memoryview) -> Pieces:
    return lambda: iter([data])


def _block_rows(rows: ShardRows) -> int:
    """Rows under one block digest: fewer where rows are large, so that damage is named closely."""
    n_bytes = sum(int(np.prod(part.shape, dtype=object)) * part.dtype.itemsize for part, _ in rows.per_row().values())
    each = n_bytes // max(len(rows.ids), 1)
    return max(min(_BLOCK_ROWS, _BLOCK_BYTES // max(each, 1)), 1)


def block_bounds(n: int, rows_each: int) -> list[tuple[int, int]]:
    """First row and end of every block."""
    return [(start, min(start + rows_each, n)) for start in range(0, n, rows_each)]


def block_digests(rows: ShardRows, bounds: list[tuple[int, int]]) -> np.ndarray:
    """SHA-256 of the bytes of every block of rows, dataset after dataset, (len(bounds), 32) uint8."""
    blocks = [hashlib.sha256() for _ in bounds]
    for part, offsets in rows.per_row().values():
        for _ in _hashed_pieces(part, _scaled(bounds, offsets), blocks)():
            pass
    return np.frombuffer(b"".join(block.digest() for block in blocks), np.uint8).reshape(-1, 32)


def _scaled(bounds: list[tuple[int, int]], offsets: np.ndarray | None) -> list[tuple[int, int]]:
    """Bounds of rows as bounds of their tokens, where tokens are ragged."""
    return bounds if offsets is None else [(int(offsets[start]), int(offsets[stop])) for start, stop in bounds]


def _hashed_pieces(part: Rows, bounds: list[tuple[int, int]], blocks: Sequence[Any]) -> Pieces:
    """The bytes of a dataset block by block, each added to its block's digest as it goes by."""

    def pieces() -> Iterator[bytes | memoryview]:
        for (start, stop), block in zip(bounds, blocks, strict=True):
            piece = byte_view(part[start:stop])
            block.update(piece)
            yield piece

    return pieces


def index_digest(pieces: Iterable[bytes | memoryview]) -> str:
    """SHA-256 of the bytes of the datasets of `INDEX`, one after the other, 64 hex digits."""
    total = hashlib.sha256()
    for piece in pieces:
        total.update(piece)
    return total.hexdigest()


def byte_view(array: np.ndarray) -> memoryview:
    """The bytes of an array, copied only if it is not contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else memoryview(b"")


def _lay_out(
    regions: Sequence[_Region], fingerprint: str, *, rows_each: int, user_block: int
) -> tuple[_Metadata, dict[str, int]]:
    """What HDF5 writes for a file of these datasets, and where each dataset's bytes belong.

    Args:
        rows_each: rows under one block digest.
    """
    metadata, offsets = _Metadata(), {}
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    with h5py.File(
        metadata,
        "w",
        libver=("v110", "v110"),
        alignment_threshold=1,
        alignment_interval=layout.ALIGN_BYTES,
        userblock_size=user_block or None,
        track_order=False,
    ) as file:
        file.attrs["encoding-type"] = np.bytes_(layout.SHARD_ENCODING)
        file.attrs["encoding-version"] = np.bytes_(layout.FORMAT)
        file.attrs["fingerprint"] = np.bytes_(fingerprint)
        for region in regions:
            dataset = file.create_dataset(
                region.name, region.shape, region.dtype, dcpl=creation.copy(), track_times=False
            )
            if region.n_bytes:
                offsets[region.name] = dataset.id.get_offset()
        file["block_digests"].attrs["block_rows"] = np.uint32(rows_each)
    return metadata, offsets


class _Metadata(io.RawIOBase):
    """The file that HDF5 writes to: it keeps what is written, which is metadata alone."""

    def __init__(self) -> None:
        self.pieces: dict[int, bytes] = {}
        self.size = self._at = 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def truncate(self, size: int | None = None) -> int:
        self.size = self._at if size is None else size
        return self.size

    def write(self, data: Any) -> int:
        data = bytes(data)
        self.pieces[self._at] = data
        self._at += len(data)
        self.size = max(self.size, self._at)
        return len(data)

    def readinto(self, buffer: Any) -> int:
        raise StoreFormatError("HDF5 read back what it wrote: a fault of this HDF5 version")
