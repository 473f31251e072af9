"""What an extraction will take, known before it starts: bytes on disk, and by a short probe hours and memory."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from embedcache.device import cores_of_thread, count_cores, full_precision, is_out_of_memory, release_memory, use_cores
from embedcache.encoders.base import Encoded, Encoder, Prepared, device_of
from embedcache.errors import InputError
from embedcache.progress import in_words
from embedcache.resources import (
    available_bytes,
    forget_peak,
    free_bytes,
    in_bytes,
    peak_bytes,
    resident_bytes,
)
from embedcache.stage_one.pipeline import SHARDS_FILLING, SHARDS_UNWRITTEN, batched, encoding_threads
from embedcache.stage_one.rows import layout_for
from embedcache.stage_one.samples import Samples, spread
from embedcache.store.layout import Layout

DEFAULT_BATCH = 32
_LARGEST_BATCH = 512
_MEMORY_SHARE = 0.8  # of a GPU's free memory that a batch may take
_ROW_OVERHEAD_BYTES = 64  # id, view, digest of a row, and its share of a shard's record
_PROBE_SAMPLES = 64
_PROBE_TEXTS = 512
_PROBE_BATCHES = 8  # of texts, whose lengths differ
_PROBE_S = 10.0  # at most, for each of preparing and encoding


@dataclass(frozen=True)
class Estimate:
    """What is to do, what it takes, and what there is.

    Args:
        n_to_do: ids to be encoded.
        n_distinct: of these, texts that differ; of images all, since files are not read before.
        n_bad: of the probed samples, how many cannot be used.
        n_workers: processes on this machine that the figures are for.
        bytes_needed: on disk, for what was asked.
        bytes_embeddings, bytes_tokens: on disk for embeddings alone, and with tokens; None where there are none.
        prepare_per_s: ids a second, all their views made ready, with all cores; None where nothing was probed.
        encode_per_s: rows a second, with all cores, or one GPU.
        seconds: for all that is to do, by this machine alone.
        memory_bytes: most of this machine's memory, of all workers.
        memory_free: what the machine, or the control group that this process is in, has left for them.
    """

    store: Path
    n_asked: int
    n_present: int
    n_to_do: int
    n_distinct: int
    n_shards: int
    batch_size: int
    n_workers: int
    n_bad: int
    bytes_needed: int
    bytes_embeddings: int
    bytes_tokens: int | None
    bytes_free: int
    prepare_per_s: float | None
    encode_per_s: float | None
    seconds: float | None
    memory_bytes: int
    memory_free: int

    @property
    def fits(self) -> bool:
        """Whether disk and memory are enough."""
        return self.bytes_needed <= self.bytes_free and self.memory_bytes <= self.memory_free

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "store": str(self.store), "fits": self.fits}

    def lines(self) -> list[str]:
        """For people."""
        same = f", {self.n_to_do - self.n_distinct:,} of them the same text as another" * (
            self.n_distinct < self.n_to_do
        )
        with_tokens = "" if self.bytes_tokens is None else f", with tokens {in_bytes(self.bytes_tokens)}"
        beside = f"embeddings alone {in_bytes(self.bytes_embeddings)}{with_tokens}"
        told = [
            f"to do       {self.n_to_do:,} of {self.n_asked:,} ids ({self.n_present:,} present){same}",
            f"shards      {self.n_shards:,}, batches of {self.batch_size}",
            f"disk        {in_bytes(self.bytes_needed)} needed, {in_bytes(self.bytes_free)} free ({beside})",
            f"memory      {in_bytes(self.memory_bytes)} needed, {in_bytes(self.memory_free)} free",
        ]
        if self.seconds is not None and self.prepare_per_s and self.encode_per_s:
            told.append(
                f"time        about {in_words(self.seconds)} (prepares {self.prepare_per_s:,.1f} samples/s, encodes "
                f"{self.encode_per_s:,.1f} rows/s, each alone)"
            )
        if self.n_bad:
            told.append(f"bad inputs  {self.n_bad} of the samples probed; each costs its own row")
        return told


def in_total(estimates: Collection[Estimate]) -> str:
    """Disk and time of several, for people."""
    disk, seconds = sum(e.bytes_needed for e in estimates), sum(e.seconds or 0 for e in estimates)
    return f"{in_bytes(disk)}, about {in_words(seconds)} one after the other"


@dataclass(frozen=True)
class Probe:
    """What a few samples showed.

    Args:
        n_tokens: mean tokens of a row as it is stored.
        row_bytes: of one prepared row in memory.
    """

    prepare_per_s: float
    encode_per_s: float
    n_tokens: float
    row_bytes: int
    n_bad: int

    def seconds(self, n_ids: int, n_views: int, *, n_gpus: int) -> float:
        """For all views of some ids: on a CPU both steps take their turns, beside GPUs the slower one counts."""
        prepare_s, encode_s = n_ids / self.prepare_per_s, n_ids * n_views / self.encode_per_s
        return max(prepare_s, encode_s / n_gpus) if n_gpus else prepare_s + encode_s


def bytes_on_disk(store_layout: Layout, n_rows: int, tokens_per_row: float) -> int:
    """About what n rows take in a store.

    Args:
        tokens_per_row: where rows have tokens of their own number; texts are taken to have so many.
    """
    tokens = store_layout.tokens
    if tokens is not None and tokens.length is None:
        store_layout = replace(store_layout, tokens=replace(tokens, length=math.ceil(tokens_per_row)))
    return n_rows * (store_layout.row_bytes() + _ROW_OVERHEAD_BYTES)


def mean_tokens(samples: Samples, ids: Sequence[str], encoder: Encoder) -> float:
    """Mean tokens of the texts of some ids; 0 for images, whose tokens are of a number that the layout knows."""
    if samples.modality == "image":
        return 0.0
    lengths = []
    for i in spread(ids, _PROBE_TEXTS):
        with contextlib.suppress(InputError):
            lengths += [row.n_tokens for row in samples.prepare(encoder, i)]
    return sum(lengths) / max(len(lengths), 1)


def probe(
    samples: Samples, ids: Sequence[str], encoder: Encoder, store_layout: Layout, *, batch_size: int, shard_ids: int
) -> Probe:
    """Prepares and encodes a few samples from all over the dataset, each with all cores, and measures.

    Raises:
        InputError: none of them can be used.
    """
    n_threads, is_text = count_cores(), samples.modality == "text"
    good: list[Prepared] = []  # rows
    n_good, n_bad, n_tokens, first = 0, 0, 0, ""
    cores, one_each = cores_of_thread(), getattr(encoder, "concurrent", False)
    with ThreadPoolExecutor(n_threads, initializer=lambda: use_cores(1)) as pool:
        started = time.perf_counter()
        for run in batched(spread(ids, _PROBE_TEXTS if is_text else _PROBE_SAMPLES), n_threads):
            for i, views in [(i, pool.submit(samples.prepare, encoder, i)) for i in run]:
                try:
                    n_good, row_views = n_good + 1, views.result()
                    n_tokens += sum(row.n_tokens for row in row_views)
                    if is_text or len(good) < batch_size:  # images are large
                        good += row_views
                except InputError as error:
                    n_bad, first = n_bad + 1, first or f"{i!r}: {error.reason}: {error}"
            if time.perf_counter() - started > _PROBE_S:
                break
        prepare_per_s = (n_good + n_bad) / (time.perf_counter() - started)
    if not good:
        raise InputError("nothing", f"{n_bad} of {n_bad} samples probed cannot be used, first {first}")
    n_encoding, tokens = encoding_threads(encoder, n_threads), store_layout.tokens is not None
    with (
        ThreadPoolExecutor(n_encoding, initializer=lambda: use_cores(1 if one_each else cores)) as pool,
        full_precision,
    ):
        encode_per_s = None
        while encode_per_s is None:  # where memory runs out, the run takes half too
            batches = _like_a_shard(good, batch_size, shard_ids * samples.n_views, n_encoding)
            encode_per_s = _rate_of(partial(encoder.encode, tokens=tokens), batches, pool, last=batch_size == 1)
            batch_size = max(batch_size // 2, 1)
    use_cores(cores)
    return Probe(prepare_per_s, encode_per_s, n_tokens / (n_good * samples.n_views), _bytes_of(good[0]), n_bad)


def _rate_of(
    encode: Callable[[list[Prepared]], Encoded], batches: Sequence[list[Prepared]], pool: Executor, *, last: bool
) -> float | None:
    """Rows a second; None if memory ran out.

    Args:
        last: whether there is no smaller batch: then that it ran out is raised.
    """
    try:
        pool.submit(encode, batches[0]).result()  # the first call warms up
        started, n = time.perf_counter(), 0
        while n == 0 or time.perf_counter() - started < _PROBE_S / 3:
            list(pool.map(encode, batches))
            n += sum(map(len, batches))
    except Exception as error:  # anything else is raised again
        if last or not is_out_of_memory(error):
            raise
        return None
    return n / (time.perf_counter() - started)


def _like_a_shard(rows: Sequence[Prepared], batch_size: int, shard_rows: int, n_encoding: int) -> list[list[Prepared]]:
    """A few batches from all over a shard whose rows are like these; texts of like length are together in it."""
    ordered = sorted(rows, key=lambda row: row.n_tokens)
    each = -(-max(shard_rows, batch_size) // len(ordered))
    shard = [row for row in ordered for _ in range(each)]
    batches = [shard[k : k + batch_size] for k in range(0, len(shard) - batch_size + 1, batch_size)]
    several = _PROBE_BATCHES if ordered[-1].n_tokens else 1
    return list(spread(batches, -(-several // n_encoding) * n_encoding))


def fitting_batch(samples: Samples, ids: Sequence[str], encoder: Encoder, *, tokens: bool) -> int:
    """The largest batch, as a power of two, that leaves a fifth of the GPU's free memory; 32 on a CPU.

    The probe takes the longest texts among a few.
    """
    device = device_of(encoder)
    if device == "cpu":
        return DEFAULT_BATCH
    import torch

    good: list[Prepared] = []
    for i in spread(ids, _PROBE_SAMPLES):
        with contextlib.suppress(InputError):
            good.append(samples.prepare(encoder, i)[0])
    if not good:
        return DEFAULT_BATCH
    longest = max(good, key=lambda p: p.n_tokens)
    n_encoding, size = encoding_threads(encoder, 1), 1
    while size < _LARGEST_BATCH:
        release_memory(device)
        torch.cuda.reset_peak_memory_stats(device)
        before, free = torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)[0]
        try:
            encoder.encode([longest] * (2 * size), tokens=tokens)
        except Exception as error:  # anything else is raised again
            if not is_out_of_memory(error):
                raise
            break
        took = torch.cuda.max_memory_allocated(device) - before
        if took * n_encoding > _MEMORY_SHARE * free:
            break
        size *= 2
    release_memory(device)
    return size


def estimate(
    store: Path, samples: Samples, encoder: Encoder, store_layout: Layout, *,
    n_asked: int, n_present: int, ids: Sequence[str], n_shards: int, shard_ids: int, batch_size: int, n_workers: int,
    n_threads: int | None,
) -> Estimate:  # fmt: skip
    """What the ids that are to do will take.

    Args:
        n_workers: processes on this machine that share the work.
        n_threads: of each; None: the machine's cores, shared out.
    """
    found, n_views = None, samples.n_views
    parent_bytes = resident_bytes()
    forget_peak()
    if ids:
        found = probe(samples, ids, encoder, store_layout, batch_size=batch_size, shard_ids=shard_ids)
    n_tokens = found.n_tokens if found else 0.0
    n_distinct = len(samples.groups(ids))
    with_tokens = None
    if encoder.token_dim is not None:
        with_tokens = layout_for(encoder, store_dtype=store_layout.dtype, tokens=True, views=n_views)
    on_gpu = device_of(encoder) != "cpu"
    each = peak_bytes() + _in_flight_bytes(
        samples, encoder, store_layout, found, min(shard_ids, len(ids)), n_shards, batch_size,
        n_threads or max(count_cores() // n_workers, 1),
    )  # fmt: skip
    in_all = each if n_workers == 1 else n_workers * each + parent_bytes
    return Estimate(
        store=store,
        n_asked=n_asked,
        n_present=n_present,
        n_to_do=len(ids),
        n_distinct=n_distinct,
        n_shards=n_shards,
        batch_size=batch_size,
        n_workers=n_workers,
        n_bad=found.n_bad if found else 0,
        bytes_needed=bytes_on_disk(store_layout, len(ids) * n_views, n_tokens),
        bytes_embeddings=bytes_on_disk(replace(store_layout, tokens=None), len(ids) * n_views, 0),
        bytes_tokens=None if with_tokens is None else bytes_on_disk(with_tokens, len(ids) * n_views, n_tokens),
        bytes_free=free_bytes(store),
        prepare_per_s=found.prepare_per_s if found else None,
        encode_per_s=found.encode_per_s if found else None,
        seconds=found.seconds(n_distinct, n_views, n_gpus=n_workers if on_gpu else 0) if found else None,
        memory_bytes=in_all,
        memory_free=resident_bytes() + available_bytes(),
    )


def _in_flight_bytes(
    samples: Samples, encoder: Encoder, store_layout: Layout, found: Probe | None, shard_ids: int, n_shards: int,
    batch_size: int, n_threads: int,
) -> int:  # fmt: skip
    """Most that the pipeline of one process holds beside what the probe held: shards, and prepared samples."""
    if found is None:
        return 0
    rows = shard_ids * samples.n_views
    shards = min(n_shards, SHARDS_FILLING + SHARDS_UNWRITTEN) + 1  # one is copied together
    ahead = 2 * rows if samples.modality == "text" else 2 * batch_size + n_threads * samples.n_views
    batches = 2 * encoding_threads(encoder, n_threads) + 1  # under way, each as samples and as a tensor, and one ready
    row_bytes = bytes_on_disk(store_layout, 1, found.n_tokens) + 4 * encoder.dim
    return shards * rows * row_bytes + (ahead + batches * batch_size) * found.row_bytes


def _bytes_of(prepared: Prepared) -> int:
    inputs = prepared.inputs
    return int(inputs.nbytes) if hasattr(inputs, "nbytes") else sys.getsizeof(inputs)
