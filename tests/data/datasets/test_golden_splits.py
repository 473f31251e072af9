"""The published splits on the official label files, against numbers computed outside this project."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from embedcache import Manifest
from embedcache.data.audit import Shared
from embedcache.data.datasets.load import load_dataset
from embedcache.data.shortcuts import shortcuts
from embedcache.data.splits import published_holdout, shuffled_halves

SHARED = Path(__file__).resolve().parents[4] / "shared"
LABELS, GOLDEN = SHARED / "data" / "labels", SHARED / "golden" / "splits.json"
pytestmark = pytest.mark.skipif(not GOLDEN.is_file(), reason="shared/golden/splits.json is not here")


@pytest.fixture(scope="module")
def golden() -> dict:
    return json.loads(GOLDEN.read_text())


def digest(ids: pd.Series) -> str:
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()


def touch(folder: Path, names: pd.Series) -> None:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()


def in_split(manifest: Manifest, name: str) -> pd.Series:
    return manifest.frame["id"][manifest.in_split(name)]


@pytest.fixture(scope="module")
def rsna(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rsna")
    shutil.copy(LABELS / "stage_2_train_labels.csv", root)
    touch(root / "stage_2_train_images", pd.read_csv(root / "stage_2_train_labels.csv")["patientId"].unique() + ".dcm")
    return root


@pytest.fixture(scope="module")
def covidx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("covidx")
    for part in ("train", "test"):
        shutil.copy(LABELS / f"{part}_COVIDx9A.txt", root)
        touch(root / part, pd.read_csv(LABELS / f"{part}_COVIDx9A.txt", sep=" ", header=None)[1])
    return root


@pytest.fixture(scope="module")
def siim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("siim")
    shutil.copy(LABELS / "train-rle.csv.gz", root)
    touch(root / "stage_2_images", pd.read_csv(LABELS / "train-rle.csv.gz")["ImageId"].unique() + ".dcm")
    return root


@pytest.mark.parametrize(("task", "held_out"), [("classification", 0.3), ("segmentation", 10_674)])
def test_rsna(golden: dict, rsna: Path, task: str, held_out: float) -> None:
    manifest = load_dataset("rsna", rsna, split="paper", task=task)
    positive = manifest.label("pneumonia") == 1
    assert (len(manifest), positive.sum()) == (26_684, 6_012)
    ordered = sorted(manifest.frame["id"])
    for name, rows in zip(("train", "valid", "test"), published_holdout(len(ordered), held_out), strict=True):
        expected = golden[f"rsna_{task}"][name]
        ids = in_split(manifest, name)
        assert len(ids) == expected["n"]
        if "sha256_sorted" in expected:
            assert digest(ids) == expected["sha256_sorted"]
        assert int(positive[manifest.in_split(name)].sum()) == expected["positives"]
        assert [ordered[row] for row in rows[:5]] == expected["first5"]
        assert {ordered[row] for row in rows} == set(ids)


def test_rsna_one_percent(golden: dict, rsna: Path) -> None:
    manifest = load_dataset("rsna", rsna, split="paper")
    used = manifest.frame["id"][manifest.in_fraction(0.01)]
    expected = golden["rsna_classification_fraction_0.01"]
    assert (len(used), digest(used)) == (expected["n"], expected["sha256_sorted"])
    assert set(expected["first5"]) <= set(used)
    assert set(used) < set(manifest.frame["id"][manifest.in_fraction(0.1)]) < set(in_split(manifest, "train"))


def test_rsna_by_view_alone(rsna: Path) -> None:
    """The headers of RSNA's DICOM files come with torchxrayvision."""
    import torchxrayvision

    headers = Path(torchxrayvision.__file__).parent / "data" / "kaggle_stage_2_train_images_dicom_headers.csv.gz"
    view = pd.read_csv(headers, dtype=str).set_index("PatientID")["ViewPosition"]
    manifest = load_dataset("rsna", rsna)
    frame = manifest.frame.assign(view=view.reindex(manifest.frame["id"]).to_numpy(), split="train+test")
    (found,) = shortcuts(manifest.with_frame(frame))
    assert (found.column, round(found.value, 3)) == ("view", 0.706)


def test_covidx(golden: dict, covidx: Path) -> None:
    manifest = load_dataset("covidx", covidx, split="paper")
    listed = pd.read_csv(covidx / "train_COVIDx9A.txt", sep=" ", header=None)[1]
    test = pd.read_csv(covidx / "test_COVIDx9A.txt", sep=" ", header=None)[1]
    train_rows, valid_rows = shuffled_halves(len(listed), 0.2)
    ordered = {"train": listed.iloc[train_rows], "valid": listed.iloc[valid_rows], "test": test}
    for name, in_order in ordered.items():
        expected = golden["covidx"][name]
        ids = in_split(manifest, name)
        assert (len(ids), digest(ids)) == (expected["n"], expected["sha256_sorted"])
        assert in_order[:5].tolist() == expected["first5"]
        assert set(in_order) == set(ids)
    report = manifest.audit(files=False)
    leaking = golden["covidx"]
    (found,) = (shared for shared in report.shared if shared.kind == "patient")
    assert (found.n, found.n_right) == (leaking["valid_patients_in_train"], leaking["valid_images_of_train_patients"])
    assert (
        report.warning
        == "covidx: 3,036 of 6,026 valid images share their patient with train: scores on valid are too good"
    )
    (source,) = report.shortcuts
    assert (source.column, source.metric, source.value) == ("source", "accuracy", 0.75)


def test_covidx_without_leaks_that_are_known(covidx: Path) -> None:
    """The patients of 13,788 images that come from RSNA are exams, and stay unknown."""
    report = load_dataset("covidx", covidx).audit(files=False)
    assert (report.split_rule, report.leaks, report.n_rows["test"]) == ("exam", False, 400)
    assert report.n_without_patient == 13_788


def test_siim(golden: dict, siim: Path) -> None:
    manifest = load_dataset("siim", siim, split="paper")
    expected = golden["siim"]
    table = pd.read_csv(siim / "train-rle.csv.gz")
    parts = dict(zip(("train", "valid", "test"), published_holdout(len(table), 0.3), strict=True))
    assert {name: len(rows) for name, rows in parts.items()} == expected["rows"]
    assert {name: len(in_split(manifest, name)) for name in parts} == expected["images"]
    for name, rows in parts.items():
        assert set(table["ImageId"].iloc[rows]) == set(in_split(manifest, name))
    n = expected["test_images_also_in_train"]
    assert Shared("image", "train", "test", n, n, n) in manifest.audit(files=False).shared
    positive = manifest.label("pneumothorax") == 1
    test = manifest.in_split("test")
    assert positive[manifest.in_split("train") & test].all()
    assert int((positive & test).sum()) == expected["test_positive_images"]
    empty = manifest.frame["mask"].str.endswith(":").to_numpy()
    np.testing.assert_array_equal(empty, ~positive)
    assert 1 - (~empty[test]).sum() / test.sum() == expected["empty_mask_dice_on_test"]
