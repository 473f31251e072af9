"""Stores made from stores: one file of many shards, and a store without some of its ids.

The old store is left as it is.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from embedcache.errors import MissingIdsError, StoreWriteError, some_ids
from embedcache.store import commit, layout
from embedcache.store.catalogue import Catalogue
from embedcache.store.save import write_store
from embedcache.store.shard import ShardImage, ShardRows
from embedcache.store.store import Store, open_store


@dataclass(frozen=True)
class DropReport:
    """What `drop_ids` left out, and what is left to do.

    Args:
        store: the new store.
        n_rows: rows in it.
        n_dropped: rows left out.
        n_failures_dropped: records of failure left out.
        delete: the old store, which still holds what was dropped.
    """

    store: Path
    n_rows: int
    n_dropped: int
    n_failures_dropped: int
    delete: Path


def pack_store(path: str | Path, out: str | Path) -> Store:
    """Merges a store into one file that is itself a store; rows are streamed, so it may be larger than memory.

    The values, ids and fingerprint are those of the store. Records that a later one replaced are left behind.

    Args:
        out: the file to write, such as `cache/mimic-cxr/dinov2-s.h5`.

    Raises:
        StoreFormatError: the store is damaged.
        StoreWriteError: the file is there already, or cannot be written.
    """
    out = Path(out)
    if out.exists():
        raise StoreWriteError(f"{out}: is there already; name another file, or remove it first")
    store = open_store(path, verify="digest")
    _write_packed(out, store.shard_rows(), store)
    return open_store(out)


def drop_ids(path: str | Path, ids: Collection[str], out: str | Path) -> DropReport:
    """Writes the store anew without some ids, as when a patient withdraws: neither rows nor records of them are left.

    A directory becomes a directory whose next extraction goes on as before; a packed store becomes a packed store.
    Stopped or killed, the same call goes on.

    Args:
        out: where the new store goes.

    Raises:
        MissingIdsError: ids that the store has neither a row nor a record of failure of.
        StoreWriteError: something is at `out` already, or it cannot be written.
    """
    path, out, ids = Path(path), Path(out), list(dict.fromkeys(ids))
    if out.is_file():
        raise StoreWriteError(f"{out}: is there already; name a place for the store without these ids")
    store = open_store(path, verify="digest")
    failed = {failure.id for failure in store.failures}
    unknown = [i for i, row in zip(ids, store.find(ids).tolist(), strict=True) if row < 0 and i not in failed]
    if unknown:
        raise MissingIdsError(
            f"{path}: {len(unknown)} of {len(ids)} ids to drop are not in the store: {some_ids(unknown)}; "
            "nothing was written"
        )
    dropped = set(ids)
    if store.is_packed:
        rows = _kept(store, dropped).shard_rows()
        _write_packed(out, replace(rows, failures=[f for f in rows.failures if f.id not in dropped]), store)
    else:
        write_store(out, store.document, _shards_left(store, dropped), batch_size=_batch_size(store))
    left = open_store(out)
    return DropReport(out, len(left), len(store) - len(left), len(store.failures) - len(left.failures), delete=path)


def _write_packed(out: Path, rows: ShardRows, store: Store) -> None:
    image = ShardImage(rows, store.document, user_block=layout.USER_BLOCK_BYTES)
    document = {"encoding-type": layout.PACKED_ENCODING, **image.facts}
    commit.make_directory(out.absolute().parent)
    commit.sweep(out.absolute().parent, of=out.name)
    commit.publish_packed(out, image, image.size, document)


def _shards_left(store: Store, dropped: set[str]) -> list[ShardRows]:
    """One shard for each old one that has rows left; the records of failure all go into the last."""
    parts = [part for whole in store.by_shard() if len(part := _kept(whole, dropped))]
    shards = [replace(part.shard_rows(), failures=[]) for part in parts] or [_kept(store, dropped).shard_rows()]
    return [*shards[:-1], replace(shards[-1], failures=[f for f in store.failures if f.id not in dropped])]


def _kept(store: Store, dropped: set[str]) -> Store:
    return store.restricted(np.array([i not in dropped for i in store.ids], bool))


def _batch_size(store: Store) -> int:
    """Of the store's first plan: the new one only names what is there already."""
    return next((plan.batch_size for plan in Catalogue.read(store.path).plans), 1)
