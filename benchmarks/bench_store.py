"""How fast a store is, as ratios against the limit and against the usual ways, all measured in this one run.

    python benchmarks/bench_store.py                       everything, about five minutes on 2 cores
    python benchmarks/bench_store.py --only gather --json  one part, as JSON

It writes what it reads into a temporary directory (`--dir` chooses the disk; about 2.5 GB at the default size) and
removes it. The parts, by the name that `--only` takes:

    read     the whole store copied into a buffer, against memcpy of the same bytes between two ordinary arrays
    gather   1,024 random rows, against the same from an array or tensor that is resident in memory
    loaders  random batches of 1,024 rows: a torch DataLoader over files as they are usually laid out, and over a store
    verify   every byte checked on one core, against plain SHA-256 on one core
    ids      a million ids: opening the store, finding rows in its own order and shuffled, against a Python dict
    write    `save_store` with its digests and fsync, against one write loop with one fsync; and where the time goes
    codes    1,024 random rows of int8 and bfloat16 stores, which come back as float32

How to read it: the machine may be busy with other things, so single times mean little. What is compared runs turn by
turn within each repeat; `value` is the median over the repeats, `ratio` the median of the ratios within each repeat
(so it may differ a little from the quotient of two printed values), and `of what` says what is divided by what. Unless
a line says otherwise the page cache is warm and mapped pages have been touched: these are ratios against memory, not
against a disk. A DataLoader runs with two workers and with none, our gather beside it on all of torch's threads and on
one: the better of each counts; both draw shuffled epochs while the clock runs. A GB is 10^9 bytes. numpy asks the
system for huge pages for large arrays; a mapped file and a torch tensor have small ones, so the gather from a numpy
array has the higher bar. The split of `save_store` is of a profiled call, which makes Python loops look slower.

Shape notation: n rows, d embedding width.
"""

from __future__ import annotations

import contextlib
import cProfile
import hashlib
import json
import os
import pstats
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from many_ids import MANY_SHARDS, measure_ids
from measuring import Goal, Result, machine, median_ratio, seconds, table, turn_by_turn
from usual_ways import H5Rows, MapStyle, NpyRows, PtFiles, batch_rate, loader_rate, write_h5, write_pt_files

if TYPE_CHECKING:
    from embedcache.store.store import Store

_BATCH = 1024
_GATHERS = 300  # in each repeat
_LOADER_BUDGET_S = 0.7  # for each loader in each repeat
_PT_FILES = 20_000
_WRITE_BYTES = 8 * 2**20  # in each call of the plain write loop


@dataclass(frozen=True)
class Bench:
    """What every part works on: made when it is first asked for.

    Args:
        folder: temporary; all files lie in it.
    """

    folder: Path
    n: int
    d: int
    n_ids: int
    repeats: int

    @cached_property
    def values(self) -> np.ndarray:
        """Random embeddings, (n, d) float16."""
        random = np.random.default_rng(0)
        out = np.empty((self.n, self.d), np.float16)
        for start in range(0, self.n, 10_000):
            part = out[start : start + 10_000]
            part[:] = random.standard_normal(part.shape, np.float32)
        return out

    @cached_property
    def store(self) -> Store:
        """A store of the values as float16, read once."""
        return self.saved("float16", "float16")

    def saved(self, name: str, dtype: str) -> Store:
        """A store of the values, on disk, its mapped pages touched."""
        from embedcache import save_store

        store = save_store(self.folder / name, self.ids, self.values, record={"source": "random"}, store_dtype=dtype)
        os.sync()  # pages that wait for the disk would disturb what follows
        store.raw.max()
        return store

    @property
    def ids(self) -> list[str]:
        return [f"image-{k:07d}" for k in range(self.n)]


def measure_read(bench: Bench) -> Iterator[Result]:
    """The whole store against memcpy, touched before and freshly opened."""
    from embedcache import open_store

    mapped, resident = bench.store.embeddings, bench.values
    buffer = np.zeros_like(resident)

    def fresh() -> float:
        rows = open_store(bench.store.path).embeddings
        return seconds(lambda: np.copyto(buffer, rows))()

    calls = {
        "memcpy": seconds(lambda: np.copyto(buffer, resident)),
        "read": seconds(lambda: np.copyto(buffer, mapped)),
        "fresh": fresh,
    }
    turn_by_turn(calls, 1)
    times = turn_by_turn(calls, max(bench.repeats, 11))
    what = "memcpy time / read time"
    yield Result("memcpy between two arrays", _gb_per_s(resident.nbytes, times["memcpy"]), "GB/s")
    for name, label, goal in (
        ("read", "whole read of the store, warm", Goal("ratio", 0.8)),
        ("fresh", "whole read, first after open (page cache warm)", None),
    ):
        ratio = median_ratio(times["memcpy"], times[name])
        yield Result(label, _gb_per_s(resident.nbytes, times[name]), "GB/s", ratio, what, goal)


