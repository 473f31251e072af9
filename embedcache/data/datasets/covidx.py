"""COVIDx CXR: radiographs from several collections, labelled by which collection they are in as much as by disease."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from embedcache.data.datasets.layout import Asked, Draft, Layout
from embedcache.data.datasets.nih_origins import MAPPING, MAPPING_OPTION, read_origins
from embedcache.data.datasets.places import Images, any_file, one_file
from embedcache.data.labels import LabelSet
from embedcache.data.splits import in_parts, published_fractions, shuffled_halves
from embedcache.data.tables import read_text
from embedcache.errors import ManifestError

# the label sets of the files ...A and ...B: one has three classes, the other says COVID-19 or not
_SETS = {
    "9A": LabelSet("covidx", "multi-class", ("covidx",), ("normal", "pneumonia", "COVID-19")),
    "9B": LabelSet("covid", "binary", ("covid",), ("negative", "positive")),
}
_MISSPELT = {"rnsa": "rsna"}


def _read(root: Path, asked: Asked) -> Draft:
    labels = _SETS[asked.task]
    notes: list[str] = []
    parts = []
    images = Images(root)
    for part in ("train", "test"):
        rows = _rows(one_file(root, f"{part}_COVIDx{asked.task}.txt"), labels)
        rows["image"] = images.locate(rows["id"], expected=part + "/{}", folder=part, notes=notes)
        parts.append(rows.assign(official=part))
    n_train, frame = len(parts[0]), pd.concat(parts, ignore_index=True)
    twice = frame["id"].duplicated(keep=False) & ~frame.duplicated(keep=False)
    if twice.any():  # a name in both folders: two images
        frame["id"] = frame["id"].mask(twice, frame["official"] + "/" + frame["id"])
    misspelt = frame["source"].isin(_MISSPELT)
    if misspelt.any():
        notes.append(f"{int(misspelt.sum()):,} rows name the source 'rnsa', read as 'rsna'")
        frame["source"] = frame["source"].replace(_MISSPELT)
    official = frame.pop("official")
    mapping = any_file(root, MAPPING, given=asked.options.get("mapping"))
    draft = Draft(
        _with_patients(frame, mapping, notes),
        label_sets=(labels,),
        official=official,
        patients_from="nih" if mapping is not None else "covidx",
        notes=notes,
        images=images,
        draws_on="nih",
    )
    if asked.split == "paper":
        _publish(draft, n_train)
    return draft


def _with_patients(frame: pd.DataFrame, mapping: Path | None, notes: list[str]) -> pd.DataFrame:
    """The patients of the rows from RSNA, whose 'patient id' is an exam's: NIH's by RSNA's mapping, else blank.

    With the mapping others get the prefix `covidx:`, as they are of no register of NIH's.
    """
    of_rsna = (frame["source"] == "rsna").to_numpy()
    exams = frame["id"].str.rpartition("/")[2].str.rpartition(".")[0]
    if not of_rsna.any():
        return frame
    if mapping is None:
        notes.append(
            f"{int(of_rsna.sum()):,} rows come from RSNA, whose ids are of exams: without {MAPPING} (published by "
            "RSNA) nobody knows their patients"
        )
        return frame.assign(patient=frame["patient"].mask(of_rsna, ""))
    origins = read_origins(mapping, exams[of_rsna]).set_index("id").reindex(exams[of_rsna])
    patient, origin = ("covidx:" + frame["patient"]).to_numpy(object), np.full(len(frame), "", object)
    patient[of_rsna], origin[of_rsna] = origins["patient"], origins["origin"]
    return frame.assign(patient=patient, origin=origin)


def _rows(path: Path, labels: LabelSet) -> pd.DataFrame:
    """Patient, file, class and source of each line, split by blanks; a file's name may hold blanks itself."""
    read = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        fields = line.rstrip().split(" ")
        if fields == [""]:
            continue
        if len(fields) < 4:
            raise ManifestError(
                f"{path}: line {number} has {len(fields)} fields, expected patient, file, class and source; is it a "
                "file of COVIDx version 9?"
            )
        patient, *name, label, source = fields
        if label not in labels.classes:
            raise ManifestError(
                f"{path}: line {number}: class {label!r}, expected one of {', '.join(labels.classes)}; the file of "
                "another label set?"
            )
        read.append((" ".join(name), patient, float(labels.classes.index(label)), source))
    return pd.DataFrame(read, columns=["id", "patient", f"label.{labels.labels[0]}", "source"])


def _publish(draft: Draft, n_train: int) -> None:
    """The published split: one fifth of the training rows, image by image, is valid; the test file is test."""
    n = len(draft.frame)
    train, valid = shuffled_halves(n_train, 0.2)
    draft.split = in_parts(n, train=train, valid=valid, test=np.arange(n_train, n))
    draft.fraction = published_fractions(n, train)


LAYOUT = Layout(
    name="covidx",
    title="COVIDx CXR (version 5 of 'covidx-cxr2', labels V9)",
    tree=f"""\
ROOT/
  train_COVIDx9A.txt, test_COVIDx9A.txt   patient file class source, by blanks; normal, pneumonia or COVID-19
  train_COVIDx9B.txt, test_COVIDx9B.txt   with --task 9B: negative or positive
  train/<file>, test/<file>
  {MAPPING}
                                          optional, published by RSNA: which NIH patients its images are of
""",
    marks=("train_COVIDx9*.txt",),
    read=_read,
    folders=("train", "test"),
    published=True,
    tasks=("9A", "9B"),
    options=(MAPPING_OPTION,),
)
