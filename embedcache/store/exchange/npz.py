"""A `.npz` with the arrays `ids` and `embeddings`.

Shape notation: n rows, d embedding width.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from embedcache.errors import EmbedCacheError, ImportFormatError, some_ids
from embedcache.store.exchange.id_files import ids_of_array
from embedcache.store.exchange.npy import npy_header
from embedcache.store.exchange.source import (
    Asked,
    Found,
    Spool,
    a_file,
    check_counts,
    check_float,
    check_ids,
)

_PIECE_BYTES = 8 * 2**20
_HOW = "numpy.savez(path, ids=numpy.array(ids, dtype='U'), embeddings=rows)"


def read(source: Path, asked: Asked) -> Found:
    """Rows and ids of one archive; the rows are unpacked to disk, not into memory.

    Raises:
        ImportFormatError: arrays missing, pickled, damaged, of another rank or number.
    """
    try:
        with zipfile.ZipFile(a_file(source)) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            missing = [name for name in ("ids", "embeddings") if names.count(name) != 1]
            if missing:
                raise ImportFormatError(
                    f"{source}: arrays {some_ids(names) or 'none'}, expected 'ids' and 'embeddings' once "
                    f"each; save it again with {_HOW}"
                )
            with archive.open("ids.npy") as handle:
                ids = _ids(handle, source)
            with archive.open("embeddings.npy") as handle:
                embeddings = _rows(handle, source, asked.scratch)
    except EmbedCacheError:  # no room for the rows, say, is also an OSError
        raise
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, KeyError) as error:
        raise ImportFormatError(f"{source}: not a readable .npz ({error}); save it again with {_HOW}") from error
    check_counts(len(ids), len(embeddings), f"{source}: ids", f"{source}: embeddings")
    check_ids(ids, lambda k: f"{source}: ids, row {k} (counted from 0)")
    return Found(ids, embeddings, {source.name: source})


def _ids(handle: IO[bytes], source: Path) -> list[str]:
    where = f"{source}: ids"
    shape, _, dtype = npy_header(handle, where)
    if dtype.hasobject:
        raise ImportFormatError(
            f"{where}: pickled Python objects, which are never read, expected (n,) of str; save it again with {_HOW}"
        )
    n_bytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
    data = handle.read(n_bytes + 1)
    if len(data) != n_bytes:
        raise ImportFormatError(f"{where}: not the {n_bytes} bytes that its header says; save it again with {_HOW}")
    return ids_of_array(np.frombuffer(data, dtype).reshape(shape) if n_bytes else np.empty(shape, dtype), where)


def _rows(handle: IO[bytes], source: Path, scratch: Path) -> np.ndarray:
    where = f"{source}: embeddings"
    shape, is_fortran, dtype = npy_header(handle, where)
    check_float(dtype, where)
    if len(shape) != 2 or is_fortran:
        raise ImportFormatError(
            f"{where}: shape {shape}{', columns first' if is_fortran else ''}, expected (n, d), rows first; save "
            "numpy.ascontiguousarray of it"
        )
    n_values, spool = shape[0] * shape[1], Spool(scratch, dtype)
    while data := handle.read(min(_PIECE_BYTES, (n_values - spool.n_values) * dtype.itemsize + 1)):
        if len(data) % dtype.itemsize or len(data) // dtype.itemsize > n_values - spool.n_values:
            raise ImportFormatError(f"{where}: not the bytes of shape {shape}; save it again with {_HOW}")
        spool.add(np.frombuffer(data, dtype))
    if spool.n_values != n_values:
        raise ImportFormatError(f"{where}: {spool.n_values} values, expected {n_values}; save it again with {_HOW}")
    return spool.rows(shape[1])
