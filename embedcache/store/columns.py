"""One dataset of many shards seen as one: rows are gathered when they are asked for, each touched once.

Shape notation: n rows in all, m rows asked for, d width of an embedding or token, l tokens in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from embedcache.store.layout import STORED_DTYPES
from embedcache.store.values import from_stored

_CHUNK_BYTES = 16 * 2**20  # converted at once where a whole column is


class Column:
    """Rows of equal shape across shards.

    Args:
        parts: the dataset in each shard, (n_k, ...).
        keeps: for each shard the rows that hold, None for all.
        empty: an array without rows, for a store without shards.
    """

    def __init__(self, parts: Sequence[np.ndarray], keeps: Sequence[np.ndarray | None], empty: np.ndarray) -> None:
        self._parts, self._keeps = list(parts), list(keeps)
        counts = [len(part) if keep is None else len(keep) for part, keep in zip(parts, keeps, strict=True)]
        self._starts = np.cumsum([0, *counts])
        self.dtype = empty.dtype
        self.shape = (int(self._starts[-1]), *empty.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows of a slice: a view where they lie in one shard, else gathered."""
        start, stop, step = rows.indices(len(self))
        if step != 1:
            return self.take(np.arange(start, stop, step))
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        if start < stop <= self._starts[min(first + 1, len(self._parts))]:
            local = slice(start - self._starts[first], stop - self._starts[first])
            keep = self._keeps[first]
            return self._parts[first][local if keep is None else keep[local]]
        return self.take(np.arange(start, max(start, stop)))

    def whole(self) -> np.ndarray:
        """Every row, (n, ...): the mapped array itself where one shard has them all, else one gathered copy."""
        full = [k for k in range(len(self._parts)) if self._starts[k + 1] > self._starts[k]]
        if len(full) == 1 and self._keeps[full[0]] is None:
            return self._parts[full[0]]
        out = np.empty(self.shape, self.dtype)
        for k in full:
            keep = self._keeps[k]
            part = self._parts[k] if keep is None else self._parts[k][keep]
            out[self._starts[k] : self._starts[k + 1]] = part
        return out

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Rows by number, (m, ...), in the order asked for.

        Args:
            rows: (m,) int64, each from 0 to n - 1.
        """
        if len(self._parts) == 1 and self._keeps[0] is None:
            return np.take(self._parts[0], rows, axis=0)
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for positions, part, local in self.by_shard(rows):
            out[positions] = part[local]
        return out

    def by_shard(self, rows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Rows grouped by shard: positions in `rows`, the shard's array, rows in it."""
        if not len(rows):
            return []
        shard_of = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(shard_of, kind="stable")
        shards, begins = np.unique(shard_of[order], return_index=True)
        groups = []
        for k, positions in zip(shards, np.split(order, begins[1:]), strict=True):
            local, keep = rows[positions] - self._starts[k], self._keeps[k]
            groups.append((positions, self._parts[k], local if keep is None else keep[local]))
        return groups


class Values:
    """The numbers that a column of codes stands for."""

    def __init__(self, codes: Column, dtype: str, scales: Column | None) -> None:
        self.codes, self.scales = codes, scales
        self._dtype = dtype

    @property
    def is_stored_as_is(self) -> bool:
        """Whether codes are the values; otherwise they are widened to float32 when gathered."""
        return self._dtype in ("float32", "float16")

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Values by row number, (m, ...)."""
        scales = None if self.scales is None else self.scales.take(rows)
        return from_stored(self.codes.take(rows), self._dtype, scales)

    def whole(self) -> np.ndarray:
        """Every value, (n, ...): the codes themselves where they are the values, else widened piece by piece."""
        if self.is_stored_as_is:
            return self.codes.whole()
        out = np.empty(self.codes.shape, np.float32)
        row_bytes = 4 * int(np.prod(self.codes.shape[1:], dtype=object))
        step = max(_CHUNK_BYTES // max(row_bytes, 1), 1)
        for start in range(0, len(out), step):
            part = slice(start, start + step)
            scales = None if self.scales is None else self.scales[part]
            out[part] = from_stored(self.codes[part], self._dtype, scales)
        return out


class Tokens:
    """Tokens of fixed length, (n, l, d). Index it with a row number or with row numbers; nothing is read before."""

    def __init__(self, values: Values) -> None:
        self.values = values

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, l, d)."""
        return self.values.codes.shape

    def __len__(self) -> int:
        return len(self.values.codes)

    def __getitem__(self, rows: int | slice | Sequence[int] | np.ndarray) -> np.ndarray:
        """(l, d) for a number, (m, l, d) for numbers or a slice; bfloat16 and int8 as float32."""
        one, numbers = row_numbers(rows, len(self))
        values = self.values.take(numbers)
        return values[0] if one else values

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        """All of them, (n, l, d): zero-copy for one shard of float16 or float32."""
        return np.array(self.values.whole(), dtype=dtype, copy=copy)


