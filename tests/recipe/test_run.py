"""A small recipe from end to end."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml
from click.testing import CliRunner

import embedcache
from embedcache.cli import main
from embedcache.data.datasets.phantom import PhantomConfig, make_phantom
from embedcache.errors import ManifestError, RecipeError
from embedcache.recipe.data import make_manifest as make_manifest_of
from embedcache.recipe.encode import encode_recipe, plan_recipe
from embedcache.recipe.read import read_recipe
from embedcache.recipe.run import planned_steps, recipe_identity, run_recipe
from embedcache.recipe.schema import Recipe, SplitSection, StepsSection, TableData
from embedcache.report.run_text import run_text
from embedcache.report.score_text import score_table

SMALL = """\
name: small
cache: {root}/cache
data:
  kind: phantom
  root: {root}/dataset
  config: {{n_images: 80, size: 64}}
encoders:
  image:
    vit: {{tiny: tiny-vit, pooling: mean}}
    again: {{random_like: "hf:{root}/cache/checkpoints/vit", seed: 3, pooling: mean}}
  text:
    bert: {{tiny: tiny-bert}}
train: {{epochs: 2, batch_size: 32, projection_dim: 24, ff_dim: 32}}
labels: [effusion]
probe: {{n_seeds: 1, n_draws: 50, fractions: [0.1, 1.0], head: {{epochs: 1, min_steps: 5}}}}
steps: {{workers: 1}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL.format(root=tmp_path))
    return read_recipe(path)


def test_both_stages_from_one_recipe(recipe: Recipe, tmp_path: Path) -> None:
    lines: list[str] = []
    result = run_recipe(recipe, run_dir=tmp_path / "run", say=lines.append)
    said = "\n".join(lines)
    assert "random weights: it has learnt nothing" in said
    assert [r.n_embedded for r in result.reports] == [80, 80, 80]
    assert set(result.scores["image"]) == {"vit", "again"}
    assert set(result.scores["control"]) == {
        "", "no-adaptor", "untrained-adaptor", "shuffled-labels", "metadata-only", "text-as-label"
    }  # fmt: skip
    for name in ("vit", "again", "bert"):
        assert embedcache.verify_store(recipe.cache / name) == []
    for pair in ("vit+bert", "again+bert"):
        assert embedcache.Adaptor.from_pretrained(tmp_path / "run" / pair).config["projection_dim"] == 24
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["fingerprints"]["vit"] == embedcache.open_store(recipe.cache / "vit").fingerprint
    assert config["train"]["epochs"] == 2
    saved = pd.read_csv(tmp_path / "run" / "scores.csv", keep_default_na=False)
    assert len(saved) == len(result.scores)
    table = score_table(result.scores)
    assert "auroc of effusion" in table
    assert table.count("text-as-label") == 4
    for name in ("gains", "calibration", "subgroups"):
        assert set(pd.read_csv(tmp_path / "run" / f"{name}.csv")["image"]) == {"vit", "again"}
    predictions = pd.read_parquet(tmp_path / "run" / "vit+bert" / "probes" / "effusion" / "predictions.parquet")
    assert len(predictions) == result.scores["n_test"].iloc[0] * 2 * 2  # heads, fractions
    again = run_recipe(recipe, run_dir=tmp_path / "again")
    assert [(r.n_embedded, r.n_present) for r in again.reports] == [(0, 80)] * 3
    pd.testing.assert_frame_equal(again.scores, result.scores)


