"""Work handed to other processes: the same bytes whoever does it, and whoever dies over it."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import embedcache
from embedcache import Manifest
from embedcache.errors import EncoderError, WorkerError
from embedcache.stage_one.extract import ExtractReport

OPTIONS = {"shard_rows": 5, "batch_size": 2}


def digests(store: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(store.iterdir())}


def counts_hold(report: ExtractReport) -> bool:
    return report.n_asked == report.n_embedded + report.n_failed + report.n_present


def published(store: Path) -> int:
    return sum(1 for _ in store.glob("shard-*.json"))


def wait_for(holds: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


@pytest.fixture
def many(make_manifest, tmp_path: Path) -> Path:
    """A manifest of 400 images, one of them bad."""
    manifest = make_manifest(400)
    (manifest.root / manifest.frame["image"][7]).write_bytes(b"")
    manifest.write(tmp_path / "m.parquet")
    return tmp_path / "m.parquet"


@pytest.fixture
def whole(many: Path, image_encoder, tmp_path: Path) -> Path:
    report = embedcache.extract(Manifest.read(many), image_encoder, tmp_path / "whole", **OPTIONS)
    assert counts_hold(report)
    assert report.n_failed == 1
    return tmp_path / "whole"


@pytest.mark.parametrize("workers", [2, 4])
def test_local_processes_give_the_same_bytes(many, whole, image_encoder, tmp_path: Path, workers: int) -> None:
    report = embedcache.extract(Manifest.read(many), image_encoder, tmp_path / "s", workers=workers, **OPTIONS)
    assert (report.n_asked, report.n_embedded, report.n_failed) == (400, 399, 1)
    assert report.phases.encode_s > 0
    assert digests(tmp_path / "s") == digests(whole)


def test_texts_are_truncated_and_told_by_workers_too(make_manifest, checkpoints: Path, tmp_path: Path) -> None:
    manifest = make_manifest(12)
    encoder = embedcache.load_encoder(f"hf:{checkpoints / 'bert'}", max_length=4, device="cpu")
    here = embedcache.extract(manifest, encoder, tmp_path / "here", **OPTIONS)
    there = embedcache.extract(manifest, encoder, tmp_path / "there", workers=2, **OPTIONS)
    assert there.truncated == here.truncated != {}
    assert digests(tmp_path / "here") == digests(tmp_path / "there")


def test_an_encoder_goes_to_another_process_by_how_it_was_loaded(image_encoder, text_encoder) -> None:
    for encoder in (image_encoder, text_encoder):
        sent = pickle.dumps(encoder)
        assert len(sent) < 5_000
        again = pickle.loads(sent)  # noqa: S301  # our own
        assert again is not encoder
        assert again.fingerprint == encoder.fingerprint
        assert pickle.loads(sent) is again  # noqa: S301  # loaded once in a process


def test_another_checkpoint_at_the_same_place_is_refused_by_workers(tmp_path: Path) -> None:
    from embedcache.encoders.random_init import write_tiny

    encoder = embedcache.load_encoder(f"hf:{write_tiny('tiny-resnet', tmp_path / 'c', seed=1)}", device="cpu")
    sent = pickle.dumps(encoder)
    (tmp_path / "c").rename(tmp_path / "old")
    write_tiny("tiny-resnet", tmp_path / "c", seed=2)
    with pytest.raises(EncoderError, match=r"its fingerprint here is .* expected .* give every worker the same"):
        pickle.loads(sent)  # noqa: S301


# killed


def start(many: Path, checkpoints: Path, store: Path, *more: str) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "embedcache", "extract", str(many), f"hf:{checkpoints / 'vit'}", "--store", str(store),
        "--pooling", "mean", "--shard-rows", "5", "--batch-size", "2", *more,
    ]  # fmt: skip
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def below(pid: int) -> set[int]:
    """Process ids of the children of a process that run this Python."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
            arguments = status.with_name("cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == pid and b"loky" in arguments and b"tracker" not in arguments:
            found.add(int(status.parent.name))
    return found


def test_a_worker_that_is_killed_costs_nothing(many, whole, checkpoints: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    parent = start(many, checkpoints, store, "--workers", "2")
    wait_for(lambda: published(store) >= 3)
    worker = min(below(parent.pid))
    os.kill(worker, signal.SIGKILL)
    output, _ = parent.communicate(timeout=180)
    assert parent.returncode == 0, output
    assert "asked 400, encoded 399, present 0, failed 1" in output
    assert digests(store) == digests(whole)


@pytest.mark.parametrize("also_workers", [False, True])
def test_a_parent_that_is_killed_can_be_run_again(
    many, whole, image_encoder, checkpoints: Path, tmp_path: Path, also_workers: bool
) -> None:
    store = tmp_path / "s"
    parent = start(many, checkpoints, store, "--workers", "2")
    wait_for(lambda: published(store) >= 3)
    workers = below(parent.pid)
    assert len(workers) == 2
    if also_workers:
        os.killpg(parent.pid, signal.SIGKILL)
    else:
        parent.kill()
    parent.wait()
    wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))  # orphans end by themselves
    assert published(store) < published(whole)
    report = embedcache.extract(Manifest.read(many), image_encoder, store, **OPTIONS)
    assert counts_hold(report)
    assert report.n_present > 0
    assert digests(store) == digests(whole)


