"""A million ids: how long a store takes to open, and to find rows in its own order and shuffled."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import itertools
import os
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import click
import numpy as np
from measuring import Goal, Result, median_ratio, turn_by_turn

MANY_SHARDS = 1000
_DIM = 8  # finding ids reads no embedding


def measure_ids(folder: Path, n: int, repeats: int) -> Iterator[Result]:
    """Opening and finding n ids: short ones, ones as long as MIMIC-CXR's, and many shards."""
    short = np.array([f"image-{k:07d}" for k in range(n)], "S")
    digests = (hashlib.md5(str(k).encode(), usedforsecurity=False).hexdigest() for k in range(n))
    long = np.array(["-".join(h[k : k + 8] for k in (0, 8, 16, 24, 3)) for h in digests], "S")
    yield from _ids_of(repeats, "one shard, ids of 13", _one_shard(folder / "short", short), short)
    yield from _ids_of(repeats, "one shard, ids of 44", _one_shard(folder / "long", long), long)
    many = _many_shards(folder / "many", short)
    yield from _ids_of(repeats, f"{MANY_SHARDS:,} shards", many, short)


def _ids_of(repeats: int, label: str, path: Path, keys: np.ndarray) -> Iterator[Result]:
    """Each repeat opens the store anew, twice, so that every search is the first."""
    from embedcache import open_store

    shuffled = np.random.default_rng(1).permutation(len(keys))
    orders = {"store order": np.arange(len(keys)), "shuffled": shuffled}
    opens: list[float] = []

    def search(order: np.ndarray) -> float:
        gc.collect()
        start = time.perf_counter()
        store = open_store(path)
        opens.append(time.perf_counter() - start)
        asked = _fresh(keys[order])
        start = time.perf_counter()
        found = store.rows(asked)
        spent = time.perf_counter() - start
        if not np.array_equal(found, order):
            raise click.ClickException(f"{path}: rows() gave other rows than were written")
        return spent

    def search_dict(order: np.ndarray) -> float:
        held, asked = _fresh(keys), _fresh(keys[order])
        gc.collect()
        start = time.perf_counter()
        index = {sample_id: k for k, sample_id in enumerate(held)}
        np.array([index[sample_id] for sample_id in asked])
        return time.perf_counter() - start

    calls = {name: partial(search, order) for name, order in orders.items()}
    calls |= {f"dict, {name}": partial(search_dict, order) for name, order in orders.items()}
    turn_by_turn(calls, 1)
    opens.clear()
    times = turn_by_turn(calls, repeats)
    yield Result(f"open_store, {len(keys):,} ids, {label}", statistics.median(opens), "s")
    for name, most in (("store order", 0.3), ("shuffled", 1.5)):
        ratio = median_ratio(times[f"dict, {name}"], times[name])
        yield Result(
            f"rows() of {len(keys):,} ids, {name}, first call, {label}",
            statistics.median(times[name]),
            "s",
            ratio,
            "Python dict built and asked, time / this time",
            Goal("value", most, "<="),
        )


def _one_shard(path: Path, keys: np.ndarray) -> Path:
    from embedcache import save_store

    save_store(path, _fresh(keys), np.ones((len(keys), _DIM), np.float16), record={"source": "ones"})
    return path


def _many_shards(path: Path, keys: np.ndarray) -> Path:
    """One plan of many shards, as an extraction leaves it; fsync is left out, as nothing here measures it."""
    from embedcache.fingerprint import INPUT_DIGEST_BYTES
    from embedcache.store import commit, layout
    from embedcache.store.catalogue import Plan, open_or_create, publish_plan
    from embedcache.store.shard import ShardImage, ShardRows

    store_layout = layout.Layout("float16", _DIM)
    made = layout.store_document(
        encoder={"name": "made"}, encoder_fingerprint="f", modality="image", store_layout=store_layout
    )
    bounds = np.linspace(0, len(keys), MANY_SHARDS + 1).astype(int).tolist()
    with _without_fsync():
        catalogue = open_or_create(path, made)
        publish_plan(path, 0, Plan(_fresh(keys), bounds, first_shard=0, batch_size=64))
        for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
            n = stop - start
            views, digests = np.zeros(n, np.uint16), np.zeros((n, INPUT_DIGEST_BYTES), np.uint8)
            codes = np.ones((n, _DIM), np.float16)
            shard = ShardRows(_fresh(keys[start:stop]), views, codes, digests, failures=[])
            image = ShardImage(shard, catalogue.document)
            commit.publish_shard(path, number, image, image.facts)
    os.sync()
    return path


def _fresh(keys: np.ndarray) -> list[str]:
    """Ids as str objects that nothing else holds, without a hash yet."""
    return [key.decode() for key in keys.tolist()]


@contextlib.contextmanager
def _without_fsync() -> Iterator[None]:
    from embedcache.store import commit

    class Unsynced(commit.Disk):
        def fsync(self, descriptor: int) -> None:
            pass

        def sync_directory(self, path: Path) -> None:
            pass

    synced = commit.disk
    commit.disk = Unsynced()
    try:
        yield
    finally:
        commit.disk = synced
