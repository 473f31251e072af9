"""MIMIC-CXR-JPG with MIMIC-CXR's reports, in its official form and in those that people make of it."""

from __future__ import annotations

import gzip
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import embedcache
from embedcache.data.datasets.load import build_dataset
from embedcache.data.labels import CHEXPERT_LABELS
from embedcache.data.sections import findings_and_impression
from embedcache.errors import DatasetError, ManifestError

N_PATIENTS = 12
VIEWS = ("PA", "LL", "AP")


def study_of(patient: int) -> str:
    return f"files/p1{patient % 3}/p1{patient % 3}{patient:06d}/s5{patient:07d}"


def report_of(patient: int) -> str:
    body = {0: " FINDINGS: \n \n The lungs are clear.\n \n", 1: "", 2: " FINDINGS:  Clear.\n"}[patient % 3]
    return (
        f"                FINAL REPORT\n EXAMINATION:  CHEST\n \n{body} IMPRESSION: \n \n No acute process {patient}.\n"
    )


def mimic(root: Path, *, zipped: bool = True, images: str = "files", version: str = "2.0.0") -> Path:
    """12 patients with a study of three images each; patient 4 has no report, patient 5 one of one word."""
    (root / images).mkdir(parents=True)
    metadata, split, labels = [], [], []
    for p in range(N_PATIENTS):
        subject, study = f"1{p % 3}{p:06d}", f"5{p:07d}"
        folder = root / (study_of(p).removeprefix("files/") if images == "" else study_of(p))
        folder.mkdir(parents=True, exist_ok=True)
        if p != 4:
            text = " IMPRESSION: Normal.\n" if p == 5 else report_of(p)
            folder.with_suffix(".txt").write_text(text)
        values = ["1.0", "0.0", "-1.0", ""] * 3 + ["", ""]
        if p == 6:
            values = [""] * 14
        if p != 7:
            labels.append(",".join([subject, study, *values]))
        for k, view in enumerate(VIEWS):
            dicom = f"{p:08x}-{k:08x}-00000000-00000000-00000000"
            (folder / f"{dicom}.jpg").touch()
            metadata.append(f'{dicom},{subject},{study},"CHEST (PA, LAT)",{view},3056,2544,21800506,{p % 10}3014.531')
            split.append(f"{dicom},{study},{subject},{('train', 'train', 'validate', 'test')[p % 4]}")
    tables = {
        "metadata": "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,"
        "StudyDate,StudyTime",
        "split": "dicom_id,study_id,subject_id,split",
        "chexpert": ",".join(["subject_id", "study_id", *sorted(CHEXPERT_LABELS)]),
    }
    for (name, header), rows in zip(tables.items(), (metadata, split, labels), strict=True):
        text = "\n".join([header, *rows]) + "\n"
        path = root / f"mimic-cxr-{version}-{name}.csv"
        if zipped:
            with gzip.open(f"{path}.gz", "wt") as file:
                file.write(text)
        else:
            path.write_text(text)
    return root


def test_images_reports_labels_and_the_official_split(tmp_path: Path) -> None:
    built = build_dataset("mimic-cxr", mimic(tmp_path))
    manifest, frame = built.manifest, built.manifest.frame
    assert (len(manifest), built.absent, built.extra) == (36, (), ())
    row = frame.iloc[9]  # of patient 3
    assert row["image"] == f"{study_of(3)}/{row['id']}.jpg"
    assert row[["patient", "study", "report_id", "view"]].tolist() == ["10000003", "s50000003", "s50000003", "PA"]
    assert row["acquired"] == "2180-05-06T03:30:14"
    assert row["report"] == report_of(3)
    assert findings_and_impression(row["report"])[0].split() == ["The", "lungs", "are", "clear."]
    assert len(manifest.reports()) == N_PATIENTS
    assert frame.groupby("patient")["split"].first().value_counts().to_dict() == {"train": 6, "valid": 3, "test": 3}
    assert manifest.about.split_rule == "patient"
    assert not manifest.audit(files=False).leaks
    assert manifest.tasks == {"chexpert": "multi-label"}
    assert "1 of 12 studies have no report, such as p11/p11000004/s50000004" in manifest.about.notes


