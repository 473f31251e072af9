"""Datasets of no official layout: any table, a folder for each class, images with texts beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from embedcache.data.datasets.layout import Asked, Draft, Layout, Option, images_below, one_file
from embedcache.data.labels import LABEL_PREFIX, LabelSet, Task
from embedcache.data.manifest import Manifest
from embedcache.errors import DatasetError, ManifestError, SettingsError

_SPLITS = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "val": "valid",
    "validation": "valid",
    "test": "test",
}


def _read_table(root: Path, asked: Asked) -> Draft:
    """Any CSV or Parquet table; its own splits are kept, and without them its rows are split by patient."""
    path = one_file(root, "*.parquet", "*.csv", given=asked.options.get("table"))
    others = [other.name for other in (*root.glob("*.parquet"), *root.glob("*.csv")) if other != path]
    if others and asked.options.get("table") is None:
        raise DatasetError(f"{root}: several tables ({path.name}, {', '.join(others)}); name one with --table")
    columns = dict(asked.options.get("columns") or {})
    manifest = Manifest.read(path, root=root, columns=columns)
    sets = manifest.label_sets
    if asked.options.get("balance"):
        sets.sort(key=lambda found: asked.options["balance"] not in found.labels)
        if not sets or asked.options["balance"] not in sets[0].labels:
            raise SettingsError(
                f"no label {asked.options['balance']!r} to balance by; there are {', '.join(manifest.labels)}"
            )
    frame = manifest.frame.copy()
    split = frame.pop("split")
    draft = Draft(frame, label_sets=tuple(sets), patients_from=manifest.about.patients_from)
    if (split != "").any():
        draft.split = split
    return draft


def _read_folder(root: Path, asked: Asked) -> Draft:
    """A folder for each class, in folders for splits or not."""
    paths = pd.Series(images_below(root), dtype=object)
    if paths.empty:
        raise DatasetError(f"{root}: no image in it. Expected:\n{LAYOUTS[1].tree}")
    parts = paths.str.split("/")
    names = {name for name in parts.str[0] if name.lower() in _SPLITS}
    in_splits = bool(names) and parts.str[0].isin(names).all()
    level = 1 if in_splits else 0
    shallow = parts.str.len() <= level + 1
    if shallow.any():
        raise DatasetError(
            f"{root}: {paths[shallow].iloc[0]} lies in no folder of a class. Expected:\n{LAYOUTS[1].tree}"
        )
    of_class = parts.str[level]
    classes = tuple(sorted(of_class.unique()))
    label = of_class.map(classes.index).astype(float)
    task: Task = "binary" if len(classes) == 2 else "multi-class"
    draft = Draft(
        pd.DataFrame({"id": paths, "image": paths, f"{LABEL_PREFIX}class": label}),
        label_sets=(LabelSet("class", task, ("class",), classes),),
    )
    if in_splits:
        official = parts.str[0].str.lower().map(_SPLITS)
        draft.official = official.where(official != "train", "")
    return draft


def _read_pairs(root: Path, asked: Asked) -> Draft:
    """Images with the report of each in a text file of the same name beside it."""
    paths = pd.Series(images_below(root), dtype=object)
    texts = [(root / path).with_suffix(".txt") for path in paths]
    there = np.array([text.is_file() for text in texts], bool)
    if not there.any():
        raise DatasetError(f"{root}: no image has a .txt of the same name beside it. Expected:\n{LAYOUTS[2].tree}")
    notes = []
    if not there.all():
        notes.append(f"{int((~there).sum()):,} images have no text beside them, such as {paths[~there].iloc[0]}")
    reports = [_text(text) if found else "" for text, found in zip(texts, there, strict=True)]
    return Draft(pd.DataFrame({"id": paths, "image": paths, "report": reports}), notes=notes)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error


LAYOUTS = (
    Layout(
        name="table",
        title="a table of one's own",
        tree="""\
ROOT/
  any.csv or any.parquet      a row for each image: id, image, report, patient, split, label.<name> ...; with
                              --column image=file --column label.tb=tuberculosis for columns of other names
  <images, where the table's paths say>
""",
        marks=(),
        read=_read_table,
        options=(
            Option("table", "The table, where ROOT holds several or it lies elsewhere.", "path"),
            Option("columns", "The table's column for one of the manifest's, where they differ.", "pairs"),
            Option("balance", "Label that splits and fractions are balanced by; by default the first."),
        ),
    ),
    Layout(
        name="folder",
        title="a folder for each class",
        tree="""\
ROOT/
  <class>/<any>.png           (or .jpg, .dcm), or
  train/<class>/<any>.png     with valid/ or val/, and test/, which are then kept
""",
        marks=("*/*.png", "*/*.jpg", "*/*.jpeg", "*/*.dcm", "*/*/*.png", "*/*/*.jpg", "*/*/*.jpeg", "*/*/*.dcm"),
        read=_read_folder,
    ),
    Layout(
        name="pairs",
        title="images with texts beside them",
        tree="""\
ROOT/
  <any>/<name>.png            (or .jpg, .dcm; any depth)
  <any>/<name>.txt            its report
""",
        marks=("*.txt", "*/*.txt", "*/*/*.txt"),
        read=_read_pairs,
    ),
)
