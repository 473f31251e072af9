"""A contact sheet: a few samples of each split on one HTML page, with masks drawn in and bad inputs named.

Shape notation: n rows of the manifest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from embedcache.data.labels import LabelSet
from embedcache.data.manifest import SPLITS, Manifest
from embedcache.data.masks import read_mask, resize_mask
from embedcache.data.pictures import data_uri, overlaid, thumbnail
from embedcache.data.radiograph import DecodePolicy, read_radiograph
from embedcache.errors import InputError, SettingsError
from embedcache.fingerprint import input_digest
from embedcache.report.page import render, write_page

_NO_SPLIT = "no split"
_FACTS = ("view", "sex", "age", "source")
_MAX_CLASSES = 12


@dataclass(frozen=True)
class _MaskNote:
    words: str
    bad: bool = False


@dataclass(frozen=True)
class _Label:
    name: str
    value: str
    positive: bool


@dataclass(frozen=True)
class _Card:
    """One sample: a picture as a data URI, or else reason and message of why there is none."""

    id: str
    report: str
    facts: list[tuple[str, str]]
    labels: list[_Label]
    picture: str = ""
    mask: _MaskNote | None = None
    reason: str = ""
    message: str = ""


@dataclass(frozen=True)
class _Split:
    name: str
    n_rows: str
    cards: list[_Card]


@dataclass(frozen=True)
class _Balance:
    """One label: the lines that count it, for each split."""

    name: str
    counts: list[list[str]]


def write_preview(
    manifest: Manifest, path: str | Path, *, n_per_split: int = 6, size: int = 320, seed: int = 0
) -> Path:
    """Writes an HTML page that shows a few samples of each split; its owner alone may read it.

    Which ones is drawn from their ids and the seed, positives and negatives of the first label in turn. A sample that
    cannot be read is shown as a card that says why.

    Args:
        path: of the page; what stands there is replaced.
        n_per_split: most samples of a split, and of the rows that are in none.
        size: of the longer side of an image, in pixels.

    Returns:
        The path.

    Raises:
        SettingsError: nothing to show, or no file's path.
    """
    path = Path(path)
    for name, value in (("n_per_split", n_per_split), ("size", size)):
        if value < 1:
            raise SettingsError(f"{name} is {value}, expected 1 or more")
    if path.is_dir():
        raise SettingsError(f"{path}: a directory, expected the path of a page, such as {path / 'preview.html'}")
    sets = {name: found for found in manifest.label_sets for name in found.labels}
    labels = {name: manifest.label(name) for name in sets}
    members = {split: np.flatnonzero(manifest.in_split(split)) for split in SPLITS}
    members[_NO_SPLIT] = np.flatnonzero(manifest.frame["split"] == "")
    splits = []
    for split, rows in members.items():
        drawn = _drawn(manifest.frame["id"].iloc[rows], next(iter(labels.values()), None), rows, seed)[:n_per_split]
        cards = [
            _card(manifest, k, [_label(found, name, labels[name][k]) for name, found in sets.items()], size)
            for k in drawn
        ]
        splits.append(_Split(split, f"{len(rows):,}", cards))
    balances = [
        _Balance(name, [_counts(labels[name][rows], found) for rows in members.values()])
        for name, found in sets.items()
    ]
    page = render(
        "preview.html.j2",
        name=manifest.name,
        n_rows=f"{len(manifest):,}",
        n_per_split=n_per_split,
        size=size,
        seed=seed,
        splits=splits,
        labels=balances,
    )
    write_page(path, page)
    return path


def _drawn(ids: pd.Series, label: np.ndarray | None, rows: np.ndarray, seed: int) -> list[int]:
    """Rows in the order in which they are shown; it depends on nothing but ids, labels and seed."""
    keys = (input_digest(f"{seed} {sample_id}".encode()) for sample_id in ids)
    order = [k for _, k in sorted(zip(keys, rows.tolist(), strict=True))]
    if label is None:
        return order
    positive = [k for k in order if label[k] > 0]
    negative = [k for k in order if label[k] == 0]
    in_turn = [k for pair in zip_longest(positive, negative) for k in pair if k is not None]
    return in_turn + [k for k in order if np.isnan(label[k])]


def _label(of: LabelSet, name: str, value: float) -> _Label | None:
    """One label of a sample, a class by its name where it has one; None where it is blank."""
    return None if np.isnan(value) else _Label(name, _class(of, int(value)), value > 0)


def _class(of: LabelSet, value: int) -> str:
    return of.classes[value] if value < len(of.classes) else str(value)


def _counts(values: np.ndarray, of: LabelSet) -> list[str]:
    """What a split has of one label, whose rows have these values."""
    known = values[~np.isnan(values)]
    if not len(known):
        return ["-"]
    if of.task == "multi-class":
        classes, counts = np.unique(known, return_counts=True)
        names = [_class(of, int(c)) for c in classes]
        lines = [f"{name}: {n:,} ({n / len(known):.0%})" for name, n in zip(names, counts, strict=True)]
        if len(lines) > _MAX_CLASSES:
            lines[_MAX_CLASSES:] = [f"and {len(lines) - _MAX_CLASSES} more classes"]
    else:
        lines = [f"{int(known.sum()):,} of {len(known):,} ({known.mean():.0%})"]
    blank = len(values) - len(known)
    return [*lines, f"{blank:,} blank"] if blank else lines


def _card(manifest: Manifest, k: int, labels: Sequence[_Label | None], size: int) -> _Card:
    row = {str(column): value for column, value in manifest.frame.iloc[k].items()}
    card: dict[str, Any] = {
        "id": row["id"],
        "report": row["report"],
        "facts": [(fact, text) for fact in _FACTS if (text := _text(row.get(fact)))],
        "labels": [label for label in labels if label is not None],
    }
    try:
        pixels = read_radiograph(manifest.path(row["image"]), DecodePolicy()).pixels
    except InputError as error:
        return _Card(**card, reason=error.reason, message=str(error))
    small_pixels, note = thumbnail(pixels, size), None
    if text := _text(row.get("mask")):
        try:
            mask = read_mask(text, manifest.root, image_size=(pixels.shape[0], pixels.shape[1]))
        except InputError as error:
            note = _MaskNote(str(error), bad=True)
        else:
            small = resize_mask(mask, (small_pixels.shape[0], small_pixels.shape[1]))
            small_pixels, note = overlaid(small_pixels, small), _MaskNote(_mask_words(mask, small))
    return _Card(**card, picture=data_uri(small_pixels), mask=note)


def _text(value: object) -> str:
    """What a cell says, blank where it says nothing; 45.0 is the integer that a blank elsewhere made a float."""
    if value is None or value is pd.NA or value is pd.NaT:
        return ""
    if isinstance(value, (float, np.floating)):
        return "" if np.isnan(value) else str(int(value) if value.is_integer() else value)
    return str(value) if str(value).strip() else ""


def _mask_words(mask: np.ndarray, small: np.ndarray) -> str:
    if not mask.any():
        return "empty"
    words = f"{mask.mean():.1%} of the image"
    return words if small.any() else f"{words}, too little to be seen at this size"