@pytest.mark.parametrize(
    ("policy", "uncertain"), [(None, np.nan), ("ignore", np.nan), ("zeros", 0), ("ones", 1), ("paper", None)]
)
def test_labels_by_their_names_and_uncertain_ones_by_policy(tmp_path: Path, policy, uncertain) -> None:
    options = {} if policy is None else {"uncertain": policy}
    frame = embedcache.load_dataset("mimic-cxr", mimic(tmp_path), **options).frame.set_index("study")
    of_one = frame.loc["s50000000"].iloc[0]
    for k, name in enumerate(sorted(CHEXPERT_LABELS)):  # the file's columns are in alphabetical order
        stands = float(name in ("Atelectasis", "Edema", "Pleural Effusion")) if policy == "paper" else uncertain
        expected = 0.0 if k >= 12 else (1.0, 0.0, stands, 0.0)[k % 4]
        np.testing.assert_equal(of_one[f"label.{name}"], expected)
    assert frame.loc["s50000007", [f"label.{name}" for name in CHEXPERT_LABELS]].isna().all(axis=None)
    blank = frame.loc["s50000006", [f"label.{name}" for name in CHEXPERT_LABELS]]
    assert (blank == 0).all(axis=None) if policy == "paper" else blank.isna().all(axis=None)


def test_the_published_rows(tmp_path: Path) -> None:
    manifest = embedcache.load_dataset("mimic-cxr", mimic(tmp_path), split="paper")
    frame = manifest.frame
    assert set(frame["view"]) == {"PA", "AP"}
    assert not {"s50000004", "s50000005"} & set(frame["study"])  # no report, and one of a single word
    assert frame.groupby("study")["split"].first().value_counts().to_dict() == {"valid": 6, "train": 4}
    assert "4 frontal images have no report of three words and were left out" in manifest.about.notes
    assert frame["label.Atelectasis"].notna().any()


@pytest.mark.parametrize("form", ["plain", "no files level", "one folder", "2.1.0", "below", "above"])
def test_forms_in_which_people_have_it(tmp_path: Path, form: str) -> None:
    before = embedcache.load_dataset("mimic-cxr", mimic(tmp_path / "whole")).frame.drop(columns="image")
    root = tmp_path / "other"
    mimic(root, zipped=form != "plain", images="" if form == "no files level" else "files")
    asked = root
    if form == "one folder":
        for path in list(root.rglob("*.jpg")):
            path.rename(root / path.name)
    if form == "2.1.0":  # its test set's labels lie beside the tables, which keep their names
        (root / "mimic-cxr-2.1.0-test-set-labeled.csv").write_text("study_id\n")
    if form == "below":
        asked = tmp_path / "shelf"
        asked.mkdir()
        shutil.move(root, asked / "mimic-cxr-jpg")
    if form == "above":
        asked = root / "files"
    manifest = embedcache.load_dataset("mimic-cxr", asked)
    pd.testing.assert_frame_equal(manifest.frame.drop(columns="image"), before)
    assert all(manifest.path(image).is_file() for image in manifest.frame["image"])
    moved = {"below": "one level down, in mimic-cxr-jpg", "above": "one level up, in other"}.get(form)
    assert moved is None or any(moved in note for note in manifest.about.notes)


@pytest.mark.parametrize("place", ["inside", "beside", "zip inside", "named folder", "named zip"])
def test_places_of_the_reports(tmp_path: Path, place: str) -> None:
    root = mimic(tmp_path / "jpg")
    before = embedcache.load_dataset("mimic-cxr", root).frame["report"]
    target = {"inside": root, "beside": tmp_path, "zip inside": tmp_path, "named folder": tmp_path / "far"}.get(
        place, tmp_path / "far"
    ) / "mimic-cxr-reports"
    for path in list(root.rglob("*.txt")):
        to = target / path.relative_to(root)
        to.parent.mkdir(parents=True, exist_ok=True)
        path.rename(to)
    options = {"reports": target} if place == "named folder" else {}
    if "zip" in place:
        archive = root / "mimic-cxr-reports.zip" if place == "zip inside" else tmp_path / "far" / "r.zip"
        with zipfile.ZipFile(archive, "w") as file:
            for path in target.rglob("*.txt"):
                file.write(path, path.relative_to(target))
        shutil.rmtree(target)
        options = {"reports": archive} if place == "named zip" else {}
    assert embedcache.load_dataset("mimic-cxr", root, **options).frame["report"].equals(before)


