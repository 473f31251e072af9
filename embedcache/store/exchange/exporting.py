"""A store to files that other tools read: Parquet, `.npy` with a list of ids, safetensors. Rows are streamed.

Shape notation: n rows, d embedding width.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from embedcache.errors import EmbedCacheError, ImportFormatError, StoreWriteError
from embedcache.store import commit
from embedcache.store.exchange.parquet import VECTOR_COLUMN
from embedcache.store.exchange.safetensors import EMBEDDINGS, IDS, LENGTH, MOST_HEADER, VIEWS
from embedcache.store.shard import byte_view
from embedcache.store.store import Store, open_store

_PIECE_BYTES = 8 * 2**20
_GROUP_BYTES = 64 * 2**20  # of a Parquet row group: held in memory while it is written
_METADATA_KEY = "embedcache"
_SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def export_store(store_path: str | Path, out: str | Path, *, kind: str | None = None) -> list[Path]:
    """Writes a store out for other tools; nothing that is there is overwritten.

    `parquet`: columns `id`, `view` and `embedding`, float32. `npy`: the rows, and `<stem>.ids.json` beside them.
    `safetensors`: tensors `embeddings`, `views` and `ids_json`. Rows are float16 or float32 as they are stored;
    bfloat16 stays so in safetensors and is float32 elsewhere; int8 is float32.

    Args:
        out: the file; the suffix of the kind is added where it is missing.
        kind: one of `EXPORT_KINDS`; by the suffix of `out` where it is not given.

    Returns:
        The files that were written.

    Raises:
        ImportFormatError: no such kind, or one that cannot hold the store.
        StoreWriteError: a file is there already, or cannot be written.
    """
    out = Path(out)
    kind = kind or out.suffix.lower().removeprefix(".")
    if kind not in EXPORT_KINDS:
        raise ImportFormatError(
            f"{out}: kind {kind!r}, expected one of {', '.join(EXPORT_KINDS)}; name it with --kind, or by the suffix"
        )
    out = out if out.suffix.lower() == f".{kind}" else out.with_name(f"{out.name}.{kind}")
    store = open_store(store_path)
    commit.make_directory(out.absolute().parent)
    return EXPORT_KINDS[kind](store, out)


def _parquet(store: Store, out: Path) -> list[Path]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # float32 whatever is stored: DuckDB before 1.3 takes lists of float16 for lists of raw bytes
    schema = pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("view", pa.uint16(), nullable=False),
            pa.field(VECTOR_COLUMN, pa.list_(pa.float32(), store.layout.dim), nullable=False),
        ],
        metadata={_METADATA_KEY: json.dumps(store.document)},
    )
    with _placed(out) as handle, pq.ParquetWriter(handle, schema, use_dictionary=False) as writer:
        for start, stop in _steps(store, _GROUP_BYTES):
            values = np.asarray(store.gather(np.arange(start, stop)), np.float32)
            columns = [
                pa.array(store.ids[start:stop], pa.string()),
                pa.array(store.views[start:stop], pa.uint16()),
                pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), store.layout.dim),
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    return [out]


def _npy(store: Store, out: Path) -> list[Path]:
    if len(set(store.ids)) != len(store):
        raise ImportFormatError(f"{store.path}: several views of an id, which a list of ids cannot tell apart; export "
                                "it with --kind parquet")  # fmt: skip
    ids_path = out.with_name(f"{out.name.removesuffix(out.suffix)}.ids.json")
    dtype = np.dtype("<f2" if store.layout.dtype == "float16" else "<f4")
    header = {"descr": dtype.str, "fortran_order": False, "shape": (len(store), store.layout.dim)}
    ids = json.dumps(store.ids, ensure_ascii=False).encode()
    ours = commit.publish(ids_path, ids)
    if not ours and (out.exists() or ids_path.read_bytes() != ids):
        raise _taken(ids_path)  # else a call that was killed has left it
    try:
        with _placed(out) as handle:
            np.lib.format.write_array_header_1_0(handle, header)
            for start, stop in _steps(store, _PIECE_BYTES):
                handle.write(byte_view(np.asarray(store.gather(np.arange(start, stop)), dtype)))
    except BaseException:  # ids without their rows would be in the way of the next try
        if ours:
            with contextlib.suppress(OSError):
                commit.disk.unlink(ids_path)
        raise
    return [out, ids_path]


def _safetensors(store: Store, out: Path) -> list[Path]:
    n, dim = len(store), store.layout.dim
    dtype = store.layout.dtype if store.layout.dtype in _SAFETENSORS_DTYPES else "float32"
    ids, views = json.dumps(store.ids, ensure_ascii=False).encode(), np.asarray(store.views, "<u2")
    tensors = {
        EMBEDDINGS: (_SAFETENSORS_DTYPES[dtype], [n, dim], n * dim * (4 if dtype == "float32" else 2)),
        VIEWS: ("U16", [n], 2 * n),
        IDS: ("U8", [len(ids)], len(ids)),
    }
    header: dict[str, Any] = {"__metadata__": {_METADATA_KEY: json.dumps(store.document)}}
    at = 0
    for name, (code, shape, n_bytes) in tensors.items():
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [at, at + n_bytes]}
        at += n_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % LENGTH.size)  # tensors start on a multiple of eight bytes
    if len(text) > MOST_HEADER:
        raise ImportFormatError(f"{store.path}: its record is too large for the header of a .safetensors; use parquet")
    codes = store.shard_rows().codes
    with _placed(out) as handle:
        handle.write(LENGTH.pack(len(text)) + text)
        for start, stop in _steps(store, _PIECE_BYTES):
            is_coded = dtype == store.layout.dtype
            handle.write(byte_view(codes[start:stop] if is_coded else store.gather(np.arange(start, stop))))
        handle.write(byte_view(views))
        handle.write(ids)
    return [out]


EXPORT_KINDS: dict[str, Callable[[Store, Path], list[Path]]] = {
    "parquet": _parquet,
    "npy": _npy,
    "safetensors": _safetensors,
}


def _steps(store: Store, n_bytes: int) -> Iterator[tuple[int, int]]:
    """First row and end of pieces that have about so many bytes as float32."""
    step = max(n_bytes // max(4 * store.layout.dim, 1), 1)
    return ((start, min(start + step, len(store))) for start in range(0, len(store), step))


@contextlib.contextmanager
def _placed(path: Path) -> Iterator[IO[bytes]]:
    """A file written aside, which gets its name when it is whole and on disk, and only if nothing has the name."""
    if path.exists():
        raise _taken(path)
    commit.sweep(path.parent, of=path.name)
    temporary = commit.temporary_name(path)
    try:
        with os.fdopen(commit.disk.create(temporary), "wb") as handle:
            yield handle
            handle.flush()
            commit.disk.fsync(handle.fileno())
        commit.disk.link(temporary, path)
        commit.disk.sync_directory(path.parent)
    except EmbedCacheError:
        raise
    except OSError as error:
        if error.errno == errno.EEXIST:
            raise _taken(path) from error
        raise StoreWriteError(
            f"{path}: cannot be written ({error.strerror or error}); nothing of it was kept. Mend that and run the "
            "same command again"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            commit.disk.unlink(temporary)


def _taken(path: Path) -> StoreWriteError:
    return StoreWriteError(f"{path}: is there already; name another file, or remove it first")