def measure_gather(bench: Bench) -> Iterator[Result]:
    """Random rows by torch and by numpy, from the store and from memory."""
    import torch

    mapped = torch.from_numpy(bench.store.embeddings)
    clone = mapped.clone()
    array = bench.values
    pairs: dict[str, tuple[Callable[[Any], object], Callable[[Any], object], str]] = {
        "torch index_select": (
            lambda rows: mapped.index_select(0, torch.from_numpy(rows)),
            lambda rows: clone.index_select(0, torch.from_numpy(rows)),
            "index_select of a resident clone time / store time, same rows",
        ),
        "store.gather": (
            bench.store.gather,
            lambda rows: np.take(array, rows, axis=0),
            "np.take of a resident array time / store time, same rows",
        ),
    }
    for label, (from_store, from_memory, what) in pairs.items():
        times = _gather_times(bench, {"store": from_store, "memory": from_memory})
        ratio = median_ratio(times["memory"], times["store"])
        yield Result(f"{_BATCH:,} rows from memory, beside {label}", _m_rows_per_s(times["memory"]), "M rows/s")
        value = _m_rows_per_s(times["store"])
        yield Result(f"{_BATCH:,} rows by {label}", value, "M rows/s", ratio, what, Goal("ratio", 0.8))
    small_pages = clone.numpy()
    times = _gather_times(
        bench, {"store": bench.store.gather, "memory": lambda rows: np.take(small_pages, rows, axis=0)}
    )
    what = "np.take of the clone's memory (small pages, as a map has) time / store time"
    value, ratio = _m_rows_per_s(times["store"]), median_ratio(times["memory"], times["store"])
    yield Result(f"{_BATCH:,} rows by store.gather, once more", value, "M rows/s", ratio, what)


def measure_loaders(bench: Bench) -> Iterator[Result]:
    """Random batches from DataLoaders over the usual files and over the store, beside our gather."""
    import torch

    folder, values, store = bench.folder / "usual", bench.values, bench.store
    mapped = torch.from_numpy(store.embeddings)
    folder.mkdir()
    usual = _usual_files(folder, values)
    os.sync()
    datasets: dict[str, Callable[[], MapStyle]] = {**usual, "our store (__getitems__)": lambda: store}
    calls: dict[str, Callable[[], float]] = {
        f"{label}|{num_workers}": loader_rate(
            dataset, batch_size=_BATCH, num_workers=num_workers, budget_s=_LOADER_BUDGET_S
        )
        for label, dataset in datasets.items()
        for num_workers in (2, 0)
    }
    for n_threads in (torch.get_num_threads(), 1):
        calls[f"ours|{n_threads}"] = partial(_gather_rate, bench.n, mapped, n_threads)
    rates = turn_by_turn(calls, bench.repeats)
    shutil.rmtree(folder)

    threads, gathered = _better(rates, "ours")
    name = f"our gather (index_select), {threads} of torch's threads"
    yield Result(name, _in_millions(gathered), "M rows/s")
    for label in datasets:
        num_workers, rate = _better(rates, label)
        goal = Goal("ratio", 50) if "usual" in label else None
        name = f"DataLoader, {num_workers} workers: {label}"
        ratio = median_ratio(gathered, rate)
        yield Result(name, _in_millions(rate), "M rows/s", ratio, "our gather / this, rows/s", goal)


def _better(rates: dict[str, list[float]], label: str) -> tuple[str, list[float]]:
    """Of the ways to run one thing, by workers or threads, the one with the highest median rate."""
    ways = {name.rpartition("|")[2]: found for name, found in rates.items() if name.rpartition("|")[0] == label}
    return max(ways.items(), key=lambda way: statistics.median(way[1]))


def _gather_rate(n: int, rows: Any, n_threads: int) -> float:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        return batch_rate(_batches(n, rows), _BATCH, budget_s=_LOADER_BUDGET_S)
    finally:
        torch.set_num_threads(before)


