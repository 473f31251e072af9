"""What audits find within a manifest's splits, and between datasets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from embedcache import Manifest
from embedcache.data.audit import Shared, audit, files_of, leak_warning, overlaps, unknown_overlaps
from embedcache.data.manifest import About
from embedcache.data.shortcuts import shortcuts


def made(root: Path, name: str = "m", about: About | None = None, **columns: object) -> Manifest:
    n = len(next(iter(columns.values())))  # type: ignore[arg-type]
    ids = [f"{name}-image-{k:04d}" for k in range(n)]
    frame = pd.DataFrame({"id": ids, "image": [f"{i}.png" for i in ids], **columns})
    return Manifest(frame, name=name, root=root, about=about)


def write(manifest: Manifest, contents: list[bytes]) -> None:
    for image, content in zip(manifest.frame["image"], contents, strict=True):
        (manifest.root / image).write_bytes(content)


def test_an_audit_counts_what_stands_in_two_splits(tmp_path: Path) -> None:
    leaky = made(
        tmp_path,
        split=["train", "train", "test", "test", "valid", ""],
        patient=["p", "q", "p", "p", "r", "p"],
        study=["1", "2", "3", "3", "4", "1"],
        report=["clear", "two", "clear ", "other", "two\n", "clear"],
    )
    write(leaky, [b"one", b"two", b"six", b"one", b"five", b"one"])
    report = leaky.audit()
    assert set(report.shared) == {
        Shared("patient", "train", "test", 1, 1, 2),
        Shared("file", "train", "test", 1, 1, 1),
        Shared("report", "train", "test", 1, 1, 1),
        Shared("report", "train", "valid", 1, 1, 1),
    }
    assert report.n_shared == {"image": 0, "patient": 1, "study": 0, "file": 1, "report": 2}
    assert (report.n_rows, report.n_patients) == (
        {"train": 2, "valid": 1, "test": 2},
        {"train": 2, "valid": 1, "test": 1},
    )
    assert report.patients_known
    assert report.leaks
    assert report.warning == "m: 2 of 2 test images share their patient with train: scores on test are too good"
    assert str(report).endswith("in more than one split: 1 patients, 2 report texts, 1 identical files")
    assert json.loads(json.dumps(report.to_json()))["leaks"] is True


def test_digests_that_are_known_are_taken_and_unknown_patients_told(tmp_path: Path) -> None:
    manifest = made(tmp_path, split=["train", "test", "test"], report=["same"] * 3)
    digests = dict(zip(manifest.frame["id"], [b"1", b"2", b"1"], strict=True))
    report = manifest.audit(files=digests)
    assert report.leaks
    assert leak_warning(manifest, digests) == report.warning
    assert "1 of 2 test images share their file with train" in report.warning
    assert len(report.missing or ()) == 3
    assert manifest.audit(files={}).n_compared == 0  # as of a store that knows no digest
    unread = manifest.audit(files=False)
    assert not unread.leaks
    assert unread.warning == ""
    assert (unread.patients_known, unread.n_without_patient) == (False, 3)
    assert "patients unknown" in str(unread)
    assert "files not read" in str(unread)
    assert audit(manifest, files=False, look=False).missing is None


def test_an_image_that_a_rule_puts_into_two_splits_is_a_leak(tmp_path: Path) -> None:
    both = made(tmp_path, split=["train+test", "test", "test"], patient=["p", "q", "r"])
    report = both.audit(files=False)
    assert report.n_shared["image"] == report.n_shared["patient"] == 1
    assert Shared("image", "train", "test", 1, 1, 1) in report.shared


def test_labels_are_balanced_by_split(tmp_path: Path) -> None:
    split = ["train", "train", "test", "test"]
    manifest = made(tmp_path, **{"split": split, "label.y": [1, None, 0, 0], "label.k": [0, 2, 1, 1]})
    found = {(b.label, b.split): (b.n_known, b.n_of_class) for b in manifest.audit(files=False).balance}
    assert found["y", "train"] == (1, (0, 1))
    assert found["y", "test"] == (2, (2, 0))
    assert found["k", "train"] == (2, (1, 0, 1))
    assert found["k", "valid"] == (0, (0, 0, 0))


def test_what_metadata_alone_tells_is_learnt_on_train_and_scored_on_test(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    n = 4000
    view = rng.choice(["AP", "PA"], n)
    y = (rng.random(n) < np.where(view == "AP", 0.6, 0.2)).astype(float)
    kind = np.where(view == "AP", 2, rng.integers(0, 2, n))
    manifest = made(
        tmp_path,
        **{
            "split": rng.choice(["train", "test"], n),
            "view": view,
            "sex": rng.choice(["F", "M"], n),
            "age": rng.integers(20, 90, n),
            "site": "one",
            "label.y": y,
            "label.kind": kind,
        },
    )
    found = {(s.label, s.column): s for s in shortcuts(manifest)}
    assert shortcuts(manifest)[0].column == "view"
    # by hand: the chance that a positive is AP more often than a negative
    positive, negative = (view[y == v] == "AP" for v in (1, 0))
    by_hand = (positive.mean() * (1 - negative.mean())) + 0.5 * (
        positive.mean() * negative.mean() + (1 - positive.mean()) * (1 - negative.mean())
    )
    assert found["y", "view"].value == pytest.approx(by_hand, abs=0.02)
    assert abs(found["y", "sex"].strength) < 0.04
    assert abs(found["y", "age"].strength) < 0.04
    assert found["kind", "view"].metric == "accuracy"
    assert found["kind", "view"].value == pytest.approx(0.75, abs=0.03)
    assert found["kind", "view"].chance == pytest.approx(0.5, abs=0.03)
    assert ("y", "site") not in found  # one value tells nothing


def test_a_column_that_gives_all_test_rows_one_guess_is_no_shortcut(tmp_path: Path) -> None:
    manifest = made(
        tmp_path,
        **{
            "split": ["train"] * 4 + ["test"] * 4,
            "view": ["AP", "PA", "AP", "PA", "AP", "AP", "AP", "AP"],
            "sex": ["F", "F", "M", "M", "F", "M", "F", "M"],
            "label.y": [1, 0, 1, 1, 0, 1, 0, 1],
        },
    )
    assert [(s.column, s.value) for s in shortcuts(manifest)] == [("sex", 1.0)]


def test_overlap_between_datasets_by_patient_name_and_file(tmp_path: Path) -> None:
    nih = made(tmp_path, "nih", About(patients_from="nih"), split=["train", "train", "test"], patient=["1", "2", "3"])
    rsna = made(
        tmp_path,
        "rsna",
        About(patients_from="nih"),
        split=["test", "train", "valid"],
        patient=["1", "9", "8"],
        origin=["nih-image-0000.png", "", "elsewhere-0001.png"],
    )
    other = made(tmp_path, "other", split=["test", "", "train"], patient=["1", "2", "3"])
    write(nih, [b"a", b"b", b"c"])
    write(rsna, [b"x", b"y", b"z"])
    write(other, [b"u", b"c", b"w"])
    found = set(overlaps([nih, rsna, other], files_of([nih, rsna, other])))
    assert found == {
        Shared("patient", "nih:train", "rsna:test", 1, 1, 1),
        Shared("name", "nih:train", "rsna:test", 1, 1, 1),
        Shared("file", "nih:test", "other:no split", 1, 1, 1),
    }
    assert {s.kind for s in overlaps([nih, rsna, other])} == {"patient", "name"}


def test_short_names_are_nobodys(tmp_path: Path) -> None:
    images = ["a/0001.png", "p1/view1_frontal.jpg", "p2/view1_frontal.jpg"]
    frame = pd.DataFrame({"id": ["1", "2", "3"], "image": images, "split": "train", "patient": ["1", "2", "3"]})
    one, two = (Manifest(frame, name=name, root=tmp_path) for name in ("one", "two"))
    assert overlaps([one, two]) == []  # nor are patients of two tables the same people


def test_datasets_of_one_register_that_do_not_say_which_patients_they_share(tmp_path: Path) -> None:
    nih = made(tmp_path, "nih", About(patients_from="nih", draws_on="nih"), split=["train"], patient=["1"])
    rsna = made(tmp_path, "rsna", About(draws_on="nih"), split=["train"])
    mapped = made(tmp_path, "mapped", About(patients_from="nih", draws_on="nih"), split=["train"], patient=["2"])
    other = made(tmp_path, "other", split=["train"])
    assert unknown_overlaps([nih, mapped, other]) == []
    (line,) = unknown_overlaps([nih, rsna])
    assert line == (
        "nih and rsna both draw on the patients of nih, and which they share cannot be told: not named in rsna"
    )


def test_the_same_path_twice_and_a_study_on_two_sides_are_leaks(tmp_path: Path) -> None:
    frame = pd.DataFrame({"id": ["a", "b"], "image": "x.png", "split": ["train", "test"]})
    assert (
        Manifest(frame, name="m", root=tmp_path)
        .audit(files=False)
        .warning.startswith("m: 1 of 1 test images are in train too")
    )
    frame = frame.assign(image=["x.png", "y.png"], study="s")
    assert Manifest(frame, name="m", root=tmp_path).audit(files=False).leaks


def test_the_warning_is_of_the_test_split_where_there_is_a_choice(tmp_path: Path) -> None:
    split, patient = ["train", "valid", "valid", "valid", "test", "test"], ["p", "p", "p", "p", "p", "q"]
    assert "1 of 2 test images" in made(tmp_path, split=split, patient=patient).audit(files=False).warning


def test_files_that_could_not_be_compared_are_counted(tmp_path: Path) -> None:
    manifest = made(tmp_path, split=["train", "test", "test"])
    write(manifest, [b"a", b"b", b"c"])
    assert manifest.audit().n_compared == 3
    (tmp_path / manifest.frame["image"][1]).unlink()
    report = manifest.audit()
    assert (report.n_compared, report.missing) == (2, (manifest.frame["id"][1],))


def test_a_label_of_endless_classes_is_passed_over(tmp_path: Path) -> None:
    manifest = made(tmp_path, **{"split": ["train", "test"] * 2, "sex": ["F", "M"] * 2, "label.n": [0, 1, 10**9, 1]})
    report = manifest.audit(files=False)
    assert (report.balance, report.shortcuts) == ((), ())
