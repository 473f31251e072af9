"""Tables that somebody else wrote: CSV, gzipped or not, read strictly, with columns asked for by name.

Nothing is guessed: every value is text as it stands, a blank is a blank. A byte order mark, Windows line ends, blanks
around the names of columns, and a trailing comma are taken for what they are.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import pandas as pd

from embedcache.errors import ManifestError, some_ids

Names = str | tuple[str, ...]  # a column's name, or the names that releases give it

_GZIP = b"\x1f\x8b"
_DAMAGED = (EOFError, OSError, zlib.error)
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read_csv(path: Path, *, only: Sequence[str] | None = None) -> pd.DataFrame:
    """A CSV file as text.

    Args:
        only: columns to keep, of a large table; by default all. Those that are not there are not missed here.

    Raises:
        ManifestError: not UTF-8 (names line and byte), a header that names a column twice, rows longer than it.
    """
    names = _header(path)
    chosen = [k for k, name in enumerate(names) if only is None or name.strip() in only]
    try:
        with opened(path) as file:
            frame = _strictly(file, len(names)) if only is None else _some(file, len(names), chosen)
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error
    except pd.errors.EmptyDataError:
        frame = pd.DataFrame({k: pd.Series(dtype=str) for k in chosen})
    except (pd.errors.ParserError, ValueError) as error:
        raise ManifestError(f"{path}: not a readable CSV file ({error})") from error
    except _DAMAGED as error:
        raise ManifestError(f"{path}: cut short or damaged ({error}); download it again") from error
    if not isinstance(frame.index, pd.RangeIndex):  # pandas would take the first column as an index
        raise ManifestError(f"{path}: rows have more fields than the {len(names)} of the header; name every column")
    nameless = [k for k in chosen if not names[k]]
    for k in nameless:
        values = frame[k].fillna("")
        if (values != "").any() and not (k == 0 and values.str.isdigit().all()):  # the numbers that pandas gives rows
            raise ManifestError(f"{path}: column {k + 1} has values and no name; name every column")
    frame = frame.drop(columns=nameless).fillna("")  # rows that end early
    return frame.set_axis([names[k] for k in chosen if names[k]], axis="columns")


def _strictly(file: IO[bytes], n_columns: int) -> pd.DataFrame:
    return pd.read_csv(
        io.TextIOWrapper(file, "utf-8-sig", newline=""),
        names=list(range(n_columns)),
        header=0,
        dtype=str,
        keep_default_na=False,
    )


def _some(file: IO[bytes], n_columns: int, chosen: Sequence[int]) -> pd.DataFrame:
    """Some columns, never held beside the others; pandas would not see that a row is too long."""
    import pyarrow as pa
    from pyarrow import csv as arrow

    names = [str(k) for k in range(n_columns)]
    kept = [str(k) for k in chosen]
    table = arrow.read_csv(
        file,
        read_options=arrow.ReadOptions(column_names=names, skip_rows_after_names=1),
        parse_options=arrow.ParseOptions(newlines_in_values=True),
        convert_options=arrow.ConvertOptions(
            include_columns=kept, column_types=dict.fromkeys(kept, pa.string()), strings_can_be_null=False
        ),
    )
    return table.to_pandas().set_axis(list(chosen), axis="columns").astype(object)


def take(
    frame: pd.DataFrame, path: Path, columns: Mapping[str, Names], *, optional: Mapping[str, Names] | None = None
) -> pd.DataFrame:
    """Columns of a table under our names, in the order asked for; blanks around the table's names do not count.

    Args:
        columns: our name to the table's, or to the names that releases of the table give it.
        optional: the same, for columns that come out blank where the table has none.

    Raises:
        ManifestError: a column is not there; says which, in which file, and what there is.
    """
    there = {str(name).strip(): name for name in frame.columns}
    taken, absent = {}, []
    for ours, names in {**columns, **(optional or {})}.items():
        found = next((there[name] for name in _all(names) if name in there), None)
        if found is not None:
            taken[ours] = frame[found]
        elif ours in columns:
            absent.append(" or ".join(_all(names)))
        else:
            taken[ours] = pd.Series("", frame.index, dtype=str)
    if absent:
        raise ManifestError(
            f"{path}: no column {', '.join(absent)}; it has {', '.join(map(str, frame.columns)) or 'none'}. Is it the "
            "official file, as it was downloaded?"
        )
    if frame.empty:
        raise ManifestError(f"{path}: no row below its header; download it again")
    return pd.DataFrame(taken)


def grouped_rows(frame: pd.DataFrame, path: Path, *, same: Sequence[str], key: str = "id") -> pd.DataFrame:
    """The first row of each id of a table that may say the same of an id more than once.

    Raises:
        ManifestError: rows of one id that differ in one of `same`.
    """
    check_same(frame, path, same=same, key=key)
    return frame.drop_duplicates(key)


def check_same(frame: pd.DataFrame, path: Path, *, same: Sequence[str], key: str = "id") -> None:
    """Refuses rows of one id that differ in one of `same`.

    Raises:
        ManifestError: names the ids.
    """
    if frame[key].is_unique:
        return
    for column in same:
        differing = frame.groupby(key, sort=False)[column].nunique(dropna=False) > 1
        if differing.any():
            raise ManifestError(
                f"{path}: rows of {some_ids(differing.index[differing])} differ in {column}; expected one value each"
            )


def numbers(values: pd.Series, path: Path) -> pd.Series:
    """A column of text as float64, NaN where blank.

    Raises:
        ManifestError: a value that is no number; names it with its row.
    """
    text = values.str.strip()
    parsed = pd.to_numeric(text.where(text != ""), errors="coerce")
    wrong = (text != "") & parsed.isna()
    if wrong.any():
        row = int(wrong.to_numpy().argmax())
        raise ManifestError(f"{path}: column {values.name}, row {row + 1}: {values.iloc[row]!r}, expected a number")
    return parsed.astype("float64")


def read_text(path: Path) -> str:
    """A text file, unzipped where it is gzip, without a byte order mark.

    Raises:
        ManifestError: not readable, or not UTF-8 (names the byte).
    """
    try:
        with opened(path) as file:
            return as_text(file.read(), path)
    except _DAMAGED as error:
        raise ManifestError(f"{path}: cannot be read ({error})") from error


def as_text(data: bytes, path: Path) -> str:
    """The bytes of a file as text, without a byte order mark.

    Raises:
        ManifestError: not UTF-8; names the byte, and nothing of what the file holds.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = error.start
    raise ManifestError(f"{path}: not UTF-8 at byte {at}; save it as UTF-8, or download it again")


