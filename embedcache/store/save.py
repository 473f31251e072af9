"""Writing arrays made elsewhere as a store: checked row by row, streamed, never changed on the way.

Shape notation: n rows, d embedding width, l tokens in a row, s tokens in all rows.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.errors import StoreWriteError, some_ids
from embedcache.fingerprint import INPUT_DIGEST_BYTES, canonical_json, fingerprint
from embedcache.ids import unusable_ids
from embedcache.store import commit, layout
from embedcache.store.catalogue import Catalogue, Plan, open_or_create, publish_plan
from embedcache.store.layout import Layout, TokenLayout
from embedcache.store.shard import Rows, ShardImage, ShardRows, byte_view
from embedcache.store.store import Store, open_store
from embedcache.store.values import from_stored, to_stored

_CHUNK_BYTES = 8 * 2**20  # looked at and converted at once


def save_store(
    path: str | Path,
    ids: Sequence[str],
    embeddings: Rows,
    *,
    tokens: Rows | Sequence[np.ndarray] | None = None,
    record: dict[str, Any] | None = None,
    modality: str = "image",
    store_dtype: str | None = None,
) -> Store:
    """Writes embeddings made elsewhere as a store of one shard.

    Arrays may be maps of files larger than memory: they are read twice, in pieces, once to check them and once to
    write them. Stopped or killed, the same call goes on; a store that is finished is never written to.

    Args:
        ids: unique sample ids, n of them.
        embeddings: (n, d), finite.
        tokens: (n, l, d_t), or for rows of different lengths n arrays (l_i, d_t); finite.
        record: JSON-ready account of where the values came from; without it the contents are fingerprinted.
        store_dtype: one of `STORED_DTYPES`; the dtype of `embeddings` if it is float16 or float32, else float32.

    Raises:
        ValueError: ids and rows that do not fit, ids that are no text or doubled, values that are no real numbers, rows
            that are not finite or zero throughout.
        StoreWriteError: the path holds a store already, or cannot be written.
        FingerprintMismatchError: an unfinished store of other values is there.
    """
    path, ids = Path(path), list(ids)
    embeddings = _with_rows(embeddings, "embeddings")
    if len(embeddings.shape) != 2 or len(embeddings) != len(ids):
        raise ValueError(f"embeddings of shape {embeddings.shape} for {len(ids)} ids, expected ({len(ids)}, d)")
    if modality not in layout.MODALITIES:
        raise ValueError(f"modality {modality!r}, expected 'image' or 'text'")
    _check_ids(ids)
    given = str(np.dtype(embeddings.dtype))
    dtype = store_dtype or (given if given in ("float16", "float32") else "float32")
    if dtype not in layout.STORED_DTYPES:
        raise ValueError(f"store_dtype {dtype!r}, expected one of {', '.join(layout.STORED_DTYPES)}")
    converted = _Converted(embeddings, dtype)
    token_codes, offsets, token_layout = _token_codes(tokens, len(ids), dtype)
    unfit = converted.unfit(ids, None) + (token_codes.unfit(ids, offsets) if token_codes is not None else [])
    if unfit:
        unfit = list(dict.fromkeys(unfit))
        raise ValueError(
            f"{len(unfit)} rows are not finite as {dtype}, or zero throughout: {some_ids(unfit)}; leave them out"
        )
    if record is None:
        contents = {"ids": ids, "embeddings": converted.digest()}
        if token_codes is not None:
            contents["tokens"] = token_codes.digest()
        record = {"source": "external", "contents": fingerprint(contents)}
    rows = ShardRows(
        ids,
        np.zeros(len(ids), np.uint16),
        converted,
        np.zeros((len(ids), INPUT_DIGEST_BYTES), np.uint8),  # the inputs are unknown here
        failures=[],
        scales=converted.scales,
        tokens=token_codes,
        token_offsets=offsets,
        token_scales=token_codes.scales if token_codes is not None else None,
    )
    document = layout.store_document(
        encoder=record,
        encoder_fingerprint=fingerprint(record),
        modality=modality,
        store_layout=Layout(dtype, embeddings.shape[1], tokens=token_layout),
    )
    return write_store(path, document, [rows], batch_size=max(len(ids), 1))


def write_store(path: Path, document: dict[str, Any], shards: Sequence[ShardRows], *, batch_size: int) -> Store:
    """Writes a store of rows that are there already, or goes on with what a stopped call left of the same one.

    Args:
        document: the store's.
        shards: what goes into each of its shards.
        batch_size: for the plan, which here only names the ids.

    Raises:
        StoreWriteError: another store, or this one finished, is there; or it cannot be written.
    """
    planned = [[*dict.fromkeys(rows.ids), *(f.id for f in rows.failures)] for rows in shards]
    bounds = [0, *accumulate(len(ids) for ids in planned)]
    plan = Plan([i for ids in planned for i in ids], bounds, 0, batch_size)
    catalogue = open_or_create(path, document)
    commit.sweep(path)
    publish_plan(path, 0, plan)
    catalogue = Catalogue.read(path)
    if list(catalogue.plans) != [plan] or len(catalogue.shards) == len(shards):
        raise StoreWriteError(f"{path}: holds a store already; name another directory")
    for number, rows in enumerate(shards):
        if not catalogue.has_shard(number):
            image = ShardImage(rows, catalogue.document)
            commit.publish_shard(path, number, image, image.facts)
    return open_store(path)


class _Converted:
    """Given values as the codes that are stored, converted as they are read."""

    def __init__(self, values: Rows, dtype: str) -> None:
        self._values, self._dtype_name = values, dtype
        self.shape, self.dtype = tuple(values.shape), np.dtype(layout.STORED_DTYPES[dtype])
        self.scales = np.empty(self.shape[:-1], "<f4") if dtype == "int8" else None

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return to_stored(np.asarray(self._values[rows]), self._dtype_name)[0]

    def _chunks(self) -> Iterator[slice]:
        row_bytes = 4 * int(np.prod(self.shape[1:], dtype=object))
        step = max(_CHUNK_BYTES // max(row_bytes, 1), 1)
        return (slice(start, min(start + step, len(self))) for start in range(0, len(self), step))

    def unfit(self, ids: Sequence[str], offsets: np.ndarray | None) -> list[str]:
        """Ids of rows that are not finite, before or after conversion, or zero throughout; fills `scales`."""
        found: list[str] = []
        for part in self._chunks():
            given = np.asarray(self._values[part])
            codes, scales = to_stored(given, self._dtype_name)
            if scales is not None and self.scales is not None:
                self.scales[part] = scales
            values = from_stored(codes, self._dtype_name, scales)
            inner = tuple(range(1, given.ndim))
            fit = np.isfinite(values).all(axis=inner)
            if codes.dtype != given.dtype:  # else they are the same numbers
                fit &= np.isfinite(given).all(axis=inner)
            if offsets is None:  # one token of a row may be zero
                fit &= ~(values == 0).all(axis=inner)
            numbers = part.start + np.flatnonzero(~fit)
            if offsets is not None:
                numbers = np.searchsorted(offsets, numbers, side="right") - 1
            found += [ids[k] for k in numbers]
        return found

    def digest(self) -> str:
        """SHA-256 over stored dtype, shape and codes."""
        total = hashlib.sha256(canonical_json([self._dtype_name, list(self.shape)]))
        for part in self._chunks():
            total.update(byte_view(self[part]))
        return total.hexdigest()


class Joined:
    """Parts of different lengths one after the other, read by slices: arrays, maps of files, columns elsewhere.

    Args:
        parts: each (n_i, d).
        dim: d.
    """

    def __init__(self, parts: Sequence[Rows], dim: int) -> None:
        self._parts = parts
        self.offsets = np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64)
        dtypes = {np.dtype(part.dtype) for part in parts}
        common = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
        self.shape, self.dtype = (int(self.offsets[-1]), dim), common if common.kind == "f" else np.dtype(np.float32)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows `start` to `stop`, both given, (stop - start, d)."""
        first = max(int(np.searchsorted(self.offsets, rows.start, side="right")) - 1, 0)
        last = int(np.searchsorted(self.offsets, rows.stop, side="left"))
        pieces = []
        for k in range(first, last):
            at = int(self.offsets[k])
            piece = self._parts[k][max(rows.start - at, 0) : min(rows.stop - at, len(self._parts[k]))]
            pieces.append(np.asarray(piece, self.dtype))
        if not pieces:
            return np.empty((0, self.shape[1]), self.dtype)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _token_codes(tokens: Any, n: int, dtype: str) -> tuple[_Converted | None, np.ndarray | None, TokenLayout | None]:
    """Tokens as codes, their offsets if they are ragged, and their layout."""
    if tokens is None:
        return None, None, None
    if len(tokens) != n:
        raise ValueError(f"tokens of {len(tokens)} rows for {n} ids")
    shape = getattr(tokens, "shape", None)
    if shape is not None and len(shape) == 3:
        tokens = _with_rows(tokens, "tokens")
        return _Converted(tokens, dtype), None, TokenLayout(tokens.shape[2], tokens.shape[1])
    parts = [_with_rows(part, "tokens") for part in tokens]
    dims = {part.shape[1] for part in parts if len(part.shape) == 2}
    if len(dims) != 1 or any(len(part.shape) != 2 for part in parts):
        shapes = sorted({part.shape for part in parts})[:3]
        raise ValueError(f"tokens of shapes {shapes}, expected (n, l, d), or n arrays (l_i, d) of one d")
    joined = Joined(parts, dims.pop())
    return _Converted(joined, dtype), joined.offsets, TokenLayout(joined.shape[1], None)


