"""What a run says of itself: metrics as CSV, and W&B with the real library offline and with one that fails."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

import embedcache
from embedcache import Manifest, TrainConfig
from embedcache.errors import SettingsError, TrainingError
from embedcache.stage_two import fit as fit_module

SMALL = TrainConfig(epochs=3, batch_size=64, lr=3e-3, projection_dim=48, n_heads=4, ff_dim=64, dropout=0.0)
ASKED = dataclasses.replace(SMALL, wandb="mine")


def test_the_table_holds_what_the_lines_hold(world, tmp_path: Path) -> None:
    result = embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=SMALL)
    table = pd.read_csv(tmp_path / "run" / "metrics.csv")
    assert table.to_dict("records") == result.history
    assert b"\r" not in (tmp_path / "run" / "metrics.csv").read_bytes()


def test_the_table_of_a_run_without_validation_has_blanks(world, tmp_path: Path) -> None:
    manifest = Manifest(world.manifest.frame.assign(split="train"), name="m", root=".")
    embedcache.train(manifest, world.image, world.text, tmp_path / "run", config=SMALL)
    assert pd.read_csv(tmp_path / "run" / "metrics.csv")["valid_loss"].isna().all()


class Stopped(Exception):
    """What stands for a kill, right after a checkpoint."""


@pytest.fixture
def stopped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint in the third epoch of four steps is followed by a stop, and no other is."""
    write, written = fit_module.write_checkpoint, []

    def counted(*args: object, **kwargs: object) -> None:
        write(*args, **kwargs)  # type: ignore[arg-type]
        written.append(1)
        if len(written) == 9:
            raise Stopped

    monkeypatch.setattr(fit_module, "write_checkpoint", counted)


def test_the_table_of_a_run_that_goes_on_is_that_of_one_nobody_stopped(world, tmp_path: Path, stopped_once) -> None:
    config = dataclasses.replace(SMALL, checkpoint_s=0.0)
    for _ in range(2):
        try:
            embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=config)
        except Stopped:
            assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 1 + 2  # heads, and two epochs
    embedcache.train(world.manifest, world.image, world.text, tmp_path / "straight", config=config)
    tables = [pd.read_csv(tmp_path / name / "metrics.csv", dtype=str) for name in ("run", "straight")]
    tables = [table.drop(columns=["seconds", "pairs_per_s"]) for table in tables]
    pd.testing.assert_frame_equal(*tables)
    assert len(tables[0]) == 3
    before = (tmp_path / "run" / "metrics.csv").read_bytes()
    embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=config)
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == before


# W&B


