"""Preparing samples in threads: in order, and never further ahead than agreed."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass

from embedcache.device import use_cores
from embedcache.encoders.base import Prepared
from embedcache.errors import InputError

Job = Callable[[], Sequence[Prepared]]  # the views of one sample
Outcome = Sequence[Prepared] | InputError


class _Window:
    """Lets job i run once fewer than `size` results before it wait to be consumed.

    A plain semaphore could hand its last permits to later jobs while the one that the consumer waits for has none.
    """

    def __init__(self, size: int) -> None:
        self._size, self._consumed, self._closed = size, 0, False
        self._changed = threading.Condition()

    def enter(self, i: int) -> bool:
        """Waits for the turn of job i; False if the window closed meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or i < self._consumed + self._size)
            return not self._closed

    @property
    def is_open(self) -> bool:
        return not self._closed

    def consume(self) -> None:
        with self._changed:
            self._consumed += 1
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


@dataclass(frozen=True)
class _Fault:
    """An exception that is no bad input, on its way to the consumer."""

    error: Exception


def in_order(jobs: Iterable[Job], *, n_threads: int | None, ahead: int) -> Generator[Outcome]:
    """Runs jobs in threads and yields their outcomes in the order of the jobs.

    Args:
        n_threads: preparing threads; by default one for each core.
        ahead: most outcomes that are ready or under way and not yet consumed.

    Yields:
        What the job returned, or the `InputError` that it raised; any other exception ends the stream.
    """
    from joblib import Parallel, delayed

    n_threads = n_threads or os.cpu_count() or 1
    window, at_work = _Window(max(ahead, n_threads)), threading.Semaphore(n_threads)
    n_jobs = max(n_threads, 2)  # with one, joblib would do everything in the thread of the consumer

    def outcome(i: int, job: Job) -> Outcome | _Fault | None:
        if not window.enter(i):
            return None
        use_cores(1)
        try:
            with at_work:
                return job()
        except InputError as error:
            return error
        except Exception as error:  # noqa: BLE001 - raised again where it is consumed
            return _Fault(error)

    outcomes = Parallel(n_jobs=n_jobs, backend="threading", return_as="generator")(
        delayed(outcome)(i, job) for i, job in enumerate(itertools.takewhile(lambda _: window.is_open, jobs))
    )
    try:
        for result in outcomes:
            if isinstance(result, _Fault):
                raise result.error
            window.consume()
            yield result
    finally:
        window.close()
        for _ in outcomes:  # what was under way returns at once, and nothing more is begun
            pass
