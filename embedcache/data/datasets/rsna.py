"""RSNA Pneumonia Detection Challenge, stage 2: boxes of pneumonia on 26,684 exams drawn from NIH ChestX-ray14."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd

from embedcache.data.datasets.headers import HEADERS, with_headers
from embedcache.data.datasets.layout import (
    Asked,
    Draft,
    Layout,
    Option,
    any_file,
    grouped_rows,
    image_index,
    located,
    one_file,
    unlisted,
)
from embedcache.data.datasets.nih import read_entries
from embedcache.data.labels import LabelSet
from embedcache.data.masks import boxes_mask
from embedcache.data.splits import published_fractions, published_holdout
from embedcache.data.tables import numbers, read_csv, take
from embedcache.errors import ManifestError, some_ids

_SIZE = (1024, 1024)
_CLASSES = ("Normal", "No Lung Opacity / Not Normal", "Lung Opacity")
_MAPPING = "pneumonia-challenge-dataset-mappings_2018.json"
_N_HELD_OUT = 10_674  # of the published segmentation split


def _read(root: Path, asked: Asked) -> Draft:
    exams = _exams(one_file(root, "stage_2_train_labels.csv"))
    index = image_index(root)
    exams["image"] = located(
        exams["id"], index, suffixes=(".dcm", ".png", ".jpg", ".jpeg"), expected="stage_2_train_images/{}.dcm"
    )
    sets = [LabelSet("pneumonia", "binary", ("pneumonia",))]
    notes: list[str] = []
    info = any_file(root, "stage_2_detailed_class_info.csv")
    if info is not None:
        exams = exams.merge(_classes(info), on="id", how="left")
        sets.append(LabelSet("class", "multi-class", ("class",), _CLASSES))
    mapping = any_file(root, _MAPPING, given=asked.options.get("mapping"))
    if mapping is not None:
        exams = exams.merge(_origins(mapping, exams["id"]), on="id", how="left")
        entries = any_file(root, "Data_Entry_2017*.csv")
        if entries is not None:
            ours = ["view", "sex", "age"]
            nih = read_entries(entries, notes).set_index("id")[ours]
            exams[ours] = nih.reindex(exams["origin"]).to_numpy()
    else:
        notes.append(
            f"'patientId' is an exam's id: without {_MAPPING} (published by RSNA) nobody knows which exams are of one "
            "patient"
        )
    exams = with_headers(exams, root, asked, notes)
    draft = Draft(
        exams,
        label_sets=tuple(sets),
        patients_from="nih" if mapping is not None else "",
        notes=notes,
        extra=unlisted(index, exams["image"]),
    )
    if asked.split == "paper":
        _publish(draft, segmentation=asked.task == "segmentation")
    return draft


def _exams(path: Path) -> pd.DataFrame:
    """One row for each exam, ordered by id, with its boxes as a mask."""
    rows = take(
        read_csv(path),
        path,
        {"id": "patientId", "x": "x", "y": "y", "w": "width", "h": "height", "target": "Target"},
    )
    rows = rows.sort_values("id", kind="stable").reset_index(drop=True)
    grouped_rows(rows, path, same=["target"])
    boxes = np.column_stack([numbers(rows[side], path) for side in "xywh"])
    present = numbers(rows["target"], path).to_numpy() == 1
    if np.isnan(boxes[present]).any():
        raise ManifestError(f"{path}: exams with Target 1 and no box: {some_ids(rows['id'][present])}")
    by_exam = rows.groupby("id", sort=False).indices
    exams = pd.DataFrame({"id": list(by_exam)}, dtype=object)
    exams["label.pneumonia"] = [float(present[at].any()) for at in by_exam.values()]
    exams["mask"] = [boxes_mask(map(tuple, boxes[at[present[at]]]), _SIZE) for at in by_exam.values()]
    return exams


def _classes(path: Path) -> pd.DataFrame:
    rows = take(read_csv(path), path, {"id": "patientId", "class": "class"})
    found = grouped_rows(rows, path, same=["class"])
    unknown = sorted(set(found["class"]) - set(_CLASSES))
    if unknown:
        raise ManifestError(f"{path}: class {', '.join(map(repr, unknown))}, expected one of {', '.join(_CLASSES)}")
    return pd.DataFrame({"id": found["id"], "label.class": found["class"].map(_CLASSES.index).astype(float)})


def _origins(path: Path, ids: pd.Series) -> pd.DataFrame:
    """The NIH image and patient of each exam, by RSNA's own mapping.

    Raises:
        ManifestError: not that file, or it lacks some of the exams: half a mapping would hide leaks.
    """
    try:
        said = json.loads(path.read_text("utf-8"))
        found = pd.DataFrame(
            {"id": [entry["subset_img_id"] for entry in said], "origin": [entry["img_id"] for entry in said]}
        )
        image = found["origin"].str.removesuffix(".png")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ManifestError(
            f"{path}: not RSNA's mapping ({type(error).__name__}: {error}); expected a list of entries with "
            "'subset_img_id' and 'img_id'"
        ) from error
    lacking = sorted(set(ids) - set(found["id"]))
    if lacking:
        raise ManifestError(f"{path}: no entry for {some_ids(lacking)}; download the mapping again")
    return found.assign(origin=image + ".png", patient=image.str.partition("_")[0]).drop_duplicates("id")


def _publish(draft: Draft, *, segmentation: bool) -> None:
    """The published split: of exams ordered by id."""
    n = len(draft.frame)
    parts = published_holdout(n, _N_HELD_OUT if segmentation else 0.3)
    split = np.empty(n, object)
    for name, rows in zip(("train", "valid", "test"), parts, strict=True):
        split[rows] = name
    fraction = np.full(n, np.nan)
    fraction[parts[0]] = published_fractions(parts[0], rounded_down=segmentation)
    draft.split, draft.fraction = split, fraction


LAYOUT = Layout(
    name="rsna",
    title="the RSNA Pneumonia Detection Challenge",
    tree=f"""\
ROOT/
  stage_2_train_labels.csv            patientId,x,y,width,height,Target: a row for each box
  stage_2_train_images/<patientId>.dcm (or .png, .jpg; any folder below ROOT)
  stage_2_detailed_class_info.csv     optional: the label 'class'
  {_MAPPING}
                                      optional, published by RSNA: which NIH patient an exam is of
  Data_Entry_2017_v2020.csv           optional, of NIH: with the mapping it gives view, sex and age
""",
    marks=("stage_2_train_labels.csv",),
    read=_read,
    published=True,
    tasks=("classification", "segmentation"),
    options=(
        Option("mapping", f"RSNA's {_MAPPING}, where it lies elsewhere.", "path"),
        HEADERS,
    ),
)
