"""What a run says of itself, epoch by epoch: `metrics.jsonl`, and TensorBoard's event files where asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from embedcache.errors import SettingsError
from embedcache.stage_two.fit import Course, Entry, without_nan


class Journal:
    """Writes what a run says of itself, epoch by epoch."""

    def __init__(self, course: Course) -> None:
        self._course = course
        self._lines: Any = None
        self._events: Any = None

    def add(self, entry: Entry) -> None:
        """One more line of `metrics.jsonl`, and of TensorBoard's event files where these are asked for."""
        if self._lines is None:
            self._lines = (self._course.run_dir / "metrics.jsonl").open("w", encoding="utf-8")
            if self._course.config.tensorboard and not self._course.stopped:
                self._events = event_writer()(str(self._course.run_dir / "tensorboard"))
        self._lines.write(json.dumps(without_nan(entry)) + "\n")
        self._lines.flush()
        if self._events is not None:
            for name, value in entry.items():
                self._events.add_scalar(name.replace("@", "_at_"), value, int(entry["epoch"]))

    def close(self) -> None:
        """Closes the files."""
        for file in (self._lines, self._events):
            if file is not None:
                file.close()


def event_writer() -> Callable[[str], Any]:
    """What writes TensorBoard's event files into a folder.

    Raises:
        SettingsError: it is not installed; says how.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise SettingsError("tensorboard is not installed; run pip install 'embedcache[tensorboard]'") from error
    return SummaryWriter
