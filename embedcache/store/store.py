"""Reading a store: shards mapped behind their gate, rows found by id.

Shape notation: n rows, d embedding width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from embedcache.errors import MissingIdsError, StoreFormatError, StoreWriteError, some_ids
from embedcache.fingerprint import INPUT_DIGEST_BYTES, digest_arrays, digest_file, fingerprint
from embedcache.ids import unusable_ids
from embedcache.store import commit, layout
from embedcache.store.catalogue import Catalogue, Plan, open_or_create, publish_plan
from embedcache.store.layout import Layout
from embedcache.store.shard import Failure, Shard, ShardRows, build_shard, open_shard
from embedcache.store.values import from_stored, to_stored

Verify = Literal["structure", "digest"]


class Store:
    """The rows of one store. Made by `open_store`.

    Where an id was tried again, its latest record holds. The object is also a torch map-style dataset.
    """

    def __init__(self, catalogue: Catalogue, shards: Sequence[Shard]) -> None:
        self.path = catalogue.path
        self.layout = catalogue.layout
        self.n_pending_shards = len(catalogue.pending())
        self._document = catalogue.document
        self._shards = shards
        self._keep = _latest(shards)

    @property
    def fingerprint(self) -> str:
        """What determines the stored values: encoder, layout and format."""
        return str(self._document["fingerprint"])

    @property
    def encoder_fingerprint(self) -> str:
        return str(self._document["encoder_fingerprint"])

    @property
    def encoder(self) -> dict[str, Any]:
        """The record of the encoder that computed the rows."""
        return dict(self._document["encoder"])

    @property
    def modality(self) -> str:
        return str(self._document["modality"])

    @cached_property
    def ids(self) -> list[str]:
        """The id of each row, (n,)."""
        return [
            i
            for shard, keep in zip(self._shards, self._keep, strict=True)
            for i in (shard.ids if keep is None else [shard.ids[k] for k in keep])
        ]

    @cached_property
    def views(self) -> np.ndarray:
        """Which view of its sample each row is, (n,) uint16."""
        return self._gathered("views", (0,), np.dtype(np.uint16))

    @cached_property
    def input_digests(self) -> np.ndarray:
        """First 16 bytes of the SHA-256 of each row's input, (n, 16) uint8; all zero where it is unknown."""
        return self._gathered("input_digests", (0, INPUT_DIGEST_BYTES), np.dtype(np.uint8))

    @cached_property
    def raw(self) -> np.ndarray:
        """The stored codes, (n, d): mapped where there is one shard, one gathered copy where there are many."""
        stored = np.dtype(layout.STORED_DTYPES[self.layout.dtype])
        return self._gathered("codes", (0, self.layout.dim), stored)

    @cached_property
    def embeddings(self) -> np.ndarray:
        """The embeddings, (n, d): the stored codes themselves, bfloat16 widened to float32."""
        return from_stored(self.raw, self.layout.dtype)

    @cached_property
    def failures(self) -> list[Failure]:
        """Inputs that were tried and have no row, by their latest record."""
        latest = {f.id: f for shard in self._shards for f in shard.failures}
        embedded = set(self.ids)
        return [f for f in latest.values() if f.id not in embedded]

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, ids: Iterable[str], view: int = 0) -> np.ndarray:
        """Row numbers of ids, (len(ids),) int64.

        Raises:
            MissingIdsError: ids without a row of that view; a `KeyError`.
        """
        index = self._index(view)
        wanted = list(ids)
        try:
            return np.fromiter((index[i] for i in wanted), np.int64, len(wanted))
        except KeyError:
            missing = [i for i in wanted if i not in index]
        raise MissingIdsError(
            f"{self.path}: {len(missing)} of {len(wanted)} ids have no row of view {view}: {some_ids(missing)}; "
            "run 'embedcache extract' on the manifest that names them"
        )

    def __contains__(self, sample_id: object) -> bool:
        return sample_id in self._index(0)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"id": self.ids[i], "embedding": np.asarray(self.embeddings[i])}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        values = self.embeddings[np.asarray(indices)]
        return [{"id": self.ids[i], "embedding": v} for i, v in zip(indices, values, strict=True)]

    def _index(self, view: int) -> dict[str, int]:
        if view not in self._indices:
            numbers = np.flatnonzero(self.views == view).tolist()
            self._indices[view] = {self.ids[i]: i for i in numbers}
        return self._indices[view]

    @cached_property
    def _indices(self) -> dict[int, dict[str, int]]:
        return {}

    def _gathered(self, name: str, empty_shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        parts = [
            getattr(shard, name) if keep is None else getattr(shard, name)[keep]
            for shard, keep in zip(self._shards, self._keep, strict=True)
        ]
        parts = [part for part in parts if len(part)]
        if not parts:
            return np.empty(empty_shape, dtype)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _latest(shards: Sequence[Shard]) -> list[np.ndarray | None]:
    """For each shard the rows that hold, None for all: a later record of an id replaces earlier ones."""
    last: dict[str, int] = {}
    n_seen = 0
    for number, shard in enumerate(shards):
        ids = {*shard.ids, *(f.id for f in shard.failures)}
        n_seen += len(ids)
        last.update(dict.fromkeys(ids, number))
    if n_seen == len(last):
        return [None] * len(shards)
    return [
        np.array([k for k, i in enumerate(shard.ids) if last[i] == number], np.int64)
        for number, shard in enumerate(shards)
    ]


def open_store(path: str | Path, *, verify: Verify = "structure") -> Store:
    """Opens a store for reading.

    Args:
        path: a store directory.
        verify: `structure` checks names, sizes and the layout of every shard; `digest` also the SHA-256 of
            every byte.

    Raises:
        StoreNotFoundError: no store there.
        StoreFormatError: a file is missing, damaged or not of format 1.
    """
    if verify not in ("structure", "digest"):
        raise ValueError(f"verify={verify!r}, expected 'structure' or 'digest'")
    catalogue = Catalogue.read(Path(path))
    shards = []
    for document in catalogue.shards.values():
        file = catalogue.path / document["file"]
        check_shard_file(file, document, digest=verify == "digest")
        shard = open_shard(file)
        if shard.record != catalogue.document:
            raise StoreFormatError(
                f"{file}: its record has fingerprint {shard.record.get('fingerprint', '')[:12]}..., the store "
                f"{catalogue.document['fingerprint'][:12]}...: a shard of another store"
            )
        shards.append(shard)
    return Store(catalogue, shards)


def check_shard_file(file: Path, document: dict[str, Any], *, digest: bool) -> None:
    """Compares a shard file with what its document says, before HDF5 sees it.

    Raises:
        StoreFormatError: missing, of another size or, with `digest`, of another content.
    """
    remedy = f"run 'embedcache verify {file.parent}'"
    if not file.is_file():
        raise StoreFormatError(f"{file}: the shard's document names it, but it is not there; {remedy}")
    size = file.stat().st_size
    if size != document["size"]:
        raise StoreFormatError(f"{file}: {size} bytes, its document says {document['size']}; {remedy}")
    if digest:
        found = digest_file(file)
        if found != document["sha256"]:
            raise StoreFormatError(
                f"{file}: SHA-256 {found[:12]}..., its document says {document['sha256'][:12]}...; {remedy}"
            )


def save_store(
    path: str | Path,
    ids: Sequence[str],
    embeddings: np.ndarray,
    *,
    record: dict[str, Any] | None = None,
    modality: str = "image",
    store_dtype: str | None = None,
) -> Store:
    """Writes embeddings made elsewhere as a store of one shard.

    Args:
        ids: unique sample ids, n of them.
        embeddings: (n, d), finite.
        record: JSON-ready account of where the values came from; without it the contents are fingerprinted.
        store_dtype: one of `STORED_DTYPES`; the dtype of `embeddings` if it is one of them, else float32.

    Raises:
        ValueError: ids and rows that do not fit, duplicate ids, rows that are not finite or zero throughout.
        StoreWriteError: the path holds a store already.
    """
    path, ids = Path(path), [str(i) for i in ids]
    embeddings = np.asarray(embeddings)
    if embeddings.ndim != 2 or len(embeddings) != len(ids):
        raise ValueError(f"embeddings of shape {embeddings.shape} for {len(ids)} ids, expected ({len(ids)}, d)")
    if modality not in ("image", "text"):
        raise ValueError(f"modality {modality!r}, expected 'image' or 'text'")
    faults = [f"{ids[k]!r} {fault}" for k, fault in unusable_ids(ids)]
    if faults:
        raise ValueError(f"{len(faults)} unusable ids: {'; '.join(faults[:5])}")
    if len(set(ids)) != len(ids):
        raise ValueError(f"duplicate ids: {some_ids(i for i, n in Counter(ids).items() if n > 1)}")
    if (path / layout.STORE_NAME).exists():
        raise StoreWriteError(f"{path}: holds a store already; name another directory")
    dtype = store_dtype or (str(embeddings.dtype) if str(embeddings.dtype) in ("float16", "float32") else "float32")
    store_layout = Layout(dtype, embeddings.shape[1])
    codes = to_stored(embeddings, dtype)
    values = from_stored(codes, dtype)
    fit = np.isfinite(embeddings).all(axis=1) & np.isfinite(values).all(axis=1) & values.any(axis=1)
    if not fit.all():
        unfit = [ids[k] for k in np.flatnonzero(~fit)]
        raise ValueError(
            f"{len(unfit)} rows are not finite as {dtype}, or zero throughout: {some_ids(unfit)}; leave them out"
        )
    if record is None:
        content = digest_arrays([(dtype, codes)])
        record = {"source": "external", "contents": fingerprint({"ids": ids, "embeddings": content})}
    catalogue = open_or_create(
        path,
        encoder=record,
        encoder_fingerprint=fingerprint(record),
        modality=modality,
        store_layout=store_layout,
    )
    publish_plan(path, 0, Plan(ids, [0, len(ids)], 0, max(len(ids), 1)))
    rows = ShardRows(
        ids,
        np.zeros(len(ids), np.uint16),
        codes,
        np.zeros((len(ids), INPUT_DIGEST_BYTES), np.uint8),  # the inputs are unknown here
        failures=[],
    )
    data = build_shard(rows, catalogue.document)
    commit.publish_shard(path, 0, data, shard_facts(catalogue, rows))
    return open_store(path)


def shard_facts(catalogue: Catalogue, rows: ShardRows) -> dict[str, Any]:
    """What a shard's document says beside its file, SHA-256 and size."""
    return {
        "fingerprint": catalogue.document["fingerprint"],
        "n": len(rows.ids),
        "n_failed": len(rows.failures),
    }
