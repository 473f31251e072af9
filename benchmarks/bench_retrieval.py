"""How fast retrieval is, beside faiss's exact index, in this one run.

    python benchmarks/bench_retrieval.py                 100,000 x 100,000 x 768, about eight minutes on 2 cores
    python benchmarks/bench_retrieval.py --n 20000 --json
    python benchmarks/bench_retrieval.py --device cuda   on a GPU, without faiss

Both look for the best ten of n candidates for n queries. Ours also gives the exact rank of each query's own match,
which an index does not. faiss is `faiss-cpu`, which has to be installed for this. Memory is the most that a process
held beyond the vectors themselves; each side runs in a process of its own. The whole matrix would take n x n x 4 bytes.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import click
import numpy as np
from measuring import Goal, Result, machine, median_ratio, shown

_DIM, _BEST = 768, 10


def _vectors(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((n, _DIM), np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    candidates = queries + 0.2 * rng.standard_normal((n, _DIM), np.float32)
    candidates /= np.linalg.norm(candidates, axis=1, keepdims=True)
    return queries, candidates


def _ours(queries: np.ndarray, candidates: np.ndarray, device: str) -> Callable[[], np.ndarray]:
    import torch

    from embedcache.stage_two.ranks import find

    x, y = (torch.from_numpy(part).to(device) for part in (queries, candidates))
    codes = torch.arange(len(queries), device=device)
    find(x[:512], y[:512], codes[:512], codes[:512], k=_BEST)  # libraries are ready
    return lambda: find(x, y, codes, codes, k=_BEST).top


def _faiss(queries: np.ndarray, candidates: np.ndarray, device: str) -> Callable[[], np.ndarray]:
    import faiss

    index = faiss.IndexFlatIP(_DIM)
    index.add(candidates)
    index.search(queries[:512], _BEST)
    return lambda: index.search(queries, _BEST)[1]


def _measured(which: str, n: int, device: str, answer: Connection) -> None:
    """In a process of its own: seconds, peak memory beyond the vectors in bytes, and a digest of what was found."""
    queries, candidates = _vectors(n)
    call = {"ours": _ours, "faiss": _faiss}[which](queries, candidates, device)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is held now
    before = _peak()
    start = time.perf_counter()
    top = call()
    seconds = time.perf_counter() - start
    answer.send((seconds, _peak() - before, np.sort(top, axis=1)[:1000].tolist()))


def _peak() -> int:
    """The most bytes that this process has held."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _run(which: str, n: int, device: str) -> tuple[float, float, list[list[int]]]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_measured, args=(which, n, device, there))
    process.start()
    there.close()  # so that the end of a process that failed is seen here
    found: tuple[float, float, list[list[int]]] = here.recv()
    process.join()
    return found


@click.command()
@click.option("--n", type=click.IntRange(min=1000), default=100_000)
@click.option("--device", default="cpu")
@click.option("--repeats", type=click.IntRange(min=1), default=1)
@click.option("--json", "as_json", is_flag=True)
def main(n: int, device: str, repeats: int, as_json: bool) -> None:
    """Measures and prints."""
    sides = ("ours", "faiss") if device == "cpu" else ("ours",)
    runs = [{which: _run(which, n, device) for which in sides} for _ in range(repeats)]
    times = {which: [run[which][0] for run in runs] for which in sides}
    memory = {which: max(run[which][1] for run in runs) for which in sides}
    results = [Result(f"{n:,} x {n:,}, best {_BEST} and exact ranks", statistics.median(times["ours"]), "s")]
    if "faiss" in sides:
        assert runs[0]["ours"][2] == runs[0]["faiss"][2], "both must find the same"
        results.append(
            Result(
                f"faiss, exact index, best {_BEST}",
                statistics.median(times["faiss"]),
                "s",
                median_ratio(times["ours"], times["faiss"]),
                "ours / faiss",
            )
        )
    whole = n * n * 4 / 2**30
    results.append(
        Result(
            "memory beyond the vectors", memory["ours"] / 2**30, "GB", memory["ours"] / 2**30 / whole,
            "that / the whole matrix", Goal("ratio", 0.05, "<="),
        )
    )  # fmt: skip
    if "faiss" in sides:
        results.append(Result("the same, faiss", memory["faiss"] / 2**30, "GB"))
    about = machine("torch", "numpy", *(["faiss-cpu"] if "faiss" in sides else []))
    click.echo(shown(results, about, as_json))


if __name__ == "__main__":
    main()
