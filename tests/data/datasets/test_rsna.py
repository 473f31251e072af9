"""RSNA Pneumonia in its official form: boxes, exams that are no patients, RSNA's mapping, headers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

import embedcache
from embedcache.data.datasets.load import build_dataset
from embedcache.data.masks import read_mask
from embedcache.errors import DatasetError, ManifestError, SettingsError

N = 60
LABELS = "stage_2_train_labels.csv"
MAPPING = "pneumonia-challenge-dataset-mappings_2018.json"


def exam(k: int) -> str:
    return f"{k:08x}-aaaa-4bbb-8ccc-dddddddddddd"


def rsna(root: Path, *, suffix: str = ".dcm") -> Path:
    """60 exams; every third has pneumonia, every sixth two boxes. Rows are in no order."""
    rows = []
    for k in range(N):
        boxes = ["100.0,200.0,50.0,80.0", "600.0,300.0,10.5,20.0"][: 1 + (k % 6 == 0)] if k % 3 == 0 else [",,,"]
        rows += [f"{exam(k)},{box},{int(k % 3 == 0)}" for box in boxes]
    np.random.default_rng(0).shuffle(rows)
    (root / "stage_2_train_images").mkdir(parents=True)
    (root / LABELS).write_text("patientId,x,y,width,height,Target\n" + "\n".join(rows) + "\n")
    classes = ["Lung Opacity", "Normal", "No Lung Opacity / Not Normal"]
    info = [f"{exam(k)},{classes[k % 3]}" for k in range(N) for _ in range(1 + (k % 6 == 0))]
    (root / "stage_2_detailed_class_info.csv").write_text("patientId,class\n" + "\n".join(info) + "\n")
    for k in range(N):
        (root / f"stage_2_train_images/{exam(k)}{suffix}").touch()
    (root / "stage_2_test_images").mkdir()
    (root / f"stage_2_test_images/{exam(N)}.dcm").touch()
    return root


def mapping(root: Path, n: int = N) -> None:
    """Two exams of each NIH patient."""
    said = [
        {
            "subset_img_id": exam(k),
            "img_id": f"{k // 2 + 1:08d}_{k % 2:03d}.png",
            "orig_labels": ["No Finding"],
            "SOPInstanceUID": f"1.2.{k}",
        }
        for k in range(n)
    ]
    (root / MAPPING).write_text(json.dumps(said))


def test_exams_with_boxes_as_masks_and_both_labels(tmp_path: Path) -> None:
    built = build_dataset("rsna", rsna(tmp_path))
    frame = built.manifest.frame.set_index("id")
    assert len(frame) == N
    assert frame.loc[exam(0), "mask"] in (
        "boxes:1024x1024:100,200,50,80;600,300,10.5,20",
        "boxes:1024x1024:600,300,10.5,20;100,200,50,80",
    )
    assert frame.loc[exam(1), "mask"] == "boxes:1024x1024:"
    assert frame.loc[exam(3), "image"] == f"stage_2_train_images/{exam(3)}.dcm"
    assert frame.loc[[exam(0), exam(1)], "label.pneumonia"].tolist() == [1, 0]
    assert frame.loc[[exam(0), exam(1), exam(2)], "label.class"].tolist() == [2, 0, 1]
    assert built.manifest.tasks == {"pneumonia": "binary", "class": "multi-class"}
    mask = read_mask(frame.loc[exam(0), "mask"], tmp_path)
    assert mask[200:280, 100:150].all()
    assert mask.sum() == 50 * 80 + 10 * 20
    assert built.extra == (f"stage_2_test_images/{exam(N)}.dcm",)


def test_without_the_mapping_patients_are_unknown_and_the_split_is_of_exams(tmp_path: Path) -> None:
    manifest = embedcache.load_dataset("rsna", rsna(tmp_path))
    assert (manifest.frame["patient"] == "").all()
    assert manifest.about.split_rule == "exam"
    assert not manifest.audit(files=False).patients_known
    assert any("'patientId' is an exam's id" in note for note in manifest.about.notes)
    assert any("patients unknown" in note for note in manifest.about.notes)


def test_with_the_mapping_exams_of_a_patient_stay_together(tmp_path: Path) -> None:
    mapping(rsna(tmp_path))
    manifest = embedcache.load_dataset("rsna", tmp_path)
    assert manifest.about.split_rule == "patient"
    assert manifest.about.patients_from == "nih"
    frame = manifest.frame.set_index("id")
    assert frame.loc[exam(5), ["patient", "origin"]].tolist() == ["00000003", "00000003_001.png"]
    report = manifest.audit(files=False)
    assert report.patients_known
    assert not report.leaks
    leaky = embedcache.load_dataset("rsna", tmp_path, split="paper").audit(files=False)
    assert leaky.n_shared["patient"] > 0
    assert "share their patient with train" in leaky.warning


def test_nihs_table_gives_view_sex_and_age_through_the_mapping(tmp_path: Path) -> None:
    mapping(rsna(tmp_path))
    rows = [f"{k // 2 + 1:08d}_{k % 2:03d}.png,No Finding,{k % 2},{k // 2 + 1},{40 + k},M,AP,1,1,1,1" for k in range(N)]
    np.random.default_rng(1).shuffle(rows)  # NIH's images come in an order of their own
    rows.append(rows[0])
    header = (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]\n"
    )
    (tmp_path / "Data_Entry_2017_v2020.csv").write_text(header + "\n".join(rows) + "\n")
    frame = embedcache.load_dataset("rsna", tmp_path).frame.set_index("id")
    assert frame.loc[exam(7), ["view", "sex", "age"]].tolist() == ["AP", "M", 47]
    kept = embedcache.load_dataset("rsna", tmp_path, headers=True).frame.set_index("id")  # no file has a header
    assert kept.loc[exam(7), ["view", "sex", "age"]].tolist() == ["AP", "M", 47]


def test_headers_give_view_sex_and_age(tmp_path: Path) -> None:
    rsna(tmp_path)
    for k in range(N):
        file = Dataset()
        file.file_meta = FileMetaDataset()
        file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        file.SOPClassUID, file.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", f"1.2.3.{k}"
        file.ViewPosition, file.PatientSex, file.PatientAge = ("PA", "AP")[k % 3 == 0], "F", f"{20 + k:03d}Y"
        file.PatientName = "Canary"
        if k != 1:
            file.save_as(tmp_path / f"stage_2_train_images/{exam(k)}.dcm", enforce_file_format=True)
    manifest = embedcache.load_dataset("rsna", tmp_path, headers=True)
    frame = manifest.frame.set_index("id")
    assert frame.loc[exam(9), ["view", "sex", "age"]].tolist() == ["AP", "F", 29]
    assert frame.loc[exam(1), ["view", "sex"]].tolist() == ["", ""]
    assert "1 files have no DICOM header that could be read" in manifest.about.notes
    strongest = manifest.audit(files=False).shortcuts[0]
    assert (strongest.label, strongest.column, strongest.value) == ("pneumonia", "view", pytest.approx(1.0, abs=0.05))


def test_the_published_splits_and_fractions_of_both_tasks(tmp_path: Path) -> None:
    from sklearn.model_selection import train_test_split

    rsna(tmp_path)
    frame = embedcache.load_dataset("rsna", tmp_path, split="paper").frame
    ids = pd.DataFrame({"id": sorted(exam(k) for k in range(N))})
    train, rest = train_test_split(ids, test_size=0.3, random_state=0)
    test, valid = train_test_split(rest, test_size=0.5, random_state=0)
    for name, part in (("train", train), ("valid", valid), ("test", test)):
        assert set(frame["id"][frame["split"] == name]) == set(part["id"])
    masks = embedcache.load_dataset("rsna", tmp_path, split="paper", task="classification").frame
    assert masks["fraction"].equals(frame["fraction"])
    used = frame["id"][frame["fraction"] <= 0.1]
    assert set(used) == set(train.sample(frac=0.1, random_state=42)["id"])
    with pytest.raises(DatasetError, match=r"task 'detection', expected one of classification, segmentation"):
        embedcache.load_dataset("rsna", tmp_path, task="detection")


def test_converted_images_and_absent_ones(tmp_path: Path) -> None:
    rsna(tmp_path, suffix=".png")
    (tmp_path / f"stage_2_train_images/{exam(3)}.png").unlink()
    built = build_dataset("rsna", tmp_path)
    assert len(built.manifest) == N - 1
    assert built.absent == (f"stage_2_train_images/{exam(3)}.dcm",)
    assert built.manifest.frame["image"].str.endswith(".png").all()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda root: (root / LABELS).write_text("patientId,x,y,width,Target\n"),
            r"train_labels\.csv: no column height",
        ),
        (
            lambda root: (root / LABELS).write_text("patientId,x,y,width,height,Target\na,1,2,3,4,1\na,,,,,0\n"),
            "rows of 'a' differ in target",
        ),
        (
            lambda root: (root / LABELS).write_text("patientId,x,y,width,height,Target\na,,,,,1\n"),
            "Target 1 and no box: 'a'",
        ),
        (
            lambda root: (root / LABELS).write_text("patientId,x,y,width,height,Target\na,1,2,3,4,2\n"),
            "Target is neither 0 nor 1 for 'a'",
        ),
        (
            lambda root: (root / LABELS).write_text("patientId,x,y,width,height,Target\na,1,2,-3,4,1\n"),
            r"train_labels\.csv: exam a: box 1 .* expected a width and a height above 0",
        ),
        (lambda root: mapping(root, 10), r"no entry for .* and 45 more; download the mapping again"),
        (lambda root: (root / MAPPING).write_text("[]"), "not RSNA's mapping"),
        (lambda root: (root / MAPPING).write_text('[{"img_id": 3}]'), "not RSNA's mapping"),
        (
            lambda root: (root / "stage_2_detailed_class_info.csv").write_text(f"patientId,class\n{exam(0)},Odd\n"),
            "class 'Odd', expected one of Normal",
        ),
    ],
)
def test_files_that_are_not_as_published(tmp_path: Path, break_it, message: str) -> None:
    break_it(rsna(tmp_path))
    with pytest.raises(ManifestError, match=message):
        embedcache.load_dataset("rsna", tmp_path)


def test_options_of_others_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="rsna has no option 'uncertain'; it has mapping, headers"):
        embedcache.load_dataset("rsna", rsna(tmp_path), uncertain="ones")
    with pytest.raises(DatasetError, match=r"none\.json: not there"):
        embedcache.load_dataset("rsna", tmp_path, mapping=tmp_path / "none.json")
