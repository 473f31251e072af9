"""A `.safetensors` as `export_store` writes it: the tensors `embeddings` and `ids_json`, a JSON list as bytes.

Shape notation: n rows, d embedding width.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.errors import ImportFormatError, some_ids
from embedcache.store.exchange.id_files import ids_of_json
from embedcache.store.exchange.source import Asked, Found, Spool, a_file, check_counts, check_ids, is_possible
from embedcache.store.mapping import map_file
from embedcache.store.values import from_stored

EMBEDDINGS, IDS, VIEWS = "embeddings", "ids_json", "views"
LENGTH = struct.Struct("<Q")  # of the header, before it
MOST_HEADER = 100_000_000  # bytes, as the format has it

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_BYTES_DTYPES = {"U8": "|u1"}
_BLOCK_ROWS = 4096


def read(source: Path, asked: Asked) -> Found:
    """Rows and ids of one file; the rows are mapped, but for bfloat16, which numpy has not.

    Raises:
        ImportFormatError: tensors missing, of another dtype, rank or number, or a damaged file.
    """
    header, whole = _mapped(source)
    codes, dtype = _tensor(header, whole, EMBEDDINGS, _DTYPES, source)
    if codes.ndim != 2:
        raise ImportFormatError(f"{source}: {EMBEDDINGS!r} has shape {codes.shape}, expected (n, d)")
    listed, _ = _tensor(header, whole, IDS, _BYTES_DTYPES, source)
    ids = ids_of_json(listed.tobytes(), f"{source}: {IDS!r}")
    check_counts(len(ids), len(codes), f"{source}: {IDS!r}", f"{source}: {EMBEDDINGS!r}")
    check_ids(ids, lambda k: f"{source}: {IDS!r} row {k} (counted from 0)")
    files = {source.name: source}
    if dtype != "BF16":
        return Found(ids, codes, files)
    spool = Spool(asked.scratch)
    for start in range(0, len(codes), _BLOCK_ROWS):
        spool.add(from_stored(codes[start : start + _BLOCK_ROWS], "bfloat16"))
    return Found(ids, spool.rows(codes.shape[1]), files, stored="bfloat16")


def _mapped(source: Path) -> tuple[dict[str, Any], np.ndarray]:
    """The header and the bytes after it, mapped."""
    size = a_file(source).stat().st_size
    whole = map_file(source, size)
    n_header = LENGTH.unpack(whole[: LENGTH.size].tobytes())[0] if size >= LENGTH.size else MOST_HEADER + 1
    if n_header > min(MOST_HEADER, size - LENGTH.size):
        raise ImportFormatError(f"{source}: no header of a .safetensors at its beginning: cut short, or another file")
    try:
        header = json.loads(whole[LENGTH.size : LENGTH.size + n_header].tobytes())
    except (ValueError, RecursionError) as error:
        raise ImportFormatError(f"{source}: its header is not readable ({error}); write it again") from error
    if not isinstance(header, dict):
        raise ImportFormatError(f"{source}: its header is a {type(header).__name__}, expected an object")
    return header, whole[LENGTH.size + n_header :]


def _tensor(
    header: dict[str, Any], data: np.ndarray, name: str, dtypes: dict[str, str], source: Path
) -> tuple[np.ndarray, str]:
    """A tensor, mapped, and the name of its dtype."""
    try:
        entry = header[name]
        found, shape = str(entry["dtype"]), tuple(entry["shape"])
        start, stop = entry["data_offsets"]
        if not (is_possible(shape) and is_possible([start, stop])):
            raise ValueError("impossible shape or offsets")
    except (LookupError, TypeError, ValueError) as error:
        raise ImportFormatError(
            f"{source}: no usable tensor {name!r} among {some_ids(header)}, expected {EMBEDDINGS!r} and "
            f"{IDS!r}, as 'embedcache export' writes them; for other files save the rows with numpy.save and use "
            "--kind npy"
        ) from error
    if found not in dtypes:
        raise ImportFormatError(f"{source}: {name!r} of {found}, expected {' or '.join(dtypes)}; convert and save it")
    dtype = np.dtype(dtypes[found])
    n_bytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if not 0 <= start <= stop <= len(data) or stop - start != n_bytes:
        raise ImportFormatError(
            f"{source}: {name!r} of shape {shape} at bytes {start} to {stop} of {len(data)}, expected {n_bytes} bytes "
            "in the file: cut short; write it again"
        )
    return (data[start:stop].view(dtype) if n_bytes else np.empty(0, dtype)).reshape(shape), found
