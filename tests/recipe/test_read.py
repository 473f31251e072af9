"""Recipes: typed, closed, and every mistake at once with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedcache.errors import RecipeError
from embedcache.recipe.read import read_recipe

PIPELINES = Path(__file__).parents[2] / "pipelines"

GOOD = """\
name: made
cache: cache/made
data:
  kind: phantom
  root: cache/made/dataset
encoders:
  image:
    vit: {tiny: tiny-vit, pooling: mean}
  text:
    bert: {tiny: tiny-bert}
train: {lr: 3e-4}
labels: [opacity]
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, "utf-8")
    return path


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read_recipe(written(tmp_path, text), overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted(PIPELINES.glob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_of_the_house_is_valid_and_says_how_to_run_it(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.name == path.stem
    assert path.read_text().startswith(f"# embedcache run pipelines/{path.name}")


def test_yaml_traps_are_read_as_meant(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, GOOD), ["train.epochs=7", "probe.fractions=[1.0]", "data.root=x/y"])
    assert recipe.train.lr == 3e-4  # YAML alone reads a string
    assert recipe.train.epochs == 7
    assert recipe.probe.fractions == (1.0,)
    assert recipe.data.root == Path("x/y")


def test_all_wrong_fields_are_reported_with_their_lines(tmp_path: Path) -> None:
    wrong = """\
name: made
cache: cache/made
data:
  kind: phantom
  root: cache/made/dataset
  config: {n_imges: 5}
encoders:
  image:
    vit: {tiny: tiny-vti}
    both: {tiny: tiny-vit, source: "hf:x"}
  text:
    bert: {source: no}
train:
  epoks: 3
  lr: fast
  batch_size: 1
probe:
  n_seeds: 0
  fractions: [0.1, 2.0]
  head: {min_steps: -1}
lables: [opacity]
"""
    message = refusal(tmp_path, wrong)
    assert "recipe.yaml: 11 wrong fields" in message
    lines = message.splitlines()[1:]
    expected = [
        "line 6: data.config.n_imges: unknown field, did you mean 'n_images'?",
        "line 9: encoders.image.vit.tiny: input should be 'tiny-vit'",
        "line 10: encoders.image.both: value error, expected one of source, tiny, random_like; found source, tiny",
        "line 12: encoders.text.bert.source: input should be a valid string, found False",
        "line 14: train.epoks: unknown field, did you mean 'epochs'?",
        "line 15: train.lr: input should be a valid number",
        "line 16: train.batch_size: input should be greater than or equal to 2, found 1",
        "line 18: probe.n_seeds: input should be greater than or equal to 1, found 0",
        "line 19: probe.fractions.1: input should be less than or equal to 1, found 2.0",
        "line 20: probe.head.min_steps: input should be greater than or equal to 0, found -1",
        "line 21: lables: unknown field, did you mean 'labels'?",
    ]
    for line, start in zip(lines, expected, strict=True):
        assert line.strip().startswith(start)
    assert lines[1].endswith("found 'tiny-vti'; did you mean 'tiny-vit'?")


def test_settings_are_checked_by_the_rooms_that_use_them(tmp_path: Path) -> None:
    message = refusal(tmp_path, GOOD, "train.n_heads=7", "probe.heads=[svm]")
    assert "--set train.n_heads" in message or "line 11: train" in message
    assert "must be divisible by n_heads (7)" in message
    assert "unknown heads svm; expected some of linear, mlp, logistic, knn" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected fields such as 'name' and 'data', found NoneType"),
        ("- a\n- b\n", "found list"),
        ("name: [unclosed\n", "line 2: "),
        ("name: a\nname: b\n", "line 2: duplicate key 'name'"),
        ("? [1, 2]\n: x\n", "line 1: "),
        ("a: " + "[" * 3000, "recipe.yaml:"),
        ("a: &x {b: 1}\nc: *x\n", "line 2: aliases are not allowed"),
        ("a: !!python/object/apply:os.system ['true']\n", "line 1: could not determine a constructor"),
    ],
)
def test_what_is_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(tmp_path, text)


def test_wrong_overrides(tmp_path: Path) -> None:
    assert "expected a.b=value" in refusal(tmp_path, GOOD, "train.lr")
    assert "'name' holds a value, not fields" in refusal(tmp_path, GOOD, "name.first=x")
    assert "--set train.epoks: train.epoks: unknown field" in refusal(tmp_path, GOOD, "train.epoks=3")


@pytest.mark.parametrize(
    ("encoders", "message"),
    [
        ("{image: {../evil: {tiny: tiny-vit}}, text: {t: {tiny: tiny-bert}}}", "should match pattern"),
        ("{image: {same: {tiny: tiny-vit}}, text: {same: {tiny: tiny-bert}}}", "used once and not be same"),
        ("{image: {checkpoints: {tiny: tiny-vit}}, text: {t: {tiny: tiny-bert}}}", "not be checkpoints"),
        ("{image: {}, text: {t: {tiny: tiny-bert}}}", "at least 1 item"),
    ],
)
def test_names_become_directories_of_their_own(tmp_path: Path, encoders: str, message: str) -> None:
    assert message in refusal(tmp_path, GOOD, f"encoders={encoders}")


def test_no_recipe_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe there; pipelines/ holds examples"):
        read_recipe(tmp_path / "none.yaml")


def test_what_an_encoder_is_asked_for(tmp_path: Path) -> None:
    asked = GOOD.replace(
        "vit: {tiny: tiny-vit, pooling: mean}",
        "vit: {source: rad-dino, pooling: cls_mean, image_size: 518, token_grid: 16, "
        "decode: {window: [40, 400], formats: [DICOM]}}",
    ).replace("bert: {tiny: tiny-bert}", "bert: {source: minilm, report: {unit: sentence}, max_length: 64}")
    recipe = read_recipe(written(tmp_path, asked + "extract: {tokens: true}\n"))
    image, text = recipe.encoders.image["vit"].options(), recipe.encoders.text["bert"].options()
    assert (image["pooling"], image["image_size"], image["token_grid"]) == ("cls_mean", 518, 16)
    assert image["decode"].window == (40.0, 400.0)
    assert image["decode"].formats == ("DICOM",)
    assert text["report"].unit == "sentence"
    assert recipe.extract.tokens
    message = refusal(tmp_path, asked.replace("unit: sentence", "unit: word").replace("window:", "windows:"))
    assert "did you mean 'window'?" in message
    assert "encoders.text.bert.report.unit" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("extract.address=tcp://head:8786", "the backend local has none, choose dask or ray with it"),
        ("extract.view_policy={seed: 1}", "there is no view to draw"),
        ("extract={views: 9, shard_rows: 8}", "expected at most shard_rows (8)"),
    ],
)
def test_settings_of_stage_one_that_make_no_sense_together(tmp_path: Path, override: str, message: str) -> None:
    assert message in refusal(tmp_path, GOOD, override)
