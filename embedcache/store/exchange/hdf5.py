"""An HDF5 file with the datasets `ids` and `embeddings`.

Shape notation: n rows, d embedding width.
"""

from __future__ import annotations

from pathlib import Path

from embedcache.errors import ImportFormatError
from embedcache.store.exchange.foreign_hdf5 import ForeignRows, looked_over, opened, text_of
from embedcache.store.exchange.source import Asked, Found, check_counts, check_ids


def read(source: Path, asked: Asked) -> Found:
    """Rows and ids of one file; the rows are read by slices, compressed or not.

    Raises:
        ImportFormatError: datasets missing, linked from elsewhere, of another rank, dtype or number.
    """
    with opened(source) as file:
        if {"block_digests", "record"} <= set(file):
            raise ImportFormatError(
                f"{source}: a store of embedcache, or a shard of one, expected a foreign file; open it with "
                "embedcache.open_store, or copy it with 'embedcache pack'"
            )
        ids = text_of(looked_over(file, source, "ids", "text"), source)
        dataset = looked_over(file, source, "embeddings", "floats")
        if dataset.ndim != 2:
            raise ImportFormatError(f"{source}: /embeddings has shape {dataset.shape}, expected (n, d)")
        rows = ForeignRows(source, "embeddings", dataset)
    check_counts(len(ids), len(rows), f"{source}: /ids", f"{source}: /embeddings")
    check_ids(ids, lambda k: f"{source}: /ids row {k} (counted from 0)")
    return Found(ids, rows, {source.name: source})
