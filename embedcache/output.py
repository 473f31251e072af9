"""Files for users, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from embedcache.errors import OutputError

if TYPE_CHECKING:
    import pandas as pd


def write_whole(path: Path, write: Callable[[Path], object], *, mode: int = 0o666, replaces: bool = True) -> None:
    """Writes a file beside its place and moves it there; what stood there stays if it fails.

    Args:
        write: is called with the path to write to.
        mode: of the new file, less what the process masks.
        replaces: whether it may take the place of another file.

    Raises:
        OutputError: it cannot be written there.
    """
    temporary = path.with_name(f".{os.getpid()}.{uuid.uuid4().hex}.tmp")  # short: the name may be as long as names go
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode))
        write(temporary)
        if replaces:
            temporary.replace(path)
        else:
            os.link(temporary, path)  # fails where something is
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}); name another place") from error
    finally:
        with contextlib.suppress(OSError):  # its folder may be none
            temporary.unlink(missing_ok=True)


def write_tables(folder: Path, tables: Mapping[str, pd.DataFrame]) -> None:
    """Writes tables into a folder by their file names, as CSV or Parquet, each whole or not at all.

    Raises:
        OutputError: they cannot be written there.
    """
    for name, table in tables.items():
        write = table.to_parquet if name.endswith(".parquet") else table.to_csv
        write_whole(folder / name, lambda path, write=write: write(path, index=False))  # type: ignore[misc]


def write_text(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Writes a text as `write_whole` does, in UTF-8; names of files that are none go out as they came in."""
    data = text.encode("utf-8", "surrogateescape")
    write_whole(path, lambda temporary: temporary.write_bytes(data), mode=mode)
