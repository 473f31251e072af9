"""Shards of work handed out to processes of this machine or of a cluster.

Work is only handed out, some shards at a time. A shard counts once its document is published, whoever wrote it and
however often it was tried, so that workers may join, die, or do a shard that another has done.
"""

from __future__ import annotations

import pickle
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from embedcache.device import cores_of_thread
from embedcache.encoders.base import Encoder, device_of
from embedcache.encoders.load import Loading
from embedcache.errors import EncoderError, WorkerError
from embedcache.stage_one.order import Delivery, Order
from embedcache.stage_one.pipeline import batched
from embedcache.stage_one.samples import Samples
from embedcache.store.catalogue import Catalogue, PlannedShard
from embedcache.workers.chosen import Workers
from embedcache.workers.pools import Lost, open_pool

_MOST_SHARDS = 8  # in one order: the pipeline of a worker runs empty between orders
_ORDERS_EACH = 4  # at least so many for each worker, so that none waits long for the last
_MOST_LOSSES = 3  # workers that died over one shard, or of each worker in a row before any shard came to count
_SILENT_S = 10.0  # so long nothing is said where a cluster has no worker
_LOOK_EVERY_S = 1.0  # how often newly joined workers are looked for


def hand_out(
    workers: Workers, samples: Samples, encoder: Encoder, catalogue: Catalogue, shards: Sequence[PlannedShard], *,
    polite: bool,
) -> Iterator[Delivery]:  # fmt: skip
    """Has shards encoded by other processes; deliveries come as they are ready.

    What a worker had in hand when it died is given to others.

    Raises:
        WorkerError: the cluster cannot be reached, or workers die over and over. What was published is kept.
        EncoderError: the encoder cannot be sent to another process.
    """
    order = Order(
        store=catalogue.path.absolute(),
        fingerprint=catalogue.document["fingerprint"],
        samples=samples,
        encoder=_sendable(encoder),
        shards=(),
        n_threads=workers.n_threads,
        neighbours=1,
        n_cores=cores_of_thread(),
        polite=polite,
    )
    loading = getattr(encoder, "origin", None)
    on_any = isinstance(loading, Loading) and loading.options.device == "auto"
    with open_pool(workers, device_of(encoder), on_any=on_any) as pool:
        each = min(max(len(shards) // (max(pool.n_workers, 1) * _ORDERS_EACH), 1), _MOST_SHARDS)
        waiting = deque(batched(shards, each))
        under_way: dict[Any, list[PlannedShard]] = {}
        losses = _Losses(catalogue)
        began, told = time.monotonic(), False
        while waiting or under_way:
            n_workers = pool.n_workers
            if n_workers == 0 and not told and time.monotonic() - began > _SILENT_S:
                warnings.warn(f"no worker at {workers.address} yet; the work waits for the first to join")
                told = True
            while waiting and len(under_way) <= n_workers:  # one more than workers: the next lies ready
                run = waiting.popleft()
                sent = replace(order, shards=run, samples=samples.of_shards(run), neighbours=pool.neighbours)
                under_way[pool.submit(sent)] = run
            for ended in pool.ended(under_way, _LOOK_EVERY_S):
                run = under_way.pop(ended)
                try:
                    yield pool.delivery(ended)
                    losses.end()
                except Lost as lost:
                    left = [shard for shard in run if not catalogue.has_shard(shard.number)]
                    if lost.begun:
                        losses.add(
                            left, progress=len(left) < len(run), most=_MOST_LOSSES * max(n_workers, 1), last=lost
                        )
                    waiting.extend([shard] for shard in left)


class _Losses:
    """Workers that died: how often over one shard, and how often since a shard came to count."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue, self._n = catalogue, 0
        self._over: Counter[int] = Counter()

    def end(self) -> None:
        """An order was carried out."""
        self._n = 0

    def add(self, left: Sequence[PlannedShard], *, progress: bool, most: int, last: Lost) -> None:
        """One more.

        Args:
            left: what its order still held; the first of it was in hand.
            progress: whether it had published a shard of its order.
            most: so many in a row without progress end the run.

        Raises:
            WorkerError: it is one too many.
        """
        self._n = 1 if progress else self._n + 1
        self._over.update(shard.number for shard in left[:1])
        number, worst = max(self._over.items(), key=lambda item: item[1], default=(0, 0))
        if worst < _MOST_LOSSES and self._n < most:
            return
        over = (
            f"{worst} times over shard {number}" if worst >= _MOST_LOSSES else f"{self._n} times and no shard was done"
        )
        raise WorkerError(
            f"{self._catalogue.path}: workers died {over}, the last with {last}; look for memory that runs out, or for "
            "a file that breaks its decoder: --workers 1 --threads 1 shows where"
        ) from last


def _sendable(encoder: Encoder) -> Encoder | Loading:
    """How it is loaded, which is small; an encoder of the caller's own goes as it is."""
    origin = getattr(encoder, "origin", None)
    if isinstance(origin, Loading):
        return origin
    from joblib.externals.loky.backend.reduction import dumps

    try:
        dumps(encoder)
    except EncoderError:
        raise
    except (pickle.PicklingError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise EncoderError(
            f"{encoder.record.name}: cannot be sent to another process ({type(error).__name__}: {error}); load it with "
            "load_encoder('py:package.module:factory'), or use one process"
        ) from error
    return encoder
