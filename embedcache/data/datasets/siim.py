"""SIIM-ACR Pneumothorax Segmentation: run-length masks of pneumothorax on images drawn from NIH ChestX-ray14."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from embedcache.data.datasets.headers import HEADERS, with_headers
from embedcache.data.datasets.layout import Asked, Draft, Layout
from embedcache.data.datasets.places import Images, one_file
from embedcache.data.labels import LabelSet
from embedcache.data.masks import relative_rle_mask
from embedcache.data.splits import in_parts, published_fractions, published_holdout
from embedcache.data.tables import read_csv, take
from embedcache.errors import InputError, ManifestError, some_ids

_SIZE = (1024, 1024)


def _read(root: Path, asked: Asked) -> Draft:
    path = one_file(root, "stage_2_train.csv", "train-rle.csv")
    rows = take(read_csv(path), path, {"id": "ImageId", "runs": "EncodedPixels"})
    rows = rows.apply(lambda column: column.str.strip())
    frame = _united(rows, path)
    notes = ["the images come from NIH, whose patients nobody has published for them"]
    images = Images(root)
    frame["image"] = images.locate(
        frame["id"],
        suffixes=(".dcm", ".png", ".jpg", ".jpeg"),
        expected="stage_2_images/{}.dcm" if path.name.startswith("stage_2") else "dicom-images-train/*/*/{}.dcm",
        notes=notes,
    )
    frame = with_headers(frame, root, asked, notes)
    draft = Draft(
        frame,
        label_sets=(LabelSet("pneumothorax", "binary", ("pneumothorax",)),),
        notes=notes,
        images=images,
        draws_on="nih",
    )
    if asked.split == "paper":
        draft.split, draft.fraction = _published(rows, frame)
    return draft


def _united(rows: pd.DataFrame, path: Path) -> pd.DataFrame:
    """One row for each image, in order of first appearance, with all its rows united in one mask."""
    empty = (rows["runs"] == "-1").to_numpy()
    if (rows["runs"] == "").any():
        blank = rows["id"][rows["runs"] == ""]
        raise ManifestError(f"{path}: no runs and no -1 for {some_ids(blank)}; download the file again")
    by_image = rows.groupby("id", sort=False).indices
    both = [image for image, at in by_image.items() if empty[at].any() and not empty[at].all()]
    if both:
        raise ManifestError(f"{path}: runs as well as -1 for {some_ids(both)}, expected one or the other")
    texts = rows["runs"].to_numpy(object)
    masks = []
    for image, at in by_image.items():
        try:
            masks.append(relative_rle_mask(texts[at], _SIZE))
        except InputError as error:
            raise ManifestError(f"{path}: image {image}: {error}") from error
    positive = [float(not empty[at].all()) for at in by_image.values()]
    return pd.DataFrame({"id": list(by_image), "label.pneumothorax": positive, "mask": masks})


def _published(rows: pd.DataFrame, images: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """The published split, of the table's rows: an image with several can be in several splits.

    In training the published code draws as many negative images as there are positive ones, and label fractions from
    these; the others have no fraction.
    """
    number = pd.Series(range(len(images)), index=images["id"])
    of_row = number.reindex(rows["id"]).to_numpy()  # the image of each row
    train, valid, test = (pd.unique(of_row[at]) for at in published_holdout(len(rows), 0.3))
    positive = images["label.pneumothorax"].to_numpy()[train] == 1
    state = np.random.RandomState(42)
    negatives = train[~positive]
    drawn = state.permutation(len(negatives))[: positive.sum()]
    used = np.concatenate([train[positive], negatives[np.sort(drawn)]])
    fraction = published_fractions(len(images), used, rounded_down=True, state=state)
    return in_parts(len(images), train=train, valid=valid, test=test), fraction


LAYOUT = Layout(
    name="siim",
    title="SIIM-ACR Pneumothorax Segmentation",
    tree="""\
ROOT/                                                   stage 1, as it was released
  train-rle.csv                                         ImageId, EncodedPixels
  dicom-images-train/<study>/<series>/<ImageId>.dcm
ROOT/                                                   or the re-release
  stage_2_train.csv
  stage_2_images/<ImageId>.dcm                          (or .png, .jpg; any folder below ROOT)
""",
    marks=("stage_2_train.csv", "train-rle.csv"),
    read=_read,
    folders=("dicom-images-*", "stage_2_images"),
    published=True,
    options=(HEADERS,),
)
