"""SIIM-ACR Pneumothorax: stage 1 and the re-release, runs of several rows united, rows in several splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import embedcache
from embedcache.data.masks import read_mask
from embedcache.errors import DatasetError, ManifestError

N = 40


def rows() -> list[tuple[str, str]]:
    """40 images; every fourth has a pneumothorax in two rows that touch each other's columns."""
    found = []
    for k in range(N):
        image = f"1.2.276.0.7230010.{k:05d}"
        runs = ["1024 3 1021 2", "1026 4"] if k % 4 == 0 else ["-1"]
        found += [(image, text) for text in runs]
    return found


def stage_one(root: Path) -> Path:
    table = "".join(f"{image}, {runs}\n" for image, runs in rows())
    root.mkdir(parents=True, exist_ok=True)
    (root / "train-rle.csv").write_text("ImageId, EncodedPixels\n" + table)
    for image, _ in rows():
        folder = root / f"dicom-images-train/study-{image}/series-{image}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{image}.dcm").touch()
    return root


def stage_two(root: Path) -> Path:
    (root / "stage_2_images").mkdir(parents=True)
    table = "".join(f"{image},{runs}\n" for image, runs in rows())
    (root / "stage_2_train.csv").write_text("ImageId,EncodedPixels\n" + table)
    for image, _ in rows():
        (root / f"stage_2_images/{image}.dcm").touch()
    return root


@pytest.mark.parametrize("make", [stage_one, stage_two])
def test_both_releases_with_runs_united(tmp_path: Path, make) -> None:
    manifest = embedcache.load_dataset("siim", make(tmp_path))
    assert len(manifest) == N
    frame = manifest.frame.set_index("id")
    assert frame["label.pneumothorax"].tolist() == [float(k % 4 == 0) for k in range(N)]
    positive, negative = (frame.loc[f"1.2.276.0.7230010.{k:05d}"] for k in (0, 1))
    assert negative["mask"] == "rle:1024x1024:"
    mask = read_mask(positive["mask"], tmp_path)
    assert np.argwhere(mask.T).tolist() == [[1, 0], [1, 1], [1, 2], [1, 3], [1, 4], [1, 5], [2, 0], [2, 1]]
    assert positive["image"].endswith("1.2.276.0.7230010.00000.dcm")
    assert manifest.about.split_rule == "exam"
    assert not manifest.audit(files=False).patients_known


def test_the_published_split_is_of_rows_and_its_leak_is_found(tmp_path: Path) -> None:
    from sklearn.model_selection import train_test_split

    manifest = embedcache.load_dataset("siim", stage_two(tmp_path), split="paper")
    table = pd.DataFrame(rows(), columns=["id", "runs"])
    train, rest = train_test_split(table, test_size=0.3, random_state=0)
    test, valid = train_test_split(rest, test_size=0.5, random_state=0)
    for name, part in (("train", train), ("valid", valid), ("test", test)):
        assert set(manifest.frame["id"][manifest.in_split(name)]) == set(part["id"])
    leaked = set(train["id"]) & set(test["id"])
    assert leaked
    report = manifest.audit(files=False)
    assert next(s.n for s in report.shared if (s.kind, s.left, s.right) == ("image", "train", "test")) == len(leaked)
    # training takes the positives and as many negatives, drawn after seed 42
    np.random.seed(42)  # what the published code does
    negative = train["id"][train["runs"] == "-1"].unique()
    positive = train["id"][train["runs"] != "-1"].unique()
    drawn = set(np.random.choice(negative, size=len(positive), replace=False))
    used = [*positive, *(image for image in negative if image in drawn)]
    tenth = np.random.choice(np.array(used), size=int(len(used) * 0.1), replace=False)
    fraction = manifest.frame.set_index("id")["fraction"]
    assert set(fraction.index[fraction <= 1]) == set(used)
    assert set(fraction.index[fraction <= 0.1]) == set(tenth)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("x,-1\nx,5 2\n", "runs as well as -1 for 'x'"),
        ("x,\n", "no runs and no -1 for 'x'"),
        ("x,5 2 7\n", "image x: row 1: 3 number"),
        ("x,1048570 20\n", "image x: row 1: run 1 goes to 1,048,590"),
    ],
)
def test_runs_that_cannot_be(tmp_path: Path, more: str, message: str) -> None:
    path = stage_two(tmp_path) / "stage_2_train.csv"
    path.write_text(path.read_text() + more)
    with pytest.raises(ManifestError, match=message):
        embedcache.load_dataset("siim", tmp_path)


def test_an_image_of_the_table_without_a_file_is_left_out_and_none_at_all_is_an_error(tmp_path: Path) -> None:
    stage_two(tmp_path)
    (tmp_path / "stage_2_images/1.2.276.0.7230010.00003.dcm").unlink()
    manifest = embedcache.load_dataset("siim", tmp_path)
    assert len(manifest) == N - 1
    assert any(note.startswith("1 of 40 listed images are absent") for note in manifest.about.notes)
    for path in (tmp_path / "stage_2_images").iterdir():
        path.unlink()
    with pytest.raises(DatasetError, match=r"none of the 40 images that the tables list is there.*\n.*ROOT/"):
        embedcache.load_dataset("siim", tmp_path)
