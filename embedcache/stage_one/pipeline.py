"""The streaming pipeline of one process: prepare in threads, encode, write in the background.

Samples are prepared in the plan's order, never further ahead than agreed. On a CPU each encoding thread takes a batch
of its own and computes it on one core: nobody waits for a neighbour's part of a product, a core is free for whatever
is ready, and the bits of a row depend on its batch alone, not on how many threads there are. On a GPU two threads keep
it busy: one batch is copied while the other is computed.

What is in memory at any time: two shards that are being filled, two that wait to be written, and the prepared samples
of a few batches; nothing grows with the dataset.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import TypeVar

from embedcache.device import (
    cores_of_thread,
    count_cores,
    full_precision,
    is_out_of_memory,
    own_stream,
    release_memory,
    use_cores,
)
from embedcache.encoders.base import Encoder, Prepared, device_of
from embedcache.errors import DeviceError, InputError
from embedcache.stage_one.phases import Clock, pace
from embedcache.stage_one.prepare import Job, Outcome, in_order
from embedcache.stage_one.rows import RowsInMaking
from embedcache.stage_one.samples import Samples
from embedcache.store import commit
from embedcache.store.catalogue import Catalogue, PlannedShard
from embedcache.store.claims import Claims
from embedcache.store.shard import ShardImage, ShardRows

_Item = TypeVar("_Item")

SHARDS_FILLING = 2  # most shards that are filled at the same time ...
SHARDS_UNWRITTEN = 2  # ... and that are encoded but not yet on disk; they bound memory
_GPU_THREADS = 2  # one batch is copied while the other is computed


@dataclass(frozen=True)
class ShardDone:
    """One shard that this process wrote.

    Args:
        truncated: tokens that did not fit into the encoder's `max_length`, of each text that lost some.
    """

    number: int
    truncated: dict[str, int] = field(default_factory=dict)


class Pipeline:
    """Encodes shards of one store with one encoder. Used as a context manager.

    Args:
        n_threads: preparing threads, and on a CPU encoding threads; by default one for each core.
        n_cores: of torch for one batch of an encoder that is not called from several threads; by default its own.
        on_ids: called with each number of ids that were encoded, and with a note on how it goes.
    """

    def __init__(
        self,
        samples: Samples,
        encoder: Encoder,
        catalogue: Catalogue,
        *,
        n_threads: int | None = None,
        n_cores: int | None = None,
        on_ids: Callable[[int, str], None] = lambda n, note: None,
    ) -> None:
        self._samples, self._encoder, self._catalogue = samples, encoder, catalogue
        self._n_threads = n_threads or count_cores()
        self._n_encoding = encoding_threads(encoder, self._n_threads)
        self._free = threading.Semaphore(self._n_encoding + 1)  # batches under way, and one that is ready
        self._batch_limit: int | None = None  # once memory ran out
        self._n_cores, self._on_ids = n_cores or cores_of_thread(), on_ids
        self._n_failed = 0
        self.clock = Clock()

    def __enter__(self) -> Pipeline:
        self._open = ExitStack()
        self._open.callback(use_cores, cores_of_thread())  # for threads that are started later
        self._open.enter_context(full_precision)
        self._encoding = ThreadPoolExecutor(self._n_encoding, "encode", initializer=self._prepare_thread)
        self._writing = ThreadPoolExecutor(1, "write")
        for pool in (self._writing, self._encoding):  # left in turn: first what is queued is dropped
            self._open.callback(pool.shutdown, cancel_futures=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def run(self, shards: Sequence[PlannedShard], claims: Claims | None) -> list[ShardDone]:
        """Encodes those shards that nobody else has claimed, all of them without `claims`."""
        claimed: deque[PlannedShard] = deque()

        def jobs() -> Iterator[Job]:
            for shard in shards:
                # asked again under the claim: whoever held it before may have published the shard
                if (claims is None or claims.claim(shard.number)) and not self._catalogue.has_shard(shard.number):
                    claimed.append(shard)
                    yield from map(self._job, shard.ids)

        stream = in_order(jobs(), n_threads=self._n_threads, ahead=self._ahead(shards))
        filling: deque[_Filling] = deque()
        unwritten: deque[Future[ShardDone]] = deque()
        done: list[ShardDone] = []

        def finish_oldest() -> None:
            if len(unwritten) == SHARDS_UNWRITTEN:
                done.append(unwritten.popleft().result())
            unwritten.append(self._writing.submit(self._commit, *self._finished(filling.popleft(), filling)))

        try:
            for first in stream:  # the first outcome of a shard: by then it stands in `claimed`
                shard = claimed.popleft()
                filling.append(self._fill(shard, chain([first], islice(stream, len(shard.ids) - 1))))
                while filling and (len(filling) == SHARDS_FILLING or filling[0].is_done):
                    finish_oldest()
            while filling:
                finish_oldest()
            done += [future.result() for future in unwritten]
        finally:
            stream.close()
        return done

    def _job(self, sample_id: str) -> Job:
        def job() -> Sequence[Prepared]:
            with self.clock.phase("prepare"):
                return self._samples.prepare(self._encoder, sample_id)

        return job

    def _ahead(self, shards: Sequence[PlannedShard]) -> int:
        """Most samples that are ready or being prepared and not yet in a batch."""
        if self._samples.modality == "text":  # small, and a shard is encoded once all of its texts are there
            return 2 * max(len(shard.ids) for shard in shards)
        return 2 * max(shard.batch_size for shard in shards) // self._samples.n_views + self._n_threads

    def _fill(self, shard: PlannedShard, outcomes: Iterator[Outcome]) -> _Filling:
        """Takes all of a shard's samples in and hands its batches to the encoding threads."""
        batch_size = min(shard.batch_size, self._batch_limit or shard.batch_size)
        filling = _Filling(shard, RowsInMaking(shard.ids, self._catalogue.layout), batch_size)
        batches = _text_batches if self._samples.modality == "text" else _image_batches
        size = batch_size if getattr(self._encoder, "even_batches", False) else 1
        for batch in batches(filling, outcomes, self._samples.n_views):
            if not filling.has_memory(wait=False):
                continue  # the rest is taken in and dropped: the shard is done again
            self._free.acquire()
            future = self._encoding.submit(self._encode, batch.filled_up(size), filling.rows)
            future.add_done_callback(lambda _: self._free.release())
            filling.batches.append(future)
            filling.n_told += batch.n_ids
        return filling

    def _encode(self, batch: _Batch, rows: RowsInMaking) -> int | None:
        """Ids that the batch stood for; None if memory ran out: the error itself would keep what the batch took."""
        try:
            with self.clock.encoding():
                encoded = self._encoder.encode(batch.inputs, tokens=rows.wants_tokens)
        except Exception as error:  # anything else is raised again
            if not is_out_of_memory(error):
                raise
            return None
        rows.put(encoded, batch.rows)
        self._tell(batch.n_ids)
        return batch.n_ids

    def _finished(
        self, filling: _Filling, younger: Iterable[_Filling]
    ) -> tuple[PlannedShard, int, dict[str, int], ShardRows]:
        """What there is to write of a shard, its batches awaited; where memory ran out, all of it again with less.

        Args:
            younger: shards whose batches may be under way beside it.
        """
        while not filling.has_memory(wait=True):
            if filling.batch_size == 1:
                raise DeviceError(
                    f"{self._catalogue.path}: {self._encoder.record.name} ran out of memory with one sample; name "
                    "another device, a smaller --image-size or --max-length, or --compute-dtype bfloat16"
                )
            self._batch_limit = min(filling.batch_size // 2, self._batch_limit or filling.batch_size)
            wait([batch for other in younger for batch in other.batches])
            release_memory(device_of(self._encoder))
            self._tell(-filling.n_encoded)
            shard = filling.shard
            jobs = map(self._job, shard.ids)
            with closing(in_order(jobs, n_threads=self._n_threads, ahead=self._ahead([shard]))) as again:
                filling = self._fill(shard, again)
        rows = filling.finish()
        self._n_failed += len(rows.failures)
        self._tell(len(filling.shard.ids) - filling.n_told)
        return filling.shard, filling.batch_size, filling.truncated, rows

    def _tell(self, n_ids: int) -> None:
        self._on_ids(n_ids, pace(self.clock.read().waited, self._n_failed))

    def _commit(self, shard: PlannedShard, batch_size: int, truncated: dict[str, int], rows: ShardRows) -> ShardDone:
        with self.clock.phase("write"):
            if not self._catalogue.has_shard(shard.number):  # another extractor may have been faster
                image = ShardImage(rows, self._catalogue.document)
                less = {} if batch_size == shard.batch_size else {"batch_size": batch_size}
                commit.publish_shard(self._catalogue.path, shard.number, image, {**image.facts, **less})
        return ShardDone(shard.number, truncated)

    def _prepare_thread(self) -> None:
        device = device_of(self._encoder)
        use_cores(1 if getattr(self._encoder, "concurrent", False) else self._n_cores)
        if device != "cpu":
            own_stream(device)


def batched(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    """Runs of `size` items, the last with what is left."""
    waiting = iter(items)
    while run := list(islice(waiting, size)):
        yield run


def encoding_threads(encoder: Encoder, n_threads: int) -> int:
    """How many batches are encoded at the same time; one where the encoder does not say that it may be more."""
    if not getattr(encoder, "concurrent", False):
        return 1
    return n_threads if device_of(encoder) == "cpu" else _GPU_THREADS


@dataclass(frozen=True)
class _Batch:
    """Samples that are encoded together, the row of each, and how many ids they stand for."""

    inputs: list[Prepared]
    rows: list[int]
    n_ids: int

    def filled_up(self, size: int) -> _Batch:
        """The same with its last input repeated where it has fewer than `size`."""
        return replace(self, inputs=self.inputs + self.inputs[-1:] * (size - len(self.inputs)))


@dataclass
class _Filling:
    """A shard whose batches are on their way.

    Args:
        outcomes: of each id its input's digest, or why it has none.
        copies: rows that are equal to another of the shard: (row, the other).
        n_told: ids that its batches stand for.
    """

    shard: PlannedShard
    rows: RowsInMaking
    batch_size: int
    outcomes: list[bytes | InputError] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    truncated: dict[str, int] = field(default_factory=dict)
    batches: list[Future[int | None]] = field(default_factory=list)
    n_told: int = 0

    @property
    def is_done(self) -> bool:
        return all(batch.done() for batch in self.batches)

    @property
    def n_encoded(self) -> int:
        """Ids that its batches stood for which were encoded."""
        return sum(batch.result() or 0 for batch in self.batches)

    def finish(self) -> ShardRows:
        """Its rows, once all batches are in."""
        self.rows.copy(self.copies)
        return self.rows.finish(self.outcomes)

    def take(self, outcomes: Iterable[Outcome], n_views: int) -> Iterator[tuple[int, Prepared | None]]:
        """Notes what becomes of each id; gives each row that is no copy of another, and its input if it has one."""
        seen: dict[bytes, int] = {}
        for k, (sample_id, outcome) in enumerate(zip(self.shard.ids, outcomes, strict=True)):
            rows = range(k * n_views, (k + 1) * n_views)
            if isinstance(outcome, InputError):
                self.outcomes.append(outcome)
                yield from ((row, None) for row in rows)
                continue
            self.outcomes.append(outcome[0].digest)
            if outcome[0].n_truncated:
                self.truncated[sample_id] = outcome[0].n_truncated
            for row, prepared in zip(rows, outcome, strict=True):
                first = seen.setdefault(prepared.key, row)
                if first == row:
                    yield row, prepared
                else:
                    self.copies.append((row, first))

    def has_memory(self, *, wait: bool) -> bool:
        """Whether memory was enough for every batch so far; what else went wrong in one is raised.

        Args:
            wait: for those that are under way.
        """
        return None not in [batch.result() for batch in self.batches if wait or batch.done()]


def _image_batches(filling: _Filling, outcomes: Iterable[Outcome], n_views: int) -> Iterator[_Batch]:
    """Rows in order, as they come."""
    n_told = 0
    for places in batched(filling.take(outcomes, n_views), filling.batch_size):
        good = [prepared for _, prepared in places if prepared is not None]
        if good:
            # a neighbour stands in for a failed row, so that the others' bits do not depend on the failure
            n_ids = len(filling.outcomes) - n_told
            yield _Batch([prepared or good[0] for _, prepared in places], [row for row, _ in places], n_ids)
            n_told += n_ids


def _text_batches(filling: _Filling, outcomes: Iterable[Outcome], n_views: int) -> Iterator[_Batch]:
    """All texts of a shard, those of like length together: little is spent on padding."""
    texts = [(row, prepared) for row, prepared in filling.take(outcomes, n_views) if prepared is not None]
    texts.sort(key=lambda text: (text[1].n_tokens, text[1].key))
    for start in range(0, len(texts), filling.batch_size):
        batch = texts[start : start + filling.batch_size]
        yield _Batch([prepared for _, prepared in batch], [row for row, _ in batch], len(batch) // n_views)
