from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from embedcache import Manifest
from embedcache.data.labels import LabelSet
from embedcache.data.manifest import About
from embedcache.errors import InputError, ManifestError, OutputError


def frame(**columns: object) -> pd.DataFrame:
    return pd.DataFrame({"id": ["a", "b", "c"], "image": ["a.png", "b.png", "c.png"], **columns})


def test_parquet_round_trip_keeps_everything(tmp_path: Path) -> None:
    original = Manifest(
        frame(**{"report": ["x", "", "NA"], "label.y": [1, None, 0], "age": [3, 4, 5], "own": ["p", "q", "r"]}),
        name="made",
        root=tmp_path / "images",
    )
    original.write(tmp_path / "manifests" / "m.parquet")
    read = Manifest.read(tmp_path / "manifests" / "m.parquet")
    pd.testing.assert_frame_equal(read.frame, original.frame)
    assert read.name == "made"
    assert read.root.resolve() == (tmp_path / "images").resolve()
    assert read.tasks == {"y": "binary"}


def test_csv_is_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text('\ufeffid,image,report,label.y\n001,1.png,NA,1\nnull,2.png,"two\nlines",\n 3,3.png,,0\n', "utf-8")
    manifest = Manifest.read(path)
    assert manifest.frame["id"].tolist() == ["001", "null", " 3"]
    assert manifest.frame["report"].tolist() == ["NA", "two\nlines", ""]
    np.testing.assert_array_equal(manifest.label("y"), [1, np.nan, 0])
    assert manifest.name == "m"
    assert manifest.root == tmp_path


