"""Where a dataset's tables and images lie: one level up or down, nested or flat, gzipped or not."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path

import pandas as pd

from embedcache.data.files import IMAGE_SUFFIXES
from embedcache.errors import DatasetError


def find_root(root: Path, *, title: str, marks: Sequence[str], folders: Sequence[str], tree: str) -> tuple[Path, str]:
    """The dataset's folder: the one given, one inside it, or the one it is a part of; and a note where it is another.

    Args:
        marks: patterns of which one matches below the dataset's folder; none where any folder will do.
        folders: patterns of the names of the dataset's own folders: only from these is it looked for one level up.

    Raises:
        DatasetError: none of them is, or several are; shows the tree.
    """
    if not root.is_dir():
        raise DatasetError(f"{root}: no folder there; name the folder of {title}")
    try:
        holds = sorted(root.iterdir())
    except OSError as error:
        raise DatasetError(f"{root}: cannot be listed ({error.strerror})") from error
    if not marks or _marked(root, marks):
        return root, ""
    inside = [child for child in holds if child.is_dir() and _marked(child, marks)]
    if len(inside) > 1:
        names = ", ".join(child.name for child in inside)
        raise DatasetError(f"{root}: several folders of {title} lie in it ({names}); name one of them")
    if inside:
        return inside[0], f"the dataset was found one level down, in {inside[0].name}"
    whole = root.resolve()
    if any(fnmatch(whole.name, pattern) for pattern in folders) and _marked(whole.parent, marks):
        return whole.parent, f"the dataset was found one level up, in {whole.parent.name}"
    shown = ", ".join(child.name for child in holds[:8]) or "nothing"
    raise DatasetError(
        f"{root}: not a folder of {title}: {' or '.join(marks)} is not in it, nor one level down or up; it holds "
        f"{shown}{' ...' if len(holds) > 8 else ''}. Expected:\n{tree}"
    )


def one_file(root: Path, *patterns: str, given: Path | None = None) -> Path:
    """The first file below the root that matches a pattern; gzipped or not.

    Args:
        given: the user's own, which is taken instead.

    Raises:
        DatasetError: there is none.
    """
    found = any_file(root, *patterns, given=given)
    if found is None:
        raise DatasetError(f"{root}: no {' or '.join(patterns)} (or .gz) in it; download it into this folder")
    return found


def any_file(root: Path, *patterns: str, given: Path | None = None) -> Path | None:
    """As `one_file`, None where there is none."""
    if given is not None:
        if not given.is_file():
            raise DatasetError(f"{given}: not there, or no file; name an existing file")
        return given
    for pattern in patterns:
        for ending in (pattern, f"{pattern}.gz"):
            matches = sorted(path for path in root.glob(ending) if path.is_file())
            if matches:
                return matches[0]
    return None


class Images:
    """The image files below a root by their names, however deep or flat they were unpacked; hidden ones aside.

    Raises:
        DatasetError: a folder that cannot be listed.
    """

    def __init__(self, root: Path) -> None:
        self.links_out: list[str] = []
        self._root = root
        self._by_name: dict[str, list[str]] = defaultdict(list)
        self.paths = sorted(self._below())
        for path in sorted(self.paths, key=lambda path: (path.count("/"), path)):
            self._by_name[_key(path.rpartition("/")[2])].append(path)

    def __len__(self) -> int:
        return len(self.paths)

    def locate(
        self,
        ids: pd.Series,
        *,
        expected: str | pd.Series,
        suffixes: Sequence[str] = ("",),
        folder: str = "",
        notes: list[str],
    ) -> pd.Series:
        """The path of each image by its name; of several files the one in its official place, else the highest.

        Args:
            ids: file names, or their stems.
            expected: the official path, with `{}` for the id; what is absent is named by it.
            suffixes: that an id may have, in capitals or not.
            folder: below the root, that these images are in, if any image is.
            notes: gets how many names are there more than once.
        """
        official = ids.map(expected.format) if isinstance(expected, str) else expected
        inside = f"{folder}/" if folder and any(path.startswith(f"{folder}/") for path in self.paths) else ""
        found, n_several = [], 0
        for name, place in zip(ids, official, strict=True):
            there = next((paths for s in suffixes if (paths := self._named(name + s, inside))), [place])
            n_several += len(there) > 1
            found.append(place if place in there else there[0])
        if n_several:
            notes.append(
                f"{n_several:,} names of images are there more than once below the folder: taken is the file in its "
                "official place, else the one that lies highest"
            )
        return pd.Series(found, ids.index, dtype=object)

    def unlisted(self, listed: Iterable[str]) -> list[str]:
        """Files that are not among these paths."""
        return sorted(set(self.paths) - set(listed))

    def _named(self, name: str, inside: str) -> list[str]:
        return [path for path in self._by_name.get(_key(name), ()) if path.startswith(inside)]

    def _below(self) -> Iterable[str]:
        def refuse(error: OSError) -> None:
            raise DatasetError(f"{error.filename}: cannot be listed ({error.strerror})") from error

        for folder, below, files in os.walk(self._root, onerror=refuse):
            below[:] = sorted(name for name in below if not name.startswith("."))
            inside = Path(folder).relative_to(self._root).as_posix()
            prefix = "" if inside == "." else inside + "/"
            self.links_out += [prefix + name for name in below if leads_out(self._root, prefix + name)]
            for name in files:
                if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                    yield prefix + name


def leads_out(root: Path, folder: str) -> bool:
    """Whether a folder below the root is a link to a place outside, where stage one does not follow."""
    return (root / folder).is_symlink() and not (root / folder).resolve().is_relative_to(root.resolve())


def _key(name: str) -> str:
    stem, dot, suffix = name.rpartition(".")
    return stem + dot + suffix.lower() if dot else name


def _marked(folder: Path, marks: Sequence[str]) -> bool:
    return any(any(folder.glob(ending)) for mark in marks for ending in (mark, f"{mark}.gz"))
