"""PadChest: 160,861 radiographs of 67,625 patients of the Hospital San Juan (Alicante), with reports in Spanish.

Labels are the terms of the table's `Labels`, which sum up a report. The terms form a tree, and whoever looks for one is
told to look for its finer ones too (the dataset's README), so `label.atelectasis` is 1 for a laminar atelectasis as
well. All terms as they stand are in the column `terms`. Labels are blank where a report's terms say nothing of what is
seen: none at all, `exclude` (a report that is not to be used), or nothing beside `unchanged` (in comparison with an
examination that nobody sees here) and `suboptimal study`. `normal` counts alone, as the tree has it: it is 0 beside a
finding. Reports come stemmed, without accents, as they are published.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from embedcache.data.datasets.layout import Asked, Draft, Layout
from embedcache.data.datasets.places import Images, one_file
from embedcache.data.labels import LABEL_PREFIX, LabelSet
from embedcache.data.tables import numbers, read_csv, take
from embedcache.errors import ManifestError

_TABLE = "PADCHEST_chest_x_ray_images_labels_160K*.csv"
_COLUMNS = {
    "id": "ImageID",
    "folder": "ImageDir",
    "date": "StudyDate_DICOM",
    "study": "StudyID",
    "patient": "PatientID",
    "birth": "PatientBirth",
    "sex": "PatientSex_DICOM",
    "view": "Projection",
    "report": "Report",
    "source": "MethodLabel",
    "terms": "Labels",
}
_OPTIONAL = {"manufacturer": "Manufacturer_DICOM", "pediatric": "Pediatric"}
_BLANK = ("nan", "None")  # how the table writes what is not there
_SAYS_NOTHING = {"", "unchanged", "suboptimal study"}

# the 20 most frequent findings, and those of other datasets; with their finer terms in the dataset's own tree
_ALVEOLAR = ("consolidation", "air bronchogram")
_INTERSTITIAL = (
    "ground glass pattern",
    "reticular interstitial pattern",
    "reticulonodular interstitial pattern",
    "miliary opacities",
)
_FINER: dict[str, tuple[str, ...]] = {
    "COPD signs": (),
    "cardiomegaly": (),
    "aortic elongation": (
        "descendent aortic elongation",
        "ascendent aortic elongation",
        "aortic button enlargement",
        "supra aortic elongation",
    ),
    "pleural effusion": (
        "loculated pleural effusion",
        "loculated fissural effusion",
        "hydropneumothorax",
        "empyema",
        "hemothorax",
    ),
    "scoliosis": (),
    "pneumonia": ("atypical pneumonia",),
    "interstitial pattern": _INTERSTITIAL,
    "chronic changes": (),
    "infiltrates": ("interstitial pattern", *_INTERSTITIAL, "alveolar pattern", *_ALVEOLAR),
    "costophrenic angle blunting": (),
    "air trapping": (),
    "alveolar pattern": _ALVEOLAR,
    "NSG tube": (),
    "kyphosis": (),
    "laminar atelectasis": (),
    "vertebral degenerative changes": ("vertebral compression", "vertebral anterior compression"),
    "vascular hilar enlargement": ("pulmonary artery enlargement",),
    "nodule": ("multiple nodules",),
    "fibrotic band": (),
    "apical pleural thickening": (),
    "atelectasis": (
        "total atelectasis",
        "lobar atelectasis",
        "segmental atelectasis",
        "laminar atelectasis",
        "round atelectasis",
        "atelectasis basal",
    ),
    "consolidation": ("air bronchogram",),
    "emphysema": (),
    "hiatal hernia": (),
    "mass": ("mediastinal mass", "breast mass", "pleural mass", "pulmonary mass", "soft tissue mass"),
    "pleural thickening": ("apical pleural thickening", "calcified pleural thickening"),
    "pneumothorax": ("hydropneumothorax",),
    "pulmonary edema": (),
    "pulmonary fibrosis": ("post radiotherapy changes", "asbestosis signs"),
}


def _read(root: Path, asked: Asked) -> Draft:
    path = one_file(root, _TABLE)
    # the first column, a row number, has no name; asking for the others by theirs leaves it out
    rows = take(read_csv(path, only=(*_COLUMNS.values(), *_OPTIONAL.values())), path, _COLUMNS, optional=_OPTIONAL)
    rows = rows.replace(dict.fromkeys(_BLANK, ""))
    notes: list[str] = []
    frame = rows.drop(columns=["folder", "date", "birth", "terms"])
    frame["report"] = rows["report"].str.strip()
    frame["report"] = frame["report"].mask(frame["report"].isin(_BLANK), "")
    frame["report_id"] = _report_ids(frame, notes)
    frame["sex"] = rows["sex"].where(rows["sex"].isin(["F", "M"]), "")
    frame["site"] = "san-juan"
    date = rows["date"].where(rows["date"].str.fullmatch(r"\d{8}"), "")
    frame["acquired"] = (date.str[:4] + "-" + date.str[4:6] + "-" + date.str[6:]).where(date != "", "")
    age = numbers(date.str[:4].rename("StudyDate_DICOM"), path) - numbers(rows["birth"].rename("PatientBirth"), path)
    frame["age"] = age.where(age.between(0, 120))
    images = Images(root)
    frame["image"] = images.locate(rows["id"], expected=rows["folder"] + "/" + rows["id"], notes=notes)
    frame = pd.concat([frame, _labels(rows["terms"], path, notes)], axis=1)
    return Draft(
        frame,
        label_sets=(LabelSet("padchest", "multi-label", tuple(_FINER)),),
        patients_from="padchest",
        notes=notes,
        images=images,
    )


def _report_ids(frame: pd.DataFrame, notes: list[str]) -> pd.Series:
    """The study, whose images share a report; the image itself where they do not."""
    texts = frame.groupby("study", sort=False)["report"].nunique()
    several = frame["study"].isin(texts.index[texts > 1])
    if several.any():
        notes.append(f"{int((texts > 1).sum()):,} studies have several reports: each of their images keeps its own")
    return frame["study"].where(~several, frame["id"])


def _labels(said: pd.Series, path: Path, notes: list[str]) -> pd.DataFrame:
    """Columns of 1 and 0, blank where the terms say nothing, and the terms joined by `;`."""
    distinct = said.drop_duplicates()
    wrong = ~(distinct.str.startswith("[") & distinct.str.endswith("]")) & (distinct != "")
    if wrong.any():
        row, text = distinct.index[wrong][0], distinct[wrong].iloc[0]
        raise ManifestError(f"{path}: column Labels, row {row + 1}: {text!r}, expected a list such as ['normal']")
    terms = distinct.str.findall(r"'\s*(.*?)\s*'")
    sets = [set(found) for found in terms]
    silent = np.array([found <= _SAYS_NOTHING or "exclude" in found for found in sets], bool)
    columns: dict[str, object] = {"terms": [";".join(filter(None, found)) for found in terms]}
    present = {"normal": [found - _SAYS_NOTHING == {"normal"} for found in sets]}
    for name, finer in _FINER.items():
        meant = {name, *finer}
        present[name] = [not meant.isdisjoint(found) for found in sets]
    for name, flags in present.items():
        columns[LABEL_PREFIX + name] = np.where(silent, np.nan, np.array(flags, np.float64))
    labels = pd.DataFrame(columns, index=distinct).loc[said].set_axis(said.index, axis="index")
    blank = int(labels[LABEL_PREFIX + "normal"].isna().sum())
    if blank:
        notes.append(f"{blank:,} images have no label: their reports' terms are none, 'exclude' or only 'unchanged'")
    return labels


LAYOUT = Layout(
    name="padchest",
    title="PadChest",
    tree="""\
ROOT/
  PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv   (or .gz)
  0/<ImageID>, ..., 54/<ImageID>                         <ImageDir>/<ImageID>, or any folder below ROOT
""",
    marks=(_TABLE,),
    folders=("[0-9]", "[0-9][0-9]"),
    read=_read,
)
