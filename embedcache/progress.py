"""Progress on a terminal as a bar, elsewhere as plain lines."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

_LINE_EVERY_S = 10.0
_hushed = False


def hush() -> None:
    """From now on this process shows no progress: it is a worker, and another tells of the whole."""
    global _hushed
    _hushed = True


class Progress:
    """A counter that shows how far a long step is, how fast, and how long it will take; safe in threads.

    Used as a context manager.

    Args:
        label: what is being done.
        total: how many units there are.
        unit: the word for one unit, such as `image`.
        done: how many were done before.
        shown: whether anything is shown at all.
    """

    def __init__(self, label: str, *, total: int, unit: str, done: int = 0, shown: bool = True) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._done, self._note, self._before = done, "", done
        self._started = self._last_line = time.monotonic()
        self._first: tuple[int, float] | None = None  # units and time when the first were done
        shown = shown and not _hushed
        self._shown: int | None = -1 if shown else None
        self._lock = threading.Lock()
        self._bar = None
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, desc=label, unit=f" {unit}", dynamic_ncols=True)

    def advance(self, n: int = 1, note: str = "") -> None:
        """Counts `n` units as done; `note` is shown beside the count."""
        with self._lock:
            self._done += n
            self._first = self._first or (self._done, time.monotonic())
            self._note = note or self._note
            if self._bar is not None:
                self._bar.set_postfix_str(self._note, refresh=False)
                self._bar.update(n)
            elif time.monotonic() - self._last_line >= _LINE_EVERY_S:
                self._last_line = time.monotonic()
                self._print_line()

    def _print_line(self) -> None:
        if self._shown is None or self._shown == self._done:
            return
        self._shown = self._done
        note = f", {self._note}" if self._note else ""
        rate = self._rate(time.monotonic())
        left = f", {in_words((self._total - self._done) / rate)} left" if rate > 0 and self._done < self._total else ""
        counted = f"{self._label}: {self._done}/{self._total} {self._unit}, {rate:,.1f} {self._unit}/s"
        print(f"{counted}{left}{note}", file=sys.stderr)

    def _rate(self, now: float) -> float:
        """Units a second: in the end over all, before from the first on, so that a slow start makes no long wait."""
        done, since = self._done - self._before, self._started
        if self._first is not None and self._first[0] < self._done < self._total:
            done, since = self._done - self._first[0], self._first[1]
        return done / max(now - since, 1e-9)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        else:
            self._print_line()


def in_words(seconds: float) -> str:
    """A time for people: `8 s`, `12 min`, `3.4 h`, `5.1 days`."""
    for unit, size, most in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 48)):
        if seconds < most * size:
            return f"{seconds / size:.{0 if size < 3600 else 1}f} {unit}"
    return f"{seconds / 86400:.1f} days"