def opened(path: Path) -> IO[bytes]:
    """A file's bytes, unzipped where they are gzip, whatever the file is called.

    Raises:
        ManifestError: not readable, or not in UTF-8 but UTF-16.
    """
    try:
        file = path.open("rb")
        begin = file.read(2)
        file.seek(0)
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror})") from error
    if begin in _UTF16:
        file.close()
        raise ManifestError(f"{path}: not UTF-8 but UTF-16 at line 1 (byte 0); save it as UTF-8 and read it again")
    return gzip.GzipFile(fileobj=file) if begin == _GZIP else file  # type: ignore[return-value]


def _all(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _header(path: Path) -> list[str]:
    try:
        with opened(path) as file:
            names = next(filter(None, csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline=""))), [])
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error
    except _DAMAGED as error:
        raise ManifestError(f"{path}: cut short or damaged ({error}); download it again") from error
    except csv.Error as error:
        raise ManifestError(f"{path}: not a readable CSV file ({error})") from error
    if not names:
        raise ManifestError(f"{path}: not a readable CSV file (it is empty)")
    repeated = sorted({name for name in names if name and names.count(name) > 1})
    if repeated:
        raise ManifestError(f"{path}: the header names {', '.join(repeated)} more than once; keep one of each")
    return names


def _not_utf8(path: Path) -> ManifestError:
    at = 0
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                where = f"line {number} (byte {at + error.start})"
                return ManifestError(f"{path}: not UTF-8 at {where}; save it as UTF-8 and read it again")
            at += len(line)
    return ManifestError(f"{path}: not UTF-8; save it as UTF-8 and read it again")
