"""A Parquet table with a column of ids and a column of vectors, lists of one length.

Shape notation: n rows, d embedding width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.errors import EmbedCacheError, ImportFormatError, some_ids
from embedcache.store.exchange.id_files import pick_column, texts
from embedcache.store.exchange.source import Asked, Found, Spool, a_file, check_ids

VECTOR_COLUMN = "embedding"

_BATCH_ROWS = 2048
_BUFFER_BYTES = 2**20


def read(source: Path, asked: Asked) -> Found:
    """Rows and ids of one table; the rows are unpacked to disk, not into memory.

    Raises:
        ImportFormatError: columns missing, of another type, with gaps, or lists of different lengths.
    """
    import pyarrow as pa

    vectors = asked.vector_column or VECTOR_COLUMN
    with opened(source) as file:
        schema = file.schema_arrow
        if vectors not in schema.names:
            raise ImportFormatError(
                f"{source}: no column {vectors!r} among {some_ids(schema.names, 20)}; name the column of the "
                "vectors with --vector-column"
            )
        column = _text_column(source, schema, asked.id_column)
        kind = schema.field(vectors).type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if not is_list or not pa.types.is_floating(kind.value_type):
            raise ImportFormatError(
                f"{source}: column {vectors!r} of {kind}, expected lists of float16, float32 or float64; convert it"
            )
        spool = Spool(asked.scratch, kind.value_type.to_pandas_dtype())
        dim = kind.list_size if pa.types.is_fixed_size_list(kind) else None
        ids: list[str] = []
        for batch in file.iter_batches(_BATCH_ROWS, columns=[column, vectors]):
            values, dim = _vectors(batch.column(vectors), dim, f"{source}: column {vectors!r}", len(ids))
            spool.add(values)
            ids += _texts(batch.column(column), f"{source}: column {column!r}", len(ids))
    if dim is None:
        raise ImportFormatError(f"{source}: no row, so the width of {vectors!r} is unknown; expected at least one row")
    check_ids(ids, lambda k: f"{source} row {k} (counted from 0)")
    return Found(ids, spool.rows(dim), {source.name: source}, {"id_column": column, "vector_column": vectors})


def column_names(path: Path) -> list[str]:
    """The columns of a table."""
    with opened(path) as file:
        return list(file.schema_arrow.names)


def id_column(path: Path, column: str | None = None) -> list[str]:
    """One column of ids; `id`, or the only column, where it is not named.

    Raises:
        ImportFormatError: no such column, or not all of it is text.
    """
    with opened(path) as file:
        if not file.metadata.num_rows:  # pandas gives a column of no rows any type
            pick_column(list(file.schema_arrow.names), column, str(path))
            return []
        column = _text_column(path, file.schema_arrow, column)
        ids: list[str] = []
        for batch in file.iter_batches(_BATCH_ROWS, columns=[column]):
            ids += _texts(batch.column(column), f"{path}: column {column!r}", len(ids))
        return ids


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Opens a table; what pyarrow says of a damaged one becomes an `ImportFormatError` that names it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    a_file(path)
    try:
        # both keep memory bounded: pre-buffering holds the whole file, and no buffer a whole column of a row group
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
            yield file
    except EmbedCacheError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ImportFormatError(f"{path}: not a readable Parquet file ({error}); write it again") from error


def _text_column(path: Path, schema: Any, column: str | None) -> str:
    import pyarrow as pa

    column = pick_column(list(schema.names), column, str(path))
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise ImportFormatError(
            f"{path}: column {column!r} of {kind}, expected text; convert it with .astype(str) where that keeps every "
            "character, or name another with --id-column"
        )
    return column


def _texts(column: Any, where: str, start: int) -> list[str]:
    return texts(column.to_pylist(), lambda k: f"{where} row {start + k} (counted from 0)")


def _vectors(column: Any, dim: int | None, where: str, start: int) -> tuple[np.ndarray, int | None]:
    """Values of a batch of lists, all of one length, and that length.

    Args:
        dim: the length so far; None before the first row.
        start: number of the batch's first row.
    """
    import pyarrow.compute as pc

    if column.null_count:
        row = start + int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise ImportFormatError(
            f"{where} row {row} (counted from 0): no vector, expected one in every row; leave it out"
        )
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    if dim is None and len(lengths):
        dim = int(lengths[0])
    other = np.flatnonzero(lengths != dim)
    if len(other):
        raise ImportFormatError(
            f"{where} row {start + int(other[0])} (counted from 0): {lengths[other[0]]} values, expected {dim} as "
            "before it: one encoder gives one width"
        )
    flat = column.flatten()
    if flat.null_count:
        k = int(np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False))[0])
        row = start + k // max(dim or 1, 1)
        raise ImportFormatError(f"{where} row {row} (counted from 0): a value is missing in the vector; leave it out")
    return flat.to_numpy(zero_copy_only=False), dim
