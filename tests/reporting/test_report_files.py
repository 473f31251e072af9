"""The files of a report, made from a run's directory alone."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import embedcache
from embedcache.comparing.study_file import read_study
from embedcache.errors import RunNotFoundError
from embedcache.recipe.read import read_recipe
from embedcache.recipe.run import RunResult
from embedcache.reporting.examples import mask_examples, retrieval_examples
from embedcache.reporting.gather import audits_of, gathered
from embedcache.reporting.maps import embedding_maps
from embedcache.reporting.methods import methods_text

_PICTURE = "data:image/jpeg;base64,"


def test_a_page_methods_and_tables(finished: RunResult) -> None:
    written = embedcache.write_report(finished.run_dir)
    page = written.page.read_text()
    assert written.page.stat().st_mode & 0o777 == 0o600
    assert "default-src 'none'" in page
    assert _PICTURE not in page  # no patient's image unless somebody says so
    for said in ("vit + bert", "again + bert", "effusion", "opacity"):
        assert said in page
    again = embedcache.write_report(finished.run_dir)
    assert again.page.read_text() == page
    assert {path.suffix for path in written.tables} == {".csv", ".md", ".tex"}
    with_images = embedcache.write_report(finished.run_dir, with_images=True).page.read_text()
    assert _PICTURE in with_images


def test_the_page_shows_what_the_tables_hold(finished: RunResult) -> None:
    study = read_study(finished.run_dir)
    contents = gathered(study, finished.comparison, audits_of(study), with_images=False)
    assert contents.verdicts == finished.comparison.verdicts
    assert len(contents.verdicts) == len(finished.comparison.differences) == 2 * 2 + 2 + 2 + 2
    assert set(contents.encoders["name"]) == {"vit", "again", "bert"}
    assert (contents.encoders["exposure"] == "none").all()  # weights were drawn
    assert contents.encoders["seconds_per_1000"].notna().all()
    assert (contents.encoders["parameters"] > 0).all()
    assert set(contents.curves["image"]) == {"vit", "again"}
    assert contents.curves.groupby("image")["epoch"].count().tolist() == [2, 2]
    facts = dict(contents.audit)
    assert facts["patients in more than one split"] == "0"
    assert any(name.startswith("manifest phantom") for name, _ in contents.provenance)
    assert contents.commands[0] == "embedcache run 1/recipe.yaml"
    assert read_recipe(finished.run_dir / "recipe.yaml").name == "small"


def test_maps_have_every_test_image_and_its_label(finished: RunResult) -> None:
    study = read_study(finished.run_dir)
    maps = list(embedding_maps(study))
    assert [(found.encoder, found.label) for found in maps] == [
        ("vit", "effusion"), ("vit", "opacity"), ("again", "effusion"), ("again", "opacity")
    ]  # fmt: skip
    test = study.tasks[0].manifest.in_split("test")
    for found in maps:
        assert found.points.shape == (test.sum(), 2)
        assert np.isfinite(found.points).all()
        assert found.values.tolist() == study.tasks[0].manifest.label(found.label)[test].tolist()
    np.testing.assert_array_equal(maps[0].points, next(iter(embedding_maps(study))).points)


def test_examples_are_the_best_and_the_worst(finished: RunResult) -> None:
    study = read_study(finished.run_dir)
    for pair in ("vit", "again"):
        table = pd.read_parquet(finished.run_dir / f"{pair}+bert" / "retrieval" / "matches.parquet")
        ranks = table[(table["direction"] == "image_to_report") & (table["rank"] == 1)]["first_own"]
        shown = [e for e in retrieval_examples(study, with_images=False) if e.pair == (pair, "bert")]
        assert len(shown) == 6
        assert shown[0].own_rank == ranks.min()
        assert shown[-1].own_rank == ranks.max()
        reports = study.tasks[0].manifest.reports()
        assert all(found.text == reports[found.id] for e in shown for found in e.found)
        images = pd.read_parquet(finished.run_dir / f"{pair}+bert" / "masks" / "images.parquet")
        positive = images[images["true_pixels"] > 0]
        masks = [e for e in mask_examples(study, with_images=True) if e.pair == (pair, "bert")]
        assert masks[0].dice == pytest.approx(positive["dice"].max())
        assert masks[-1].dice == pytest.approx(positive["dice"].min())
        assert all(e.picture.startswith(_PICTURE) for e in masks)


def test_pictures_of_images_that_are_gone_are_left_out(finished: RunResult, tmp_path: Path) -> None:
    study = read_study(finished.run_dir)
    root = study.tasks[0].manifest.root
    worst = [e for e in mask_examples(study, with_images=False) if e.pair == ("vit", "bert")][-1]
    frame = study.tasks[0].manifest.frame
    file = root / frame.set_index("id").loc[worst.id, "image"]
    moved = file.rename(tmp_path / file.name)
    try:
        found = {e.id: e.picture for e in mask_examples(study, with_images=True) if e.pair == ("vit", "bert")}
        assert found[worst.id] == ""
        assert sum(picture != "" for picture in found.values()) == len(found) - 1
    finally:
        shutil.move(moved, file)


def test_methods_answer_what_a_run_knows(finished: RunResult) -> None:
    study = read_study(finished.run_dir)
    said = methods_text(study, finished.comparison, audits_of(study))
    manifest = study.tasks[0].manifest
    positives = int(manifest.label("effusion")[manifest.in_split("train")].sum())
    assert f"effusion: train {positives} of {manifest.in_split('train').sum()}" in said
    for item in ("5a", "8a", "9b", "12a", "12c", "12e", "20a", "20b", "21", "23a"):
        assert re.search(rf"\*\*\[{item}\] .*\.\*\* (?!not provided)", said), item
    for item in ("3a", "6a", "17", "18a", "19", "25"):
        assert re.search(rf"^\| {item} \| .* \| not provided \|$", said, re.MULTILINE), item
    assert "[5b] Dates of data.** not provided." in said  # the phantom has none
    assert len(re.findall(r"^\| \d+[a-g]? \|", said, re.MULTILINE)) == 52
    assert "sex F" in said
    assert "Student's t" in said
    assert "frozen image encoder" in said


def test_a_run_that_is_not_finished_has_no_report(finished: RunResult, tmp_path: Path) -> None:
    with pytest.raises(RunNotFoundError, match="no run of a recipe or of 'embedcache compare' there"):
        embedcache.write_report(tmp_path)
    begun = tmp_path / "begun"
    shutil.copytree(finished.run_dir, begun)
    (begun / "comparison.json").unlink()
    with pytest.raises(RunNotFoundError, match="no finished comparison there"):
        embedcache.write_report(begun)
