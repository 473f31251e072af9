"""NIH ChestX-ray14 in its official form: releases of its table, its list, its boxes, and the real files where there."""

from __future__ import annotations

import gzip
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from embedcache.data.datasets.layout import Asked, Built, build
from embedcache.data.datasets.nih import LAYOUT, read_entries
from embedcache.data.masks import read_mask
from embedcache.errors import DatasetError, ManifestError

SHARED = Path(__file__).parents[4] / "shared" / "data" / "labels"
V2020, V2017 = "Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv"
HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
BOXES = "Image Index,Finding Label,Bbox [x,y,w,h],,,"
N_PATIENTS = 40
SIZES = ("2682", "2749", "0.143", "0.143")
FINDINGS = ("No Finding", "Effusion|Hernia", "Pleural_Thickening", "Infiltration")


def image(patient: int, k: int) -> str:
    return f"{patient:08d}_{k:03d}.png"


def rows() -> list[list[str]]:
    """Two images of each patient."""
    return [
        [image(p, k), FINDINGS[(p + k) % 4], str(k), str(p), str(40 + p), "FM"[p % 2], ("PA", "AP")[k], *SIZES]
        for p in range(1, N_PATIENTS + 1)
        for k in (0, 1)
    ]


def table(lines: list[list[str]], header: str = HEADER, *, end: str = "\n") -> str:
    return end.join([header, *(",".join(line) for line in lines), ""])


def nih(root: Path, *, flat: bool = False, lists: bool = True) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / V2020).write_text(table(rows()))
    for k, line in enumerate(rows()):
        folder = root / "images" if flat else root / f"images_{k % 12 + 1:03d}" / "images"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / line[0]).touch()
    if lists:
        for name, patients in (("test_list.txt", range(1, 9)), ("train_val_list.txt", range(9, N_PATIENTS + 1))):
            (root / name).write_text("\n".join(image(p, k) for p in patients for k in (0, 1)))
    return root


def built(root: Path, *, seed: int = 0) -> Built:
    return build(LAYOUT, root, Asked("patient", "", seed, 0.1, 0.2, {}))


def test_images_patients_and_labels(tmp_path: Path) -> None:
    made = built(nih(tmp_path))
    manifest, frame = made.manifest, made.manifest.frame.set_index("id")
    assert (len(manifest), made.absent, made.extra) == (2 * N_PATIENTS, (), ())
    row = frame.loc[image(7, 1)]
    assert row["image"] == f"images_002/images/{image(7, 1)}"
    assert row[["patient", "view", "sex", "age", "follow_up"]].tolist() == ["00000007", "AP", "M", 47.0, "1"]
    assert frame.loc[image(1, 0), ["label.Effusion", "label.Hernia", "label.Mass", "label.No Finding"]].tolist() == [
        1, 1, 0, 0,
    ]  # fmt: skip
    assert frame.loc[image(4, 0), [c for c in frame if c.startswith("label.")]].sum() == 1  # No Finding
    assert manifest.about.patients_from == "nih"
    assert manifest.tasks == {"nih": "multi-label", "No Finding": "binary"}
    assert len(manifest.label_sets[0].labels) == 14


def test_the_official_test_list_is_kept_and_validation_is_carved_by_patient(tmp_path: Path) -> None:
    manifest = built(nih(tmp_path)).manifest
    frame = manifest.frame
    assert set(frame["patient"][frame["split"] == "test"]) == {f"{p:08d}" for p in range(1, 9)}
    assert manifest.about.split_rule == "patient"
    assert (frame.groupby("patient")["split"].nunique() == 1).all()
    assert frame["split"].value_counts()["valid"] > 0
    again = built(tmp_path, seed=1).manifest.frame
    assert (again["split"] == "test").equals(frame["split"] == "test")
    assert not again["split"].equals(frame["split"])


