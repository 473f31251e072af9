"""What a worker process is asked to do, and how it does it: some shards of one store."""

from __future__ import annotations

import pickle
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedcache.device import count_cores
from embedcache.encoders.base import Encoder
from embedcache.encoders.load import Loading
from embedcache.errors import WorkerError
from embedcache.stage_one.phases import Phases
from embedcache.stage_one.pipeline import Pipeline, ShardDone
from embedcache.stage_one.samples import Samples
from embedcache.store import layout
from embedcache.store.catalogue import Catalogue, PlannedShard, check_fingerprint
from embedcache.store.claims import Claims
from embedcache.store.commit import read_document

# one order at a time in a worker of several threads: an encoder is loaded once, and record locks know no threads
_at_work = threading.Lock()


@dataclass(frozen=True)
class Order:
    """All that a worker process needs to encode some shards; small, and made to be sent.

    Args:
        fingerprint: of the store, which the worker must see too.
        encoder: how it is loaded, or one of the caller's own.
        n_threads: preparing threads; None: the worker's cores, shared out among its `neighbours`.
        neighbours: workers on the same machine, itself included.
        n_cores: of torch, for an encoder that is not called from several threads: the same in every worker.
        polite: whether shards that another process works on are left to it.
    """

    store: Path
    fingerprint: str
    samples: Samples
    encoder: Encoder | Loading
    shards: Sequence[PlannedShard]
    n_threads: int | None
    neighbours: int
    n_cores: int
    polite: bool


@dataclass(frozen=True)
class Delivery:
    """What a worker made of an order.

    Args:
        notes: of the worker's encoder: versions, device kind.
    """

    done: list[ShardDone]
    phases: Phases
    notes: dict[str, Any] = field(default_factory=dict)


def carry_out(order: Order) -> Delivery:
    """Encodes the shards of an order; runs in a worker process.

    Raises:
        StoreNotFoundError, FingerprintMismatchError: the worker does not see the store, or sees another.
        ManifestError: it does not see the images.
        EncoderError: what it loads is another encoder.
        WorkerError: instead of an exception that cannot be sent to another process.
    """
    try:
        return _carry_out(order)
    except Exception as error:  # raised again as it is, if it can be sent
        try:
            pickle.loads(pickle.dumps(error))  # noqa: S301  # our own
        except Exception as unsent:  # noqa: BLE001  # whatever its class does when it is made again
            told = "".join(traceback.format_exception(error))
            raise WorkerError(f"{type(error).__name__} in a worker (it cannot be sent: {unsent}):\n{told}") from None
        raise


def _carry_out(order: Order) -> Delivery:
    with _at_work:
        document = read_document(order.store / layout.STORE_NAME)
        check_fingerprint(document["fingerprint"], order.fingerprint, order.store / layout.STORE_NAME)
        order.samples.check_data()
        encoder = order.encoder.load() if isinstance(order.encoder, Loading) else order.encoder
        n_threads = order.n_threads or max(count_cores() // order.neighbours, 1)
        catalogue = Catalogue(order.store, document, {}, 0)
        with (
            Claims(order.store) as claims,
            Pipeline(order.samples, encoder, catalogue, n_threads=n_threads, n_cores=order.n_cores) as pipeline,
        ):
            done = pipeline.run(order.shards, claims if order.polite else None)
            return Delivery(done, pipeline.clock.read(), dict(encoder.record.notes))
