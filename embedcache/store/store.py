"""Reading a store: shards mapped behind their gate, rows found by id.

Shape notation: n rows, d embedding width, l tokens in a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from embedcache.errors import MissingIdsError, NoTokensError, some_ids
from embedcache.fingerprint import INPUT_DIGEST_BYTES, fingerprint
from embedcache.ids import unusable_ids
from embedcache.store import layout
from embedcache.store.catalogue import Catalogue
from embedcache.store.columns import Column, RaggedTokens, Tokens, Values, row_numbers
from embedcache.store.gate import Shard, decoded
from embedcache.store.id_index import IdIndex, key_array, surely_distinct
from embedcache.store.layout import Layout
from embedcache.store.shard import Failure, ShardRows
from embedcache.store.source import Source, find_source

Verify = Literal["structure", "digest"]


class Store:
    """The rows of one store. Made by `open_store`.

    Where an id was tried again, its latest record holds. The object is also a torch map-style dataset. It holds no
    open file, so that it may be used after a fork; pickled, it goes by its path and opens the same shards again.
    """

    def __init__(
        self, source: Source, shards: Sequence[Shard], keeps: Sequence[np.ndarray | None] | None = None
    ) -> None:
        self.path = source.path
        self.layout = Layout.from_json(source.document["layout"])
        self._source, self._shards, self._given_keeps = source, shards, keeps

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened_again, (self._source, self._given_keeps)

    def __repr__(self) -> str:
        tokens = "" if self.layout.tokens is None else f", tokens {self.layout.tokens.length or 'ragged'}"
        return f"<Store {self.path}: {len(self)} x {self.layout.dim} {self.layout.dtype}{tokens}, {self.modality}>"

    @property
    def document(self) -> dict[str, Any]:
        """What the store says of itself."""
        return dict(self._source.document)

    @property
    def fingerprint(self) -> str:
        """What determines the stored values: encoder, layout and format."""
        return str(self._source.document["fingerprint"])

    @property
    def content(self) -> str:
        """A digest of what it holds: equal for stores of the same shards, wherever they lie."""
        return fingerprint([self.fingerprint, [document["sha256"] for document in self._source.shards]])

    @property
    def encoder_fingerprint(self) -> str:
        return str(self._source.document["encoder_fingerprint"])

    @property
    def encoder(self) -> dict[str, Any]:
        """The record of the encoder that computed the rows."""
        return dict(self._source.document["encoder"])

    @property
    def modality(self) -> str:
        return str(self._source.document["modality"])

    @property
    def is_packed(self) -> bool:
        """Whether the store is one file."""
        return self._source.packed

    @property
    def n_shards(self) -> int:
        return len(self._shards)

    @property
    def n_bytes(self) -> int:
        """Bytes of its shards on disk."""
        return sum(int(document["size"]) for document in self._source.shards)

    @cached_property
    def n_pending_shards(self) -> int:
        """Planned shards that do not count yet."""
        return 0 if self.is_packed else len(Catalogue.read(self.path).pending())

    @cached_property
    def ids(self) -> list[str]:
        """The id of each row, (n,)."""
        return decoded(self._keys, self.path)

    @cached_property
    def views(self) -> np.ndarray:
        """Which view of its sample each row is, (n,) uint16."""
        return self._column("views", np.empty(0, "<u2")).whole()

    @cached_property
    def input_digests(self) -> np.ndarray:
        """First 16 bytes of the SHA-256 of each row's input, (n, 16) uint8; all zero where it is unknown."""
        return self._column("input_digests", np.empty((0, INPUT_DIGEST_BYTES), np.uint8)).whole()

    @cached_property
    def raw(self) -> np.ndarray:
        """The stored codes, (n, d): mapped where there is one shard, one gathered copy where there are many."""
        return self._values.codes.whole()

    @cached_property
    def scales(self) -> np.ndarray | None:
        """The scale of each row, (n,) float32, of an int8 store; otherwise None."""
        return None if self._values.scales is None else self._values.scales.whole()

    @cached_property
    def embeddings(self) -> np.ndarray:
        """The embeddings, (n, d): mapped where there is one shard, one gathered copy, kept, where there are many.

        float16 and float32 as they are stored, bfloat16 and int8 as float32.
        """
        return self.raw if self._values.is_stored_as_is else self._values.whole()

    def gather(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Embeddings of some rows, (m, d), straight from their shards: no other row is read or copied.

        Args:
            rows: (m,) row numbers, as `rows` gives them.
        """
        _, numbers = row_numbers(rows, len(self))
        if "embeddings" in self.__dict__:
            return np.take(self.embeddings, numbers, axis=0)
        return self._values.take(numbers)

    @cached_property
    def tokens(self) -> Tokens | RaggedTokens:
        """The tokens of each row, read when indexed: (l, d) by a row number; by row numbers (m, l, d), or a list of
        (l_i, d) where the store is ragged.

        Raises:
            NoTokensError: the store holds embeddings alone.
        """
        tokens = self.layout.tokens
        if tokens is None:
            raise NoTokensError(f"{self.path}: holds embeddings and no tokens; use a store that was made with tokens")
        dtype = self.layout.dtype
        if tokens.length is None:
            parts = [(s.tokens, s.token_offsets, s.token_scales) for s in self._shards]
            return RaggedTokens(parts, self._keeps, dtype, tokens.dim)  # type: ignore[arg-type]  # the gate saw them
        stored = np.dtype(layout.STORED_DTYPES[dtype])
        codes = self._column("tokens", np.empty((0, tokens.length, tokens.dim), stored))
        scales = self._column("token_scales", np.empty((0, tokens.length), "<f4")) if dtype == "int8" else None
        return Tokens(Values(codes, dtype, scales))

    @cached_property
    def failures(self) -> list[Failure]:
        """Inputs that were tried and have no row, by their latest record."""
        latest = {f.id: f for shard in self._shards for f in shard.failures}
        if not latest:
            return []
        embedded = self.find(list(latest)) >= 0
        return [f for f, there in zip(latest.values(), embedded.tolist(), strict=True) if not there]

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, ids: Sequence[str], view: int = 0) -> np.ndarray:
        """Row numbers of ids, (len(ids),) int64; -1 where the store has no row of that view."""
        try:
            keys = key_array(ids)
        except ValueError:  # an id that no store can hold is in none
            bad = [k for k, _ in unusable_ids(ids)]
            usable = np.delete(np.arange(len(ids)), bad)
            found = np.full(len(ids), -1, np.int64)
            found[usable] = self.find([ids[k] for k in usable.tolist()], view)
            return found
        index, numbers = self._index(view)
        found = index.find(keys)
        return found if numbers is None or not len(numbers) else np.where(found < 0, -1, numbers[found])

    def rows(self, ids: Iterable[str], view: int = 0) -> np.ndarray:
        """Row numbers of ids, (len(ids),) int64.

        Raises:
            MissingIdsError: ids without a row of that view; a `KeyError`.
        """
        wanted = ids if isinstance(ids, list) else list(ids)
        found = self.find(wanted, view)
        if (found < 0).any():
            missing = [wanted[k] for k in np.flatnonzero(found < 0)]
            raise MissingIdsError(
                f"{self.path}: {len(missing)} of {len(wanted)} ids have no row of view {view}: {some_ids(missing)}; "
                "run 'embedcache extract' on the manifest that names them"
            )
        return found

    def __contains__(self, sample_id: object) -> bool:
        return isinstance(sample_id, str) and bool(self.find([sample_id])[0] >= 0)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Samples for a DataLoader, one gather for all of them: `id`, `embedding` and, where stored, `tokens`."""
        _, numbers = row_numbers(indices, len(self))
        columns: dict[str, Any] = {
            "id": decoded(self._keys[numbers], self.path),
            "embedding": self.gather(numbers),
        }
        if self.layout.tokens is not None:
            columns["tokens"] = self.tokens[numbers]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def shard_rows(self) -> ShardRows:
        """All rows and failures as one shard is written from them; rows are read as they are written."""
        rows = ShardRows(
            self.ids, self.views, self._values.codes, self.input_digests, self.failures, self._values.scales
        )
        if self.layout.tokens is None:
            return rows
        if isinstance(self.tokens, RaggedTokens):
            codes = self.tokens.codes()
            scales = self.tokens.scales() if self.layout.dtype == "int8" else None
            return replace(rows, tokens=codes, token_offsets=codes.offsets, token_scales=scales)
        return replace(rows, tokens=self.tokens.values.codes, token_scales=self.tokens.values.scales)

    def shards_of(self, rows: np.ndarray) -> np.ndarray:
        """Which shard each row lies in, (m,) int64: rows of one are read together.

        Args:
            rows: (m,) row numbers.
        """
        counts = [
            len(shard) if keep is None else len(keep) for shard, keep in zip(self._shards, self._keeps, strict=True)
        ]
        return np.searchsorted(np.cumsum(counts), rows, side="right")

    def restricted(self, keep: np.ndarray) -> Store:
        """The same store with only some of its rows in sight; failures stay.

        Args:
            keep: which rows to keep, (n,) bool.
        """
        start = 0
        keeps: list[np.ndarray | None] = []
        for shard, held in zip(self._shards, self._keeps, strict=True):
            numbers = np.arange(len(shard)) if held is None else held
            keeps.append(numbers[keep[start : start + len(numbers)]])
            start += len(numbers)
        return Store(self._source, self._shards, keeps)

    def by_shard(self) -> Iterator[Store]:
        """The same store shard by shard: of each only the rows that hold."""
        for document, shard, keep in zip(self._source.shards, self._shards, self._keeps, strict=True):
            yield Store(replace(self._source, shards=[document]), [shard], [keep])

    @cached_property
    def _values(self) -> Values:
        stored = np.dtype(layout.STORED_DTYPES[self.layout.dtype])
        codes = self._column("codes", np.empty((0, self.layout.dim), stored))
        scales = self._column("scales", np.empty(0, "<f4")) if self.layout.dtype == "int8" else None
        return Values(codes, self.layout.dtype, scales)

    @cached_property
    def _keys(self) -> np.ndarray:
        """Ids as bytes of one width, (n,)."""
        width = max((shard.keys.dtype.itemsize for shard in self._shards), default=1)
        return self._column("keys", np.empty(0, f"S{width}")).whole()

    @cached_property
    def _keeps(self) -> Sequence[np.ndarray | None]:
        """For each shard the rows in sight, None for all."""
        return _latest(self._shards) if self._given_keeps is None else self._given_keeps

    def _column(self, name: str, empty: np.ndarray) -> Column:
        return Column([getattr(shard, name) for shard in self._shards], self._keeps, empty)

    def _index(self, view: int) -> tuple[IdIndex, np.ndarray | None]:
        """An index of the rows of one view, and their numbers; None where they are all rows."""
        if view not in self._indices:
            of_view = self.views == view
            everything = bool(of_view.all())
            keys = self._keys if everything else self._keys[of_view]
            self._indices[view] = (IdIndex(keys), None if everything else np.flatnonzero(of_view))
        return self._indices[view]

    @cached_property
    def _indices(self) -> dict[int, tuple[IdIndex, np.ndarray | None]]:
        return {}


def _latest(shards: Sequence[Shard]) -> list[np.ndarray | None]:
    """For each shard the rows that hold, None for all: a later record of an id replaces earlier ones."""
    if len(shards) < 2:
        return [None] * len(shards)
    records = [part for shard in shards for part in (shard.keys, key_array([f.id for f in shard.failures]))]
    counts = [len(shard) + len(shard.failures) for shard in shards]
    width = max(part.dtype.itemsize for part in records)
    keys = np.concatenate([part.astype(f"S{width}") for part in records])
    if surely_distinct(keys):
        return [None] * len(shards)
    shard_of = np.repeat(np.arange(len(shards)), counts)
    # of equal keys the index gives the first, so the last record comes first
    last = shard_of[::-1][IdIndex(keys[::-1]).firsts()][::-1]
    holds = last == shard_of
    starts = np.cumsum([0, *counts])
    return [np.flatnonzero(holds[starts[k] : starts[k] + len(shard)]) for k, shard in enumerate(shards)]


def open_store(path: str | Path, *, verify: Verify = "structure") -> Store:
    """Opens a store for reading.

    Args:
        path: a store's directory, or the one file of a packed store.
        verify: `structure` checks names, sizes and the layout of every shard; `digest` also the SHA-256 of
            every byte.

    Raises:
        StoreNotFoundError: no store there.
        StoreFormatError: a file is missing, damaged or not of format 1.
    """
    if verify not in ("structure", "digest"):
        raise ValueError(f"verify={verify!r}, expected 'structure' or 'digest'")
    source = find_source(Path(path), digest=verify == "digest")
    return Store(source, source.open(digest=verify == "digest" and not source.packed))


def _opened_again(source: Source, keeps: Sequence[np.ndarray | None] | None) -> Store:
    return Store(source, source.open(), keeps)
