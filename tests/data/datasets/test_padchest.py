"""PadChest in its official form: a column without a name, terms in lists, reports that a study's images share."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import re
from pathlib import Path

import numpy as np
import pytest

from embedcache.data.datasets.layout import Asked, Built, build
from embedcache.data.datasets.padchest import LAYOUT
from embedcache.errors import DatasetError, ManifestError

TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
ASKED = Asked("patient", "", 0, 0.1, 0.2, {})
# the first, a row number, has no name
COLUMNS = [
    "",
    "ImageID",
    "ImageDir",
    "StudyDate_DICOM",
    "StudyID",
    "PatientID",
    "PatientBirth",
    "PatientSex_DICOM",
    "ViewPosition_DICOM",
    "Projection",
    "MethodProjection",
    "Pediatric",
    "Modality_DICOM",
    "Manufacturer_DICOM",
    "PhotometricInterpretation_DICOM",
    "PixelRepresentation_DICOM",
    "PixelAspectRatio_DICOM",
    "SpatialResolution_DICOM",
    "BitsStored_DICOM",
    "WindowCenter_DICOM",
    "WindowWidth_DICOM",
    "Rows_DICOM",
    "Columns_DICOM",
    "XRayTubeCurrent_DICOM",
    "Exposure_DICOM",
    "ExposureInuAs_DICOM",
    "ExposureTime",
    "RelativeXRayExposure_DICOM",
    "ReportID",
    "Report",
    "MethodLabel",
    "Labels",
    "Localizations",
    "LabelsLocalizationsBySentence",
    "labelCUIS",
    "LocalizationsCUIS",
]
N_STUDIES = 40


def image(study: int, k: int) -> str:
    return f"2168401113669640{study:04d}_0{k}-059-001.png"


def rows(terms: dict[int, str] | None = None, **changed: str) -> list[dict[str, str]]:
    """Two images of each study, two studies of each patient."""
    made = []
    for study in range(N_STUDIES):
        for k in (0, 1):
            row = dict.fromkeys(COLUMNS, "None")
            row |= {
                "": str(len(made)),
                "ImageID": image(study, k),
                "ImageDir": str(study % 3),
                "StudyDate_DICOM": "20140915",
                "StudyID": f"21684011136696401{study:04d}",
                "PatientID": f"8398604886942923{study // 2:04d}",
                "PatientBirth": "1930.0",
                "PatientSex_DICOM": "FM"[study % 2],
                "Projection": ("PA", "L")[k],
                "Pediatric": "No",
                "Manufacturer_DICOM": "PhilipsMedicalSystems",
                "Report": f" sin hallazg signific , estudi {study} .",
                "MethodLabel": ("Physician", "RNN_model")[study % 2],
                "Labels": (terms or {}).get(study, ("['normal']", "['pleural effusion', ' pneumonia']")[study % 2]),
            }
            made.append(row | changed)
    return made


def padchest(
    root: Path, lines: list[dict[str, str]] | None = None, *, flat: bool = False, zipped: bool = False
) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    lines = rows() if lines is None else lines
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    if zipped:
        (root / f"{TABLE}.gz").write_bytes(gzip.compress(text.getvalue().encode()))
    else:
        (root / TABLE).write_text(text.getvalue())
    for line in lines:
        path = root / ("images" if flat else line["ImageDir"]) / line["ImageID"]
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return root


def built(root: Path) -> Built:
    return build(LAYOUT, root, ASKED)


def test_images_patients_reports_and_labels(tmp_path: Path) -> None:
    made = built(padchest(tmp_path))
    manifest, frame = made.manifest, made.manifest.frame.set_index("id")
    assert (len(manifest), made.absent, made.extra) == (2 * N_STUDIES, (), ())
    row = frame.loc[image(5, 1)]
    assert row["image"] == f"2/{image(5, 1)}"
    assert row[["patient", "study", "view", "sex", "age", "acquired", "site", "source", "manufacturer"]].tolist() == [
        "83986048869429230002", "216840111366964010005", "L", "M", 84.0, "2014-09-15", "san-juan", "RNN_model",
        "PhilipsMedicalSystems",
    ]  # fmt: skip
    assert row["report"] == "sin hallazg signific , estudi 5 ."
    assert row["report_id"] == row["study"]
    assert row["terms"] == "pleural effusion;pneumonia"
    assert row[["label.pleural effusion", "label.pneumonia", "label.cardiomegaly", "label.normal"]].tolist() == [
        1,
        1,
        0,
        0,
    ]
    assert frame.loc[image(4, 0), "label.normal"] == 1
    assert manifest.tasks == {"padchest": "multi-label", "normal": "binary"}
    assert manifest.about.patients_from == "padchest"
    assert (manifest.frame.groupby("patient")["split"].nunique() == 1).all()
    assert set(manifest.frame["split"]) == {"train", "valid", "test"}


def test_flat_folders_and_gzip(tmp_path: Path) -> None:
    made = built(padchest(tmp_path, flat=True, zipped=True))
    assert made.manifest.frame["image"][0] == f"images/{image(0, 0)}"
    assert made.absent == ()


@pytest.mark.parametrize(
    ("terms", "present"),
    [
        ("['laminar atelectasis']", {"laminar atelectasis", "atelectasis"}),
        ("['air bronchogram', '']", {"consolidation", "alveolar pattern", "infiltrates"}),
        ("['ground glass pattern', ' unchanged']", {"interstitial pattern", "infiltrates"}),
        ("['hydropneumothorax']", {"pneumothorax", "pleural effusion"}),
        ("[' normal']", {"normal"}),
        ("['normal', 'unchanged']", {"normal"}),
        ("['nodule', ' normal']", {"nodule"}),
        ("['suboptimal study', 'NSG tube']", {"NSG tube"}),
        ("['goiter']", set()),
        (
            "['apical pleural thickening', 'apical pleural thickening']",
            {"apical pleural thickening", "pleural thickening"},
        ),
    ],
)
def test_a_label_counts_where_one_of_its_finer_terms_stands(tmp_path: Path, terms: str, present: set[str]) -> None:
    labels = built(padchest(tmp_path, rows({7: terms}))).manifest.frame.set_index("id").filter(like="label.")
    row = labels.loc[image(7, 0)]
    assert {name.removeprefix("label.") for name in row.index[row == 1]} == present
    assert row.notna().all()


@pytest.mark.parametrize(
    "terms",
    [
        "nan",
        "",
        "[]",
        "['']",
        "['unchanged']",
        "['', 'unchanged']",
        "['suboptimal study']",
        "['exclude']",
        "['cardiomegaly', ' exclude']",
    ],
)
def test_terms_that_say_nothing_leave_the_labels_blank(tmp_path: Path, terms: str) -> None:
    manifest = built(padchest(tmp_path, rows({7: terms}))).manifest
    labels = manifest.frame.set_index("id").filter(like="label.")
    assert labels.loc[[image(7, 0), image(7, 1)]].isna().to_numpy().all()
    assert labels.drop(index=[image(7, 0), image(7, 1)]).notna().to_numpy().all()
    assert any(note.startswith("2 images have no label") for note in manifest.about.notes)


def test_terms_that_are_no_list_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=rf"{TABLE}: column Labels, row 15: 'cardiomegaly', expected a list"):
        built(padchest(tmp_path, rows({7: "cardiomegaly"})))


def test_a_study_with_two_reports_keeps_both(tmp_path: Path) -> None:
    lines = rows()
    lines[11]["Report"] = " otro texto ."
    manifest = built(padchest(tmp_path, lines)).manifest
    frame = manifest.frame.set_index("id")
    assert frame.loc[[image(5, 0), image(5, 1)], "report_id"].tolist() == [image(5, 0), image(5, 1)]
    assert frame.loc[image(5, 1), "report"] == "otro texto ."
    assert frame.loc[image(6, 1), "report_id"] == frame.loc[image(6, 1), "study"]
    assert "1 studies have several reports: each of their images keeps its own" in manifest.about.notes


def test_what_is_not_known_is_blank(tmp_path: Path) -> None:
    lines = rows()
    lines[0] |= {"PatientBirth": "", "PatientSex_DICOM": "O"}
    lines[1] |= {"PatientBirth": "nan", "PatientSex_DICOM": "nan"}
    lines[2] |= {"PatientBirth": "1800.0", "StudyDate_DICOM": "nan", "Report": " nan"}
    lines[3] |= {"PatientBirth": "1800.0", "Report": "nan"}
    frame = built(padchest(tmp_path, lines)).manifest.frame
    assert np.isnan(frame["age"][:4]).all()
    assert frame["sex"][:2].tolist() == ["", ""]
    assert frame["acquired"][2] == ""
    assert frame["report"][2:4].tolist() == ["", ""]


def test_a_birth_that_is_no_number(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=rf"{TABLE}: column PatientBirth, row 1: 'old', expected a number"):
        built(padchest(tmp_path, rows(PatientBirth="old")))


def test_images_that_are_absent_are_left_out(tmp_path: Path) -> None:
    (padchest(tmp_path) / "1" / image(1, 0)).unlink()
    made = built(tmp_path)
    assert made.absent == (f"1/{image(1, 0)}",)
    assert len(made.manifest) == 2 * N_STUDIES - 1


def test_a_row_twice_counts_once_and_two_rows_of_one_image_are_refused(tmp_path: Path) -> None:
    lines = rows()
    made = built(padchest(tmp_path / "a", [*lines, lines[0] | {"": "999"}]))
    assert len(made.manifest) == 2 * N_STUDIES
    assert any(
        f"1 rows repeat another and were left out, such as {image(0, 0)}" in n for n in made.manifest.about.notes
    )
    with pytest.raises(ManifestError, match=f"rows under one id that differ: .*{image(0, 0)}"):
        built(padchest(tmp_path / "b", [*lines, lines[0] | {"Projection": "AP"}]))


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = padchest(tmp_path) / TABLE
    plain = built(tmp_path).manifest.frame
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert built(tmp_path).manifest.frame.equals(plain)


def test_another_header_names_column_and_file(tmp_path: Path) -> None:
    path = padchest(tmp_path) / TABLE
    path.write_text(path.read_text().replace("Projection,Method", "View,Method", 1))
    with pytest.raises(ManifestError, match=rf"{re.escape(TABLE)}: no column Projection; it has "):
        built(tmp_path)


def test_there_is_no_published_split(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="padchest: no published split"):
        build(LAYOUT, padchest(tmp_path), Asked("paper", "", 0, 0.1, 0.2, {}))


def test_the_real_table(tmp_path: Path) -> None:
    """As torchxrayvision ships it, where it is installed."""
    found = importlib.util.find_spec("torchxrayvision")
    source = Path(found.origin).parent / "data" / f"{TABLE}.gz" if found and found.origin else None
    if source is None or not source.is_file():
        pytest.skip(f"torchxrayvision, which ships {TABLE}.gz, is not installed")
    (tmp_path / source.name).symlink_to(source)
    draft = LAYOUT.read(tmp_path, ASKED)
    frame = draft.frame
    assert (len(frame), frame["patient"].nunique(), frame["study"].nunique()) == (160_861, 67_625, 109_931)
    assert frame["view"].value_counts()[["PA", "L", "AP_horizontal"]].tolist() == [91_728, 49_579, 14_346]
    assert frame["source"].value_counts()["Physician"] == 39_053
    assert frame["sex"].value_counts().to_dict() == {"M": 80_920, "F": 79_919, "": 22}
    assert (frame["report_id"] == frame["study"]).all()
    assert frame["label.normal"].isna().sum() == 6_330
    labels = frame[["label.normal", "label.cardiomegaly", "label.laminar atelectasis", "label.atelectasis"]]
    assert labels.sum().tolist() == [50_395, 15_006, 5_190, 8_961]
