"""Datasets of no official layout: any table, a folder for each class, images with texts beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from embedcache.data.datasets.layout import SPLIT_NAMES, Asked, Draft, Layout, Option
from embedcache.data.datasets.places import Images, any_file
from embedcache.data.files import in_threads
from embedcache.data.labels import LABEL_PREFIX, LabelSet, Task
from embedcache.data.manifest import Manifest, is_made_here
from embedcache.data.tables import read_text
from embedcache.errors import DatasetError, SettingsError

_FOLDER_TREE = """\
ROOT/
  <class>/<any>.png           (or .jpg, .dcm), or
  train/<class>/<any>.png     with valid/ or val/, and test/, which are then kept
"""
_PAIRS_TREE = """\
ROOT/
  <any>/<name>.png            (or .jpg, .dcm; any depth)
  <any>/<name>.txt            its report
"""


def _read_table(root: Path, asked: Asked) -> Draft:
    """Any CSV or Parquet table; its own splits are kept, and without them its rows are split by patient."""
    path = any_file(root, given=asked.options.get("table"))
    if path is None:
        tables = sorted(p for pattern in ("*.parquet", "*.csv", "*.csv.gz") for p in root.glob(pattern))
        tables = [table for table in tables if not is_made_here(table)]
        if len(tables) != 1:
            named = f"several tables ({', '.join(table.name for table in tables)})" if tables else "no table in it"
            raise DatasetError(f"{root}: {named}; name one with --table")
        path = tables[0]
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
    draft = Draft(
        frame,
        label_sets=tuple(sets),
        patients_from=manifest.about.patients_from,
        name=manifest.name,
        rule="",
        fraction=pd.to_numeric(frame["fraction"], errors="coerce") if "fraction" in frame else None,
    )
    if (split != "").any():
        draft.split = split
        draft.notes.append("the table's own splits are kept")
    return draft


def _read_folder(root: Path, asked: Asked) -> Draft:
    """A folder for each class, in folders for splits or not."""
    paths, images = _paths(root, _FOLDER_TREE)
    parts = paths.str.split("/")
    names = {name for name in parts.str[0] if name.lower() in SPLIT_NAMES}
    in_splits = bool(names) and parts.str[0].isin(names).all()
    if names and not in_splits:
        others = sorted(set(parts.str[0]) - names)
        raise DatasetError(
            f"{root}: folders of splits ({', '.join(sorted(names))}) and others ({', '.join(others[:5])}) side by "
            f"side; expected one or the other:\n{_FOLDER_TREE}"
        )
    level = 1 if in_splits else 0
    shallow = parts.str.len() <= level + 1
    if shallow.any():
        raise DatasetError(f"{root}: {paths[shallow].iloc[0]} lies in no folder of a class. Expected:\n{_FOLDER_TREE}")
    of_class = parts.str[level]
    classes = tuple(sorted(of_class.unique()))
    if len(classes) < 2:
        raise DatasetError(f"{root}: one folder of a class, {classes[0]}, expected two at least:\n{_FOLDER_TREE}")
    label = of_class.map(classes.index).astype(float)
    task: Task = "binary" if len(classes) == 2 else "multi-class"
    return Draft(
        pd.DataFrame({"id": paths, "image": paths, f"{LABEL_PREFIX}class": label}),
        label_sets=(LabelSet("class", task, ("class",), classes),),
        official=parts.str[0].str.lower().map(SPLIT_NAMES) if in_splits else None,
        images=images,
    )


def _read_pairs(root: Path, asked: Asked) -> Draft:
    """Images with the report of each in a text file of the same name beside it."""
    paths, images = _paths(root, _PAIRS_TREE)
    texts = in_threads(_text_beside, [root / path for path in paths])
    there = np.array([text is not None for text in texts], bool)
    if not there.any():
        raise DatasetError(f"{root}: no image has a .txt of the same name beside it. Expected:\n{_PAIRS_TREE}")
    notes = []
    if not there.all():
        notes.append(f"{int((~there).sum()):,} images have no text beside them, such as {paths[~there].iloc[0]}")
    reports = [text or "" for text in texts]
    return Draft(pd.DataFrame({"id": paths, "image": paths, "report": reports}), notes=notes, images=images)


def _paths(root: Path, tree: str) -> tuple[pd.Series, Images]:
    images = Images(root)
    if images.links_out:
        raise DatasetError(
            f"{root / images.links_out[0]}: a link to a place outside ROOT; name the folder that it leads to"
        )
    if not len(images):
        raise DatasetError(f"{root}: no image in it. Expected:\n{tree}")
    return pd.Series(images.paths, dtype=object), images


def _text_beside(image: Path) -> str | None:
    text = next((path for path in (image.with_suffix(".txt"), image.with_suffix(".TXT")) if path.is_file()), None)
    return None if text is None else read_text(text)


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
        tree=_FOLDER_TREE,
        marks=(),
        read=_read_folder,
    ),
    Layout(
        name="pairs",
        title="images with texts beside them",
        tree=_PAIRS_TREE,
        marks=(),
        read=_read_pairs,
    ),
)