class Fatal:
    """Ends the process that encodes with it, as a fault of a library would."""

    modality, dim, token_dim, token_grid = "image", 4, None, None
    device, concurrent, origin = "cpu", False, None

    def __init__(self, inner) -> None:
        self.record, self.fingerprint = inner.record, inner.fingerprint

    def prepare(self, sample):
        os._exit(3)


def test_workers_that_die_over_and_over_end_the_run(make_manifest, image_encoder, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="workers died 3 times before a shard was done"):
        embedcache.extract(make_manifest(6), Fatal(image_encoder), tmp_path / "s", workers=2)


# dask and ray


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[tuple[str, Callable[[], subprocess.Popen]]]:
    """The address of a dask scheduler on loopback, and what starts a worker process."""
    running: list[subprocess.Popen] = []

    def run(*arguments: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-m", "dask", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        running.append(process)
        return process

    file = tmp_path / "scheduler.json"
    run("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file))
    wait_for(lambda: file.exists() and file.stat().st_size > 0)
    address = json.loads(file.read_text())["address"]
    try:
        yield address, lambda: run("worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard")
    finally:
        for process in running:
            process.kill()
            process.wait()


def test_dask_workers_may_join_and_die(
    many, whole, checkpoints: Path, tmp_path: Path, scheduler: tuple[str, Callable[[], subprocess.Popen]]
) -> None:
    address, start_worker = scheduler
    store, first = tmp_path / "s", start_worker()
    parent = start(many, checkpoints, store, "--backend", "dask", "--address", address)
    wait_for(lambda: published(store) >= 2)
    start_worker()
    first.kill()  # in the middle of a shard: the other worker does it, and all that is left
    output, _ = parent.communicate(timeout=180)
    assert parent.returncode == 0, output
    assert "asked 400, encoded 399, present 0, failed 1" in output
    assert digests(store) == digests(whole)


def test_dask_starts_workers_of_its_own(many, whole, image_encoder, tmp_path: Path) -> None:
    report = embedcache.extract(
        Manifest.read(many), image_encoder, tmp_path / "s", backend="dask", workers=2, **OPTIONS
    )
    assert counts_hold(report)
    assert digests(tmp_path / "s") == digests(whole)


def test_a_scheduler_that_is_not_there_is_told(make_manifest, image_encoder, tmp_path: Path, monkeypatch) -> None:
    from embedcache.stage_one import engine

    monkeypatch.setattr(engine, "_CONNECT_S", 1)
    with pytest.raises(WorkerError, match=r"no dask scheduler at tcp://127\.0\.0\.1:9"):
        embedcache.extract(make_manifest(4), image_encoder, tmp_path / "s", backend="dask", address="tcp://127.0.0.1:9")


def test_ray_gives_the_same_bytes(many, whole, image_encoder, tmp_path: Path) -> None:
    report = embedcache.extract(Manifest.read(many), image_encoder, tmp_path / "s", backend="ray", workers=2, **OPTIONS)
    assert counts_hold(report)
    assert digests(tmp_path / "s") == digests(whole)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"backend": "mpi"}, "backend 'mpi', expected one of local, dask, ray"),
        ({"address": "tcp://x:1"}, "the backend local has none"),
        ({"workers": 0}, "workers is 0, expected at least 1"),
        ({"part": (3, 2)}, r"part 3/2, expected 1/2 to 2/2"),
    ],
)
def test_settings_that_make_no_sense(make_manifest, image_encoder, tmp_path: Path, wrong, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embedcache.extract(make_manifest(2), image_encoder, tmp_path / "s", **wrong)
    assert not (tmp_path / "s").exists()


def test_parts_together_make_the_whole(many, whole, image_encoder, tmp_path: Path) -> None:
    manifest = Manifest.read(many)
    reports = [
        embedcache.extract(manifest, image_encoder, tmp_path / "s", part=(number, 3), **OPTIONS) for number in (2, 1, 3)
    ]
    assert all(map(counts_hold, reports))
    assert sum(report.n_asked for report in reports) == 400
    assert sum(report.n_embedded for report in reports) == 399
    assert digests(tmp_path / "s") == digests(whole)
    again = embedcache.extract(manifest, image_encoder, tmp_path / "s", part=(1, 3), **OPTIONS)
    assert (again.n_embedded, again.n_present, again.n_failed) == (0, reports[1].n_embedded, reports[1].n_failed)
