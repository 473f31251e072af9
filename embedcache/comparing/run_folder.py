"""The directory of a run: whose it is, whether it is finished, and what lies beside it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from embedcache.errors import OutputError, RunStateError
from embedcache.output import write_text

STATE_NAME, LOCK_NAME, CONFIG_NAME = ".run.json", ".lock", "config.yaml"
WORDS_NAME = "comparison.json"  # what a comparison says beside its tables
_TRIES, _PATIENCE_S = 5, 0.1  # another process may look for a moment whether the run is under way


class RunFolder:
    """A run's directory, held by this process alone. A context manager.

    The lock is the system's: it ends with its process, however that dies.

    Args:
        path: is made if it is not there.
        identity: a fingerprint of what is run; a directory of another is refused.

    Raises:
        RunStateError: it holds another run, or another process is at work on it.
        OutputError: it cannot be made.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self._identity = path, identity
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror}); name another run directory") from error
        try:
            if not _hold_in_time(self._lock):
                raise RunStateError(f"{path}: another process is at work on this run; wait for it, or stop it")
            self._begin()
        except BaseException:
            os.close(self._lock)
            raise

    def _begin(self) -> None:
        known = _state(self.path).get("identity")
        if known not in (None, self._identity):
            raise RunStateError(
                f"{self.path}: holds another run; name another run directory beside it, and the steps that both have "
                "in common are taken from there"
            )
        if known is None and (self.path / CONFIG_NAME).exists():
            raise RunStateError(f"{self.path}: holds a run of 'embedcache train', or of an older version; name another")
        (self.path / WORDS_NAME).unlink(missing_ok=True)  # they are of the finished run, which this is no longer
        self._write(finished=None)

    def describe(self, resolved: Mapping[str, Any]) -> None:
        """Writes the settings of the run, as they were resolved."""
        write_text(self.path / CONFIG_NAME, yaml.safe_dump(dict(resolved), sort_keys=False, allow_unicode=True))

    def finish(self) -> None:
        """Notes that all of it is done, and when."""
        self._write(finished=time.strftime("%Y-%m-%d %H:%M:%S %z"))

    def others(self) -> list[Path]:
        """Directories of other runs beside it, the newest first."""
        return [path for path in runs_below(self.path.resolve().parent) if path != self.path.resolve()]

    def _write(self, *, finished: str | None) -> None:
        write_text(self.path / STATE_NAME, json.dumps({"identity": self._identity, "finished": finished}))

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)


def runs_below(parent: Path) -> list[Path]:
    """Directories of runs in a directory, by name, the last first: names are times."""
    return sorted((path.parent for path in parent.glob(f"*/{STATE_NAME}")), reverse=True)


def unfinished(parent: Path, identity: str) -> Path | None:
    """The newest run in a directory that is the same, is not finished, and is not under way."""
    for path in runs_below(parent):
        state = _state(path)
        if state.get("identity") == identity and not state.get("finished") and not _is_held(path):
            return path
    return None


def run_path(parent: Path, identity: str) -> Path:
    """Where a run goes of which nobody said where: to the newest of the same that was stopped, else by the time."""
    at = parent / time.strftime("%Y-%m-%dT%H-%M-%S")
    new = next(path for path in (at, *(Path(f"{at}-{k}") for k in range(2, 1000))) if not path.exists())
    return unfinished(parent, identity) or new


def finished_at(run_dir: Path) -> str:
    """When a run was finished; blank where it is not."""
    return _state(run_dir).get("finished") or ""


def _state(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((path / STATE_NAME).read_text("utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _hold_in_time(descriptor: int) -> bool:
    """Whether the lock is ours, also where another process looked at it just then."""
    for _ in range(_TRIES - 1):
        if _hold(descriptor):
            return True
        time.sleep(_PATIENCE_S)
    return _hold(descriptor)


def _hold(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Whether the lock is ours now; it always is where the file system has none."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # ENOLCK, ENOTSUP
        return True
    return True


def _is_held(path: Path) -> bool:
    try:
        descriptor = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _hold(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)
