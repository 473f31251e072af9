"""CheXpert, small and in full-size batches, with CheXpert Plus; its test set; the 5x200 list."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import embedcache
from embedcache.data.datasets import chexpert as module
from embedcache.data.datasets.load import build_dataset
from embedcache.data.labels import CHEXPERT_LABELS
from embedcache.errors import DatasetError, ManifestError, SettingsError

HEADER = ",".join(["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT_LABELS])
FIVE = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
PLUS = "df_chexpert_plus_240401.csv"


def table(n_patients: int, *, first: int, part: str, name: str = "CheXpert-v1.0-small") -> pd.DataFrame:
    """Two studies of a patient; the first has a frontal and a lateral image; labels of all kinds."""
    rng = np.random.default_rng(first)
    rows = []
    for patient in range(first, first + n_patients):
        for study, views in ((1, ("view1_frontal", "view2_lateral")), (2, ("view1_frontal",))):
            labels = rng.choice(["1.0", "0.0", "-1.0", ""], 14, p=[0.2, 0.2, 0.1, 0.5])
            if rng.random() < 0.5:  # one of the five findings alone
                labels[:] = ""
                labels[CHEXPERT_LABELS.index(FIVE[patient % 5])] = "1.0"
            for view in views:
                frontal = "frontal" in view
                path = f"{name}/{part}/patient{patient:05d}/study{study}/{view}.jpg"
                rows.append(
                    [
                        path,
                        ("Female", "Male", "Unknown")[patient % 3],
                        str(30 + patient % 50),
                        "Frontal" if frontal else "Lateral",
                        "AP" if frontal else "",
                        *labels,
                    ]
                )
    return pd.DataFrame(rows, columns=HEADER.split(","))


def images(root: Path, frame: pd.DataFrame, under: str | None = None) -> None:
    for path in frame["Path"]:
        below = path.split("/", 1)[1]
        target = root / (below if under is None else f"{under}/{below.split('/', 1)[1]}")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()


def small(root: Path, n: int = 40) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for part, first, n_patients in (("train", 1, n), ("valid", 64541, 5)):
        frame = table(n_patients, first=first, part=part)
        frame.to_csv(root / f"{part}.csv", index=False)
        images(root, frame)
    return root


def test_the_small_download(tmp_path: Path) -> None:
    built = build_dataset("chexpert", small(tmp_path))
    manifest, frame = built.manifest, built.manifest.frame.set_index("id")
    assert (len(manifest), built.absent) == (135, ())
    row = frame.loc["patient00004/study1/view1_frontal.jpg"]
    assert row["image"] == "train/patient00004/study1/view1_frontal.jpg"
    assert row[["patient", "study", "view", "sex", "age"]].tolist() == [
        "patient00004", "patient00004/study1", "AP", "M", 34,
    ]  # fmt: skip
    assert frame.loc["patient00004/study1/view2_lateral.jpg", "view"] == "Lateral"
    assert frame.loc["patient00002/study1/view1_frontal.jpg", "sex"] == ""  # Unknown
    assert (frame["split"][frame["image"].str.startswith("valid/")] == "test").all()
    assert set(frame["split"]) == {"train", "valid", "test"}
    assert not manifest.audit(files=False).leaks
    assert manifest.tasks == {"chexpert": "multi-label"}


@pytest.mark.parametrize(("policy", "uncertain"), [("zeros", 0), ("ones", 1), ("ignore", np.nan)])
def test_uncertain_labels(tmp_path: Path, policy: str, uncertain: float) -> None:
    said = pd.read_csv(small(tmp_path) / "train.csv").set_index("Path")
    frame = embedcache.load_dataset("chexpert", tmp_path, uncertain=policy).frame.set_index("image")
    row = said[said["Fracture"] == -1].index[0]
    np.testing.assert_equal(frame.loc[row.split("/", 1)[1], "label.Fracture"], uncertain)


def test_full_size_batches_with_or_without_a_level_train(tmp_path: Path) -> None:
    whole = table(30, first=1, part="train", name="CheXpert-v1.0")
    valid = table(5, first=64541, part="valid", name="CheXpert-v1.0")
    first = tmp_path / "CheXpert-v1.0 batch 1 (validate & csv)"
    first.mkdir()
    whole.to_csv(first / "train.csv", index=False)
    valid.to_csv(first / "valid.csv", index=False)
    images(tmp_path, valid, "CheXpert-v1.0 batch 1 (validate & csv)/valid")
    images(tmp_path, whole[:50], "CheXpert-v1.0 batch 2 (train 1)")
    images(tmp_path, whole[50:], "CheXpert-v1.0 batch 3 (train 2)/train")
    built = build_dataset("chexpert", tmp_path)
    assert (len(built.manifest), built.absent) == (105, ())
    found = built.manifest.frame.set_index("id")["image"]
    assert found["patient00001/study1/view1_frontal.jpg"].startswith("CheXpert-v1.0 batch 2 (train 1)/patient00001/")
    assert found["patient00030/study1/view1_frontal.jpg"].startswith("CheXpert-v1.0 batch 3 (train 2)/train/patient")
    assert all(built.manifest.path(image).is_file() for image in found)


def test_reports_of_chexpert_plus(tmp_path: Path) -> None:
    frame = pd.read_csv(small(tmp_path) / "train.csv", keep_default_na=False)
    said = frame["Path"].str.split("/", n=1).str[1]
    plus = pd.DataFrame(
        {
            "path_to_image": said,
            "report": "NARRATIVE:\nof " + said.str.rpartition("/")[0] + '\nIMPRESSION:\n1. Clear, "as before".',
            "section_impression": "1. Clear.",
        }
    )[:-6]
    plus.to_csv(tmp_path / PLUS, index=False)
    manifest = embedcache.load_dataset("chexpert", tmp_path)
    rows = manifest.frame.set_index("id")
    assert rows.loc["patient00007/study1/view2_lateral.jpg", "report"].startswith(
        "NARRATIVE:\nof train/patient00007/study1"
    )
    assert rows.loc["patient00007/study1/view2_lateral.jpg", "report_id"] == "patient00007/study1"
    assert f"21 of 135 images have no report in {PLUS}" in manifest.about.notes
    (tmp_path / PLUS).rename(tmp_path / "elsewhere.csv")
    again = embedcache.load_dataset("chexpert", tmp_path, reports=tmp_path / "elsewhere.csv")
    assert again.frame["report"].equals(manifest.frame["report"])


def test_plus_may_list_some_images_of_a_study_only(tmp_path: Path) -> None:
    frame = pd.read_csv(small(tmp_path) / "train.csv", keep_default_na=False)
    said = frame["Path"].str.split("/", n=1).str[1]
    plus = pd.DataFrame({"path_to_image": said, "report": "of " + said.str.rpartition("/")[0]})
    plus = plus[~said.str.contains("lateral")].reset_index(drop=True)
    plus.to_csv(tmp_path / PLUS, index=False)
    rows = embedcache.load_dataset("chexpert", tmp_path).frame.set_index("id")
    both = rows.loc[[f"patient00007/study1/{view}.jpg" for view in ("view1_frontal", "view2_lateral")]]
    assert set(both["report"]) == {"of train/patient00007/study1"}
    assert set(both["report_id"]) == {"patient00007/study1"}
    twice = pd.DataFrame({"path_to_image": said, "report": said})  # another text for each image
    twice.to_csv(tmp_path / PLUS, index=False)
    rows = embedcache.load_dataset("chexpert", tmp_path).frame.set_index("id")
    image = "patient00007/study1/view2_lateral.jpg"
    assert rows.loc[image, ["report", "report_id"]].tolist() == [f"train/{image}", image]


def test_other_labellers(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"drawn by the labels of train\.csv, not by chexbert's"):
        embedcache.load_dataset("chexpert", small(tmp_path / "paper"), split="paper", labels="chexbert")
    frame = pd.read_csv(small(tmp_path) / "train.csv", dtype=str, keep_default_na=False)
    frame["Edema"] = "1.0"
    frame.to_csv(tmp_path / "train_cheXbert.csv", index=False)
    manifest = embedcache.load_dataset("chexpert", tmp_path, labels="chexbert")
    assert (manifest.frame["label.Edema"][manifest.frame["image"].str.startswith("train")] == 1).all()


def published(root: Path, n_valid: int) -> dict[str, pd.DataFrame]:
    """What the published code does, with pandas and NumPy as it calls them."""
    df = pd.read_csv(root / "train.csv")
    filled = df.fillna(dict.fromkeys(CHEXPERT_LABELS, 0))
    filled = filled[filled["Frontal/Lateral"] == "Frontal"]
    aside = []
    for finding in FIVE:
        alone = filled[finding] == 1
        for other in CHEXPERT_LABELS:
            if other not in (finding, "No Finding"):
                alone &= filled[other] == 0
        aside.append(filled[alone].sample(n=min(200, int(alone.sum())), random_state=0))
    df = df[~df["Path"].isin(pd.concat(aside)["Path"])]
    np.random.seed(0)
    ids = np.random.choice(len(df), size=n_valid, replace=False)
    found = {"valid": df.iloc[ids], "train": df.drop(ids, errors="ignore")}
    return {name: part[part["Frontal/Lateral"] == "Frontal"] for name, part in found.items()}


def test_the_published_split_with_its_fault(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "_N_VALID", 300)
    small(tmp_path, n=1500)
    manifest = embedcache.load_dataset("chexpert", tmp_path, split="paper")
    expected = published(tmp_path, 300)
    for name, part in expected.items():
        assert set(manifest.frame["image"][manifest.in_split(name)]) == set(part["Path"].str.split("/", n=1).str[1])
    assert (manifest.frame["view"] == "AP").all()
    assert not any("in no table" in note for note in manifest.about.notes)
    tenth = expected["train"].sample(frac=0.1, random_state=42)
    assert set(manifest.frame["image"][manifest.in_fraction(0.1)]) == set(tenth["Path"].str.split("/", n=1).str[1])
    stayed = set(expected["valid"]["Path"]) & set(expected["train"]["Path"])
    assert len(stayed) > 0.8 * len(expected["valid"])
    report = manifest.audit(files=False)
    assert next(s.n for s in report.shared if (s.kind, s.right) == ("image", "valid")) == len(stayed)
    assert set(manifest.frame["image"][manifest.in_split("test")]) == {
        f"valid/patient{p}/study{s}/view1_frontal.jpg" for p in range(64541, 64546) for s in (1, 2)
    }


@pytest.mark.parametrize("by", ["image", "study"])
def test_the_test_set(tmp_path: Path, by: str) -> None:
    frame = table(6, first=64741, part="test", name="CheXpert-v1.0")
    frame[list(CHEXPERT_LABELS)] = "0"
    frame.loc[frame["Path"].str.contains("64743/study1"), "Edema"] = "1"
    images(tmp_path, frame)
    if by == "image":
        frame["Path"] = frame["Path"].str.removeprefix("CheXpert-v1.0/")
        frame[["Path", *CHEXPERT_LABELS]].to_csv(tmp_path / "test_labels.csv", index=False)
    else:
        frame["Study"] = frame["Path"].str.rpartition("/")[0]
        frame[["Study", *CHEXPERT_LABELS]].drop_duplicates().to_csv(tmp_path / "groundtruth.csv", index=False)
    built = build_dataset("chexpert-test", tmp_path)
    rows = built.manifest.frame.set_index("id")
    assert (len(rows), built.absent) == (18, ())
    assert rows["study"].nunique() == 12
    assert (rows["split"] == "test").all()
    positive = rows["study"] == "patient64743/study1"
    assert rows["label.Edema"].tolist() == positive.astype(float).tolist()
    assert rows.loc["patient64743/study1/view2_lateral.jpg", "view"] == "Lateral"
    assert built.manifest.about.patients_from == "chexpert"


def test_the_list_of_five_by_two_hundred(tmp_path: Path) -> None:
    frame = pd.read_csv(small(tmp_path) / "train.csv", dtype=str, keep_default_na=False)
    frontal = frame[frame["Frontal/Lateral"] == "Frontal"].copy()
    frontal[list(CHEXPERT_LABELS)] = "0.0"
    for k in range(len(frontal)):
        frontal.iloc[k, frontal.columns.get_loc(FIVE[k % 5])] = "1.0"
    frontal.to_csv(tmp_path / "list.csv", index=True)  # GLoRIA's has pandas' row numbers
    with pytest.raises(DatasetError, match=r"no chexpert_5x200\.csv"):
        embedcache.load_dataset("chexpert-5x200", tmp_path)
    manifest = embedcache.load_dataset("chexpert-5x200", tmp_path, list=tmp_path / "list.csv")
    assert manifest.tasks == {"5x200": "multi-class"}
    assert manifest.label_sets[0].classes == FIVE
    assert manifest.label("5x200")[:6].tolist() == [0, 1, 2, 3, 4, 0]
    assert (manifest.frame["split"] == "test").all()


def test_a_path_of_another_form_is_named(tmp_path: Path) -> None:
    path = small(tmp_path) / "valid.csv"
    path.write_text(path.read_text().replace("patient64542/study1/view1", "somebody/1/view1"))
    with pytest.raises(
        ManifestError, match=r"valid\.csv: path .*somebody/1/view1_frontal.jpg', expected \.\.\./patient"
    ):
        embedcache.load_dataset("chexpert", tmp_path)


def test_one_level_too_deep(tmp_path: Path) -> None:
    small(tmp_path / "CheXpert-v1.0-small")
    shutil.rmtree(tmp_path / "CheXpert-v1.0-small/valid")
    manifest = embedcache.load_dataset("chexpert", tmp_path / "CheXpert-v1.0-small/train")
    assert any("one level up, in CheXpert-v1.0-small" in note for note in manifest.about.notes)
    assert any("15 of 135 listed images are absent" in note for note in manifest.about.notes)
