"""What an extraction will take, known before it starts: bytes on disk, and by a short probe hours and memory."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from embedcache.device import cores_of_thread, is_out_of_memory, release_memory, use_cores
from embedcache.encoders.base import Encoder, Prepared
from embedcache.errors import InputError, StoreWriteError
from embedcache.progress import in_words
from embedcache.stage_one.pipeline import SHARDS_FILLING, SHARDS_UNWRITTEN, batched, encoding_threads
from embedcache.stage_one.rows import layout_for
from embedcache.stage_one.samples import Samples
from embedcache.store.layout import Layout

DEFAULT_BATCH = 32
_LARGEST_BATCH = 512
_MEMORY_SHARE = 0.8  # of a GPU's free memory that a batch may take
_ROW_OVERHEAD_BYTES = 64  # id, view, digest of a row, and its share of a shard's record
_PROBE_SAMPLES = 64
_PROBE_S = 10.0  # at most, for each of preparing and encoding


@dataclass(frozen=True)
class Estimate:
    """What is to do, what it takes, and what there is.

    Args:
        n_to_do: ids to be encoded.
        n_distinct: of these, texts that differ; of images all, since files are not read before.
        n_bad: of the probed samples, how many cannot be used.
        bytes_needed: on disk, for what was asked.
        bytes_embeddings, bytes_tokens: on disk for embeddings alone, and with tokens; None where there are none.
        prepare_per_s, encode_per_s: samples a second, each alone with all cores; None where nothing was probed.
        seconds: for all that is to do, by this machine alone.
        memory_bytes: most of this process's memory.
    """

    store: Path
    n_asked: int
    n_present: int
    n_to_do: int
    n_distinct: int
    n_shards: int
    batch_size: int
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
                f"time        about {in_words(self.seconds)} (prepares {self.prepare_per_s:,.1f}/s, encodes "
                f"{self.encode_per_s:,.1f}/s, each alone with all cores)"
            )
        if self.n_bad:
            told.append(f"bad inputs  {self.n_bad} of the samples probed; each costs its own row")
        return told


@dataclass(frozen=True)
class Probe:
    """What a few samples showed.

    Args:
        n_tokens: mean tokens of a row as it is stored.
        sample_bytes: of one prepared sample in memory.
        sample_s: seconds that a sample takes: on a CPU both turns, beside a GPU the longer of the two.
    """

    prepare_per_s: float
    encode_per_s: float
    sample_s: float
    n_tokens: float
    sample_bytes: int
    n_bad: int


def bytes_on_disk(store_layout: Layout, n_rows: int, tokens_per_row: float) -> int:
    """About what n rows take in a store.

    Args:
        tokens_per_row: where rows have tokens of their own number; texts are taken to have so many.
    """
    tokens = store_layout.tokens
    if tokens is not None and tokens.length is None:
        store_layout = replace(store_layout, tokens=replace(tokens, length=math.ceil(tokens_per_row)))
    return n_rows * (store_layout.row_bytes() + _ROW_OVERHEAD_BYTES)


def free_bytes(store: Path) -> int:
    """Free on the disk that the store is on or will be on."""
    path = store.absolute()
    while not path.exists():
        path = path.parent
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def check_room(store: Path, needed: int) -> None:
    """Refuses what the disk cannot hold, before anything is written.

    Raises:
        StoreWriteError: says how much is missing, and what takes less.
    """
    free = free_bytes(store)
    if needed > free:
        raise StoreWriteError(
            f"{store}: needs about {in_bytes(needed)}, and {in_bytes(free)} are free there; nothing was started. Name "
            "another disk with --store, or store less: no --tokens, a --token-grid, --store-dtype int8, fewer --views"
        )


def mean_tokens(samples: Samples, ids: Sequence[str], encoder: Encoder) -> float:
    """Mean tokens of the texts of some ids; 0 for images, whose tokens are of a number that the layout knows."""
    if samples.modality == "image":
        return 0.0
    lengths = []
    for i in _spread(ids):
        with contextlib.suppress(InputError):
            lengths.append(samples.prepare(encoder, i)[0].n_tokens)
    return sum(lengths) / max(len(lengths), 1)


def probe(samples: Samples, ids: Sequence[str], encoder: Encoder, store_layout: Layout, batch_size: int) -> Probe:
    """Prepares and encodes a few samples from all over the dataset, each with all cores, and measures.

    Raises:
        InputError: none of them can be used.
    """
    n_threads = os.cpu_count() or 1
    good: list[Prepared] = []
    n_bad, last = 0, None
    cores, one_each = cores_of_thread(), getattr(encoder, "concurrent", False)
    with ThreadPoolExecutor(n_threads, initializer=lambda: use_cores(1)) as pool:
        started = time.perf_counter()
        for run in batched(_spread(ids), n_threads):
            for views in [pool.submit(samples.prepare, encoder, i) for i in run]:
                try:
                    good.append(views.result()[0])
                except InputError as error:
                    n_bad, last = n_bad + 1, error
            if time.perf_counter() - started > _PROBE_S:
                break
        prepare_per_s = (len(good) + n_bad) / (time.perf_counter() - started)
    if not good:
        raise last or InputError("nothing", "nothing to probe")
    tokens = store_layout.tokens is not None
    good.sort(key=lambda p: p.n_tokens)
    repeated = good * -(-batch_size // len(good)) if len(good) < batch_size else good
    batches = [repeated[k : k + batch_size] for k in range(0, len(repeated) - batch_size + 1, batch_size)]
    n_encoding = encoding_threads(encoder, n_threads)
    with ThreadPoolExecutor(n_encoding, initializer=lambda: use_cores(1 if one_each else cores)) as pool:
        pool.submit(encoder.encode, batches[0], tokens=tokens).result()  # the first call warms up
        started, n = time.perf_counter(), 0
        while n == 0 or (n < 2 * _PROBE_SAMPLES and time.perf_counter() - started < _PROBE_S / 3):
            under_way = [
                pool.submit(encoder.encode, batches[k % len(batches)], tokens=tokens) for k in range(n_encoding)
            ]
            for future in under_way:
                future.result()
            n += n_encoding * batch_size
        encode_per_s = n / (time.perf_counter() - started)
    use_cores(cores)
    on_cpu = getattr(encoder, "device", "cpu") == "cpu"
    sample_s = 1 / prepare_per_s + 1 / encode_per_s if on_cpu else max(1 / prepare_per_s, 1 / encode_per_s)
    n_tokens = sum(p.n_tokens for p in good) / len(good)
    return Probe(prepare_per_s, encode_per_s, sample_s, n_tokens, _bytes_of(good[0]), n_bad)


def fitting_batch(samples: Samples, ids: Sequence[str], encoder: Encoder, *, tokens: bool) -> int:
    """The largest batch, as a power of two, that leaves a fifth of the GPU's free memory; 32 on a CPU.

    The probe takes the longest texts among a few.
    """
    device = getattr(encoder, "device", "cpu")
    if device == "cpu":
        return DEFAULT_BATCH
    import torch

    good: list[Prepared] = []
    for i in _spread(ids):
        with contextlib.suppress(InputError):
            good.append(samples.prepare(encoder, i)[0])
    if not good:
        return DEFAULT_BATCH
    longest = max(good, key=lambda p: p.n_tokens)
    n_encoding, size = encoding_threads(encoder, 1), 1
    while size < _LARGEST_BATCH:
        release_memory(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        try:
            encoder.encode([longest] * (2 * size), tokens=tokens)
        except Exception as error:  # anything else is raised again
            if not is_out_of_memory(error):
                raise
            break
        took = torch.cuda.max_memory_allocated(device) - before
        if took * n_encoding > _MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]:
            break
        size *= 2
    release_memory(device)
    return size


def estimate(
    store: Path, samples: Samples, encoder: Encoder, store_layout: Layout, *,
    n_asked: int, n_present: int, ids: Sequence[str], n_shards: int, shard_ids: int, batch_size: int,
) -> Estimate:  # fmt: skip
    """What the ids that are to do will take."""
    found = probe(samples, ids, encoder, store_layout, batch_size) if ids else None
    n_tokens = found.n_tokens if found else 0.0
    n_rows = len(ids) * samples.n_views
    n_distinct = len(samples.groups(ids))
    embeddings_only = replace(store_layout, tokens=None)
    with_tokens = None
    if encoder.token_dim is not None:
        with_tokens = layout_for(encoder, store_dtype=store_layout.dtype, tokens=True, views=samples.n_views)
    in_flight = min(n_shards, SHARDS_FILLING + SHARDS_UNWRITTEN)
    rows_each = min(shard_ids, max(len(ids), 1)) * samples.n_views
    shard_bytes = bytes_on_disk(store_layout, rows_each, n_tokens) + 4 * rows_each * encoder.dim
    ahead = 2 * rows_each if samples.modality == "text" else 4 * batch_size + (os.cpu_count() or 1) * samples.n_views
    return Estimate(
        store=store,
        n_asked=n_asked,
        n_present=n_present,
        n_to_do=len(ids),
        n_distinct=n_distinct,
        n_shards=n_shards,
        batch_size=batch_size,
        n_bad=found.n_bad if found else 0,
        bytes_needed=bytes_on_disk(store_layout, n_rows, n_tokens),
        bytes_embeddings=bytes_on_disk(embeddings_only, n_rows, 0),
        bytes_tokens=None if with_tokens is None else bytes_on_disk(with_tokens, n_rows, n_tokens),
        bytes_free=free_bytes(store),
        prepare_per_s=found.prepare_per_s if found else None,
        encode_per_s=found.encode_per_s if found else None,
        seconds=found.sample_s * n_distinct * samples.n_views if found else None,
        memory_bytes=_resident_bytes() + in_flight * shard_bytes + ahead * (found.sample_bytes if found else 0),
        memory_free=_resident_bytes() + _available_bytes(),
    )


def in_bytes(n: int) -> str:
    """A size for people: `640 bytes`, `1.2 MB`, `86 GB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.{0 if n >= 10 * size else 1}f} {unit}"
    return f"{n} bytes"


def _spread(ids: Sequence[str]) -> Sequence[str]:
    """A few ids from all over the dataset."""
    return ids[:: max(len(ids) // _PROBE_SAMPLES, 1)][:_PROBE_SAMPLES]


def _bytes_of(prepared: Prepared) -> int:
    inputs = prepared.inputs
    return int(inputs.nbytes) if hasattr(inputs, "nbytes") else sys.getsizeof(inputs)


def _resident_bytes() -> int:
    """Most memory that this process has had."""
    found = _proc("/proc/self/status", "VmHWM:")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if found is None else found


def _available_bytes() -> int:
    found = _proc("/proc/meminfo", "MemAvailable:")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if found is None else found


def _proc(path: str, name: str) -> int | None:
    """Bytes of a field that Linux gives in kB; None on other systems."""
    with contextlib.suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return None
