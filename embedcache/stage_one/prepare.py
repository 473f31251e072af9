"""Preparing samples in threads: in order, and never further ahead than agreed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from embedcache.device import use_one_core
from embedcache.encoders.base import Prepared
from embedcache.errors import InputError

Job = Callable[[], Sequence[Prepared]]  # the views of one sample
Outcome = Sequence[Prepared] | InputError


def in_order(jobs: Iterable[Job], *, n_threads: int, ahead: int) -> Generator[Outcome]:
    """Runs jobs in threads and yields their outcomes in the order of the jobs.

    A job is handed to the threads only when its turn has come, so that nothing is ready that nobody is about to take.

    Args:
        ahead: most outcomes that are ready or under way and not yet consumed; as many as threads at least.

    Yields:
        What the job returned, or the `InputError` that it raised; any other exception ends the stream.
    """
    under_way: deque[Future[Sequence[Prepared]]] = deque()
    pool = ThreadPoolExecutor(n_threads, "prepare", initializer=use_one_core)
    try:
        for job in jobs:
            under_way.append(pool.submit(job))
            if len(under_way) >= max(ahead, n_threads):
                yield _outcome(under_way.popleft())
        while under_way:
            yield _outcome(under_way.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _outcome(future: Future[Sequence[Prepared]]) -> Outcome:
    try:
        return future.result()
    except InputError as error:
        return error