def _usual_files(folder: Path, values: np.ndarray) -> dict[str, Callable[[], MapStyle]]:
    """Writes the files, and gives the datasets that read them."""
    n, d = values.shape
    n_pt = min(n, _PT_FILES)
    write_h5(folder / "contiguous.h5", values)
    write_h5(folder / "chunked.h5", values, chunks=(1, d))
    write_h5(folder / "checked.h5", values, chunks=(1, d), fletcher32=True)
    np.save(folder / "rows.npy", values)
    write_pt_files(folder / "pt", values[:n_pt])
    return {
        "h5py ds[i], contiguous (usual)": partial(H5Rows, folder / "contiguous.h5", n),
        "npy memmap (usual)": partial(NpyRows, folder / "rows.npy"),
        "h5py ds[i], chunks (1, d)": partial(H5Rows, folder / "chunked.h5", n),
        "h5py ds[i], chunks (1, d), fletcher32": partial(H5Rows, folder / "checked.h5", n),
        f"one .pt file per sample ({n_pt:,} samples)": partial(PtFiles, folder / "pt", n_pt),
    }


def measure_verify(bench: Bench) -> Iterator[Result]:
    """`verify_store` beside hashlib, both on one core."""
    from embedcache import verify_store

    path, n_bytes, whole = bench.store.path, bench.store.n_bytes, bench.values.reshape(-1).view(np.uint8)

    def verified() -> None:
        if problems := verify_store(path):
            raise click.ClickException(str(problems))

    calls = {"sha256": seconds(lambda: hashlib.sha256(whole.data)), "verify": seconds(verified)}
    with _one_core():
        turn_by_turn(calls, 1)
        times = turn_by_turn(calls, bench.repeats)
    plain = [s * n_bytes / whole.nbytes for s in times["sha256"]]
    yield Result("plain hashlib SHA-256 of memory, one core", _gb_per_s(n_bytes, plain), "GB/s")
    yield Result(
        f"verify_store, one core, one shard of {bench.n:,} ids",
        _gb_per_s(n_bytes, times["verify"]),
        "GB/s",
        median_ratio(plain, times["verify"]),
        "SHA-256 time / verify time, same number of bytes",
        Goal("value", 1.0),
    )


def measure_write(bench: Bench) -> Iterator[Result]:
    """`save_store` beside a plain write of as many bytes, both onto the disk."""
    from embedcache import save_store

    ids, values, folder = bench.ids, bench.values, bench.folder / "written"
    whole = values.reshape(-1).view(np.uint8)
    folder.mkdir()

    def saved(record: dict[str, Any] | None) -> None:
        save_store(folder / "store", ids, values, record=record)

    def removed_after(call: Callable[[], object]) -> Callable[[], float]:
        def timed() -> float:
            spent = seconds(call)()
            shutil.rmtree(folder)
            folder.mkdir()
            os.sync()
            return spent

        return timed

    calls = {
        "plain": removed_after(lambda: _plain_write(folder / "plain", whole.data)),
        "no record": removed_after(lambda: saved(None)),
        "record": removed_after(lambda: saved({"source": "random"})),
        "sha256": seconds(lambda: hashlib.sha256(whole.data)),
    }
    turn_by_turn(calls, 1)
    times = turn_by_turn(calls, bench.repeats)
    split = _split_of(lambda: saved(None))
    for name, label in (("plain", "os.write loop and fsync, no digest"), ("sha256", "one pass of SHA-256, memory")):
        yield Result(label, _gb_per_s(whole.nbytes, times[name]), "GB/s")
    for name, label in (("no record", "save_store"), ("record", "save_store with a record given")):
        ratio = median_ratio(times["plain"], times[name])
        what = "plain write and fsync time / save_store time"
        yield Result(f"{label}, fsync included", _gb_per_s(whole.nbytes, times[name]), "GB/s", ratio, what)
    total = sum(split.values())
    for label, spent in split.items():
        yield Result(f"  of save_store: {label}", spent, "s", spent / total, "this / all of one profiled call")


