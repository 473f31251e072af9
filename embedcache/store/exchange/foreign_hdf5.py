"""A dataset of somebody else's HDF5 file, looked over before any of it is read.

HDF5 follows links, external files and virtual datasets silently, loads filters from shared libraries, and gives zeros
for what was never written. As in the gate of the store's own shards, all of that is refused by name first; but here
chunks and the filters that h5py carries itself are allowed.

Shape notation: n rows, d embedding width.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from embedcache.errors import EmbedCacheError, ImportFormatError, some_ids
from embedcache.store.exchange.id_files import decoded
from embedcache.store.exchange.source import FLOAT_BYTES, a_file
from embedcache.store.gate import without_plugins
from embedcache.store.isolated import isolated

Holds = Literal["floats", "whole numbers", "text"]

_FILTERS = {
    h5py.h5z.FILTER_DEFLATE: "gzip",
    h5py.h5z.FILTER_SHUFFLE: "shuffle",
    h5py.h5z.FILTER_FLETCHER32: "fletcher32",
    h5py.h5z.FILTER_LZF: "lzf",
}
_MOST_RATIO = 1100  # deflate cannot make a megabyte smaller than about 1,000 bytes
_BLOCK_BYTES = 8 * 2**20
_TEXT_TIMEOUT_S, _TEXT_TIMEOUT_S_EACH = 20.0, 1e-4


class ForeignRows:
    """Rows of a dataset, (n, d), read by slices; the file is opened, and looked over, each time that it is read.

    What is read at once is some megabytes and whole chunks, so that no chunk is unpacked for every few of its rows.
    It is kept until its last row was asked for, so that a thousand files read one after the other keep nothing.

    Args:
        dataset: of shape (n, d), (1, n, d), or (d,) for a single row.
    """

    def __init__(self, path: Path, name: str, dataset: h5py.Dataset) -> None:
        self._path, self._name, self._axes, self.dtype = path, name, dataset.shape, dataset.dtype
        self.shape: tuple[int, ...] = (1, *self._axes) if len(self._axes) == 1 else self._axes[-2:]
        chunk_rows = dataset.chunks[-2] if dataset.chunks and len(dataset.chunks) > 1 else 1
        wanted_rows = _BLOCK_BYTES // max(self.dtype.itemsize * self.shape[1], 1)
        self._block_rows = max(-(-wanted_rows // chunk_rows), 1) * chunk_rows
        self._block, self._start = np.empty((0, self.shape[1]), self.dtype), 0

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(len(self))
        if not self._start <= start <= stop <= self._start + len(self._block):
            end = min(max(stop, start + self._block_rows), len(self))
            self._block, self._start = self._read(start, end), start
        part = self._block[start - self._start : stop - self._start]
        if stop == self._start + len(self._block):
            self._block, self._start = self._block[:0].copy(), 0
        return part

    def _read(self, start: int, stop: int) -> np.ndarray:
        with opened(self._path) as file:
            dataset = looked_over(file, self._path, self._name, "floats")
            if dataset.shape != self._axes or dataset.dtype != self.dtype:
                raise ImportFormatError(f"{self._path}: changed while it was read; run the same command again")
            if len(self._axes) == 1:
                return dataset[:][None][start:stop]
            return dataset[0, start:stop] if len(self._axes) == 3 else dataset[start:stop]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """Opens a file for reading; what HDF5 says of a damaged one becomes an `ImportFormatError` that names it."""
    a_file(path)
    try:
        with without_plugins(), h5py.File(path, "r", locking=False, driver="sec2") as file:
            yield file
    except EmbedCacheError:
        raise
    except (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, MemoryError) as error:
        raise ImportFormatError(
            f"{path}: cannot be read as HDF5 ({error}): damaged, cut short, or another kind of file; write it again"
        ) from error


def looked_over(file: h5py.File, path: Path, name: str, holds: Holds) -> h5py.Dataset:
    """A dataset at the top of a file that lies in it and is what it seems; nothing of it has been read yet.

    Raises:
        ImportFormatError: the message says what was found and expected.
    """

    def refuse(found: str, wanted: str) -> ImportFormatError:
        return ImportFormatError(f"{path}: /{name} {found}, expected {wanted}; refused before reading it")

    link = file.get(name, getlink=True)
    if link is None:
        raise refuse("is not there", f"a dataset beside {some_ids(sorted(file)) or 'nothing'}")
    if not isinstance(link, h5py.HardLink):
        raise refuse(f"is a {type(link).__name__}", "a hard link: links lead to other files")
    if file.get(name, getclass=True) is not h5py.Dataset:
        raise refuse("is no dataset", "a dataset")
    dataset = file[name]
    if dataset.is_virtual:
        raise refuse("is virtual", "rows in this file")
    if dataset.external is not None:
        raise refuse("lies in external files", "rows in this file")
    creation = dataset.id.get_create_plist()
    filters = [creation.get_filter(k)[0] for k in range(creation.get_nfilters())]
    foreign = [code for code in filters if code not in _FILTERS]
    if foreign:
        raise refuse(f"has filter {foreign[0]}", f"no filter but {', '.join(_FILTERS.values())}")
    if not _is(dataset.dtype, holds):
        raise refuse(f"has dtype {dataset.dtype}", holds)
    if dataset.shape is None:
        raise refuse("is empty of any shape", "rows")
    n_bytes = int(np.prod(dataset.shape, dtype=object)) * dataset.id.get_type().get_size()
    stored = dataset.id.get_storage_size()
    if n_bytes > stored * (_MOST_RATIO if filters else 1):
        raise refuse(
            f"claims {n_bytes} bytes in shape {dataset.shape} and has {stored} in the file",
            "rows that were all written",
        )
    if dataset.chunks is not None:
        wanted = math.prod(-(-n // step) for n, step in zip(dataset.shape, dataset.chunks, strict=True))
        there = dataset.id.get_num_chunks()
        if there != wanted:
            raise refuse(f"has {there} of its {wanted} chunks", "rows that were all written")
    return dataset


def text_of(dataset: h5py.Dataset, path: Path) -> list[str]:
    """The strings of a dataset of text, (n,), of fixed or variable length.

    Text of variable length is read by another process: HDF5 loops for ever on some damage to its heap.

    Raises:
        ImportFormatError: another rank, or bytes that are not UTF-8.
    """
    where = f"{path}: {dataset.name}"
    if dataset.ndim != 1:
        raise ImportFormatError(f"{where} has shape {dataset.shape}, expected (n,): one id for each row")
    if h5py.check_string_dtype(dataset.dtype).length is not None:
        data = [bytes(value) for value in dataset[:].tolist()]
    else:
        timeout_s = _TEXT_TIMEOUT_S + len(dataset) * _TEXT_TIMEOUT_S_EACH
        try:
            read = isolated(f"{__name__}:texts_in", path, str(dataset.name).lstrip("/"), timeout_s=timeout_s)
        except ChildProcessError as error:
            raise ImportFormatError(f"{where} cannot be read ({error}): damaged; write the file again") from error
        data = [bytes.fromhex(value) for value in read]
    return decoded(data, lambda k: f"{where} row {k} (counted from 0)")


def texts_in(path: Path, name: str) -> list[str]:
    """The bytes of each string of a dataset, (n,), as hexadecimal digits."""
    with opened(path) as file:
        return [bytes(value).hex() for value in looked_over(file, path, name, "text")[:].tolist()]


def _is(dtype: Any, holds: Holds) -> bool:
    if holds == "text":
        return h5py.check_string_dtype(dtype) is not None
    return dtype.kind == "f" and dtype.itemsize in FLOAT_BYTES if holds == "floats" else dtype.kind in "iu"