def test_columns_are_taken_from_others(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text("id,file,tb,report\nx,x.png,1,r\n", "utf-8")
    manifest = Manifest.read(path, columns={"image": "file", "patient": "id", "label.tb": "tb"})
    assert manifest.frame[["id", "image", "patient", "label.tb"]].iloc[0].tolist() == ["x", "x.png", "x", 1.0]
    assert "tb" not in manifest.frame
    with pytest.raises(ManifestError, match="no column tuber; it has id, file, tb, report"):
        Manifest.read(path, columns={"label.tb": "tuber"})


def test_not_utf8_names_line_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes(b"id,image\na,a.png\nb,\xff.png\n")
    with pytest.raises(ManifestError, match=r"not UTF-8 at line 3 \(byte 19\)"):
        Manifest.read(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", b"", "not a readable CSV"),
        ("m.csv", b'id,image\n"a,b\n', "not a readable CSV"),
        ("m.parquet", b"PAR1 cut short", "not a readable Parquet"),
        ("m.xlsx", b"x", "expected .parquet or .csv"),
        ("m.csv", b"id,image\na,a.png,\nb,b.png,\n", "rows have more fields than the 2 of the header"),
        ("m.csv", b"id,image,report,report\na,a.png,x,y\n", "header names report more than once"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ManifestError, match=message):
        Manifest.read(tmp_path / name)


def test_no_manifest_there(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"none\.csv: no manifest there"):
        Manifest.read(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": ["a", "b", "a"]}, r"id 'a' stands in rows 0 and 2"),
        ({"id": ["a", "", "c"]}, "row 1: the id is empty"),
        ({"report_id": ["a", "b", "r\0"], "report": ["x", "y", "z"]}, "row 2: the report_id holds a NUL"),
        ({"id": ["a", "b\0", "c"]}, "row 1: the id holds a NUL"),
        ({"id": [1, 2, 3]}, "row 0, column id: int.*1.*, expected text"),
        ({"report": ["x", "y", "z"], "report_id": ["r", "r", "s"]}, "report_id 'r': more than one text"),
        ({"split": ["train", "test", "dev"]}, "unknown split 'dev', expected train, valid, test"),
        ({"label.y": ["1", "yes", ""]}, "label.y of id 'b' is 'yes', expected 0, 1"),
        ({"label.y": [0.5, 1, 0]}, "label.y of id 'a' is"),
    ],
)
def test_what_a_manifest_refuses(columns: dict, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        Manifest(frame(**columns), name="m", root=".")


def test_missing_columns_are_named() -> None:
    with pytest.raises(ManifestError, match="no column image; it has id"):
        Manifest(pd.DataFrame({"id": ["a"]}), name="m", root=".")


def test_ids_are_compared_byte_for_byte() -> None:
    ids = ["é", "e\u0301", "E", " e", "1", "1.0"]  # composed and decomposed are two ids
    made = Manifest(pd.DataFrame({"id": ids, "image": "x.png"}), name="m", root=".")
    assert made.frame["id"].tolist() == ids


def test_rows_may_be_in_several_splits() -> None:
    manifest = Manifest(frame(split=["train", "train+test", ""]), name="m", root=".")
    np.testing.assert_array_equal(manifest.in_split("train"), [True, True, False])
    np.testing.assert_array_equal(manifest.in_split("test"), [False, True, False])
    with pytest.raises(ManifestError, match="split 'dev'"):
        manifest.in_split("dev")


def test_reports_are_listed_once() -> None:
    manifest = Manifest(frame(report=["one", "one", "two"], report_id=["r", "r", ""]), name="m", root=".")
    assert manifest.reports() == {"r": "one", "c": "two"}


def test_a_wrong_label_names_those_there_are() -> None:
    with pytest.raises(ManifestError, match="no label 'z'; it has y"):
        Manifest(frame(**{"label.y": [0, 1, 0]}), name="m", root=".").label("z")


def test_groups_fall_back_to_the_row_where_the_patient_is_blank() -> None:
    groups = Manifest(frame(patient=["p", "", "p"]), name="m", root=".").groups()
    assert groups[0] == groups[2] != groups[1]


def test_paths_stay_inside_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "in.png").write_bytes(b"x")
    (tmp_path / "out.png").write_bytes(b"x")
    (root / "link.png").symlink_to(tmp_path / "out.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    manifest = Manifest(frame(), name="m", root=root)
    assert manifest.path("in.png") == (root / "in.png").resolve()
    for path, reason in {
        "../out.png": "outside-root",
        str(tmp_path / "out.png"): "outside-root",
        "link.png": "outside-root",
        "none.png": "missing",
        "loop.png": "missing",
        "\ud800.png": "missing",
        "": "no-path",
        "a\0b": "no-path",
    }.items():
        with pytest.raises(InputError) as caught:
            manifest.path(path)
        assert caught.value.reason == reason


def test_a_manifest_keeps_what_it_knows_of_itself(tmp_path: Path) -> None:
    about = About(
        label_sets=(
            LabelSet("both", "multi-label", ("y", "z")),
            LabelSet("kind", "multi-class", ("k",), ("a", "b", "c")),
        ),
        split_rule="exam",
        patients_from="nih",
        notes=("3 images are absent",),
    )
    made = frame(**{"label.y": [1, 0, 0], "label.z": [0, 0, 1], "label.k": [0, 1, 2], "label.alone": [0, 1, None]})
    Manifest(made, name="m", root=tmp_path, about=about).write(tmp_path / "m.parquet")
    read = Manifest.read(tmp_path / "m.parquet")
    assert read.about == about
    assert read.tasks == {"both": "multi-label", "kind": "multi-class", "alone": "binary"}
    assert read.with_frame(read.frame[:1], split_rule="paper").about.split_rule == "paper"


def test_a_label_set_without_its_column_is_refused(tmp_path: Path) -> None:
    about = About(label_sets=(LabelSet("both", "multi-label", ("y", "z")),))
    with pytest.raises(ManifestError, match="a label set names 'z', for which there is no column"):
        Manifest(frame(**{"label.y": [1, 0, 0]}), name="m", root=tmp_path, about=about)


def test_label_fractions_are_nested_and_named(tmp_path: Path) -> None:
    manifest = Manifest(frame(fraction=["0.1", "", "1"]), name="m", root=tmp_path)
    assert manifest.in_fraction(0.1).tolist() == [True, False, False]
    assert manifest.in_fraction(1).tolist() == [True, False, True]
    few = Manifest(frame(fraction=["0.01", "", "1"]), name="m", root=tmp_path)
    assert few.in_fraction(0.1).tolist() == [True, False, False]  # 10% of few are no more than 1%
    with pytest.raises(ManifestError, match=r"no label fraction 0\.5 in its column 'fraction', which has 0\.1, 1"):
        manifest.in_fraction(0.5)


def test_rows_are_grouped_by_what_is_known(tmp_path: Path) -> None:
    manifest = Manifest(frame(patient=["p", "", ""], study=["s", "s", ""]), name="m", root=tmp_path)
    assert manifest.groups().tolist() == ["patient:p", "patient:p", "id:c"]  # a study has one patient
    manifest = Manifest(frame(study=["s", "s", ""]), name="m", root=tmp_path)
    assert manifest.groups().tolist() == ["study:s", "study:s", "id:c"]


def test_it_is_written_where_it_can_be_read_or_not_at_all(tmp_path: Path) -> None:
    manifest = Manifest(frame(), name="m", root=tmp_path)
    with pytest.raises(ManifestError, match=r"m\.csv: suffix '\.csv', expected \.parquet; write m\.parquet"):
        manifest.write(tmp_path / "m.csv")
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "folder.parquet", tmp_path / "file" / "m.parquet"):
        with pytest.raises(OutputError, match="cannot be written"):
            manifest.write(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.parquet"]


def test_its_root_is_found_through_a_linked_folder(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").touch()
    Manifest(frame(), name="m", root=tmp_path / "images").write(tmp_path / "link" / "m.parquet")
    assert Manifest.read(tmp_path / "link" / "m.parquet").path("a.png").is_file()
