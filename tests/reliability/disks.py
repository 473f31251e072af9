"""Disks that die, fail or remember, in place of the store's own: each of its system calls goes through them."""

from __future__ import annotations

import errno
import mmap
import os
import signal
from dataclasses import dataclass, field
from typing import Any

from embedcache.store.commit import Disk

CALLS = ("create", "write", "seek", "allocate", "fsync", "close", "link", "unlink", "mkdir", "sync_directory", "read")


class Wrapped(Disk):
    """Calls `before(k, name)` and `after(k, name)` around call number k."""

    def __init__(self) -> None:
        self.n_calls = 0
        self.names: list[str] = []

    def before(self, k: int, name: str, arguments: tuple[Any, ...]) -> None: ...

    def after(self, k: int, name: str, arguments: tuple[Any, ...], result: Any) -> None: ...


def _wrap(name: str) -> Any:
    def call(self: Wrapped, *arguments: Any) -> Any:
        k = self.n_calls
        self.n_calls += 1
        self.names.append(name)
        self.before(k, name, arguments)
        result = getattr(super(Wrapped, self), name)(*arguments)
        self.after(k, name, arguments, result)
        return result

    return call


for _name in CALLS:
    setattr(Wrapped, _name, _wrap(_name))


class Killing(Wrapped):
    """Dies of SIGKILL before or after one call."""

    def __init__(self, at: int, *, after: bool) -> None:
        super().__init__()
        self._at, self._after = at, after

    def before(self, k: int, name: str, arguments: tuple[Any, ...]) -> None:
        if k == self._at and not self._after:
            if name == "write":  # torn: half of it reached the file
                os.write(arguments[0], memoryview(arguments[1])[: len(arguments[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    def after(self, k: int, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        if k == self._at and self._after:
            os.kill(os.getpid(), signal.SIGKILL)


class Failing(Wrapped):
    """Raises an OSError at call number `at`, once or from then on; a write gets half of its bytes out first."""

    def __init__(self, at: int, code: int, *, forever: bool) -> None:
        super().__init__()
        self._at, self._code, self._forever = at, code, forever

    def before(self, k: int, name: str, arguments: tuple[Any, ...]) -> None:
        if k == self._at or (self._forever and k > self._at):
            if name == "write":
                os.write(arguments[0], memoryview(arguments[1])[: len(arguments[1]) // 2])
            if name == "close":  # the descriptor is gone even when close fails
                os.close(arguments[0])
            raise OSError(self._code, os.strerror(self._code))


class Marking(Wrapped):
    """Says in memory shared with the parent whether a call is under way: where a kill hit."""

    def __init__(self) -> None:
        super().__init__()
        self._flag = mmap.mmap(-1, 8)

    def before(self, k: int, name: str, arguments: tuple[Any, ...]) -> None:
        self._flag[0] = 1

    def after(self, k: int, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        self._flag[0] = 0

    def take(self) -> bool:
        """Whether the last child died within a call; forgets it."""
        inside, self._flag[0] = bool(self._flag[0]), 0
        return inside


@dataclass
class Recorded:
    """One call that changes the disk: its name, and what it did to which file or name."""

    name: str
    path: str = ""
    target: str = ""
    data: bytes = b""


@dataclass
class Recording(Wrapped):
    """Remembers what was written, synced, linked and unlinked, in order."""

    log: list[Recorded] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._files: dict[int, str] = {}

    def after(self, k: int, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        if name == "create":
            self._files[result] = str(arguments[0])
            self.log.append(Recorded(name, str(arguments[0])))
        elif name == "write":
            written = bytes(memoryview(arguments[1])[:result])
            self.log.append(Recorded(name, self._files[arguments[0]], data=written))
        elif name == "fsync":
            self.log.append(Recorded(name, self._files[arguments[0]]))
        elif name == "link":
            self.log.append(Recorded(name, str(arguments[0]), str(arguments[1])))
        elif name in ("unlink", "mkdir", "sync_directory"):
            self.log.append(Recorded(name, str(arguments[0])))


CODES = {code: errno.errorcode[code] for code in (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES)}
