"""Datasets of no official layout, and what all layouts share: roots, splits, twins, absences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import embedcache
from embedcache.data import files
from embedcache.data.datasets.layout import Asked, Draft, Layout, build
from embedcache.data.datasets.load import build_dataset
from embedcache.data.datasets.places import Images
from embedcache.data.labels import LabelSet
from embedcache.errors import DatasetError, ManifestError, SettingsError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_any_table_with_columns_of_other_names(tmp_path: Path) -> None:
    n = 200
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"key": [f"{k:03d}" for k in range(n)], "file": [f"i/{k}.png" for k in range(n)], "tb": rng.integers(0, 2, n)}
    )
    touch(tmp_path, *frame["file"])
    frame.to_csv(tmp_path / "mine.csv", index=False)
    columns = {"id": "key", "image": "file", "patient": "key", "label.tb": "tb"}
    manifest = embedcache.load_dataset("table", tmp_path, columns=columns, valid=0.2, test=0.3)
    assert manifest.audit(files=False).n_rows == {"train": 100, "valid": 40, "test": 60}
    shares = manifest.frame.groupby("split")["label.tb"].mean()
    assert shares.max() - shares.min() < 0.02
    train = manifest.in_split("train")
    for fraction, count in ((0.01, 4), (0.1, 10), (1.0, 100)):  # at least two of each class
        assert manifest.in_fraction(fraction).sum() == count
        assert not (manifest.in_fraction(fraction) & ~train).any()
    assert (
        embedcache.load_dataset("table", tmp_path, columns=columns, seed=1)
        .frame["split"]
        .ne(manifest.frame["split"])
        .any()
    )


def test_a_table_keeps_its_own_splits(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png")
    (tmp_path / "mine.csv").write_text("id,image,split,label.y\na,a.png,test,1\nb,b.png,train,0\n")
    assert embedcache.load_dataset("table", tmp_path).frame["split"].tolist() == ["test", "train"]
    (tmp_path / "other.csv").write_text("id,image\na,a.png\n")
    with pytest.raises(DatasetError, match=r"several tables \(mine\.csv, other\.csv\); name one with --table"):
        embedcache.load_dataset("table", tmp_path)
    assert len(embedcache.load_dataset("table", tmp_path, table=tmp_path / "other.csv")) == 1
    with pytest.raises(SettingsError, match="no label 'z' to balance by; there are y"):
        embedcache.load_dataset("table", tmp_path, table=tmp_path / "mine.csv", balance="z")


def test_a_table_keeps_its_own_fractions_and_is_not_called_published(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png")
    (tmp_path / "mine.csv").write_text("id,image,split,fraction\na,a.png,test,\nb,b.png,train,0.1\n")
    manifest = embedcache.load_dataset("table", tmp_path)
    assert (manifest.name, manifest.about.split_rule) == ("mine", "")
    assert manifest.in_fraction(0.1).tolist() == [False, True]
    assert any("patients unknown" in note for note in manifest.about.notes)
    manifest.write(tmp_path / "m.parquet")  # beside the table, which is read again all the same
    assert len(embedcache.load_dataset("table", tmp_path)) == 2


def test_a_study_stays_together_where_some_of_its_rows_lack_the_patient(tmp_path: Path) -> None:
    n = 200
    frame = pd.DataFrame({"id": range(n), "image": [f"{k}.png" for k in range(n)], "study": [k // 2 for k in range(n)]})
    frame["patient"] = [f"p{k // 4}" if k % 2 else "" for k in range(n)]
    touch(tmp_path, *frame["image"])
    frame.to_csv(tmp_path / "t.csv", index=False)
    report = embedcache.load_dataset("table", tmp_path).audit(files=False)
    assert report.split_rule == "exam"
    assert (report.n_shared["study"], report.n_shared["patient"]) == (0, 0)


@pytest.mark.parametrize("splits", [False, True])
def test_a_folder_for_each_class(tmp_path: Path, splits: bool) -> None:
    parts = ("train/", "val/", "test/") if splits else ("",)
    touch(
        tmp_path, *(f"{part}{name}/{k}.png" for part in parts for name in ("normal", "tb", "other") for k in range(10))
    )
    manifest = embedcache.load_dataset("folder", tmp_path)
    assert manifest.label_sets == [LabelSet("class", "multi-class", ("class",), ("normal", "other", "tb"))]
    assert manifest.frame["id"].is_unique
    if splits:
        assert manifest.audit(files=False).n_rows == {"train": 30, "valid": 30, "test": 30}
    assert manifest.frame["label.class"].value_counts().nunique() == 1


def test_folders_that_are_no_classes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "sibling/1.png", "other/2.png")
    with pytest.raises(DatasetError, match=r"empty: no image in it\. Expected:"):
        embedcache.load_dataset("folder", tmp_path / "empty")  # and not the folders around it
    mixed, single, linked = tmp_path / "mixed", tmp_path / "single", tmp_path / "linked"
    touch(mixed, "train/a/1.png", "test/a/2.png", "unlabelled/3.png")
    with pytest.raises(DatasetError, match=r"folders of splits \(test, train\) and others \(unlabelled\) side by side"):
        embedcache.load_dataset("folder", mixed)
    touch(single, "ds/a/1.png", "ds/b/2.png")
    with pytest.raises(DatasetError, match="one folder of a class, ds, expected two"):
        embedcache.load_dataset("folder", single)
    touch(linked, "a/1.png", "b/2.png")
    (linked / "c").symlink_to(tmp_path / "sibling")
    with pytest.raises(DatasetError, match="linked/c: a link to a place outside ROOT"):
        embedcache.load_dataset("folder", linked)


def test_suffixes_in_capitals_count(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.PNG", "b/2.JPG")
    assert len(embedcache.load_dataset("folder", tmp_path)) == 2


def test_images_with_texts_beside_them(tmp_path: Path) -> None:
    touch(tmp_path, "a/x.png", "a/y.jpg", "b/x.png")
    (tmp_path / "a/x.txt").write_bytes(b"\xef\xbb\xbfOne.\r\n")
    (tmp_path / "b/x.txt").write_text("Two.")
    manifest = embedcache.load_dataset("pairs", tmp_path)
    assert dict(zip(manifest.frame["id"], manifest.frame["report"], strict=True)) == {
        "a/x.png": "One.\r\n", "a/y.jpg": "", "b/x.png": "Two.",
    }  # fmt: skip
    assert "1 images have no text beside them, such as a/y.jpg" in manifest.about.notes
    (tmp_path / "b/x.txt").write_bytes(b"\xff")
    with pytest.raises(ManifestError, match=r"x\.txt: not UTF-8 at byte 0"):
        embedcache.load_dataset("pairs", tmp_path)


# what all layouts share


def layout(frame: pd.DataFrame, **draft: object) -> Layout:
    return Layout(
        "made", "a made dataset", "ROOT/\n  mark.csv\n", ("mark.csv",), lambda root, asked: Draft(frame.copy(), **draft)
    )


ASKED = Asked("patient", "", 0, 0.25, 0.25, {})


def made(root: Path, n: int = 40, **columns: object) -> pd.DataFrame:
    root.mkdir(exist_ok=True)
    frame = pd.DataFrame({"id": [f"i{k}" for k in range(n)], "image": [f"i{k}.png" for k in range(n)], **columns})
    touch(root, "mark.csv", *frame["image"])
    return frame


def test_official_test_rows_stay_and_their_patients_leave_training(tmp_path: Path) -> None:
    frame = made(tmp_path, patient=[f"p{k // 2}" for k in range(40)])
    official = np.array(["test" if k < 5 else "" for k in range(40)], object)  # half of p2's images
    built = build(layout(frame, official=official), tmp_path, ASKED)
    split = built.manifest.frame.set_index("id")["split"]
    assert (split[["i0", "i1", "i2", "i3", "i4"]] == "test").all()
    assert split["i5"] == ""
    assert set(split[6:]) == {"train", "valid"}
    assert not built.manifest.audit(files=False).leaks
    assert "1 rows have no split, as their patients are in the official test list" in built.manifest.about.notes


def test_rows_that_repeat_another_are_left_out_and_told(tmp_path: Path) -> None:
    frame = made(tmp_path, patient=[f"p{k}" for k in range(40)])
    twice = pd.concat([frame[:3], frame])
    official = np.array(["test"] * 3 + ["test"] * 3 + [""] * 34 + ["test"] * 3, object)
    built = build(layout(twice, official=official), tmp_path, ASKED)
    assert len(built.manifest) == 40
    in_test = built.manifest.frame["id"][built.manifest.in_split("test")]
    assert set(in_test) == {"i0", "i1", "i2", "i37", "i38", "i39"}
    with pytest.raises(ManifestError, match="rows under one id that differ: 'i0'"):
        build(layout(twice, official=np.array([""] * 3 + ["test"] * 40, object)), tmp_path, ASKED)
    assert any("3 rows repeat another and were left out, such as i0" in note for note in built.manifest.about.notes)
    frame.loc[1, "id"] = "i0"
    with pytest.raises(ManifestError, match="made: rows under one id that differ: 'i0'"):
        build(layout(frame), tmp_path, ASKED)


def test_multi_label_splits_are_balanced_by_the_rarest(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = {
        f"label.{name}": (rng.random(2000) < p).astype(float) for name, p in (("a", 0.5), ("b", 0.2), ("c", 0.02))
    }
    frame = made(tmp_path, 2000, **labels)
    sets = (LabelSet("three", "multi-label", ("a", "b", "c")),)
    built = build(layout(frame, label_sets=sets), tmp_path, ASKED)
    of_rare = built.manifest.frame.groupby("split")["label.c"].sum()
    assert abs(of_rare["test"] - of_rare.sum() / 4) <= 1


def test_the_wrong_folder_is_told_with_the_layout(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "holiday.jpg").touch()
    with pytest.raises(
        DatasetError, match=r"empty: not a folder of a made dataset: mark\.csv .* holds holiday\.jpg.*\nROOT/"
    ):
        build(layout(pd.DataFrame()), tmp_path / "empty", ASKED)
    with pytest.raises(DatasetError, match="no folder there"):
        build(layout(pd.DataFrame()), tmp_path / "nowhere", ASKED)
    for name in ("one", "two"):
        made(tmp_path / name)
    with pytest.raises(DatasetError, match=r"several folders of a made dataset lie in it \(one, two\)"):
        build(layout(pd.DataFrame()), tmp_path, ASKED)


def test_one_level_up_only_from_a_folder_of_the_dataset(tmp_path: Path) -> None:
    frame = made(tmp_path / "made")
    for name in ("images", "strange"):
        (tmp_path / "made" / name).mkdir()
    own = replace(layout(frame), folders=("image*",))
    built = build(own, tmp_path / "made" / "images", ASKED)
    assert built.manifest.root.name == "made"
    assert "the dataset was found one level up, in made" in built.manifest.about.notes
    with pytest.raises(DatasetError, match="not a folder of a made dataset"):
        build(own, tmp_path / "made" / "strange", ASKED)


def test_links_out_of_the_root_and_folders_that_cannot_be_listed(tmp_path: Path, monkeypatch) -> None:
    touch(tmp_path / "disk", "0.png", "1.png")
    (tmp_path / "made").mkdir()
    touch(tmp_path / "made", "mark.csv")
    (tmp_path / "made" / "images").symlink_to(tmp_path / "disk")
    frame = pd.DataFrame({"id": ["0", "1"], "image": ["images/0.png", "images/1.png"]})
    with pytest.raises(DatasetError, match="made/images: a link to a place outside ROOT, where stage one"):
        build(layout(frame), tmp_path / "made", ASKED)

    def refuse(folder: object) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.os, "listdir", refuse)
    with pytest.raises(DatasetError, match=r"cannot be listed \(Permission denied\)"):
        files.names_in(tmp_path)


def test_of_several_files_of_a_name_the_official_one_counts(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.png", "images-224/a.png", "images-224/b.PNG", "x/y/c.png", "x/c.png")
    notes: list[str] = []
    images = Images(tmp_path)
    located = images.locate(pd.Series(["a.png", "b.png", "c.png", "d.png"]), expected="images/{}", notes=notes)
    assert located.tolist() == ["images/a.png", "images-224/b.PNG", "x/c.png", "images/d.png"]
    assert notes[0].startswith("2 names of images are there more than once")
    assert images.unlisted(located) == ["images-224/a.png", "x/y/c.png"]


def test_images_that_a_rule_leaves_out_are_not_extra(tmp_path: Path) -> None:
    frame = made(tmp_path, 10)
    touch(tmp_path, "stray.png", "notes")
    built = build(layout(frame[:8], aside=["i8.png", "i9.png"]), tmp_path, ASKED)
    assert built.extra == ("stray.png",)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rsna", {"mapping": 5}, "mapping 5, expected a path"),
        ("table", {"columns": "x=y"}, "columns 'x=y', expected <ours>: <theirs>"),
        ("rsna", {"headers": "yes"}, "headers 'yes', expected true or false"),
    ],
)
def test_options_of_another_kind_are_refused(tmp_path: Path, name: str, options: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        embedcache.load_dataset(name, tmp_path, **options)
    with pytest.raises(SettingsError, match="seed -1, expected 0 or more"):
        embedcache.load_dataset(name, tmp_path, seed=-1)


def test_a_split_that_is_not_published(tmp_path: Path) -> None:
    frame = made(tmp_path)
    with pytest.raises(DatasetError, match="made: no published split is known for it; use the split 'patient'"):
        build(layout(frame), tmp_path, Asked("paper", "", 0, 0.1, 0.2, {}))


def test_unknown_names_are_told_with_those_that_come_close(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"no dataset 'chexprt'; did you mean 'chexpert'\? There are mimic-cxr, chexpert"
    ):
        build_dataset("chexprt", tmp_path)
