"""The command line: messages, exit codes, JSON."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from calling import call

import embedcache
from embedcache.cli import main


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_shows_an_example(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    assert f"embedcache {command}" in result.output


def test_the_whole_way_by_hand(make_manifest, checkpoints: Path, tmp_path: Path) -> None:
    manifest = make_manifest(40)
    (manifest.root / manifest.frame["image"][5]).write_bytes(b"")
    manifest.write(tmp_path / "m.parquet")
    image, text, run = tmp_path / "image", tmp_path / "text", tmp_path / "run"
    done = call("extract", tmp_path / "m.parquet", f"hf:{checkpoints / 'vit'}", "--store", image, "--pooling", "mean")
    assert done.exit_code == 0, done.output
    assert "asked 40, encoded 39, present 0, failed 1" in done.output
    assert "failed 's005': empty-file: the file has no bytes" in done.output
    done = call("extract", tmp_path / "m.parquet", f"hf:{checkpoints / 'bert'}", "--store", text, "--json")
    assert json.loads(done.stdout)["n_embedded"] == 40
    done = call("train", tmp_path / "m.parquet", image, text, "--run-dir", run, "--epochs", 1, "--batch-size", 8)
    assert done.exit_code == 0, done.output
    assert "training pairs" in done.output
    few = ("--set", "heads=knn", "--set", "n_seeds=2", "--set", "n_draws=100")
    done = call("probe", tmp_path / "m.parquet", image, "--label", "opacity", "--run-dir", run, "--json", *few)
    assert {"control", "head", "fraction", "metric", "value", "low", "high", "n_train"} <= set(
        json.loads(done.stdout)["scores"][0]
    )
    facts = json.loads(call("info", image, "--json").stdout)
    assert (facts["rows"], facts["failed"], facts["dim"]) == (39, 1, 96)
    assert "unfinished shards" in call("info", image).output
    assert "sound" in call("verify", image).output


def test_verify_fails_on_a_damaged_store(make_manifest, image_encoder, tmp_path: Path) -> None:
    embedcache.extract(make_manifest(4), image_encoder, tmp_path / "s")
    shard = next((tmp_path / "s").glob("*.h5"))
    shard.write_bytes(shard.read_bytes()[:-1])
    result = call("verify", tmp_path / "s")
    assert result.exit_code == 1
    assert "damaged" in result.output
    assert json.loads(call("verify", tmp_path / "s", "--json").stdout)[0]["kind"] == "damaged"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["info", "nowhere"], 2, "no store there"),
        (["run", "nowhere.yaml"], 2, "no recipe there"),
        (["extract", "nowhere.csv", "minilm", "--store", "s"], 2, "no manifest there"),
        (["train", "nowhere.csv", "a", "b", "--run-dir", "r"], 2, "no manifest there"),
        (["probe", "nowhere.csv", "s", "--label", "y"], 2, "no manifest there"),
        (["extract"], 2, "Missing argument"),
    ],
)
def test_a_users_mistake_is_one_message_and_exit_code_2(
    tmp_path: Path, monkeypatch, arguments: list[str], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == code
    assert message in result.output
    assert "Traceback" not in result.output


def test_a_damaged_store_is_a_fault(tmp_path: Path) -> None:
    import numpy as np

    embedcache.save_store(tmp_path / "s", ["a"], np.ones((1, 2), np.float32))
    (tmp_path / "s" / "store.json").write_bytes(b"{}")
    result = call("info", tmp_path / "s")
    assert result.exit_code == 1
    assert "not a sealed store document" in result.output


def extracting(many: Path, checkpoints: Path, store: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "embedcache", "extract", str(many), f"hf:{checkpoints / 'vit'}",
        "--store", str(store), "--pooling", "mean", "--shard-rows", "8", "--batch-size", "4", *more,
    ]  # fmt: skip


def until_a_shard_is_there(store: Path) -> None:
    deadline = time.monotonic() + 120
    while not list(store.glob("shard-*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_the_caller_ignores_does_not_stop_it(make_manifest, checkpoints: Path, tmp_path: Path) -> None:
    """As under nohup, when the terminal closes."""
    make_manifest(100).write(tmp_path / "m.parquet")
    child = subprocess.Popen(
        extracting(tmp_path / "m.parquet", checkpoints, tmp_path / "s"),
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    until_a_shard_is_there(tmp_path / "s")
    child.send_signal(signal.SIGHUP)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    assert "asked 100, encoded 100" in output


def test_a_second_ctrl_c_changes_nothing(make_manifest, checkpoints: Path, tmp_path: Path) -> None:
    make_manifest(400).write(tmp_path / "m.parquet")
    command = extracting(tmp_path / "m.parquet", checkpoints, tmp_path / "s", "--workers", "2")
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    until_a_shard_is_there(tmp_path / "s")
    for _ in range(2):
        os.killpg(child.pid, signal.SIGINT)
        time.sleep(0.05)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "To go on: " in errors.splitlines()[-1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--address", "tcp://head:8786"), "the backend local has none, choose dask or ray with it"),
        (("--view", "seed=1"), "there is no view to draw; ask for 2 or more"),
        (("--views", "9", "--shard-rows", "8"), "expected at most shard_rows (8)"),
        (("--part", "1/2", "--retry-failed"), "each part would try every failure"),
    ],
)
def test_settings_that_make_no_sense_are_found_before_the_encoder_is_loaded(
    make_manifest, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    make_manifest(2).write(tmp_path / "m.parquet")
    result = call("extract", tmp_path / "m.parquet", "hf:nowhere/at-all", "--store", tmp_path / "s", *more)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("number", "code", "more"),
    [
        (signal.SIGINT, 130, ()),
        (signal.SIGTERM, 143, ()),
        (signal.SIGHUP, 129, ()),
        (signal.SIGINT, 130, ("--workers", "2")),
    ],
)
def test_stopped_it_says_how_to_go_on_and_goes_on(
    make_manifest, checkpoints: Path, tmp_path: Path, number: signal.Signals, code: int, more: tuple[str, ...]
) -> None:
    make_manifest(400).write(tmp_path / "m.parquet")
    command = extracting(tmp_path / "m.parquet", checkpoints, tmp_path / "s", *more)
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    until_a_shard_is_there(tmp_path / "s")
    os.killpg(child.pid, number)  # as a terminal does: every process of the group gets it
    _, errors = child.communicate(timeout=60)
    assert child.returncode == code, errors.decode()
    told = errors.decode().splitlines()[-1]
    assert told.startswith("stopped; what is finished is kept. To go on: ")
    going_on = shlex.split(told.partition("To go on: ")[2])
    assert going_on == command
    assert "Traceback" not in errors.decode()
    report = json.loads(call(*going_on[3:], "--json").stdout)  # in this process: it is another one than before
    assert report["n_present"] > 0
    assert report["n_asked"] == 400 == report["n_embedded"] + report["n_present"]
    assert set(report["phases"]) == {
        "plan_s", "run_s", "worker_s", "prepare_s", "encode_s", "write_s", "waited_s"
    }  # fmt: skip
    assert embedcache.verify_store(tmp_path / "s") == []


def test_a_signal_keeps_its_number_where_a_library_raises_its_own_exception(monkeypatch) -> None:
    """As ray does, when the signal lands inside its wait."""

    @click.command()
    def stopping() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None

    monkeypatch.setitem(main.commands, "stopping", stopping)
    before = signal.getsignal(signal.SIGINT)
    try:
        assert call("stopping").exit_code == 143
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_plan_is_told_and_nothing_is_written(make_manifest, checkpoints: Path, tmp_path: Path, monkeypatch) -> None:
    make_manifest(30).write(tmp_path / "m.parquet")
    command = extracting(tmp_path / "m.parquet", checkpoints, tmp_path / "s", "--plan")[3:]
    done = call(*command)
    assert done.exit_code == 0, done.output
    for line in ("to do       30 of 30 ids", "shards      4, batches of 4", "disk  ", "memory  ", "time        about"):
        assert line in done.output
    assert json.loads(call(*command, "--json").stdout)["fits"] is True
    assert not (tmp_path / "s").exists()
    from embedcache import resources

    monkeypatch.setattr(resources, "free_bytes", lambda store: 100)
    refused = call(*command)
    assert refused.exit_code == 2
    assert "100 bytes are free there; nothing was started" in refused.output


def test_parts_views_and_batch_sizes_on_the_command_line(make_manifest, checkpoints: Path, tmp_path: Path) -> None:
    make_manifest(30).write(tmp_path / "m.parquet")
    command = extracting(tmp_path / "m.parquet", checkpoints, tmp_path / "s", "--views", "2", "--view", "seed=3")[3:]
    first = call(*command, "--part", "1/2", "--json")
    assert json.loads(first.stdout)["n_asked"] == 16
    second = call(*command, "--part", "2/2")
    assert "asked 14, encoded 14" in second.output
    assert "phases: plan" in second.output
    assert len(embedcache.open_store(tmp_path / "s")) == 60
    assert "part '3/2'" not in (wrong := call(*command, "--part", "3/2").output)
    assert "expected 1/2 to 2/2" in wrong
    assert "is not a valid integer" in call(*command, "--batch-size", "much").output
    assert call(*command, "--batch-size", "auto").exit_code == 0
    assert "--view 'sed=1': expected FIELD=VALUE with one of seed, min_area" in call(*command, "--view", "sed=1").output