def test_the_test_list_alone_is_enough(tmp_path: Path) -> None:
    both = built(nih(tmp_path)).manifest.frame["split"]
    (tmp_path / "train_val_list.txt").unlink()
    text = (tmp_path / "test_list.txt").read_text()
    (tmp_path / "test_list.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode() + b"\r\n")
    assert built(tmp_path).manifest.frame["split"].equals(both)


def test_without_a_list_test_patients_are_drawn(tmp_path: Path) -> None:
    manifest = built(nih(tmp_path, lists=False)).manifest
    assert any("no official list" in note for note in manifest.about.notes)
    assert set(manifest.frame["split"]) == {"train", "valid", "test"}


def test_images_in_neither_list_are_counted(tmp_path: Path) -> None:
    lines = (nih(tmp_path) / "train_val_list.txt").read_text().split("\n")
    (tmp_path / "train_val_list.txt").write_text("\n".join(lines[2:]))
    manifest = built(tmp_path).manifest
    assert f"2 images are in neither official list and count as its training images, such as {image(9, 0)}" in (
        manifest.about.notes
    )
    assert (manifest.frame["split"][manifest.frame["patient"] == "00000009"] != "test").all()


def test_lists_that_overlap_or_that_are_of_something_else(tmp_path: Path) -> None:
    nih(tmp_path)
    (tmp_path / "train_val_list.txt").write_text(image(1, 0))
    with pytest.raises(ManifestError, match=rf"train_val_list.txt: .*{image(1, 0)}.* stand in test_list.txt too"):
        built(tmp_path)
    (tmp_path / "train_val_list.txt").unlink()
    (tmp_path / "test_list.txt").write_text("other.png")
    with pytest.raises(ManifestError, match=r"test_list\.txt: none of its 1 images is in the table"):
        built(tmp_path)


def test_the_release_of_2017(tmp_path: Path) -> None:
    """A trailing comma, Windows line ends, a byte order mark, 'Patient Sex', ages of three digits with their unit."""
    lines = [
        [*line[:4], age, *line[5:], ""] for line, age in zip(rows(), ["058Y", "006M", "414Y", "40"] * 20, strict=True)
    ]
    nih(tmp_path, flat=True)
    (tmp_path / V2020).unlink()
    text = table(lines, HEADER.replace("Gender", "Sex") + ",", end="\r\n")
    (tmp_path / V2017).write_bytes(b"\xef\xbb\xbf" + text.encode())
    made = built(tmp_path)
    frame = made.manifest.frame.set_index("id")
    assert frame.loc[image(1, 0), "image"] == f"images/{image(1, 0)}"
    assert frame.loc[[image(1, 0), image(1, 1), image(2, 1)], "age"].tolist() == [58, 0.5, 40]
    assert np.isnan(frame.loc[image(2, 0), "age"])
    assert frame.loc[image(1, 0), "sex"] == "M"
    assert (
        f"20 ages in {V2017} are no human's and were left blank, such as '414Y' of {image(2, 0)}"
        in made.manifest.about.notes
    )


def test_of_several_releases_the_newest_counts_gzipped_or_not(tmp_path: Path) -> None:
    text = (nih(tmp_path) / V2020).read_text()
    (tmp_path / V2020).unlink()
    (tmp_path / f"{V2020}.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / V2017).write_text(text.replace("Effusion|Hernia", "Mass"))
    manifest = built(tmp_path).manifest
    assert manifest.frame["label.Mass"].sum() == 0
    assert f"labels are those of {V2020}.gz; {V2017} was left aside" in manifest.about.notes


def test_boxes_are_masks_of_their_findings(tmp_path: Path) -> None:
    nih(tmp_path)
    lines = [
        f"{image(3, 0)},Infiltrate,10,20,30,40",
        f"{image(3, 0)},Infiltrate,100.5,200,5,6",
        f"{image(3, 0)},Mass,1,2,3,4",
        f"{image(5, 1)},Mass,225.084745762712,547.0,86.7,79.1",
    ]
    (tmp_path / "BBox_List_2017.csv").write_text("\n".join([BOXES, *lines]) + "\n")
    frame = built(tmp_path).manifest.frame.set_index("id")
    assert frame.loc[image(3, 0), "mask.Infiltration"] == "boxes:1024x1024:10,20,30,40;100.5,200,5,6"
    assert frame.loc[image(5, 1), "mask.Infiltration"] == ""
    assert frame.loc[image(5, 1), "mask.Mass"] == "boxes:1024x1024:225.084745762712,547,86.7,79.1"
    assert (frame.filter(like="mask.") != "").to_numpy().sum() == 3
    assert read_mask(frame.loc[image(3, 0), "mask.Mass"], tmp_path).sum() == 3 * 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{image(3, 0)},Nodules,10,20,30,40", "finding 'Nodules', expected Atelectasis"),
        (f"{image(3, 0)},Mass,2000,20,30,40", f"image {image(3, 0)}, Mass: "),
        (f"{image(3, 0)},Mass,x,20,30,40", "column x, row 1: 'x', expected a number"),
    ],
)
def test_boxes_that_cannot_be(tmp_path: Path, line: str, message: str) -> None:
    nih(tmp_path)
    (tmp_path / "BBox_List_2017.csv").write_text(f"{BOXES}\n{line}\n")
    with pytest.raises(ManifestError, match=rf"BBox_List_2017.csv: {re.escape(message)}"):
        built(tmp_path)