def test_the_same_recipe_again_takes_all_steps_over(recipe: Recipe, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert set(planned_steps(recipe).values()) == {"waits"}
    first = run_recipe(recipe)
    assert first.run_dir.parent == Path("runs") / "small"
    lines: list[str] = []
    # what needs an Adaptor that is not here yet waits
    assert set(planned_steps(recipe).values()) == {"elsewhere", "waits"}
    second = run_recipe(recipe, say=lines.append)
    assert second.run_dir != first.run_dir
    assert sum(f"as in {first.run_dir.name}, copied" in line for line in lines) == 4
    pd.testing.assert_frame_equal(second.comparison.differences, first.comparison.differences)
    assert set(planned_steps(recipe, run_dir=second.run_dir).values()) == {"done"}
    other = recipe.model_copy(update={"probe": replace(recipe.probe, n_draws=60)})
    third = run_recipe(other, say=lines.append)
    assert sum(f"as in {second.run_dir.name}, copied" in line for line in lines) == 2  # the Adaptors
    written = read_recipe(third.run_dir / "recipe.yaml")
    assert recipe_identity(written) == recipe_identity(other)
    assert recipe_identity(written) != recipe_identity(recipe)


@pytest.mark.parametrize("backend", ["local", "dask", "ray"])
def test_several_processes_do_the_steps(recipe: Recipe, tmp_path: Path, backend: str) -> None:
    here = run_recipe(recipe, run_dir=tmp_path / "here")
    shared = recipe.model_copy(update={"steps": StepsSection(workers=2, backend=backend)})
    there = run_recipe(shared, run_dir=tmp_path / "x" / "there")
    pd.testing.assert_frame_equal(there.comparison.differences, here.comparison.differences, rtol=0.05, atol=0.05)
    assert set(there.tables) == set(here.tables)


def test_tasks_are_other_data_through_the_same_encoders(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    more = f"""\
tasks:
  other:
    data: {{kind: table, root: {tmp_path}/other, table: manifest.parquet}}
    labels: [opacity]
    probe: {{n_seeds: 1, n_draws: 50, fractions: [1.0], heads: [linear], head: {{epochs: 1, min_steps: 5}}}}
    zeroshot: chexpert
  masks:
    data: {{kind: table, root: {tmp_path}/other, table: manifest.parquet}}
    segment: {{decoders: [linear], size: 16, fractions: [1.0], n_seeds: 1, n_draws: 50, epochs: 2, min_steps: 5}}
"""
    make_phantom(tmp_path / "other", PhantomConfig(n_images=60, size=64, seed=5))
    path.write_text(SMALL.format(root=tmp_path) + more)
    lines: list[str] = []
    result = run_recipe(read_recipe(path), run_dir=tmp_path / "run", say=lines.append)
    assert set(result.scores["data"]) == {"phantom", "other"}
    assert set(result.tables["mask_scores"]["data"]) == {"masks"}
    assert set(result.tables["zeroshot_scores"]["data"]) == {"other"}
    assert set(result.comparison.differences["data"]) == {"phantom", "other", "masks"}
    pair = tmp_path / "run" / "vit+bert"
    assert (pair / "tasks" / "other" / "probes" / "opacity" / "head-linear.safetensors").is_file()
    assert (pair / "tasks" / "masks" / "masks" / "decoder-linear.safetensors").is_file()
    cache = tmp_path / "cache"
    assert embedcache.open_store(cache / "vit").layout.tokens is None
    assert embedcache.open_store(cache / "tasks" / "other" / "vit").layout.tokens is None
    assert embedcache.open_store(cache / "tasks" / "masks" / "vit").layout.tokens is not None
    assert any("stage one vit on other (image" in line for line in lines)
    for wrong, said in (
        ("tasks.other.labels=[]", "expected labels to probe, or segment"),
        ("tasks.other.data.kind=tabel", "did you mean 'table'?"),
        ("tasks.other.data.tabel=x", "tasks.other.data.tabel: unknown field, did you mean 'table'?"),
    ):
        with pytest.raises(RecipeError, match=re.escape(said)):
            read_recipe(path, [wrong])


def test_without_a_text_encoder_embeddings_are_compared_as_they_are(recipe: Recipe, tmp_path: Path) -> None:
    alone = recipe.model_copy(update={"encoders": recipe.encoders.model_copy(update={"text": {}})})
    result = run_recipe(alone, run_dir=tmp_path / "run")
    assert set(result.scores["control"]) == {"", "shuffled-labels", "metadata-only"}
    assert set(result.comparison.differences["a"]) == {"vit"}
    assert (tmp_path / "run" / "vit" / "probes" / "effusion" / "predictions.parquet").is_file()
    with pytest.raises(RecipeError, match="retrieve and zeroshot need a text encoder"):
        read_recipe(tmp_path / "small.yaml", ["encoders.text={}", "retrieve={}"])
    with pytest.raises(RecipeError, match="nothing is scored: expected labels, segment, retrieve, or tasks"):
        read_recipe(tmp_path / "small.yaml", ["labels=[]"])


def test_all_pipelines_can_be_read() -> None:
    for path in Path("pipelines").glob("*.yaml"):
        assert path.read_text().startswith(f"# embedcache run pipelines/{path.name}")
        assert read_recipe(path).name == path.stem


def test_masks_retrieval_and_prompts_stand_beside_the_probes(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    more = "extract: {tokens: image}\nretrieve: {n_draws: 50}\nzeroshot: chexpert\n"
    more += (
        "segment: {decoders: [linear], size: 16, fractions: [1.0], n_seeds: 1, n_draws: 50, epochs: 2, min_steps: 5}\n"
    )
    path.write_text(SMALL.format(root=tmp_path) + more)
    lines: list[str] = []
    result = run_recipe(read_recipe(path), run_dir=tmp_path / "run", say=lines.append)
    assert set(result.tables) == {
        "scores", "gains", "calibration", "subgroups", "mask_scores", "mask_gains", "retrieval_scores",
        "zeroshot_scores",
    }  # fmt: skip
    assert set(result.tables["mask_scores"]["control"]) == {"", "no-adaptor", "untrained-adaptor", "mean-mask"}
    for name, table in result.tables.items():
        assert set(table["image"]) == {"vit", "again"}
        assert len(pd.read_csv(tmp_path / "run" / f"{name}.csv")) == len(table)
    assert (tmp_path / "run" / "vit+bert" / "masks" / "decoder-linear.safetensors").is_file()
    assert embedcache.open_store(tmp_path / "cache" / "vit").layout.tokens is not None
    assert embedcache.open_store(tmp_path / "cache" / "bert").layout.tokens is None
    assert len(embedcache.open_store(tmp_path / "cache" / "prompts" / "bert")) == 8
    assert any("8 prompts of chexpert" in line for line in lines)
    shown = run_text(result.tables)
    for said in ("auroc of effusion", "masks (test", "empty mask", "image to report:", "report to image:", "chance",
                 "zero-shot by prompts"):  # fmt: skip
        assert said in shown
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["segment"]["size"] == 16
    assert config["zeroshot"] == "chexpert"
    again = run_recipe(read_recipe(path), run_dir=tmp_path / "again")
    for name, table in result.tables.items():
        pd.testing.assert_frame_equal(again.tables[name], table)


def test_what_a_recipe_cannot_do_is_said_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    for more, said in (
        ("segment: {}\n", "segment needs the tokens of images: set extract.tokens to image"),
        ("segment: {}\nextract: {tokens: text}\n", "segment needs the tokens of images"),
        ("zeroshot: nothing\n", "one of chexzero, chexpert"),
        ("retrieve: {}\n", "an image does not attend to its report"),
    ):
        small = SMALL.format(root=tmp_path)
        if more.startswith("retrieve"):
            small = small.replace("train: {", "train: {attention: cross-modal, image: tokens, text: tokens, ")
        path.write_text(small + more)
        with pytest.raises(RecipeError, match=said):
            read_recipe(path)


def test_a_wrong_label_is_found_before_anything_is_encoded(recipe: Recipe, tmp_path: Path) -> None:
    wrong = recipe.model_copy(update={"labels": ["efusion"]})
    for begin in (lambda r: run_recipe(r, run_dir=tmp_path / "run"), encode_recipe, plan_recipe):
        with pytest.raises(ManifestError, match="no label 'efusion'; it has opacity, effusion, cardiomegaly"):
            begin(wrong)
    assert not recipe.cache.exists()


def test_splits_of_a_table_are_not_drawn_over(tmp_path: Path, recipe: Recipe, make_manifest) -> None:
    manifest = make_manifest(10)
    manifest.frame.to_csv(manifest.root / "t.csv", index=False)
    split = SplitSection(by="opacity")
    data = TableData(kind="table", root=manifest.root, table="t.csv", split=split)
    with pytest.raises(RecipeError, match=r"splits of its own; take data\.split out"):
        make_manifest_of(recipe.model_copy(update={"data": data, "labels": ["opacity"]}))
    kept = make_manifest_of(
        recipe.model_copy(update={"data": data.model_copy(update={"split": None}), "labels": ["opacity"]})
    )
    assert kept.frame["split"].tolist() == manifest.frame["split"].tolist()


def test_failures_are_told_with_the_way_to_retry_them(recipe: Recipe, tmp_path: Path) -> None:
    made = make_manifest_of(recipe)
    spoiled = made.root / made.frame["image"][3]
    original = spoiled.read_bytes()
    spoiled.write_bytes(b"")
    lines: list[str] = []
    run_recipe(recipe, run_dir=tmp_path / "run", say=lines.append)
    assert any("failed 'p" in line and "empty-file" in line for line in lines)
    assert any("--set extract.retry_failed=true" in line for line in lines)
    spoiled.write_bytes(original)
    again = recipe.model_copy(update={"extract": recipe.extract.model_copy(update={"retry_failed": True})})
    assert [r.n_embedded for r in run_recipe(again, run_dir=tmp_path / "again").reports] == [1, 1, 0]


def test_a_table_of_ones_own(tmp_path: Path, checkpoints: Path, make_manifest) -> None:
    manifest = make_manifest(40)
    table = manifest.frame[["id", "image", "report", "patient", "label.opacity"]]
    table.rename(columns={"label.opacity": "finding", "image": "file"}).to_csv(manifest.root / "t.csv", index=False)
    path = tmp_path / "own.yaml"
    path.write_text(
        f"""\
name: own
cache: {tmp_path}/cache
data:
  kind: table
  root: {manifest.root}
  table: t.csv
  columns: {{image: file, label.opacity: finding}}
  split: {{by: opacity, valid: 0.1, test: 0.3}}
encoders:
  image: {{vit: {{source: "hf:{checkpoints}/vit", pooling: mean}}}}
  text: {{bert: {{source: "hf:{checkpoints}/bert"}}}}
train: {{epochs: 1, batch_size: 8, projection_dim: 24, ff_dim: 32}}
labels: [opacity]
probe: {{n_seeds: 1, n_draws: 50, fractions: [1.0], heads: [linear], head: {{min_steps: 100}}}}
steps: {{workers: 1}}
"""
    )
    result = run_recipe(read_recipe(path), run_dir=tmp_path / "run")
    scores = result.scores
    alone = scores[(scores["control"] == "no-adaptor") & (scores["metric"] == "auroc")]
    assert alone["value"].item() > 0.9  # a bright square is easy to see


def test_a_dataset_by_its_name_and_root(tmp_path: Path, checkpoints: Path, make_manifest) -> None:
    made = make_manifest(40).frame
    root = tmp_path / "squares"
    mesh = made["label.opacity"].map({0: "normal", 1: "Opacity"})
    reports = pd.DataFrame({"uid": range(40), "MeSH": mesh, "findings": made["report"], "impression": ""})
    reports.assign(Problems="", image="", indication="", comparison="").to_csv(
        root / "indiana_reports.csv", index=False
    )
    projections = pd.DataFrame({"uid": range(40), "filename": made["image"], "projection": "Frontal"})
    projections.to_csv(root / "indiana_projections.csv", index=False)
    path = tmp_path / "named.yaml"
    path.write_text(
        f"""\
name: named
cache: {tmp_path}/cache
data: {{kind: dataset, name: open-i, root: {root}, test: 0.3}}
encoders:
  image: {{vit: {{source: "hf:{checkpoints}/vit", pooling: mean}}}}
  text: {{bert: {{source: "hf:{checkpoints}/bert"}}}}
train: {{epochs: 1, batch_size: 8, projection_dim: 24, ff_dim: 32}}
labels: [normal]
probe: {{n_seeds: 1, n_draws: 50, fractions: [1.0], heads: [linear], subsets: manifest, head: {{min_steps: 100}}}}
steps: {{workers: 1}}
"""
    )
    lines: list[str] = []
    result = run_recipe(read_recipe(path), run_dir=tmp_path / "run", say=lines.append)
    scores = result.scores
    alone = scores[(scores["control"] == "no-adaptor") & (scores["metric"] == "auroc")]
    assert alone["value"].item() > 0.9
    assert any(line.startswith("data      open-i: 40 images, 40 reports") for line in lines)
    assert any("no patients are named" in line for line in lines)
    with pytest.raises(RecipeError, match=r"data: value error, no dataset 'openi'; did you mean 'open-i'\?"):
        read_recipe(path, ["data.name=openi"])
    with pytest.raises(RecipeError, match=r"data: value error, open-i has no option 'uncertain'"):
        read_recipe(path, ["data.options={uncertain: ones}"])


def test_parts_of_stage_one_and_then_the_rest(recipe: Recipe, tmp_path: Path) -> None:
    small = recipe.model_copy(update={"extract": recipe.extract.model_copy(update={"shard_rows": 16})})
    assert {name: found.n_to_do for name, found in plan_recipe(small).items()} == {"vit": 80, "again": 80, "bert": 80}
    lines: list[str] = []
    for number in (2, 1):
        encode_recipe(small, part=(number, 2), say=lines.append)
    assert any(
        "stage one vit (image, 96-d, random weights" in line and "part 2/2: encoded 32" in line for line in lines
    )
    result = run_recipe(small, run_dir=tmp_path / "run")
    assert [(r.n_embedded, r.n_present) for r in result.reports] == [(0, 80)] * 3


SBATCH = """#!/usr/bin/env bash
# A stand-in that runs a job at once, each part of an array in turn, if what it depends on ended as it must.
set -euo pipefail
printf '%q ' "$@" >> "$LOG"; echo >> "$LOG"
tasks=0; here=.; runs=yes
for argument in "$@"; do
  case "$argument" in
    --wrap=*) command="${argument#--wrap=}" ;;
    --array=1-*) tasks="${argument#--array=1-}" ;;
    --chdir=*) here="${argument#--chdir=}" ;;
    --dependency=*) for needed in $(tr , ' ' <<< "${argument#--dependency=}"); do
        case "$needed" in afterok:*) [ "$(cat "$LOG.${needed#*:}")" = 0 ] || runs=no ;; esac
        [ -e "$LOG.${needed#*:}" ]
      done ;;
  esac
done
number=$(grep -c -- --job-name "$LOG")
code=0
if [ $runs = no ]; then code=cancelled
elif [ "$tasks" = 0 ]; then (cd "$here" && bash -c "$command") >> "$LOG" 2>&1 || code=$?
else for task in $(seq "$tasks"); do
    (cd "$here" && SLURM_ARRAY_TASK_ID=$task bash -c "$command") >> "$LOG" 2>&1 || code=$?
  done
fi
echo $code > "$LOG.$number"
echo "$number;cluster"
"""


@pytest.fixture
def submit(tmp_path: Path, monkeypatch):
    """Submits the recipe from another directory than its own; gives the log of all jobs, and how each ended."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(SBATCH)
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    home, elsewhere = tmp_path / "a b", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()

    def run(*more: str) -> tuple[str, list[str]]:
        monkeypatch.chdir(home)
        script = elsewhere / "submit.sh"
        again = f"encoders.image.again.random_like=hf:{home}/kept/checkpoints/vit"
        arguments = [
            "slurm",
            str(tmp_path / "small.yaml"),
            "--parts",
            "2",
            "--set",
            "cache=kept",
            "--set",
            again,
            *more,
        ]
        called = CliRunner().invoke(main, [*arguments, "-o", str(script)])
        assert called.exit_code == 0, called.output
        assert "submit it with 'bash" in called.output
        environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "LOG": str(tmp_path / "log"), "HOME": str(tmp_path)}
        done = subprocess.run(["bash", str(script)], env=environment, cwd=elsewhere, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert list(elsewhere.iterdir()) == [script]
        return (tmp_path / "log").read_text(), [(tmp_path / f"log.{k}").read_text().strip() for k in (1, 2, 3)]

    return run


def test_slurm_runs_the_plan_then_the_parts_then_the_rest(recipe: Recipe, tmp_path: Path, submit) -> None:
    log, ended = submit("--set", "extract.shard_rows=16", "--sbatch=--gres=gpu:1", "--sbatch=--mem 8G")
    assert ended == ["0", "0", "0"], log
    submitted = [line for line in log.splitlines() if line.startswith(("--parsable", "--job-name"))]
    assert ["--array=1-2" in line for line in submitted] == [False, True, False]
    assert ["--gres=gpu:1 --mem 8G" in line for line in submitted] == [True, True, False]
    assert "in all: " in log
    assert "part 1/2: encoded 48" in log
    assert "part 2/2: encoded 32" in log
    assert "stage one vit (image, 96-d, random weights: it has learnt nothing): encoded 0, present 80" in log
    assert "auroc of effusion" in log
    assert (tmp_path / "a b" / "kept" / "vit" / "store.json").exists()


def test_slurm_encodes_nothing_where_the_plan_failed(recipe: Recipe, tmp_path: Path, submit) -> None:
    log, ended = submit("--set", "labels=[nothing]")
    assert ended == ["2", "cancelled", "cancelled"]
    assert "no label 'nothing'" in log
    assert not (tmp_path / "a b" / "kept").exists()


def test_slurm_refuses_what_parts_cannot_share(recipe: Recipe, tmp_path: Path) -> None:
    recipe_file = str(tmp_path / "small.yaml")
    called = CliRunner().invoke(main, ["slurm", recipe_file, "--set", "extract.retry_failed=true"])
    assert called.exit_code == 2
    assert "each would try every failure" in called.output
    called = CliRunner().invoke(main, ["slurm", recipe_file, "--sbatch", "--comment=it's"])
    assert called.exit_code == 2
    assert "quote it as in a shell" in called.output
    called = CliRunner().invoke(main, ["slurm", recipe_file, "-o", str(tmp_path / "nowhere" / "x.sh")])
    assert called.exit_code == 2
    assert "cannot be written (No such file or directory)" in called.output
    called = CliRunner().invoke(main, ["run", recipe_file, "--part", "1/2", "--run-dir", "r"])
    assert called.exit_code == 2
    assert "a part is of stage one" in called.output