def test_the_real_library_offline_writes_below_the_run_and_nowhere_else(tmp_path: Path) -> None:
    """In a process of its own, whose home and temporary folder lie where the test can look."""
    rng, ids = np.random.default_rng(0), [f"i{k:02d}" for k in range(60)]
    rows = {"id": ids, "image": ids, "report": [f"text {i}" for i in ids], "split": ["train", "train", "valid"] * 20}
    Manifest(pd.DataFrame(rows), name="made", root=tmp_path).write(tmp_path / "m.parquet")
    values = rng.normal(size=(60, 8)).astype(np.float32)
    stores = [tmp_path / "image", tmp_path / "text"]
    embedcache.save_store(stores[0], ids, values)
    embedcache.save_store(stores[1], ids, values, modality="text")
    home, temporary = tmp_path / "home", tmp_path / "t"
    home.mkdir()
    temporary.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "XDG"))}
    environment |= {
        "HOME": str(home), "TMPDIR": str(temporary), "WANDB_MODE": "offline", "WANDB_SILENT": "true",
        "WANDB_SAVE_CODE": "true", "MADE_BY_THIS_TEST": str(tmp_path),
    }  # fmt: skip
    sizes = ("--epochs", "2", "--batch-size", "16", "--set", "projection_dim=24", "--set", "ff_dim=32")
    command = [
        sys.executable, "-m", "embedcache", "train", str(tmp_path / "m.parquet"), *map(str, stores), "--run-dir",
        str(tmp_path / "runs" / "first"), *sizes, "--wandb", "mine", "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    history = json.loads(done.stdout)["history"]

    (written,) = (tmp_path / "runs" / "first" / "wandb").glob("offline-run-*/*.wandb")
    project, name, config, logged, files = read_offline(written)
    assert (project, name) == ("mine", "first")
    assert (config["epochs"], config["wandb"], config["loss"]) == (2, "mine", "clip")
    assert [epoch["valid_loss"] for epoch in logged] == [epoch["valid_loss"] for epoch in history]
    assert [epoch["_step"] for epoch in logged] == [0, 1]
    assert not [path for path in files if path.endswith((".py", ".patch", "requirements.txt"))]
    assert not list(written.parent.rglob("*.py"))
    assert not [path for path in temporary.rglob("*") if path.is_file()]
    assert {path.relative_to(home).parts[:2] for path in home.rglob("*") if path.is_file()} <= {(".cache", "wandb")}
    assert left_behind(f"MADE_BY_THIS_TEST={tmp_path}") == []


def read_offline(path: Path) -> tuple[str, str, dict, list[dict], list[str]]:
    """Project, name, settings, what was logged, and files of a run that was written offline."""
    from wandb.proto import wandb_internal_pb2

    project, name, config, logged, files = "", "", {}, [], []
    for data in records_of(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            project, name = record.run.project, record.run.display_name
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            logged.append({key: json.loads(value) for key, value in items.items()})
        files += [item.path for item in record.files.files]
    return project, name, config, logged, files


def records_of(file: bytes) -> Iterator[bytes]:
    """Records of a log as LevelDB writes it: blocks of 32 KiB; CRC, length and kind before each piece."""
    assert file[:4] == b":W&B"
    at, record = 7, b""
    while at + 7 <= len(file):
        if 32768 - at % 32768 < 7:  # no head fits into what is left of the block
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack("<HB", file[at + 4 : at + 7])
        record += file[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def left_behind(mark: str) -> list[str]:
    """Processes whose environment has a mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (path / "environ").read_bytes():
                found.append((path / "cmdline").read_text())
        except OSError:
            continue
    return found


class FakeRun:
    def __init__(self, fails: bool) -> None:
        self.fails, self.logged, self.ended = fails, [], []

    def log(self, entry: dict, *, step: int) -> None:
        self.logged.append((step, entry))
        if self.fails:
            raise RuntimeError("the service\nis gone")

    def finish(self, *, exit_code: int) -> None:
        self.ended.append(exit_code)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A library with W&B's names that keeps what it is told; `fails` is what goes wrong."""
    library = types.ModuleType("wandb")
    told = types.SimpleNamespace(fails="", runs=[], asked=[])

    class Error(Exception):
        pass

    class Settings:
        model_fields = ("save_code", "disable_code")

        def __init__(self, **fields: object) -> None:
            self.fields = fields

    def init(**asked: object) -> FakeRun:
        told.asked.append(asked)
        if told.fails == "init":
            raise Error("No API key configured")
        told.runs.append(FakeRun(told.fails == "log"))
        return told.runs[-1]

    library.init, library.Settings, library.errors = init, Settings, types.SimpleNamespace(Error=Error)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", library)
    return told


def test_each_epoch_goes_to_its_run_and_no_code_does(world, tmp_path: Path, fake) -> None:
    result = embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=ASKED)
    (asked,), (run,) = fake.asked, fake.runs
    assert (asked["project"], asked["name"], asked["dir"]) == ("mine", "run", str(tmp_path / "run"))
    assert asked["config"] == dataclasses.asdict(ASKED)
    assert asked["settings"].fields == {"save_code": False, "disable_code": True}
    assert "mode" not in asked  # WANDB_MODE decides
    assert run.logged == list(enumerate(result.history))
    assert run.ended == [0]


def test_a_finished_run_is_not_told_again_and_one_that_goes_on_is_told_whole(
    world, tmp_path: Path, fake, stopped_once
) -> None:
    config = dataclasses.replace(ASKED, checkpoint_s=0.0)
    with pytest.raises(Stopped):
        embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=config)
    assert fake.runs[0].ended == [1]
    for _ in range(2):
        embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=config)
    assert len(fake.runs) == 2
    assert [step for step, _ in fake.runs[1].logged] == [0, 1, 2]


def test_runs_that_train_together_have_a_run_each(world, tmp_path: Path, fake) -> None:
    configs = embedcache.grid(ASKED, {}, n_seeds=2)
    embedcache.train_many(world.manifest, world.image, world.text, tmp_path / "runs", configs=configs)
    assert [asked["name"] for asked in fake.asked] == ["seed=0", "seed=1"]
    assert {asked["reinit"] for asked in fake.asked} == {"create_new"}
    assert [len(run.logged) for run in fake.runs] == [3, 3]


def test_what_fails_at_the_beginning_stops_before_training(
    world, tmp_path: Path, fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.fails = "init"
    monkeypatch.setattr("embedcache.stage_two.steps.Steps.step", lambda *a: pytest.fail("it trained"))
    with pytest.raises(SettingsError, match=r"project 'mine' \(Error: No API key configured\).*WANDB_MODE=offline"):
        embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=ASKED)


def test_what_fails_later_is_warned_of_once_and_changes_nothing(world, tmp_path: Path, fake) -> None:
    fake.fails = "log"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=ASKED)
    said = [str(w.message) for w in caught if "W&B" in str(w.message)]
    assert len(said) == 1
    assert "RuntimeError: the service is gone" in said[0]
    assert len(fake.runs[0].logged) == 1
    assert len(result.history) == 3
    embedcache.train(world.manifest, world.image, world.text, tmp_path / "without", config=SMALL)
    weights = [(tmp_path / name / "adaptor.safetensors").read_bytes() for name in ("run", "without")]
    assert weights[0] == weights[1]


def test_a_run_that_raises_is_ended_as_failed(world, tmp_path: Path, fake) -> None:
    wild = dataclasses.replace(ASKED, lr=1e30, warmup=0.0)
    with pytest.raises(TrainingError, match="became nan"):
        embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=wild)
    assert fake.runs[0].ended == [1]


def test_without_the_library_it_says_how_to_get_it(world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("embedcache.stage_two.steps.Steps.step", lambda *a: pytest.fail("it trained"))
    with pytest.raises(SettingsError, match=r"pip install 'embedcache\[wandb\]'"):
        embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=ASKED)


def test_a_run_is_the_same_run_with_and_without(world, tmp_path: Path, fake) -> None:
    embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=SMALL)
    embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=ASKED)  # and not refused
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["train"]["wandb"] == "mine"
    assert fake.runs == []
