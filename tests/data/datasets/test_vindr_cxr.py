"""VinDr-CXR as PhysioNet has it and as Kaggle's VinBigData: three radiologists, a consensus, rules of agreement."""

from __future__ import annotations

import gzip
import importlib.util
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from embedcache.data.datasets.layout import Asked, Built, build
from embedcache.data.datasets.vindr_cxr import LAYOUT
from embedcache.errors import DatasetError, ManifestError, SettingsError

N_TRAIN, N_TEST = 40, 10
# in the order of the official tables
NAMES = [
    "Aortic enlargement",
    "Atelectasis",
    "Calcification",
    "Cardiomegaly",
    "Clavicle fracture",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Enlarged PA",
    "ILD",
    "Infiltration",
    "Lung Opacity",
    "Lung cavity",
    "Lung cyst",
    "Mediastinal shift",
    "Nodule/Mass",
    "Pleural effusion",
    "Pleural thickening",
    "Pneumothorax",
    "Pulmonary fibrosis",
    "Rib fracture",
    "Other lesion",
    "COPD",
    "Lung tumor",
    "Pneumonia",
    "Tuberculosis",
    "Other diseases",
    "No finding",
]
TRAIN, TEST = "annotations/image_labels_train.csv", "annotations/image_labels_test.csv"


def image(part: str, k: int) -> str:
    return f"{'0' if part == 'train' else 'f'}{k:031x}"


def votes(k: int) -> int:
    """How many of the three radiologists see the one finding of a training image: 0 to 3."""
    return k % 4


def finding(k: int) -> str:
    return ("Nodule/Mass", "Cardiomegaly", "Other diseases")[k % 3]


def line(*lead: str, found: str) -> str:
    return ",".join([*lead, *("1" if name == found else "0" for name in NAMES)])


def vindr(root: Path, *, radiologist: str = "rad_id", suffix: str = ".dicom") -> Path:
    (root / "annotations").mkdir(parents=True)
    train = [f"image_id,{radiologist},{','.join(NAMES)}"]
    for k in range(N_TRAIN):
        for r in range(3):
            train.append(line(image("train", k), f"R{8 + r}", found=finding(k) if r < votes(k) else "No finding"))
    test = [f"image_id,{','.join(NAMES)}".replace("Other diseases", "Other disease")]
    test += [line(image("test", k), found=("No finding", finding(k))[k % 2]) for k in range(N_TEST)]
    (root / TRAIN).write_text("\n".join(train) + "\n")
    (root / TEST).write_text("\n".join(test) + "\n")
    for part, n in (("train", N_TRAIN), ("test", N_TEST)):
        (root / part).mkdir()
        for k in range(n):
            (root / part / f"{image(part, k)}{suffix}").touch()
    return root


def kaggle(root: Path) -> Path:
    """The same votes on Kaggle's 14 findings; one of the radiologists draws two boxes."""
    (root / "train").mkdir(parents=True)
    rows = ["image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max"]
    for k in range(N_TRAIN):
        for r in range(3):
            seen = r < votes(k)
            box = f"{image('train', k)},Nodule/Mass,8,R{8 + r},691.0,1375.0,1653.0,1831.0"
            rows += [box] * (1 + (r == 0)) if seen else [f"{image('train', k)},No finding,14,R{8 + r},,,,"]
        (root / "train" / f"{image('train', k)}.dicom").touch()
    (root / "test").mkdir()
    (root / "test" / f"{image('test', 0)}.dicom").touch()
    (root / "train.csv").write_text("\n".join(rows) + "\n")
    return root


def built(root: Path, **options: object) -> Built:
    return build(LAYOUT, root, Asked("patient", "", 0, 0.1, 0.2, options))


