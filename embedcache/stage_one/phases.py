"""Where the time of an extraction goes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True)
class Phases:
    """Seconds of each phase. Phases run beside each other and in several threads, so that their sum is no wall time.

    Args:
        plan_s: wall time before the first sample: inputs looked at, plan published.
        run_s: wall time from then to the last shard, the start of other processes included.
        worker_s: time that pipelines ran, added up over processes.
        prepare_s: decoding and transforming, or tokenising, added up over threads.
        encode_s: the model, added up over threads.
        write_s: digests, writing and syncing, in the background.
        waited_s: of `worker_s` the time in which nothing was being encoded.
    """

    plan_s: float = 0.0
    run_s: float = 0.0
    worker_s: float = 0.0
    prepare_s: float = 0.0
    encode_s: float = 0.0
    write_s: float = 0.0
    waited_s: float = 0.0

    @property
    def waited(self) -> float:
        """Share of the running time in which the encoder had nothing to do."""
        return self.waited_s / self.worker_s if self.worker_s else 0.0

    def __add__(self, other: Phases) -> Phases:
        return Phases(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __str__(self) -> str:
        threads = f"prepare {self.prepare_s:.1f} s, encode {self.encode_s:.1f} s (over all threads)"
        waited = f"the encoder waited {self.waited:.0%} of {self.worker_s:.1f} s"
        return f"plan {self.plan_s:.1f} s, run {self.run_s:.1f} s: {threads}, write {self.write_s:.1f} s; {waited}"

    def to_json(self) -> dict[str, float]:
        return asdict(self)


class Clock:
    """Measures the phases of one process while they run; safe in threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds = dict.fromkeys(("prepare", "encode", "write"), 0.0)
        self._started = self._idle_since = time.perf_counter()
        self._n_encoding, self._waited = 0, 0.0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time within to a phase."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._seconds[name] += time.perf_counter() - begun

    @contextlib.contextmanager
    def encoding(self) -> Iterator[None]:
        """The same for encoding, and while one thread is within, the encoder does not wait."""
        with self._lock:
            if self._n_encoding == 0:
                self._waited += time.perf_counter() - self._idle_since
            self._n_encoding += 1
        try:
            with self.phase("encode"):
                yield
        finally:
            with self._lock:
                self._n_encoding -= 1
                self._idle_since = time.perf_counter()

    def read(self) -> Phases:
        """Until now."""
        with self._lock:
            now = time.perf_counter()
            waited = self._waited + (now - self._idle_since if self._n_encoding == 0 else 0.0)
            return Phases(
                run_s=now - self._started,
                worker_s=now - self._started,
                prepare_s=self._seconds["prepare"],
                encode_s=self._seconds["encode"],
                write_s=self._seconds["write"],
                waited_s=waited,
            )


def pace(waited: float | None, n_failed: int) -> str:
    """How it goes, for a progress line.

    Args:
        waited: share of the time in which the encoder had nothing to do; None where nobody told yet.
    """
    told = [] if waited is None else [f"encoder waited {waited:.0%}"]
    return ", ".join([*told, f"{n_failed} failed"] if n_failed else told)
