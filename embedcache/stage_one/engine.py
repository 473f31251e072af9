"""Shards of work handed out to processes of this machine or of a cluster.

Work is only handed out, some shards at a time. A shard counts once its document is published, whoever wrote it and
however often it was tried, so that workers may join, die, or do a shard that another has done.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from embedcache.device import cores_of_thread
from embedcache.encoders.base import Encoder
from embedcache.encoders.load import Loading
from embedcache.errors import EncoderError, WorkerError
from embedcache.stage_one.order import Delivery, Order
from embedcache.stage_one.pipeline import batched
from embedcache.stage_one.pools import POOLS, Lost
from embedcache.stage_one.samples import Samples
from embedcache.stage_one.workers import Workers
from embedcache.store.catalogue import Catalogue, PlannedShard

_MOST_SHARDS = 8  # in one order: the pipeline of a worker runs empty between orders
_ORDERS_EACH = 4  # at least so many for each worker, so that none waits long for the last
_MOST_LOSSES = 3  # orders in a row whose worker died before a shard of theirs came to count
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
    with POOLS[workers.backend](workers, encoder) as pool:
        each = min(max(len(shards) // (max(pool.n_workers, 1) * _ORDERS_EACH), 1), _MOST_SHARDS)
        waiting = deque(batched(shards, each))
        under_way: dict[Any, list[PlannedShard]] = {}
        n_losses = 0
        while waiting or under_way:
            while waiting and len(under_way) <= pool.n_workers:  # one more than workers: the next lies ready
                run = waiting.popleft()
                sent = replace(order, shards=run, samples=samples.of_shards(run), neighbours=pool.neighbours)
                under_way[pool.submit(sent)] = run
            for ended in pool.ended(under_way, _LOOK_EVERY_S):
                run = under_way.pop(ended)
                try:
                    yield pool.delivery(ended)
                    n_losses = 0
                except Lost as lost:
                    left = [shard for shard in run if not catalogue.has_shard(shard.number)]
                    n_losses = n_losses + 1 if len(left) == len(run) else 0
                    if n_losses == _MOST_LOSSES:
                        raise WorkerError(
                            f"{catalogue.path}: workers died {n_losses} times before a shard was done, the last with "
                            f"{lost}; look for memory that runs out, or for a file that breaks its decoder: "
                            "--workers 1 --threads 1 shows where"
                        ) from lost
                    waiting.extend([shard] for shard in left)


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