def test_images_labels_and_the_official_test_list(tmp_path: Path) -> None:
    made = built(vindr(tmp_path))
    manifest, frame = made.manifest, made.manifest.frame.set_index("id")
    assert (len(manifest), made.absent, made.extra) == (N_TRAIN + N_TEST, (), ())
    assert frame.loc[image("train", 3), "image"] == f"train/{image('train', 3)}.dicom"
    assert set(frame.index[frame["split"] == "test"]) == {image("test", k) for k in range(N_TEST)}
    assert set(frame["split"]) == {"train", "valid", "test"}
    assert (frame["view"] == "PA").all()
    assert (frame["patient"] == "").all()
    assert manifest.about.split_rule == "exam"
    assert manifest.tasks == {"vindr-cxr": "multi-label", "No finding": "binary"}
    assert len(manifest.label_sets[0].labels) == 27
    assert frame.loc[image("test", 5), ["label.Other diseases", "label.No finding"]].tolist() == [1, 0]
    assert frame.loc[image("test", 0), ["label.Nodule/Mass", "label.No finding"]].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("rule", "least", "least_none"), [(None, 2, 2), ("majority", 2, 2), ("any", 1, 3), ("all", 3, 1)]
)
def test_rules_of_agreement(tmp_path: Path, rule: str | None, least: int, least_none: int) -> None:
    frame = built(vindr(tmp_path), agree=rule).manifest.frame.set_index("id")
    for k in range(N_TRAIN):
        row = frame.loc[image("train", k)]
        assert row[f"label.{finding(k)}"] == (votes(k) >= least)
        assert row["label.No finding"] == (3 - votes(k) >= least_none)
        assert row.filter(like="label.").sum() == (votes(k) >= least) + (3 - votes(k) >= least_none)


def test_kaggles_table_gives_the_same_of_its_14_findings(tmp_path: Path) -> None:
    for rule in ("majority", "any", "all"):
        made = built(kaggle(tmp_path / rule), agree=rule)
        frame = made.manifest.frame.set_index("id")
        least = {"majority": 2, "any": 1, "all": 3}[rule]
        assert [frame.loc[image("train", k), "label.Nodule/Mass"] for k in range(N_TRAIN)] == [
            votes(k) >= least for k in range(N_TRAIN)
        ]
    assert made.extra == (f"test/{image('test', 0)}.dicom",)
    assert made.manifest.tasks == {"vinbigdata": "multi-label", "No finding": "binary"}
    assert len(made.manifest.label_sets[0].labels) == 14
    assert any("no official test list" in note for note in made.manifest.about.notes)
    assert made.manifest.frame["id"].tolist() == [image("train", k) for k in range(N_TRAIN)]


