"""COVIDx CXR: radiographs from several collections, labelled by which collection they are in as much as by disease."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from embedcache.data.datasets.layout import Asked, Draft, Layout, image_index, located, one_file, unlisted
from embedcache.data.labels import LabelSet
from embedcache.data.splits import published_fractions, shuffled_halves
from embedcache.data.tables import opened
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
    for part in ("train", "test"):
        path = one_file(root, f"{part}_COVIDx{asked.task}.txt", f"*/{part}_COVIDx{asked.task}.txt")
        index = image_index(root, [part]) or image_index(root)
        rows = _rows(path, labels)
        rows["image"] = located(rows["id"], index, expected=part + "/{}")
        parts.append((rows.assign(official=part), index))
    frame = pd.concat([rows for rows, _ in parts], ignore_index=True)
    twice = frame["id"].duplicated(keep=False) & ~frame.duplicated(keep=False)
    if twice.any():  # a name in both folders: two images
        frame["id"] = frame["id"].mask(twice, frame["official"] + "/" + frame["id"])
    misspelt = frame["source"].isin(_MISSPELT)
    if misspelt.any():
        notes.append(f"{int(misspelt.sum()):,} rows name the source 'rnsa', read as 'rsna'")
        frame["source"] = frame["source"].replace(_MISSPELT)
    official = frame.pop("official")
    draft = Draft(
        frame,
        label_sets=(labels,),
        official=official.where(official == "test", ""),
        patients_from="covidx",
        notes=notes,
        extra=sorted({path for rows, index in parts for path in unlisted(index, frame["image"])}),
    )
    if asked.split == "paper":
        _publish(draft, n_train=len(parts[0][0]))
    return draft


def _rows(path: Path, labels: LabelSet) -> pd.DataFrame:
    """Patient, file, class and source of each line, split by blanks; a file's name may hold blanks itself."""
    with opened(path) as file:
        try:
            lines = file.read().decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ManifestError(f"{path}: not UTF-8 at byte {error.start}; download it again") from error
    read = []
    for number, line in enumerate(lines, start=1):
        fields = line.split(" ")
        if not line.strip():
            continue
        if len(fields) < 4:
            raise ManifestError(
                f"{path}: line {number} has {len(fields)} fields, expected patient, file, class and source; is it a "
                "file of COVIDx version 9?"
            )
        patient, *name, label, source = line.rstrip().split(" ")
        if label not in labels.classes:
            raise ManifestError(
                f"{path}: line {number}: class {label!r}, expected one of {', '.join(labels.classes)}; the file of "
                "another label set?"
            )
        read.append((" ".join(name), patient, float(labels.classes.index(label)), source))
    return pd.DataFrame(read, columns=["id", "patient", f"label.{labels.labels[0]}", "source"])


def _publish(draft: Draft, *, n_train: int) -> None:
    """The published split: one fifth of the training rows, image by image, is valid; the test file is test."""
    n = len(draft.frame)
    train, valid = shuffled_halves(n_train, 0.2)
    split = np.full(n, "test", object)
    split[train], split[valid] = "train", "valid"
    fraction = np.full(n, np.nan)
    fraction[train] = published_fractions(train)
    draft.split, draft.fraction = split, fraction


LAYOUT = Layout(
    name="covidx",
    title="COVIDx CXR (version 5 of 'covidx-cxr2', labels V9)",
    tree="""\
ROOT/
  train_COVIDx9A.txt, test_COVIDx9A.txt   patient file class source, by blanks; normal, pneumonia or COVID-19
  train_COVIDx9B.txt, test_COVIDx9B.txt   with --task 9B: negative or positive
  train/<file>, test/<file>
""",
    marks=("train_COVIDx9*.txt", "*/train_COVIDx9*.txt"),
    read=_read,
    published=True,
    tasks=("9A", "9B"),
)
