"""HDF5 files of CLAM and TRIDENT: one for each slide, with `features` of its patches and their `coords`.

A row's id is `<stem>/<x>_<y>`; a file of one vector for the whole slide gives the id `<stem>`.

Shape notation: n patches, d embedding width.
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from embedcache.errors import ImportFormatError, some_ids
from embedcache.store.exchange.foreign_hdf5 import ForeignRows, looked_over, opened
from embedcache.store.exchange.source import Asked, Found, check_ids
from embedcache.store.save import Joined

SUFFIX = ".h5"


def read(source: Path, asked: Asked) -> Found:
    """Rows of one file, or of all files of a directory in the order of their names; the rows are read by slices.

    A slide without patches gives no row. TRIDENT's `.lock` files are left alone.

    Raises:
        ImportFormatError: no features, coordinates given twice, rows of different width, a damaged or hostile file.
    """
    paths = slide_files(source) if source.is_dir() else [source]
    if not paths:
        raise ImportFormatError(f"{source}: no {SUFFIX} file, expected one for each slide; name the folder of features")
    ids: list[str] = []
    parts: list[ForeignRows] = []
    first: Path | None = None
    for path in paths:
        slide_ids, rows = _slide(path)
        if rows is None:
            continue
        if parts and rows.shape[1] != parts[0].shape[1]:
            raise ImportFormatError(
                f"{path}: features of width {rows.shape[1]}, but {first} has {parts[0].shape[1]}, expected one "
                "encoder for all slides; import each folder of features as a store of its own"
            )
        first = first or path
        ids += slide_ids
        parts.append(rows)
    if not parts:
        raise ImportFormatError(f"{source}: {len(paths)} slides and no patch in any of them, expected at least one row")
    check_ids(ids, lambda k: f"{source}: slide and patch {ids[k]!r}")
    return Found(ids, Joined(parts, parts[0].shape[1]), {path.name: path for path in paths})


def slide_files(folder: Path) -> list[Path]:
    """The files of slides in a directory, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix == SUFFIX and not path.name.startswith("."))


def _slide(path: Path) -> tuple[list[str], ForeignRows | None]:
    """Ids and rows of one file; no rows for a slide without patches."""
    with opened(path) as file:
        if "features" not in set(file):
            raise ImportFormatError(
                f"{path}: datasets {some_ids(sorted(file)) or 'none'} and no features, expected features (n, d): "
                "coordinates alone are CLAM's 'patches'; name the folder of features, such as h5_files"
            )
        features = looked_over(file, path, "features", "floats")
        axes = features.shape
        if len(axes) not in (1, 2, 3) or (len(axes) == 3 and axes[0] != 1):
            raise ImportFormatError(
                f"{path}: /features has shape {axes}, expected (n, d), (1, n, d), or (d,) of a slide"
            )
        rows = ForeignRows(path, "features", features)
        if axes == (0,) or not len(rows):
            return [], None
        if not rows.shape[1]:
            raise ImportFormatError(f"{path}: /features has shape {axes}, expected a width of 1 or more")
        if len(axes) == 1:
            return [path.stem], rows
        return _patch_ids(_coords(file, path, len(rows)), path), rows


def _coords(file: h5py.File, path: Path, n: int) -> np.ndarray:
    """Where each patch lies, (n, 2)."""
    dataset = looked_over(file, path, "coords", "whole numbers")
    if dataset.shape not in ((n, 2), (1, n, 2)):
        raise ImportFormatError(
            f"{path}: /coords has shape {dataset.shape}, expected ({n}, 2) as there are {n} features; extract the "
            "slide again"
        )
    return dataset[...].reshape(n, 2)


def _patch_ids(coords: np.ndarray, path: Path) -> list[str]:
    ids = [f"{path.stem}/{x}_{y}" for x, y in coords.tolist()]
    first: dict[str, int] = {}
    for k, sample_id in enumerate(ids):
        if (before := first.setdefault(sample_id, k)) != k:
            x, y = coords[k].tolist()
            raise ImportFormatError(
                f"{path}: rows {before} and {k} (counted from 0) both have coords ({x}, {y}), expected each patch "
                "once; extract the slide again"
            )
    return ids
