"""One `.npy` of rows and a file of their ids.

Shape notation: n rows, d embedding width.
"""

from __future__ import annotations

import os
import tokenize
from pathlib import Path
from typing import IO

import numpy as np

from embedcache.errors import ImportFormatError
from embedcache.store.exchange.id_files import read_ids
from embedcache.store.exchange.source import Asked, Found, a_file, check_counts, check_float, check_ids, is_possible
from embedcache.store.mapping import map_file


def read(source: Path, asked: Asked) -> Found:
    """Rows of a `.npy`, ids of the file that the caller names.

    Raises:
        ImportFormatError: no ids, another number of them, or a damaged or foreign file.
    """
    embeddings = map_npy(source)
    if asked.ids is None:
        raise ImportFormatError(
            f"{source}: a .npy holds no ids, expected a file of them beside it: .txt (one a line), .csv or .parquet "
            "(with --id-column), .json (a list) or .npy (of str); pass --ids"
        )
    ids, where = read_ids(asked.ids, asked.id_column)
    check_counts(len(ids), len(embeddings), str(asked.ids), str(source))
    check_ids(ids, where)
    return Found(ids, embeddings, {source.name: source, asked.ids.name: asked.ids})


def map_npy(path: Path) -> np.ndarray:
    """The rows of a `.npy`, (n, d), mapped; no descriptor stays open, so that a thousand parts may be mapped.

    Raises:
        ImportFormatError: damaged, pickled, of another rank or dtype.
    """
    with a_file(path).open("rb") as handle:
        shape, is_fortran, dtype = npy_header(handle, str(path))
        start, size = handle.tell(), os.fstat(handle.fileno()).st_size
    check_float(dtype, str(path))
    if len(shape) != 2:
        raise ImportFormatError(f"{path}: shape {shape}, expected (n, d): one row for each id; reshape it and save")
    n_bytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if size - start != n_bytes:
        raise ImportFormatError(
            f"{path}: {size - start} bytes of rows, its header says {n_bytes} for shape {shape}: cut short or "
            "overwritten; save it again"
        )
    if not n_bytes:
        return np.empty(shape, dtype)
    return map_file(path, size)[start:].view(dtype).reshape(shape, order="F" if is_fortran else "C")


def npy_header(handle: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether columns come first, and dtype, as a `.npy` begins; nothing is unpickled.

    Raises:
        ImportFormatError: the bytes do not begin as a `.npy`.
    """
    try:
        version = np.lib.format.read_magic(handle)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version in readers:
            shape, is_fortran, dtype = readers[version](handle)
            if not is_possible(shape):
                raise ValueError(f"shape {shape}")
            return shape, is_fortran, dtype
    except (ValueError, SyntaxError, tokenize.TokenError, TypeError, LookupError, RecursionError, MemoryError) as error:
        raise ImportFormatError(f"{where}: not a readable .npy ({error}); save it again with numpy.save") from error
    raise ImportFormatError(f"{where}: .npy of version {version}, expected 1.0 or 2.0: rows of plain numbers")
