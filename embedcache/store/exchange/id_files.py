"""Files of ids, one for each row of an array that came without: .txt, .csv, .parquet, .json, .npy.

Ids are text and stay as they are, byte for byte: `NA` and `007` are ids like any other, and a number is refused.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.errors import ImportFormatError, some_ids
from embedcache.store.exchange.source import a_file

_ID_COLUMN = "id"

Where = Callable[[int], str]


def read_ids(path: Path, column: str | None = None) -> tuple[list[str], Where]:
    """The ids in a file, and a function that names the place of one of them. Without a suffix it has one a line.

    Args:
        column: of a table; `id`, or the only column, where it is not given.

    Raises:
        ImportFormatError: another kind of file, not UTF-8, no such column, ids that are no text.
    """
    a_file(path)
    suffix = path.suffix.lower()
    if column is not None and suffix not in (".csv", ".parquet"):
        raise ImportFormatError(f"{path}: no table, but a column {column!r} was named; leave --id-column out")
    if suffix in (".txt", ""):
        return _lines(path), lambda k: f"{path} line {k + 1}"
    if suffix == ".csv":
        ids = _csv_column(path, column)
    elif suffix == ".parquet":
        from embedcache.store.exchange.parquet import id_column

        ids = id_column(path, column)
    elif suffix == ".json":
        ids = ids_of_json(path.read_bytes(), str(path))
    elif suffix == ".npy":
        ids = _npy(path)
    else:
        raise ImportFormatError(f"{path}: ids in a {suffix} file, expected .txt, .csv, .parquet, "
                                ".json or .npy; save them as one of these")  # fmt: skip
    return ids, lambda k: f"{path} row {k} (counted from 0)"


def utf8(data: bytes, where: str) -> str:
    """Text of UTF-8 bytes, without a byte order mark.

    Raises:
        ImportFormatError: other bytes; the message names the line.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ImportFormatError(
            f"{where}: not UTF-8 at line {line} (byte {error.start}); save it as UTF-8 and run the same command again"
        ) from error


def read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a CSV file, every field as its text stands.

    Raises:
        ImportFormatError: not UTF-8, a broken quote, a row with more or fewer fields than the header.
    """
    text = utf8(path.read_bytes(), str(path))
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise ImportFormatError(f"{path}: not a readable CSV file ({error}); save it again") from error
    while rows and not rows[-1]:
        rows.pop()
    if not rows:
        raise ImportFormatError(f"{path}: an empty file, expected a header and one row for each id")
    header, *body = rows
    for k, row in enumerate(body):
        if len(row) != len(header):
            raise ImportFormatError(
                f"{path} row {k} (counted from 0): {len(row)} fields, expected the {len(header)} of the header"
            )
    return header, body


def pick_column(names: list[str], column: str | None, where: str) -> str:
    """The column that was asked for; else `id`, or the only one.

    Raises:
        ImportFormatError: no such column, or one of several has to be named.
    """
    wanted = column or (_ID_COLUMN if _ID_COLUMN in names else names[0] if len(names) == 1 else None)
    if wanted is None or names.count(wanted) != 1:
        found = f"no column {wanted!r}" if wanted and wanted not in names else f"{len(names)} columns"
        raise ImportFormatError(
            f"{where}: {found} among {some_ids(names, 20)}; name the column of the ids with --id-column"
        )
    return wanted


def ids_of_json(data: bytes, where: str) -> list[str]:
    """The ids in a JSON list.

    Raises:
        ImportFormatError: not a list of strings.
    """
    try:
        ids = json.loads(utf8(data, where))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ImportFormatError(f"{where}: not readable JSON ({error}), expected a list of ids") from error
    if not isinstance(ids, list):
        raise ImportFormatError(f"{where}: a {type(ids).__name__}, expected a list of ids")
    return texts(ids, lambda k: f"{where} row {k} (counted from 0)")


def texts(values: list[Any], where: Where) -> list[str]:
    """The values, if all of them are text.

    Raises:
        ImportFormatError: one is not; the message names its place.
    """
    for k, value in enumerate(values):
        if not isinstance(value, str):
            found = "no value" if value is None else f"{value!r}, a {type(value).__name__}"
            raise ImportFormatError(f"{where(k)}: the id is {found}, expected text; save the ids as strings")
    return values


def decoded(values: list[bytes], where: Where) -> list[str]:
    """Ids that were kept as UTF-8 bytes.

    Raises:
        ImportFormatError: one is not UTF-8; the message names its place.
    """
    ids = []
    for k, value in enumerate(values):
        try:
            ids.append(value.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ImportFormatError(f"{where(k)}: the id {value!r} is not UTF-8; save the ids as UTF-8") from error
    return ids


def ids_of_array(array: np.ndarray, where: str) -> list[str]:
    """The ids in an array of str, or of UTF-8 bytes, (n,).

    Raises:
        ImportFormatError: another rank or dtype.
    """
    if array.dtype.kind not in "US" or array.ndim != 1:
        raise ImportFormatError(
            f"{where}: shape {array.shape} of {array.dtype}, expected (n,) of str; save them with "
            "numpy.array(ids, dtype='U')"
        )
    values = array.tolist()
    return values if array.dtype.kind == "U" else decoded(values, lambda k: f"{where} row {k} (counted from 0)")


def _npy(path: Path) -> list[str]:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError, MemoryError) as error:
        raise ImportFormatError(
            f"{path}: not a readable .npy of ids ({error}); save them with numpy.array(ids, dtype='U')"
        ) from error
    if not isinstance(array, np.ndarray):
        raise ImportFormatError(f"{path}: a {type(array).__name__}, expected one array of str")
    return ids_of_array(array, str(path))


def _lines(path: Path) -> list[str]:
    lines = utf8(path.read_bytes(), str(path)).split("\n")  # str.splitlines would also cut at \x0b or \u2028
    if lines[-1] == "":
        lines.pop()
    if lines and all(line.endswith("\r") for line in lines):
        return [line[:-1] for line in lines]
    return lines


def _csv_column(path: Path, column: str | None) -> list[str]:
    header, body = read_csv(path)
    k = header.index(pick_column(header, column, str(path)))
    return [row[k] for row in body]