def test_other_spellings_and_other_files(tmp_path: Path) -> None:
    """'rad_ID', a byte order mark, Windows line ends, gzip, converted images, the tables beside the folders."""
    vindr(tmp_path, radiologist="rad_ID", suffix=".png")
    plain = built(tmp_path).manifest.frame
    text = (tmp_path / TRAIN).read_text()
    (tmp_path / "image_labels_train.csv.gz").write_bytes(
        gzip.compress(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    )
    shutil.move(tmp_path / TEST, tmp_path / "image_labels_test.csv")
    shutil.rmtree(tmp_path / "annotations")
    frame = built(tmp_path).manifest.frame
    assert frame.equals(plain)
    assert frame["image"].str.endswith(".png").all()


def test_a_radiologist_who_leaves_a_label_blank_does_not_vote_on_it(tmp_path: Path) -> None:
    path = vindr(tmp_path) / TRAIN
    lines = path.read_text().splitlines()
    blank = [row.split(",") for row in lines[1:4]]  # of the first image, which all find normal
    blank[0][-1] = blank[1][-1] = ""
    for row in blank:
        row[2] = ""
    path.write_text("\n".join([lines[0], *(",".join(row) for row in blank), *lines[4:]]) + "\n")
    row = built(tmp_path).manifest.frame.set_index("id").loc[image("train", 0)]
    np.testing.assert_equal(row[["label.No finding", "label.Aortic enlargement"]].astype(float).to_numpy(), [1, np.nan])


def test_without_the_test_table(tmp_path: Path) -> None:
    (vindr(tmp_path) / TEST).unlink()
    made = built(tmp_path)
    assert len(made.manifest) == N_TRAIN
    assert len(made.extra) == N_TEST
    assert any("image_labels_test.csv is not there" in note for note in made.manifest.about.notes)
    assert set(made.manifest.frame["split"]) == {"train", "valid", "test"}


def test_images_that_are_absent_are_left_out(tmp_path: Path) -> None:
    (vindr(tmp_path) / f"test/{image('test', 4)}.dicom").unlink()
    made = built(tmp_path)
    assert made.absent == (f"test/{image('test', 4)}.dicom",)
    assert image("test", 4) not in set(made.manifest.frame["id"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Nodule/Mass", "Nodule", "no column Nodule/Mass; it has image_id, rad_id, Aortic"),
        ("rad_id", "reader", "no column rad_id or rad_ID; it has image_id, reader"),
        (",R8,0", ",R8,3", "column Aortic enlargement, row 1: 3, expected 0 or 1"),
        (",R8,0", ",R8,yes", "column Aortic enlargement, row 1: 'yes', expected a number"),
    ],
)
def test_a_table_that_is_not_the_official_one(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = vindr(tmp_path) / TRAIN
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ManifestError, match=f"image_labels_train.csv: {re.escape(message)}"):
        built(tmp_path)


def test_votes_that_stand_twice(tmp_path: Path) -> None:
    path = vindr(tmp_path) / TRAIN
    lines = path.read_text().splitlines()
    plain = built(tmp_path).manifest.frame
    path.write_text("\n".join([*lines, lines[1]]) + "\n")
    assert built(tmp_path).manifest.frame.equals(plain)
    path.write_text("\n".join([*lines, line(image("train", 0), "R8", found="COPD")]) + "\n")
    with pytest.raises(ManifestError, match=f"a radiologist who labels an image twice: .*{image('train', 0)}"):
        built(tmp_path)
    path.write_text("\n".join(lines) + "\n")
    test = tmp_path / TEST
    test.write_text(test.read_text() + line(image("test", 0), found="COPD") + "\n")
    with pytest.raises(
        ManifestError, match=f"image_labels_test.csv: rows of .*{image('test', 0)}.* differ in label.COPD"
    ):
        built(tmp_path)


def test_a_class_that_kaggle_does_not_have(tmp_path: Path) -> None:
    path = kaggle(tmp_path) / "train.csv"
    path.write_text(path.read_text().replace("Nodule/Mass", "Nodule", 1))
    with pytest.raises(ManifestError, match=r"train\.csv: class_name 'Nodule', expected one of Aortic enlargement"):
        built(tmp_path)


def test_the_version_folder_or_the_one_above(tmp_path: Path) -> None:
    vindr(tmp_path / "1.0.0")
    for named in (tmp_path, tmp_path / "1.0.0/train"):
        manifest = built(named).manifest
        assert len(manifest) == N_TRAIN + N_TEST
        assert manifest.root.name == "1.0.0"


def test_sex_and_age_from_headers_leave_the_view(tmp_path: Path) -> None:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    vindr(tmp_path)
    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = file.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    file.PatientSex, file.PatientAge = "F", "061Y"
    file.save_as(tmp_path / f"train/{image('train', 2)}.dicom", enforce_file_format=True)
    manifest = built(tmp_path, headers=True).manifest
    frame = manifest.frame.set_index("id")
    assert frame.loc[image("train", 2), ["view", "sex", "age"]].tolist() == ["PA", "F", 61]
    assert (frame["view"] == "PA").all()
    assert any("no DICOM header" in note for note in manifest.about.notes)


def test_options_and_splits_that_it_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="agree 'most', expected one of majority, any, all"):
        LAYOUT.check(None, {"agree": "most"})
    with pytest.raises(DatasetError, match="vindr-cxr: no published split"):
        build(LAYOUT, vindr(tmp_path), Asked("paper", "", 0, 0.1, 0.2, {}))


def test_the_real_table_of_kaggle(tmp_path: Path) -> None:
    """As torchxrayvision ships it, where it is installed."""
    found = importlib.util.find_spec("torchxrayvision")
    source = Path(found.origin).parent / "data" / "vinbigdata-train.csv.gz" if found and found.origin else None
    if source is None or not source.is_file():
        pytest.skip("torchxrayvision, which ships vinbigdata-train.csv.gz, is not installed")
    (tmp_path / "train.csv.gz").symlink_to(source)
    frame = LAYOUT.read(tmp_path, Asked("patient", "", 0, 0.1, 0.2, {})).frame
    assert len(frame) == 15_000
    labels = frame[["label.No finding", "label.Aortic enlargement", "label.Pneumothorax"]]
    assert labels.sum().tolist() == [10_606, 2_346, 58]
