"""From images to answers by commands alone: extract, train, probe, predict, export."""

from __future__ import annotations

import json
import os
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from calling import call

QUICK = (
    "--set=n_seeds=1", "--set=n_draws=20", "--set=fractions=1.0", "--set=heads=logistic", "--set=controls=no-adaptor",
)  # fmt: skip
MASKS = (
    "--set=decoders=linear", "--set=size=32", "--set=fractions=1.0", "--set=n_seeds=1", "--set=n_draws=20",
    "--set=epochs=1", "--set=min_steps=5",
)  # fmt: skip


@pytest.fixture
def made(make_manifest, checkpoints: Path, tmp_path: Path) -> dict[str, Path]:
    """A manifest, both stores and a run, by commands; the image encoder is named by its directory."""
    manifest = make_manifest(48)
    boxes = np.where(manifest.label("opacity") == 1, "boxes:40x40:10,10,20,20", "boxes:40x40:")
    manifest.with_frame(manifest.frame.assign(mask=boxes)).write(tmp_path / "m.parquet")
    small = ("epochs=1", "batch_size=16", "projection_dim=24", "n_heads=2", "ff_dim=32")
    vit, bert = f"hf:{checkpoints / 'vit'}", f"hf:{checkpoints / 'bert'}"
    for command in (
        ("extract", tmp_path / "m.parquet", vit, "--store", tmp_path / "image", "--tokens", "--pooling", "mean"),
        ("extract", tmp_path / "m.parquet", bert, "--store", tmp_path / "text"),
        ("train", tmp_path / "m.parquet", tmp_path / "image", tmp_path / "text", "--run-dir", tmp_path / "run",
         *(f"--set={setting}" for setting in small)),
    ):  # fmt: skip
        done = call(*command)
        assert done.exit_code == 0, done.output
    return {name: tmp_path / name for name in ("m.parquet", "image", "run")} | {"root": manifest.root}


def test_a_probed_run_answers_for_new_files(made: dict[str, Path], tmp_path: Path) -> None:
    stores = (made["m.parquet"], made["image"], "--run-dir", made["run"])
    done = call("probe", *stores, "--label", "opacity", *QUICK)
    assert done.exit_code == 0, done.output
    assert f"tables, predictions, heads: {made['run'] / 'probes' / 'opacity'}" in done.output
    done = call("segment", *stores, *MASKS)
    assert done.exit_code == 0, done.output
    files = [made["root"] / "s001.png", made["root"] / "s003.jpg", made["root"] / "absent.png"]
    done = call("predict", made["run"], *files)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["file", "opacity", "failure"]
    assert [line.split()[0] for line in lines[1:4]] == [str(file) for file in files]
    assert lines[1].split()[1] == f"{float(lines[1].split()[1]):.3f}"
    assert "unreadable" in lines[3]
    assert "1 of 3 files have no answer" in done.stderr
    assert "--masks FOLDER writes them" in done.stderr
    done = call("predict", made["run"], *files[:2], "--masks", tmp_path / "out", "--csv")
    table = pd.read_csv(StringIO(done.stdout))
    assert table.columns.tolist() == [
        "file", "opacity", "opacity.raw", "opacity.present", "mask", "mask.area", "failure"
    ]  # fmt: skip
    assert [Path(file).name for file in table["mask"]] == ["s001.mask.png", "s003.mask.png"]
    assert all(Path(file).is_file() for file in table["mask"])
    said = json.loads(call("predict", made["run"], *files[:2], "--json").stdout)
    assert said[0]["opacity"] == pytest.approx(table["opacity"][0], abs=1e-6)
    done = call("predict", made["run"], *files[:2], "--masks", tmp_path / "out", "--csv")
    assert done.exit_code == 2
    assert "s001.mask.png: is there already" in done.output
    assert not done.stdout
    done = call("predict", made["run"], files[2])
    assert done.exit_code == 2
    assert "1 of 1 files have no answer" in done.stderr


def test_a_run_is_written_as_a_graph(made: dict[str, Path], tmp_path: Path) -> None:
    assert (
        call("probe", made["m.parquet"], made["image"], "--label", "opacity", *QUICK, "--out", tmp_path / "p").exit_code
        == 0
    )
    done = call("export", tmp_path / "p", tmp_path / "p.onnx", "--onnx", "--head", "logistic")
    assert done.exit_code == 0, done.output
    assert "outputs embedding, opacity, opacity.raw; at most" in done.stdout
    assert "note: opacity: head logistic, fitted on" in done.stderr
    assert (tmp_path / "p.onnx").stat().st_size > 100_000
    said = json.loads(call("export", tmp_path / "p", tmp_path / "q.onnx", "--onnx", "--json").stdout)
    assert said["files"] == [str(tmp_path / "q.onnx")]
    assert said["difference"] <= 1e-4
    for wrong, message in (
        (("--onnx", "--kind", "npy"), "--kind npy is of a store"),
        (("--head", "mlp"), "--head is of a run; give --onnx as well"),
    ):
        done = call("export", tmp_path / "p", tmp_path / "r.onnx", *wrong)
        assert done.exit_code == 2
        assert message in done.output


def test_a_name_that_is_no_text_is_printed_all_the_same(made: dict[str, Path], tmp_path: Path) -> None:
    assert call("probe", made["m.parquet"], made["image"], "--label", "opacity", *QUICK, "--out", tmp_path / "p")
    odd = os.fsdecode(b"odd\xff.png")
    (tmp_path / odd).write_bytes((made["root"] / "s001.png").read_bytes())
    assert b"odd\xff.png,0." in call("predict", tmp_path / "p", tmp_path / odd, "--csv").stdout_bytes
    assert json.loads(call("predict", tmp_path / "p", tmp_path / odd, "--json").stdout)[0]["file"].endswith(odd)
    assert "odd\\udcff.png" in call("predict", tmp_path / "p", tmp_path / odd).stdout


def test_what_does_not_answer_is_refused(made: dict[str, Path]) -> None:
    done = call("export", made["run"], made["run"] / "x.parquet")
    assert done.exit_code == 2
    assert "is a run and no store; give --onnx" in done.output
    done = call("predict", made["run"], made["root"] / "s001.png")
    assert done.exit_code == 2
    assert "no head there that answers for new images" in done.output
    done = call("predict", made["run"], made["root"] / "s001.png", "--csv", "--json")
    assert done.exit_code == 2
    assert "expected one of them" in done.output