def _plain_write(path: Path, data: memoryview) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        for start in range(0, len(data), _WRITE_BYTES):
            part = data[start : start + _WRITE_BYTES]
            while part:
                part = part[os.write(descriptor, part) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _split_of(call: Callable[[], object]) -> dict[str, float]:
    """Seconds of one call by what they were spent on, from a profile: each function goes to the first that fits."""
    profile = cProfile.Profile()
    profile.runcall(call)
    kinds = {
        "SHA-256": ("_hashlib.HASH", "openssl_sha256"),
        "os.write": ("posix.write",),
        "fsync": ("posix.fsync",),
        "float16 to float32 and back": ("astype", "ascontiguousarray"),
        "all else: checks, ids, plan": ("",),
    }
    spent = dict.fromkeys(kinds, 0.0)
    functions: dict[tuple[str, int, str], Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    for (_, _, name), (_, _, own_s, _, _) in functions.items():
        kind = next(kind for kind, parts in kinds.items() if any(part in name for part in parts))
        spent[kind] += own_s
    return spent


def measure_codes(bench: Bench) -> Iterator[Result]:
    """Random rows of stores that are narrower than what they give."""
    stores = {"float16": bench.store, **{dtype: bench.saved(dtype, dtype) for dtype in ("bfloat16", "int8")}}
    times = _gather_times(bench, {dtype: store.gather for dtype, store in stores.items()})
    for dtype, spent in times.items():
        label, ratio = f"store.gather {_BATCH:,} rows, {dtype}", median_ratio(times["float16"], spent)
        if dtype == "float16":
            yield Result(label, _m_rows_per_s(spent), "M rows/s")
        else:
            yield Result(f"{label} to float32", _m_rows_per_s(spent), "M rows/s", ratio, "float16 time / this time")


def _gather_times(bench: Bench, gathers: dict[str, Callable[[Any], object]]) -> dict[str, list[float]]:
    """Seconds of many gathers, one sum a repeat: all take the same rows, fresh ones each time, in turn."""
    random = np.random.default_rng(2)
    found: dict[str, list[float]] = {name: [] for name in gathers}
    for _ in range(bench.repeats + 1):
        sums = dict.fromkeys(gathers, 0.0)
        for k in range(_GATHERS):
            rows = random.integers(0, bench.n, _BATCH)
            for name in list(gathers)[:: -1 if k % 2 else 1]:
                start = time.perf_counter()
                gathers[name](rows)
                sums[name] += time.perf_counter() - start
        for name, spent in sums.items():
            found[name].append(spent)
    return {name: spent[1:] for name, spent in found.items()}  # the first warmed up


def _batches(n: int, rows: Any) -> Iterator[object]:
    """Batches of shuffled epochs without end, as a training loop over a resident tensor takes them."""
    import torch

    while True:
        for numbers in torch.randperm(n).split(_BATCH):
            if len(numbers) == _BATCH:
                yield rows.index_select(0, numbers)


def _gb_per_s(n_bytes: int, times: list[float]) -> float:
    return n_bytes / statistics.median(times) / 1e9


def _m_rows_per_s(times: list[float]) -> float:
    return _GATHERS * _BATCH / statistics.median(times) / 1e6


def _in_millions(rates: list[float]) -> float:
    return statistics.median(rates) / 1e6


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """This thread, and those that it starts meanwhile, on one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


_PARTS: dict[str, Callable[[Bench], Iterator[Result]]] = {
    "read": measure_read,
    "gather": measure_gather,
    "loaders": measure_loaders,
    "verify": measure_verify,
    "ids": lambda bench: measure_ids(bench.folder, bench.n_ids, bench.repeats),
    "write": measure_write,
    "codes": measure_codes,
}


@click.command()
@click.option("--rows", type=click.IntRange(min=_BATCH), default=200_000, show_default=True)
@click.option("--dim", type=click.IntRange(min=1), default=768, show_default=True)
@click.option("--ids", "n_ids", type=click.IntRange(min=MANY_SHARDS), default=1_000_000, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--only", type=click.Choice(list(_PARTS)), multiple=True, help="One part; may be given again.")
@click.option("--dir", "directory", type=click.Path(path_type=Path, file_okay=False, exists=True), help="Which disk.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(
    rows: int, dim: int, n_ids: int, repeats: int, only: tuple[str, ...], directory: Path | None, as_json: bool
) -> None:
    """Measures a store against memory and against the usual ways; prints one table."""
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="bench-store-", dir=directory) as folder:
        measured_on = {**machine("numpy", "torch", "h5py"), "directory": str(Path(folder).parent)}
        bench = Bench(Path(folder), rows, dim, n_ids, repeats)
        for part in only or _PARTS:
            click.echo(f"measuring {part} ...", err=True)
            results += _PARTS[part](bench)
    settings = {"rows": rows, "dim": dim, "ids": n_ids, "repeats": repeats, **measured_on}
    if as_json:
        click.echo(json.dumps({"settings": settings, "results": [r.as_json() for r in results]}, indent=2))
    else:
        click.echo(", ".join(f"{name} {value}" for name, value in settings.items()))
        click.echo(table(results))


if __name__ == "__main__":
    main()
