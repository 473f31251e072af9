"""RSNA Pneumonia Detection Challenge, stage 2: boxes of pneumonia on 26,684 exams drawn from NIH ChestX-ray14."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from embedcache.data.datasets.headers import HEADERS, with_headers
from embedcache.data.datasets.layout import Asked, Draft, Layout
from embedcache.data.datasets.nih import read_entries
from embedcache.data.datasets.nih_origins import MAPPING, MAPPING_OPTION, read_origins
from embedcache.data.datasets.places import Images, any_file, one_file
from embedcache.data.labels import LabelSet
from embedcache.data.masks import boxes_mask
from embedcache.data.splits import in_parts, published_fractions, published_holdout
from embedcache.data.tables import check_same, grouped_rows, numbers, read_csv, take
from embedcache.errors import InputError, ManifestError, some_ids

_SIZE = (1024, 1024)
_SUFFIXES = (".dcm", ".png", ".jpg", ".jpeg")
_CLASSES = ("Normal", "No Lung Opacity / Not Normal", "Lung Opacity")
_N_HELD_OUT = 10_674  # of the published segmentation split


def _read(root: Path, asked: Asked) -> Draft:
    exams = _exams(one_file(root, "stage_2_train_labels.csv"))
    sets = [LabelSet("pneumonia", "binary", ("pneumonia",))]
    notes: list[str] = []
    images = Images(root)
    exams["image"] = images.locate(exams["id"], suffixes=_SUFFIXES, expected="stage_2_train_images/{}.dcm", notes=notes)
    info = any_file(root, "stage_2_detailed_class_info.csv")
    if info is not None:
        exams = exams.merge(_classes(info), on="id", how="left")
        sets.append(LabelSet("class", "multi-class", ("class",), _CLASSES))
    mapping = any_file(root, MAPPING, given=asked.options.get("mapping"))
    if mapping is not None:
        exams = exams.merge(read_origins(mapping, exams["id"]), on="id", how="left")
        entries = any_file(root, "Data_Entry_2017*.csv")
        if entries is not None:
            ours = ["view", "sex", "age"]
            nih = read_entries(entries, notes).drop_duplicates("id").set_index("id")[ours]
            exams[ours] = nih.reindex(exams["origin"]).to_numpy()
    else:
        notes.append(
            f"'patientId' is an exam's id: without {MAPPING} (published by RSNA) nobody knows which exams are of one "
            "patient"
        )
    exams = with_headers(exams, root, asked, notes)
    draft = Draft(
        exams,
        label_sets=tuple(sets),
        patients_from="nih" if mapping is not None else "",
        notes=notes,
        images=images,
        draws_on="nih",
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
    rows = rows.sort_values("id", kind="stable").drop_duplicates().reset_index(drop=True)
    check_same(rows, path, same=["target"])
    boxes = np.column_stack([numbers(rows[side], path) for side in "xywh"])
    target = numbers(rows["target"].rename("Target"), path)
    odd = ~target.isin([0, 1]).to_numpy()
    if odd.any():
        raise ManifestError(f"{path}: Target is neither 0 nor 1 for {some_ids(rows['id'][odd])}")
    present = target.to_numpy() == 1
    boxless = present & np.isnan(boxes).any(axis=1)
    if boxless.any():
        raise ManifestError(f"{path}: exams with Target 1 and no box: {some_ids(rows['id'][boxless])}")
    by_exam = rows.groupby("id", sort=False).indices
    masks = []
    for exam, at in by_exam.items():
        try:
            masks.append(boxes_mask(map(tuple, boxes[at[present[at]]]), _SIZE))
        except InputError as error:
            raise ManifestError(f"{path}: exam {exam}: {error}") from error
    positive = [float(present[at].any()) for at in by_exam.values()]
    return pd.DataFrame({"id": pd.Series(list(by_exam), dtype=object), "label.pneumonia": positive, "mask": masks})


def _classes(path: Path) -> pd.DataFrame:
    rows = take(read_csv(path), path, {"id": "patientId", "class": "class"})
    found = grouped_rows(rows, path, same=["class"])
    unknown = sorted(set(found["class"]) - set(_CLASSES))
    if unknown:
        raise ManifestError(f"{path}: class {', '.join(map(repr, unknown))}, expected one of {', '.join(_CLASSES)}")
    return pd.DataFrame({"id": found["id"], "label.class": found["class"].map(_CLASSES.index).astype(float)})


def _publish(draft: Draft, *, segmentation: bool) -> None:
    """The published split: of exams ordered by id."""
    n = len(draft.frame)
    parts = published_holdout(n, _N_HELD_OUT if segmentation else 0.3)
    draft.split = in_parts(n, train=parts[0], valid=parts[1], test=parts[2])
    draft.fraction = published_fractions(n, parts[0], rounded_down=segmentation)


LAYOUT = Layout(
    name="rsna",
    title="the RSNA Pneumonia Detection Challenge",
    tree=f"""\
ROOT/
  stage_2_train_labels.csv            patientId,x,y,width,height,Target: a row for each box
  stage_2_train_images/<patientId>.dcm (or .png, .jpg; any folder below ROOT)
  stage_2_detailed_class_info.csv     optional: the label 'class'
  {MAPPING}
                                      optional, published by RSNA: which NIH patient an exam is of
  Data_Entry_2017_v2020.csv           optional, of NIH: with the mapping it gives view, sex and age
""",
    marks=("stage_2_train_labels.csv",),
    read=_read,
    published=True,
    tasks=("classification", "segmentation"),
    folders=("stage_2_*images",),
    options=(MAPPING_OPTION, HEADERS),
)
