"""What lies below a root: which of the listed files are there, and which of them are the same file twice."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from embedcache.errors import DatasetError
from embedcache.fingerprint import digest_file

IMAGE_SUFFIXES = (".dcm", ".dicom", ".png", ".jpg", ".jpeg")
_T = TypeVar("_T")
_R = TypeVar("_R")
_THREADS = 16  # a remote disk answers slowly, and many at once
_RUN = 64  # items that a thread takes at once
_END = 4096


def in_threads(function: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
    """The function of each item, in order; for work that waits for a disk."""
    runs = [items[k : k + _RUN] for k in range(0, len(items), _RUN)]
    with ThreadPoolExecutor(_THREADS) as pool:
        return [result for done in pool.map(lambda run: [function(item) for item in run], runs) for result in done]


def names_in(folder: str | Path) -> frozenset[str]:
    """Names of what a folder holds; none where there is no such folder.

    Raises:
        DatasetError: it cannot be listed.
    """
    try:
        return frozenset(os.listdir(folder))  # noqa: PTH208  # a Path for each name is slow
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()
    except OSError as error:
        raise DatasetError(f"{folder}: cannot be listed ({error.strerror})") from error


def present(root: Path, paths: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Which of the paths below a root are there, by one listing of each folder; no file is opened.

    Returns:
        (n,) bool, and the other images that lie in those folders, in order.
    """
    split = [path.rpartition("/") for path in paths]
    folders = sorted({folder for folder, _, _ in split})
    found = dict(zip(folders, in_threads(lambda folder: names_in(root / folder), folders), strict=True))
    there = np.fromiter((name in found[folder] for folder, _, name in split), bool, len(split))
    listed: dict[str, set[str]] = defaultdict(set)
    for folder, _, name in split:
        listed[folder].add(name)
    extra = [
        f"{folder}/{name}" if folder else name
        for folder in folders
        for name in sorted(found[folder] - listed[folder])
        if name.lower().endswith(IMAGE_SUFFIXES)
    ]
    return there, extra


def content_digests(paths: Sequence[Path | None]) -> list[str | None]:
    """A digest of each file's bytes where another of the files can be equal to it, else None.

    Files of one size are compared by their first and last bytes, and only those that agree are read to their end: of a
    large dataset little is read.

    Args:
        paths: None, an empty file, and what cannot be read count as equal to nothing.
    """
    sizes = in_threads(_size, paths)
    ends = _among_equals(sizes, paths, _ends)
    return _among_equals(ends, paths, _whole)


def _among_equals(
    keys: Iterable[_T | None], paths: Sequence[Path | None], digest: Callable[[Path], str | None]
) -> list[str | None]:
    """The digest of each path whose key another path has too."""
    positions: dict[_T, list[int]] = defaultdict(list)
    for k, key in enumerate(keys):
        if key is not None:
            positions[key].append(k)
    chosen = [k for group in positions.values() if len(group) > 1 for k in group]
    found = in_threads(lambda k: digest(paths[k]), chosen)  # type: ignore[arg-type]  # a path with a key is no None
    digests: list[str | None] = [None] * len(paths)
    for k, value in zip(chosen, found, strict=True):
        digests[k] = value
    return digests


def _size(path: Path | None) -> int | None:
    try:
        return (path.stat().st_size or None) if path is not None and path.is_file() else None
    except OSError:
        return None


def _ends(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            begin = file.read(_END)
            file.seek(max(size - _END, 0))
            return hashlib.sha256(b"%d:" % size + begin + file.read(_END)).hexdigest()
    except OSError:
        return None


def _whole(path: Path) -> str | None:
    try:
        return digest_file(path)
    except OSError:
        return None