def test_images_that_are_absent_or_in_no_table(tmp_path: Path) -> None:
    nih(tmp_path)
    (tmp_path / f"images_001/images/{image(1, 0)}").unlink()
    (tmp_path / "images_001/images/99999999_000.png").touch()
    made = built(tmp_path)
    assert made.absent == (f"images/{image(1, 0)}",)
    assert made.extra == ("images_001/images/99999999_000.png",)
    assert len(made.manifest) == 2 * N_PATIENTS - 1


def test_the_folder_above_and_the_folder_below(tmp_path: Path) -> None:
    nih(tmp_path / "nih")
    for named in (tmp_path, tmp_path / "nih" / "images_001"):
        manifest = built(named).manifest
        assert len(manifest) == 2 * N_PATIENTS
        assert any("the dataset was found one level" in note for note in manifest.about.notes)
        assert all(manifest.path(path).is_file() for path in manifest.frame["image"])


def test_another_patients_number_is_refused(tmp_path: Path) -> None:
    lines = rows()
    lines[4][3] = "77"
    (nih(tmp_path) / V2020).write_text(table(lines))
    with pytest.raises(ManifestError, match=rf"{V2020}: 1 rows whose 'Image Index' .* '{image(3, 0)}' of '77'"):
        built(tmp_path)


def test_a_label_that_nih_does_not_have(tmp_path: Path) -> None:
    lines = rows()
    lines[0][1] = "Effusion|Pleural Thickening"
    (nih(tmp_path) / V2020).write_text(table(lines))
    with pytest.raises(ManifestError, match=rf"{V2020}: column Finding Labels: 'Pleural Thickening', expected"):
        built(tmp_path)


def test_a_blank_label_is_unknown(tmp_path: Path) -> None:
    lines = rows()
    lines[0][1] = ""
    (nih(tmp_path) / V2020).write_text(table(lines))
    labels = built(tmp_path).manifest.frame.set_index("id").filter(like="label.")
    assert labels.loc[image(1, 0)].isna().all()
    assert labels.drop(index=image(1, 0)).notna().to_numpy().all()


def test_another_header_names_column_and_file(tmp_path: Path) -> None:
    (nih(tmp_path) / V2020).write_text(table(rows(), HEADER.replace("Finding Labels", "Labels")))
    with pytest.raises(ManifestError, match=rf"{V2020}: no column Finding Labels; it has Image Index, Labels"):
        built(tmp_path)


def test_there_is_no_published_split(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="nih: no published split"):
        build(LAYOUT, nih(tmp_path), Asked("paper", "", 0, 0.1, 0.2, {}))


def test_the_real_table_and_boxes(tmp_path: Path) -> None:
    """Counted in the published files; of their images three are there, as empty files."""
    source, boxes = SHARED / f"{V2020}.gz", SHARED / "BBox_List_2017.csv"
    if not (source.is_file() and boxes.is_file()):
        pytest.skip(f"{source.name} or {boxes.name} is not in {SHARED}")
    shutil.copy(source, tmp_path)
    shutil.copy(boxes, tmp_path)
    (tmp_path / "images").mkdir()
    for name in (image(1, 0), "00013118_008.png", image(30805, 0)):
        (tmp_path / "images" / name).touch()
    frame = LAYOUT.read(tmp_path, Asked("patient", "", 0, 0.1, 0.2, {})).frame
    assert (len(frame), frame["patient"].nunique()) == (112_120, 30_805)
    assert frame["view"].value_counts().to_dict() == {"PA": 67_310, "AP": 44_810}
    masks = frame.filter(like="mask.")
    assert (masks != "").any(axis=1).sum() == 880
    assert sum(text.count(";") + 1 for text in masks.to_numpy().ravel() if text) == 984
    assert masks.shape[1] == 8
    assert frame[["label.No Finding", "label.Infiltration", "label.Hernia"]].sum().tolist() == [60_361, 19_894, 227]
    made = built(tmp_path)
    assert (len(made.manifest), len(made.absent)) == (3, 112_117)
    assert read_entries(source, [])["id"].tolist() == frame["id"].tolist()
