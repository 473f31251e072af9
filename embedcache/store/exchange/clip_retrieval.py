"""Folders of clip-retrieval: `img_emb`, `text_emb` and `metadata`, each in numbered parts.

Row k of `img_emb_3.npy` is row k of `metadata_3.parquet`. Numbers are filled with zeros and may have gaps.

Shape notation: d embedding width.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from embedcache.errors import ImportFormatError, some_ids
from embedcache.store.exchange.npy import map_npy
from embedcache.store.exchange.parquet import column_names, id_column
from embedcache.store.exchange.source import Asked, Found, a_directory, check_counts, check_ids
from embedcache.store.save import Joined

FOLDERS = {"image": "img_emb", "text": "text_emb"}

_METADATA = "metadata"
_ID_COLUMNS = ("key", "image_path")


def read(source: Path, asked: Asked) -> Found:
    """Rows of all parts of one modality, mapped, in the order of their numbers.

    Raises:
        ImportFormatError: parts without metadata or the other way round, numbers that differ, ids given twice.
    """
    a_directory(source, f"{', '.join(FOLDERS.values())} and {_METADATA}")
    folder = FOLDERS[asked.modality]
    values, tables = _parts(source / folder, folder, ".npy"), _parts(source / _METADATA, _METADATA, ".parquet")
    if not values:
        raise ImportFormatError(
            f"{source / folder}: no {folder}_<number>.npy, expected the parts of modality {asked.modality}; check "
            "the path, or name the other modality"
        )
    alone = sorted({path.name for n, path in (values | tables).items() if n not in values or n not in tables})
    if alone:
        raise ImportFormatError(
            f"{source}: {some_ids(alone)} without the other of {folder} and {_METADATA}, expected both for each "
            "number: a part is missing; copy it here, or run clip-retrieval again"
        )
    column = asked.id_column or _default_column(next(iter(tables.values())))
    ids: list[str] = []
    places: list[tuple[Path, int]] = []
    parts: list[np.ndarray] = []
    for number, path in values.items():
        rows, part_ids = map_npy(path), id_column(tables[number], column)
        check_counts(len(part_ids), len(rows), str(tables[number]), str(path))
        if parts and rows.shape[1] != parts[0].shape[1]:
            raise ImportFormatError(f"{path}: rows of width {rows.shape[1]}, expected {parts[0].shape[1]} as before it")
        places.append((tables[number], len(ids)))
        ids += part_ids
        parts.append(rows)

    def where(k: int) -> str:
        path, start = next((path, start) for path, start in reversed(places) if start <= k)
        return f"{path} row {k - start} (counted from 0)"

    check_ids(ids, where)
    files = {path.relative_to(source).as_posix(): path for path in (*values.values(), *tables.values())}
    filled = [part for part in parts if len(part)] or parts[:1]
    return Found(ids, Joined(filled, parts[0].shape[1]), files, {"id_column": column})


def _parts(folder: Path, stem: str, suffix: str) -> dict[str, Path]:
    """The numbered files of a folder by the digits in their names, smallest number first."""
    pattern = re.compile(rf"{stem}_([0-9]+){re.escape(suffix)}")
    found = {match[1]: path for path in folder.glob("*") if (match := pattern.fullmatch(path.name))}
    return dict(sorted(found.items(), key=lambda item: (int(item[0]), item[0])))


def _default_column(table: Path) -> str:
    names = column_names(table)
    for name in _ID_COLUMNS:
        if name in names:
            return name
    raise ImportFormatError(
        f"{table}: columns {some_ids(names, 20)}, expected {' or '.join(map(repr, _ID_COLUMNS))}; name the "
        "column of the ids with --id-column"
    )
