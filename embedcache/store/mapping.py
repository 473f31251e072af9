"""Files mapped into memory without keeping a descriptor open for each.

Python's `mmap` holds a descriptor as long as the map lives, so that a store of a thousand shards would meet the usual
limit of 1,024 open files; and a copy-on-write map larger than memory is refused unless it reserves nothing.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from functools import cache
from pathlib import Path

import numpy as np

_MAP_FAILED = ctypes.c_void_p(-1).value
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if os.uname().sysname == "Linux" else 0x40)


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    number, pointer = ctypes.c_int, ctypes.c_void_p
    libc.mmap.restype = pointer
    libc.mmap.argtypes = [pointer, ctypes.c_size_t, number, number, number, ctypes.c_long]
    libc.munmap.argtypes = [pointer, ctypes.c_size_t]
    return libc


class _Mapping:
    """A whole file, copy-on-write: what is written to it reaches no other process and never the file."""

    def __init__(self, path: Path, size: int) -> None:
        self._address, self._size, self._libc = None, size, _libc()
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.fstat(descriptor).st_size < size:
                raise OSError(f"{path}: shorter than {size} bytes")
            flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
            address = self._libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, descriptor, 0)
        finally:
            os.close(descriptor)
        if address in (None, _MAP_FAILED):
            code = ctypes.get_errno()
            raise OSError(code, f"cannot map {size} bytes: {os.strerror(code)}", str(path))
        self._address = address

    @property
    def __array_interface__(self) -> dict[str, object]:
        return {"version": 3, "data": (self._address, False), "shape": (self._size,), "typestr": "|u1"}

    def __del__(self) -> None:
        if self._address is not None:
            self._libc.munmap(self._address, self._size)
            self._address = None


def map_file(path: Path, size: int) -> np.ndarray:
    """The first `size` bytes of a file, (size,) uint8, mapped for as long as the array or a view of it lives.

    Raises:
        OSError: no such file, shorter than that, or the system maps no more.
    """
    return np.asarray(_Mapping(path, size)) if size else np.empty(0, np.uint8)
