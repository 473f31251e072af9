"""What a worker process is asked to do, and how it does it: some shards of one store."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from embedcache.device import count_cores
from embedcache.encoders.base import Encoder
from embedcache.encoders.load import Loading
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

    def on(self, device: str) -> Order:
        """The same with its encoder on a device of this machine; one of the caller's own stays where it is."""
        return replace(self, encoder=self.encoder.on(device)) if isinstance(self.encoder, Loading) else self

    def anywhere(self) -> Order:
        """The same for a worker of a cluster, whose GPUs have numbers of their own."""
        numbered = isinstance(self.encoder, Loading) and self.encoder.options.device.startswith("cuda:")
        return self.on("cuda") if numbered else self

    def carry_out(self) -> Delivery:
        """Encodes the shards; runs in a worker process.

        Raises:
            StoreNotFoundError, FingerprintMismatchError: the worker does not see the store, or sees another.
            ManifestError: it does not see the images.
            EncoderError: what it loads is another encoder.
        """
        with _at_work:
            document = read_document(self.store / layout.STORE_NAME)
            check_fingerprint(document["fingerprint"], self.fingerprint, self.store / layout.STORE_NAME)
            self.samples.check_data()
            encoder = self.encoder.load() if isinstance(self.encoder, Loading) else self.encoder
            n_threads = self.n_threads or max(count_cores() // self.neighbours, 1)
            catalogue = Catalogue(self.store, document, {}, 0)
            with (
                Claims(self.store) as claims,
                Pipeline(self.samples, encoder, catalogue, n_threads=n_threads, n_cores=self.n_cores) as pipeline,
            ):
                done = pipeline.run(self.shards, claims if self.polite else None)
                return Delivery(done, pipeline.clock.read(), dict(encoder.record.notes))


@dataclass(frozen=True)
class Delivery:
    """What a worker made of an order.

    Args:
        notes: of the worker's encoder: versions, device kind.
    """

    done: list[ShardDone]
    phases: Phases
    notes: dict[str, Any] = field(default_factory=dict)