def _with_rows(values: Any, name: str) -> Rows:
    """As given where rows come by slices, so that a map of a file is not read here; else as an array.

    Raises:
        ValueError: values that are no real numbers, or masked ones.
    """
    sliceable = hasattr(values, "shape") and hasattr(values, "dtype") and hasattr(values, "__getitem__")
    rows = values if sliceable and isinstance(values.dtype, np.dtype) else np.asarray(values)
    if isinstance(rows, np.ma.MaskedArray) or rows.dtype.kind not in "fiub":
        found = "masked values" if isinstance(rows, np.ma.MaskedArray) else f"dtype {rows.dtype}"
        raise ValueError(f"{name} of {found}, expected real numbers")
    return rows


def _check_ids(ids: Sequence[str]) -> None:
    wrong = next((k for k, i in enumerate(ids) if not isinstance(i, str)), None)
    if wrong is not None:
        raise ValueError(f"id {wrong} is {ids[wrong]!r}, a {type(ids[wrong]).__name__}, expected str")
    faults = [f"{ids[k]!r} {fault}" for k, fault in unusable_ids(ids)]
    if faults:
        raise ValueError(f"{len(faults)} unusable ids: {'; '.join(faults[:5])}")
    if len(set(ids)) != len(ids):
        raise ValueError(f"duplicate ids: {some_ids(i for i, n in Counter(ids).items() if n > 1)}")
