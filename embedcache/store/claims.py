"""Which shards somebody is working on: locks that save work, and decide nothing.

Whether a shard counts is decided by its document alone. A claim only keeps two extractors on one store from computing
the same shard at the same time. It is a record lock of the system, so that it ends with its process however that dies,
and needs no clock. Where the file system has no locks, every claim is granted.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from types import TracebackType

CLAIMS_NAME = ".claims"


class Claims:
    """Claims of one process on the shards of one store; byte k of `.claims` stands for shard k. A context manager."""

    def __init__(self, store: Path) -> None:
        self._descriptor: int | None = None
        with contextlib.suppress(OSError):  # a store that cannot be written is reported where it is written
            self._descriptor = os.open(store / CLAIMS_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def claim(self, number: int) -> bool:
        """Whether the shard is now ours; False if another process works on it."""
        if self._descriptor is None:
            return True
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except (BlockingIOError, PermissionError):  # POSIX lets a held lock be reported as either
            return False
        except OSError:  # ENOLCK, ENOTSUPP: no locks here
            self.close()
        return True

    def is_free(self, number: int) -> bool:
        """Whether no other process works on the shard; it is not claimed, nor is a claim of ours kept."""
        free = self.claim(number)
        if free and self._descriptor is not None:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, number)
        return free

    @property
    def keep_others_out(self) -> bool:
        """Whether this file system has locks; known once something was claimed."""
        return self._descriptor is not None

    def close(self) -> None:
        """Gives every claim back."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Claims:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
