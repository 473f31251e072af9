"""NIH ChestX-ray14: 112,120 frontal radiographs of 30,805 patients, with findings mined from their reports."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from embedcache.data.datasets.headers import age_in_years
from embedcache.data.datasets.layout import Asked, Draft, Layout
from embedcache.data.datasets.places import Images, any_file, one_file
from embedcache.data.labels import LABEL_PREFIX, LabelSet
from embedcache.data.masks import boxes_mask
from embedcache.data.tables import numbers, read_csv, read_text, take
from embedcache.errors import InputError, ManifestError, some_ids

_FINDINGS = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
_NONE = "No Finding"
_OF_BOXES = {"Infiltrate": "Infiltration"}  # as the list of boxes spells it
_SIZE = (1024, 1024)
_SEXES = ("F", "M")


def _read(root: Path, asked: Asked) -> Draft:
    path = one_file(root, "Data_Entry_2017_v2020.csv", "Data_Entry_2017*.csv")
    notes: list[str] = []
    others = sorted(other.name for other in root.glob("Data_Entry_2017*.csv*") if other.name != path.name)
    if others:
        notes.append(f"labels are those of {path.name}; {', '.join(others)} was left aside")
    frame = read_entries(path, notes)
    images = Images(root)
    frame["image"] = images.locate(frame["id"], expected="images/{}", notes=notes)
    boxes = any_file(root, "BBox_List_2017.csv")
    if boxes is not None:
        frame = frame.join(_boxes(boxes), on="id")
        masks = [column for column in frame if column.startswith("mask.")]
        frame[masks] = frame[masks].fillna("")
    return Draft(
        frame,
        label_sets=(LabelSet("nih", "multi-label", _FINDINGS),),
        official=_official(root, frame["id"], notes),
        patients_from="nih",
        notes=notes,
        images=images,
        draws_on="nih",
    )


def read_entries(path: Path, notes: list[str]) -> pd.DataFrame:
    """A row for each image of any release of `Data_Entry_2017.csv`: id, patient, view, sex, age, follow-up and labels.

    Raises:
        ManifestError: not that table, a label that is none of NIH's, an image that is named after another patient.
    """
    rows = take(
        read_csv(path),
        path,
        {"id": "Image Index", "labels": "Finding Labels", "number": "Patient ID", "view": "View Position"},
        optional={"sex": ("Patient Gender", "Patient Sex"), "age": "Patient Age", "follow_up": "Follow-up #"},
    )
    patient = rows["id"].str.extract(r"^(\d{8})_", expand=False)
    wrong = patient.isna() | (pd.to_numeric(patient) != numbers(rows["number"], path))
    if wrong.any():
        raise ManifestError(
            f"{path}: {int(wrong.sum()):,} rows whose 'Image Index' does not begin with the eight digits of their "
            f"'Patient ID', such as {rows['id'][wrong].iloc[0]!r} of {rows['number'][wrong].iloc[0]!r}"
        )
    age = rows["age"].map({text: age_in_years(text) for text in rows["age"].unique()}).astype("float64")
    odd = age.isna() & (rows["age"] != "")
    if odd.any():
        first = f"{rows['age'][odd].iloc[0]!r} of {rows['id'][odd].iloc[0]}"
        notes.append(f"{int(odd.sum()):,} ages in {path.name} are no human's and were left blank, such as {first}")
    entries = pd.DataFrame(
        {
            "id": rows["id"],
            "patient": patient,
            "view": rows["view"],
            "sex": rows["sex"].where(rows["sex"].isin(_SEXES), ""),
            "age": age,
            "follow_up": rows["follow_up"],
        }
    )
    return pd.concat([entries, _labels(rows["labels"], path)], axis=1)


def _labels(said: pd.Series, path: Path) -> pd.DataFrame:
    """Columns of 1 and 0, blank where nothing is said, from findings joined by `|`."""
    distinct = said.drop_duplicates()
    flags = distinct.str.get_dummies("|").set_axis(distinct, axis="index")
    known = (*_FINDINGS, _NONE)
    unknown = sorted(set(flags.columns) - {*known, ""})
    if unknown:
        raise ManifestError(
            f"{path}: column Finding Labels: {', '.join(map(repr, unknown))}, expected {', '.join(known)}, joined by |"
        )
    flags = flags.reindex(columns=list(known), fill_value=0).astype("float64")
    flags[flags.index == ""] = np.nan
    return flags.loc[said].set_axis(said.index, axis="index").add_prefix(LABEL_PREFIX)


def _boxes(path: Path) -> pd.DataFrame:
    """A column `mask.<finding>` for each finding that boxes were drawn of, by image."""
    names = {"id": "Image Index", "finding": "Finding Label", "x": "Bbox [x", "y": "y", "w": "w", "h": "h]"}
    rows = take(read_csv(path), path, names)
    rows["finding"] = rows["finding"].replace(_OF_BOXES)
    unknown = sorted(set(rows["finding"]) - set(_FINDINGS))
    if unknown:
        raise ManifestError(f"{path}: finding {', '.join(map(repr, unknown))}, expected {', '.join(_FINDINGS)}")
    boxes = np.column_stack([numbers(rows[side], path) for side in "xywh"])
    masks = {}
    for (image, finding), at in rows.groupby(["id", "finding"]).indices.items():
        try:
            masks[image, f"mask.{finding}"] = boxes_mask(map(tuple, boxes[at]), _SIZE)
        except InputError as error:
            raise ManifestError(f"{path}: image {image}, {finding}: {error}") from error
    return pd.Series(masks, dtype=object).unstack() if masks else pd.DataFrame()


def _official(root: Path, ids: pd.Series, notes: list[str]) -> np.ndarray | None:
    """The official list's `test`; the rest is for training and validation, which the list does not tell apart."""
    path = any_file(root, "test_list.txt")
    if path is None:
        notes.append("no official list: test_list.txt is not there, so test patients are drawn")
        return None
    test = set(read_text(path).split())
    rest_path = any_file(root, "train_val_list.txt")
    if rest_path is not None:
        rest = set(read_text(rest_path).split())
        both = sorted(test & rest)
        if both:
            raise ManifestError(f"{rest_path}: {some_ids(both)} stand in {path.name} too; download both again")
        unlisted_rows = ~ids.isin(test | rest)
        if unlisted_rows.any():
            notes.append(
                f"{int(unlisted_rows.sum()):,} images are in neither official list and count as its training images, "
                f"such as {ids[unlisted_rows].iloc[0]}"
            )
    if not ids.isin(test).any():
        raise ManifestError(f"{path}: none of its {len(test):,} images is in the table; download it again")
    return np.where(ids.isin(test), "test", "").astype(object)


LAYOUT = Layout(
    name="nih",
    title="NIH ChestX-ray14",
    tree="""\
ROOT/
  Data_Entry_2017_v2020.csv               or Data_Entry_2017.csv: Image Index, Finding Labels, Patient ID, ...
  test_list.txt, train_val_list.txt       the official split; without them test patients are drawn
  BBox_List_2017.csv                      optional: boxes, as columns mask.<finding>
  images_001/images/00000001_000.png      to images_012/, or all in images/ (any folder below ROOT)
""",
    marks=("Data_Entry_2017*.csv",),
    read=_read,
    folders=("images", "images_*"),
)
