"""Reading image files with limits, before anything is decoded: what radiographs and masks have in common.

Nothing here or above passes on what a library says of a bad file: it may quote its content.
"""

from __future__ import annotations

import logging
import os
import stat
import warnings
from pathlib import Path

from embedcache.errors import InputError

MAX_PIXELS = 80_000_000
MAX_FILE_BYTES = 2**30


def read_regular(path: Path, *, max_bytes: int | None = None) -> bytes:
    """All bytes of a regular file.

    Raises:
        InputError: not a regular file, not readable, empty, or larger than `max_bytes`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO must not block
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise InputError("not-a-file", "its path is not a regular file")
            _check_bytes(found.st_size, max_bytes)  # before they are read
            with os.fdopen(descriptor, "rb", closefd=False) as handle:
                data = handle.read()
        finally:
            os.close(descriptor)
    except OSError as error:
        raise InputError("unreadable", f"the file cannot be read ({error.strerror})") from None
    return usable_bytes(data, max_bytes=max_bytes)


def usable_bytes(data: bytes, *, max_bytes: int | None = None) -> bytes:
    """The bytes of a file as they are.

    Raises:
        InputError: none, or more than `max_bytes`.
    """
    _check_bytes(len(data), max_bytes)
    if not data:
        raise InputError("empty-file", "the file has no bytes")
    return data


def _check_bytes(n: int, limit: int | None) -> None:
    if limit is not None and n > limit:
        raise InputError("too-large", f"{n:,} bytes, limit {limit:,}")


def keep_quiet(library: str) -> None:
    """Switches off what a library logs and warns of the files that it reads: it may quote what identifies a patient."""
    logging.getLogger(library).setLevel(logging.CRITICAL + 1)
    module = rf"{library}\b"
    if not any(getattr(of, "pattern", None) == module for *_, of, _ in warnings.filters):  # adding takes it out first
        warnings.filterwarnings("ignore", module=module)


def check_pixels(width: int, height: int, n_frames: int, limit: int) -> None:
    """Refuses an image by what its header says of its size.

    Raises:
        InputError: more than `limit` pixels.
    """
    if width * height * n_frames > limit:
        frames = f" x {n_frames} frames" if n_frames > 1 else ""
        raise InputError("too-large", f"{width} x {height}{frames} pixels, limit {limit:,}")
