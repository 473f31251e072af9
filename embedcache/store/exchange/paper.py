"""Embeddings of the paper's own code, holajoa/Adaptor-VL-SSL: `{model}_{split}.npy` and a CSV of dicom ids.

TRAP. That code sorts every batch by the number of its report's tokens before it encodes it, and writes rows in that
order; the CSV keeps the order of the dataset. So row k of the CSV is NOT the image of row k of the `.npy`, and nothing
in the files can tell. What it drops on the way also makes the numbers differ. Hence rows are joined only where the
caller vouches for them, and the record of the store says that they were.
"""

from __future__ import annotations

from pathlib import Path

from embedcache.errors import ImportFormatError
from embedcache.store.exchange.id_files import read_csv
from embedcache.store.exchange.npy import map_npy
from embedcache.store.exchange.source import Asked, Found, a_file, check_ids

HEADER = ["", "dicom_id"]

_IDS_NAME = "mimic-cxr-2.0.0_idx2dicom_id_{split}.csv"
_TRAP = (
    "the paper's code sorts the rows within each batch by the number of report tokens before it encodes them, and the "
    "CSV is not sorted with them"
)
_WAYS = (
    "extract again with 'embedcache extract', where every row carries its id; or, if you know that these rows were "
    "written in the order of the CSV, pass --trust-row-order"
)


def ids_file(source: Path) -> Path | None:
    """The CSV of ids that the paper's code wrote for a `.npy`, if it lies beside it."""
    path = source.parent / _IDS_NAME.format(split=source.stem.rpartition("_")[2])
    return path if path.is_file() else None


def read(source: Path, asked: Asked) -> Found:
    """Rows and ids in the order in which they stand, if the caller vouches for it.

    Raises:
        ImportFormatError: numbers that differ, an order that nobody vouches for, or damaged files.
    """
    embeddings = map_npy(source)
    path = asked.ids or ids_file(source)
    if path is None:
        raise ImportFormatError(
            f"{source}: no ids, expected {_IDS_NAME.format(split='{split}')} beside it; name the CSV with --ids"
        )
    ids = _dicom_ids(path)
    if len(ids) != len(embeddings):
        raise ImportFormatError(
            f"{source}: {len(embeddings)} rows, but {len(ids)} ids in {path}: which id a row has cannot be known, for "
            f"{_TRAP}, and it leaves out what it could not use; extract again with 'embedcache extract', where every "
            "row carries its id"
        )
    if not asked.trust_row_order:
        raise ImportFormatError(
            f"{source}: {len(ids)} rows and as many ids in {path}, but no row says which id it has: {_TRAP}. So row k "
            f"may be the embedding of another image of its batch. Either {_WAYS}"
        )
    files = {source.name: source, path.name: path}
    return Found(ids, embeddings, files, {"join": "by row number, not verified"})


def _dicom_ids(path: Path) -> list[str]:
    header, body = read_csv(a_file(path))
    if header != HEADER:
        raise ImportFormatError(
            f"{path}: header {','.join(header)!r}, expected {','.join(HEADER)!r} as the paper's code writes it; for "
            "other rows and ids use --kind npy"
        )
    for k, (number, _) in enumerate(body):
        if number != str(k):
            raise ImportFormatError(
                f"{path} row {k} (counted from 0): running number {number!r}, expected '{k}': rows were moved or left "
                "out after the CSV was written; name the file as it was written"
            )
    ids = [dicom_id for _, dicom_id in body]
    check_ids(ids, lambda k: f"{path} row {k} (counted from 0)")
    return ids
