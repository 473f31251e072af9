"""What a reader of a foreign format is asked, what it gives, and what all readers check.

Shape notation: n rows, d embedding width.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.errors import ImportFormatError, StoreWriteError
from embedcache.fingerprint import canonical_json, digest_file
from embedcache.ids import unusable_ids
from embedcache.store import commit
from embedcache.store.shard import Rows, byte_view

_MOST_LISTED = 100  # files named one by one in a record
_CHUNK_BYTES = 8 * 2**20
_MOST_AXES = 3
FLOAT_BYTES = (2, 4, 8)


@dataclass(frozen=True)
class Asked:
    """What the caller says beside the source.

    Args:
        ids: file of the ids, for formats whose values come without them.
        id_column, vector_column: columns of a table, where the format has one.
        trust_row_order: the caller vouches that rows and ids of the paper's files are in one order.
        scratch: an existing or future directory with room for the rows of a source that cannot be mapped.
    """

    modality: str
    scratch: Path
    ids: Path | None = None
    id_column: str | None = None
    vector_column: str | None = None
    trust_row_order: bool = False


@dataclass(frozen=True)
class Found:
    """What a reader found.

    Args:
        ids: n ids, checked.
        embeddings: (n, d), read when sliced.
        files: every file that was read, by its name relative to the source.
        facts: what the record says beside kind, name and files.
        digests: SHA-256 of files, where the reader has seen every byte anyway.
        stored: the stored dtype that keeps the values, where the dtype of `embeddings` does not tell.
    """

    ids: list[str]
    embeddings: Rows
    files: Mapping[str, Path]
    facts: Mapping[str, Any] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    stored: str | None = None


class Spool:
    """Rows kept in a nameless file and mapped: a source that cannot be sliced costs disk and no memory.

    Args:
        folder: where the file lies; it is gone with the last array that maps it, however the process ends.
    """

    def __init__(self, folder: Path, dtype: np.dtype | str = "<f4") -> None:
        commit.make_directory(folder)
        self._folder, self._dtype = folder, np.dtype(dtype)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # it lives as long as the rows
        self.n_values = 0

    def add(self, values: np.ndarray) -> None:
        """Appends values of any shape.

        Raises:
            StoreWriteError: no room.
        """
        try:
            self._file.write(byte_view(np.asarray(values, self._dtype)))
        except OSError as error:
            raise StoreWriteError(
                f"{self._folder}: cannot keep rows there while they are read ({error.strerror}); free some space, or "
                "name an output on another disk"
            ) from error
        self.n_values += values.size

    def rows(self, dim: int) -> np.ndarray:
        """All that was added, (n, dim), mapped."""
        n = self.n_values // dim if dim else 0
        if not n:
            return np.empty((0, dim), self._dtype)
        self._file.flush()
        return np.memmap(self._file, self._dtype, mode="r", shape=(n, dim))


def a_file(path: Path) -> Path:
    """The path, if a regular file is there: a pipe would hang, a directory has other formats.

    Raises:
        ImportFormatError: it is not.
    """
    if path.is_file():
        return path
    found = "a directory" if path.is_dir() else "no regular file" if path.exists() else "nothing there"
    raise ImportFormatError(f"{path}: {found}, expected a file; check the path")


def a_directory(path: Path, layout: str) -> Path:
    """The path, if a directory is there.

    Args:
        layout: what it should hold, for the message.

    Raises:
        ImportFormatError: it is not.
    """
    if path.is_dir():
        return path
    found = "a file" if path.exists() else "nothing there"
    raise ImportFormatError(f"{path}: {found}, expected a directory with {layout}; check the path")


def check_ids(ids: Sequence[str], where: Callable[[int], str]) -> None:
    """Refuses ids that are empty, unusable or given twice.

    Args:
        where: names the place of row k, such as `ids.txt line 3`.

    Raises:
        ImportFormatError: the message names the rows.
    """
    for k, fault in unusable_ids(ids):
        raise ImportFormatError(f"{where(k)}: the id {fault}; give every row an id of its own")
    first: dict[str, int] = {}
    for k, sample_id in enumerate(ids):
        if (before := first.setdefault(sample_id, k)) != k:
            raise ImportFormatError(
                f"{where(before)} and {where(k)}: both have the id {sample_id!r}, expected one row for each id; leave "
                "one of them out"
            )


def is_possible(axes: Sequence[object]) -> bool:
    """Whether a header's shape can be one: of rows, or of rows of one row, in whole numbers from 0."""
    return len(axes) <= _MOST_AXES and all(type(n) is int and n >= 0 for n in axes)


def check_float(dtype: np.dtype, where: str) -> None:
    """Refuses values that are no float16, float32 or float64.

    Raises:
        ImportFormatError: the message names what was found.
    """
    if dtype.hasobject:
        raise ImportFormatError(
            f"{where}: holds pickled Python objects, which are never read; save it again with .astype('float32')"
        )
    if dtype.kind != "f" or dtype.itemsize not in FLOAT_BYTES:
        raise ImportFormatError(f"{where}: dtype {dtype}, expected float16, float32 or float64; convert it and save")


def check_counts(n_ids: int, n_rows: int, ids_place: str, rows_place: str) -> None:
    """Refuses ids and rows of different number.

    Raises:
        ImportFormatError: the message names both.
    """
    if n_ids != n_rows:
        raise ImportFormatError(
            f"{rows_place}: {n_rows} rows, but {n_ids} ids in {ids_place}, expected one id for each row; name the ids "
            "that were written with these rows"
        )


def files_record(found: Found) -> dict[str, Any]:
    """The files a store was read from: names and SHA-256, or one digest of both where they are many."""
    listed = [
        {"name": name, "sha256": found.digests.get(name) or digest_file(path)}
        for name, path in sorted(found.files.items())
    ]
    if len(listed) <= _MOST_LISTED:
        return {"files": listed}
    lines = "".join(f"{file['sha256']}  {file['name']}\n" for file in listed)
    return {"n_files": len(listed), "files_sha256": hashlib.sha256(os.fsencode(lines)).hexdigest()}


def contents_digest(ids: Sequence[str], embeddings: Rows) -> str:
    """SHA-256 over ids, shape and values, whatever file they came in."""
    dtype = np.dtype(embeddings.dtype).newbyteorder("<")
    total = hashlib.sha256(canonical_json({"dtype": dtype.str, "ids": list(ids), "shape": list(embeddings.shape)}))
    step = max(_CHUNK_BYTES // max(dtype.itemsize * embeddings.shape[1], 1), 1)
    for start in range(0, len(embeddings), step):
        part = embeddings[start : min(start + step, len(embeddings))]
        total.update(byte_view(np.asarray(part, dtype)))
    return total.hexdigest()