def test_without_reports_or_labels_it_says_so(tmp_path: Path) -> None:
    root = mimic(tmp_path)
    for path in root.rglob("*.txt"):
        path.unlink()
    (root / "mimic-cxr-2.0.0-chexpert.csv.gz").unlink()
    manifest = embedcache.load_dataset("mimic-cxr", root)
    assert manifest.labels == []
    assert any("no reports were found" in note for note in manifest.about.notes)
    with pytest.raises(DatasetError, match=r"no mimic-cxr-2\.0\.0-chexpert\.csv"):
        embedcache.load_dataset("mimic-cxr", root, split="paper")
    with pytest.raises(DatasetError, match="no zip file, nor a folder with files/p10/"):
        embedcache.load_dataset("mimic-cxr", root, reports=tmp_path.parent)


def test_the_first_patient_without_a_report_hides_no_others(tmp_path: Path) -> None:
    root = mimic(tmp_path)
    (root / f"{study_of(0)}.txt").unlink()
    frame = embedcache.load_dataset("mimic-cxr", root).frame
    assert (frame["report"] != "").sum() == 30
    for path in root.rglob("*.txt"):
        path.write_text("")
    with pytest.raises(DatasetError, match="no frontal image has a report of three words"):
        embedcache.load_dataset("mimic-cxr", root, split="paper")


def test_radiologists_labels_of_the_test_split(tmp_path: Path) -> None:
    root = mimic(tmp_path)
    names = [name.replace("Lung Opacity", "Airspace Opacity") for name in CHEXPERT_LABELS]
    rows = "".join(f"5{p:07d}{',1.0' * 14}\n" for p in (3, 4))  # of patient 3 (test) and 4 (train)
    (root / "mimic-cxr-2.1.0-test-set-labeled.csv").write_text(",".join(["study_id", *names]) + "\n" + rows)
    manifest = embedcache.load_dataset("mimic-cxr", root, radiologists=True)
    rows = manifest.frame.set_index("study")
    assert (rows.loc["s50000003", "label.Lung Opacity"] == 1).all()
    assert rows.loc["s50000011", "label.Lung Opacity"].isna().all()
    before = embedcache.load_dataset("mimic-cxr", root).frame.set_index("study")
    assert rows.loc["s50000004"].equals(before.loc["s50000004"])
    assert "2 test studies were not labelled by radiologists, and their labels are blank" in manifest.about.notes


def test_tables_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    root = mimic(tmp_path, zipped=False)
    split, labels = (root / f"mimic-cxr-2.0.0-{name}.csv" for name in ("split", "chexpert"))
    said = split.read_text()
    split.write_text(said + said.splitlines()[1].replace(",train", ",test") + "\n")
    with pytest.raises(ManifestError, match=r"split\.csv: rows of '00000000-.*' differ in official"):
        embedcache.load_dataset("mimic-cxr", root)
    split.write_text(said)
    labels.write_text(labels.read_text() + "10000000,50000000" + ",0.0" * 14 + "\n")
    with pytest.raises(ManifestError, match=r"chexpert\.csv: rows of '50000000' differ in label"):
        embedcache.load_dataset("mimic-cxr", root)
    labels.write_text(labels.read_text().replace("50000000,1.0", "50000000,5.0"))
    with pytest.raises(ManifestError):
        embedcache.load_dataset("mimic-cxr", root)


def test_half_a_download_is_a_smaller_manifest(tmp_path: Path) -> None:
    root = mimic(tmp_path)
    shutil.rmtree(root / "files/p11")
    (root / study_of(0) / "stray.jpg").touch()
    built = build_dataset("mimic-cxr", root)
    assert (len(built.manifest), len(built.absent)) == (24, 12)
    assert built.extra == (f"{study_of(0)}/stray.jpg",)
    assert "12 of 36 listed images are absent and were left out" in " ".join(built.manifest.about.notes)


def test_a_table_of_another_form_is_named(tmp_path: Path) -> None:
    root = mimic(tmp_path, zipped=False)
    path = root / "mimic-cxr-2.0.0-split.csv"
    path.write_text(path.read_text().replace(",validate\n", ",dev\n"))
    with pytest.raises(ManifestError, match=r"split\.csv: split 'dev', expected one of train, validate, test"):
        embedcache.load_dataset("mimic-cxr", root)
    path.write_text(path.read_text().replace(",split\n", ",part\n"))
    with pytest.raises(
        ManifestError, match=r"split\.csv: no column split; it has dicom_id, study_id, subject_id, part"
    ):
        embedcache.load_dataset("mimic-cxr", root)