class RaggedTokens:
    """Tokens of rows with lengths of their own.

    Args:
        parts: tokens of each shard, (s_k, d), their offsets (n_k + 1,), and for int8 their scales (s_k,).
        keeps: for each shard the rows that hold, None for all.
        dtype: stored dtype.
        dim: d.
    """

    def __init__(
        self,
        parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray | None]],
        keeps: Sequence[np.ndarray | None],
        dtype: str,
        dim: int,
    ) -> None:
        self._parts, self._dtype, self.dim = list(parts), dtype, dim
        begins = [offsets[:-1] for _, offsets, _ in parts]
        ends = [offsets[1:] for _, offsets, _ in parts]
        shard = [np.full(len(b), k) for k, b in enumerate(begins)]
        none = np.empty(0, np.int64)

        def kept(columns: Sequence[np.ndarray]) -> np.ndarray:
            return Column(columns, keeps, none).whole()

        self._begins, self._ends, self._shard = kept(begins), kept(ends), kept(shard)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each row, (n,) int64."""
        return self._ends - self._begins

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, rows: int | slice | Sequence[int] | np.ndarray) -> np.ndarray | list[np.ndarray]:
        """(l_i, d) for a number, a list of such for numbers or a slice; bfloat16 and int8 as float32."""
        one, numbers = row_numbers(rows, len(self))
        values = [self._decoded(i) for i in numbers.tolist()]
        return values[0] if one else values

    def codes(self) -> RaggedCodes:
        """The stored codes of all rows one after the other, by slices of tokens; for writing them anew."""
        return RaggedCodes(self, lambda k: self._parts[k][0], (self.dim,), np.dtype(STORED_DTYPES[self._dtype]))

    def scales(self) -> RaggedCodes:
        """The scales of int8 tokens, one after the other."""
        return RaggedCodes(self, lambda k: self._parts[k][2], (), np.dtype("<f4"))

    def place(self, i: int) -> tuple[int, slice]:
        """Shard of a row, and its tokens there."""
        return int(self._shard[i]), slice(int(self._begins[i]), int(self._ends[i]))

    def _decoded(self, i: int) -> np.ndarray:
        k, tokens = self.place(i)
        codes, _, scales = self._parts[k]
        return from_stored(codes[tokens], self._dtype, None if scales is None else scales[tokens])


class RaggedCodes:
    """A ragged dataset of many shards in the order of rows, by slices that begin and end with a row."""

    def __init__(
        self,
        rows: RaggedTokens,
        part: Callable[[int], np.ndarray | None],
        tail: tuple[int, ...],
        dtype: np.dtype,
    ) -> None:
        self._rows, self._part = rows, part
        self.offsets = np.concatenate([[0], np.cumsum(rows.lengths)]).astype(np.int64)
        self.shape, self.dtype = (int(self.offsets[-1]), *tail), dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, tokens: slice) -> np.ndarray:
        first, last = np.searchsorted(self.offsets, [tokens.start, tokens.stop], side="left")
        places = [self._rows.place(i) for i in range(first, last)]
        parts = [part[where] for k, where in places if (part := self._part(k)) is not None]
        return np.concatenate(parts) if parts else np.empty((0, *self.shape[1:]), self.dtype)


def row_numbers(rows: int | slice | Sequence[int] | np.ndarray, n: int) -> tuple[bool, np.ndarray]:
    """Whether one row was asked for, and the row numbers, (m,) int64, as numpy would take them.

    Raises:
        IndexError: a number outside the n rows.
    """
    if isinstance(rows, slice):
        return False, np.arange(n)[rows]
    numbers = np.asarray(rows)
    if numbers.dtype == bool:
        numbers = np.flatnonzero(numbers)
    if numbers.dtype.kind not in "iu" and numbers.size:
        raise IndexError(f"row numbers of dtype {numbers.dtype}, expected integers; find rows of ids with .rows(ids)")
    one, numbers = numbers.ndim == 0, np.atleast_1d(numbers).astype(np.int64, copy=False)
    lowest, highest = (int(numbers.min()), int(numbers.max())) if numbers.size else (0, -1)
    if lowest < -n or highest >= n:
        raise IndexError(f"row {highest if highest >= n else lowest} of a store of {n} rows")
    return one, np.where(numbers < 0, numbers + n, numbers) if lowest < 0 else numbers
