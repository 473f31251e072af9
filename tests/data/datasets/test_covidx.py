"""COVIDx CXR: two label sets, names with blanks, sources as labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import embedcache
from embedcache.data.datasets.load import build_dataset
from embedcache.data.datasets.nih_origins import MAPPING
from embedcache.errors import ManifestError


def covidx(root: Path) -> Path:
    """90 training and 6 test images, labelled in both ways; those of RSNA have exams for patients.

    The others have patients of two images each.
    """
    three, two = ("normal", "pneumonia", "COVID-19"), ("negative", "negative", "positive")
    source = ("rsna", "rnsa", "stonybrook")
    for part, n in (("train", 90), ("test", 6)):
        (root / part).mkdir(parents=True)
        for version, classes in (("9A", three), ("9B", two)):
            lines = []
            for k in range(n):
                file = f"{part} scan {k}.png" if k == 1 else f"{part}-{k:012d}.png"
                (root / part / file).touch()
                patient = f"{part}{k // 6}" if k % 3 == 2 else file.removesuffix(".png").replace(" ", "-")
                lines.append(f"{patient} {file} {classes[k % 3]} {source[k % 3]}")
            (root / f"{part}_COVIDx{version}.txt").write_text("\n".join(lines) + "\n")
    return root


def test_three_classes_with_sources_and_patients(tmp_path: Path) -> None:
    built = build_dataset("covidx", covidx(tmp_path))
    manifest, frame = built.manifest, built.manifest.frame.set_index("id")
    assert not built.absent
    assert manifest.label_sets[0].classes == ("normal", "pneumonia", "COVID-19")
    assert frame["label.covidx"].iloc[:3].tolist() == [0, 1, 2]
    row = frame.loc["train scan 1.png"]
    assert (row["image"], row["patient"], row["source"]) == ("train/train scan 1.png", "", "rsna")
    assert frame[["patient", "source"]].iloc[2].tolist() == ["train0", "stonybrook"]
    assert "32 rows name the source 'rnsa', read as 'rsna'" in manifest.about.notes
    assert "64 rows come from RSNA, whose ids are of exams" in " ".join(manifest.about.notes)
    assert manifest.about.split_rule == "exam"
    assert not manifest.audit(files=False).patients_known
    assert (frame["split"][frame["image"].str.startswith("test/")] == "test").all()
    assert not manifest.audit(files=False).leaks


def test_rsnas_mapping_names_the_patients_of_nih(tmp_path: Path) -> None:
    covidx(tmp_path)
    rows = [line.split(" ") for part in ("train", "test") for line in (tmp_path / f"{part}_COVIDx9A.txt").open()]
    exams = [" ".join(row[1:-2]).removesuffix(".png") for row in rows if row[-1].strip() in ("rsna", "rnsa")]
    said = [{"subset_img_id": exam, "img_id": f"{k // 2 + 1:08d}_{k % 2:03d}.png"} for k, exam in enumerate(exams)]
    (tmp_path / MAPPING).write_text(json.dumps(said))
    manifest = embedcache.load_dataset("covidx", tmp_path)
    frame = manifest.frame.set_index("id")
    assert frame.loc["train scan 1.png", ["patient", "origin"]].tolist() == ["00000001", "00000001_001.png"]
    assert frame.loc["train-000000000002.png", ["patient", "origin"]].tolist() == ["covidx:train0", ""]
    assert (manifest.about.split_rule, manifest.about.patients_from) == ("patient", "nih")
    report = manifest.audit(files=False)
    assert (report.patients_known, report.leaks) == (True, False)


def test_two_classes_do_not_become_the_third(tmp_path: Path) -> None:
    manifest = embedcache.load_dataset("covidx", covidx(tmp_path), task="9B")
    assert manifest.tasks == {"covid": "binary"}
    assert manifest.frame["label.covid"].iloc[:3].tolist() == [0, 0, 1]
    for part in ("train", "test"):
        (tmp_path / f"{part}_COVIDx9B.txt").replace(tmp_path / f"{part}_COVIDx9A.txt")
    with pytest.raises(ManifestError, match="line 1: class 'negative', expected one of normal, pneumonia, COVID-19"):
        embedcache.load_dataset("covidx", tmp_path)


def test_the_published_split_shares_patients_and_the_audit_says_so(tmp_path: Path) -> None:
    manifest = embedcache.load_dataset("covidx", covidx(tmp_path), split="paper")
    assert manifest.frame["split"].value_counts().to_dict() == {"train": 72, "valid": 18, "test": 6}
    report = manifest.audit(files=False)
    assert report.n_shared["patient"] > 0
    assert report.warning.startswith("covidx: ")
    assert [(s.column, s.metric, s.value) for s in report.shortcuts] == [("source", "accuracy", pytest.approx(4 / 6))]


@pytest.mark.parametrize("line", ["a b normal", "alone"])
def test_lines_of_another_version_are_refused(tmp_path: Path, line: str) -> None:
    covidx(tmp_path)
    with (tmp_path / "train_COVIDx9A.txt").open("a", newline="") as file:
        file.write(f"\r\n{line}\r\n")
    with pytest.raises(
        ManifestError, match=r"train_COVIDx9A\.txt: line 92 has \d fields, expected patient, file, class"
    ):
        embedcache.load_dataset("covidx", tmp_path)


def test_windows_lines_and_a_byte_order_mark_change_nothing(tmp_path: Path) -> None:
    before = embedcache.load_dataset("covidx", covidx(tmp_path)).frame
    for path in tmp_path.glob("*.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert embedcache.load_dataset("covidx", tmp_path).frame.equals(before)


def test_a_name_in_both_folders_is_two_images(tmp_path: Path) -> None:
    covidx(tmp_path)
    for part in ("train", "test"):
        (tmp_path / part / "twice.png").touch()
        with (tmp_path / f"{part}_COVIDx9A.txt").open("a") as file:
            file.write(f"{part}-p twice.png normal rsna\n")
    frame = embedcache.load_dataset("covidx", tmp_path).frame.set_index("id")
    assert frame.loc["train/twice.png", "image"] == "train/twice.png"
    assert frame.loc["test/twice.png", ["image", "split"]].tolist() == ["test/twice.png", "test"]
    assert "test-000000000003.png" in frame.index
