"""VinDr-CXR: 18,000 radiographs read by radiologists, three for each training image; as PhysioNet or Kaggle has them.

A training label says on what its radiologists agree. 'No finding' says that no finding is present: where one voice is
enough for a finding, it takes all of them, and the other way about. Kaggle's VinBigData has the training images alone,
with 14 findings of the 27. The boxes are not read: they are in pixels of images whose size no table gives. Neither
patients nor hospitals are published; all images are postero-anterior.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from embedcache.data.datasets.headers import HEADERS, with_headers
from embedcache.data.datasets.layout import Asked, Draft, Layout, Option
from embedcache.data.datasets.places import Images, any_file, one_file
from embedcache.data.labels import LABEL_PREFIX, LabelSet
from embedcache.data.tables import Names, grouped_rows, numbers, read_csv, take
from embedcache.errors import ManifestError, some_ids

_OF_KAGGLE = (
    "Aortic enlargement",
    "Atelectasis",
    "Calcification",
    "Cardiomegaly",
    "Consolidation",
    "ILD",
    "Infiltration",
    "Lung Opacity",
    "Nodule/Mass",
    "Other lesion",
    "Pleural effusion",
    "Pleural thickening",
    "Pneumothorax",
    "Pulmonary fibrosis",
)
_FINDINGS = (
    *_OF_KAGGLE,
    "Clavicle fracture",
    "Edema",
    "Emphysema",
    "Enlarged PA",
    "Lung cavity",
    "Lung cyst",
    "Mediastinal shift",
    "Rib fracture",
    "COPD",
    "Lung tumor",
    "Pneumonia",
    "Tuberculosis",
    "Other diseases",
)
_NONE = "No finding"
_SPELT: dict[str, Names] = {"Other diseases": ("Other diseases", "Other disease")}  # the test table's name of it
_RADIOLOGIST = ("rad_id", "rad_ID")
_RULES = ("majority", "any", "all")
_SUFFIXES = (".dicom", ".dcm", ".png", ".jpg", ".jpeg")


def _read(root: Path, asked: Asked) -> Draft:
    rule = asked.options.get("agree") or _RULES[0]
    notes: list[str] = []
    path = any_file(root, "annotations/image_labels_train.csv", "image_labels_train.csv")
    if path is None:
        labels = LabelSet("vinbigdata", "multi-label", _OF_KAGGLE)
        train = _agreed(_kaggle(one_file(root, "train.csv")), rule)
        parts = [("train", train)]
        notes.append("Kaggle publishes no labels of the test images, so there is no official test list")
    else:
        labels = LabelSet("vindr-cxr", "multi-label", _FINDINGS)
        parts = [("train", _agreed(_votes(path), rule))]
        test_path = any_file(root, "annotations/image_labels_test.csv", "image_labels_test.csv")
        if test_path is None:
            notes.append("image_labels_test.csv is not there, so the official test images are left out")
        else:
            parts.append(("test", _consensus(test_path)))
    images = Images(root)
    for part, rows in parts:
        rows["image"] = images.locate(rows["id"], suffixes=_SUFFIXES, expected=part + "/{}.dicom", notes=notes)
    frame = pd.concat([rows.assign(official=part) for part, rows in parts], ignore_index=True)
    official = frame.pop("official")
    frame = with_headers(frame, root, asked, notes).assign(view="PA")
    return Draft(
        frame,
        label_sets=(labels,),
        official=official,
        notes=notes,
        images=images,
    )


def _table(path: Path, *, by_radiologist: bool) -> pd.DataFrame:
    """Votes of 1 and 0, blank where there is none, a row for each image and radiologist or for each image."""
    names: dict[str, Names] = {LABEL_PREFIX + name: _SPELT.get(name, name) for name in (*_FINDINGS, _NONE)}
    who: dict[str, Names] = {"radiologist": _RADIOLOGIST} if by_radiologist else {}
    rows = take(read_csv(path), path, {"id": "image_id", **who, **names})
    for column in names:
        votes = numbers(rows[column].rename(column.removeprefix(LABEL_PREFIX)), path)
        wrong = votes.notna() & ~votes.isin([0, 1])
        if wrong.any():
            row = int(wrong.to_numpy().argmax())
            raise ManifestError(f"{path}: column {votes.name}, row {row + 1}: {votes.iloc[row]:g}, expected 0 or 1")
        rows[column] = votes
    return rows


def _votes(path: Path) -> pd.DataFrame:
    """The share of each image's radiologists that sees each finding; whoever leaves one blank does not vote on it."""
    rows = _table(path, by_radiologist=True).drop_duplicates()
    twice = rows.duplicated(["id", "radiologist"])
    if twice.any():
        raise ManifestError(f"{path}: a radiologist who labels an image twice: {some_ids(rows['id'][twice])}")
    return rows.drop(columns="radiologist").groupby("id", sort=False).mean()


def _consensus(path: Path) -> pd.DataFrame:
    rows = _table(path, by_radiologist=False)
    return grouped_rows(rows, path, same=[column for column in rows if column != "id"]).reset_index(drop=True)


def _kaggle(path: Path) -> pd.DataFrame:
    """As `_votes`, of a table with a row for each box, or for 'No finding'."""
    rows = take(read_csv(path), path, {"id": "image_id", "radiologist": _RADIOLOGIST, "finding": "class_name"})
    known = (*_OF_KAGGLE, _NONE)
    unknown = sorted(set(rows["finding"]) - set(known))
    if unknown:
        raise ManifestError(f"{path}: class_name {', '.join(map(repr, unknown))}, expected one of {', '.join(known)}")
    order = rows["id"].drop_duplicates()
    n_votes = rows.drop_duplicates().groupby(["id", "finding"]).size().unstack(fill_value=0)
    share = n_votes.div(rows.groupby("id")["radiologist"].nunique(), axis="index")
    return share.reindex(index=order, columns=list(known), fill_value=0.0).add_prefix(LABEL_PREFIX)


def _agreed(share: pd.DataFrame, rule: str) -> pd.DataFrame:
    """Labels of each image from the share of its radiologists; blank where none voted."""
    rules = {"majority": share > 0.5, "any": share > 0, "all": share == 1}
    present = rules[rule].copy()
    none = LABEL_PREFIX + _NONE
    present[none] = rules[{"any": "all", "all": "any"}.get(rule, rule)][none]
    return present.astype(np.float64).where(share.notna()).rename_axis("id").reset_index()


LAYOUT = Layout(
    name="vindr-cxr",
    title="VinDr-CXR 1.0.0, or Kaggle's VinBigData",
    tree="""\
ROOT/                                      PhysioNet's
  annotations/image_labels_train.csv       image_id, rad_id and 28 labels, three rows for each image
  annotations/image_labels_test.csv        image_id and 28 labels
  train/<image_id>.dicom, test/<image_id>.dicom
ROOT/                                      or Kaggle's VinBigData
  train.csv                                image_id, class_name, class_id, rad_id, ...: a row for each box
  train/<image_id>.dicom                   (or .png, .jpg; any folder below ROOT)
""",
    marks=("annotations/image_labels_train.csv", "image_labels_train.csv", "train.csv"),
    read=_read,
    folders=("train", "test", "annotations"),
    options=(
        Option("agree", "How many of a training image's three radiologists a label takes.", choices=_RULES),
        HEADERS,
    ),
)
