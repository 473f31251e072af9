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
import torch

import embedcache
from embedcache import Manifest
from embedcache.errors import DeviceError, EncoderError, SettingsError, WorkerError
from embedcache.stage_one.extract import ExtractReport
from embedcache.workers.chosen import Workers

OPTIONS = {"shard_rows": 5, "batch_size": 2}

PACED = """
import os, sys, time
from pathlib import Path
import torch
from embedcache.encoders.image import ImageModel
from embedcache.encoders.pooling import Output
from embedcache.encoders.transforms import paper_transform

HERE = Path(__file__).parent
under_way = 0

def factory(concurrent=True):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 7, 4), torch.nn.ReLU(), torch.nn.Conv2d(64, 8, 3))

    def forward(pixels):
        global under_way
        if not pixels.any():  # the look that loading takes
            return Output(pooler=module(pixels).mean(dim=(2, 3)))
        under_way += 1
        if under_way > 1:
            (HERE / "overlap").touch()
        (HERE / "pids" / str(os.getpid())).touch()
        while (HERE / "hold").exists():
            time.sleep(0.01)
        time.sleep(float(os.environ.get("PACE_S", "0.02")))
        pooled = module(pixels).mean(dim=(2, 3))
        under_way -= 1
        return Output(pooler=pooled)

    return ImageModel(module=module, forward=forward, transform=paper_transform(), config={}, concurrent=concurrent)

def careful():
    return factory(concurrent=False)

class Odd(Exception):
    def __init__(self, what, why):
        super().__init__(f"{what}: {why}")

def odd():
    model = factory()
    def forward(pixels):
        if pixels.any():
            raise Odd("a fault of the model", "told as it is")
        return model.forward(pixels)
    return ImageModel(module=model.module, forward=forward, transform=model.transform, config={"odd": True})

def fatal():
    model = factory()
    def forward(pixels):
        if pixels.any():
            os._exit(3)
        return model.forward(pixels)
    return ImageModel(module=model.module, forward=forward, transform=model.transform, config={"fatal": True})
"""


def digests(store: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(store.iterdir()) if p.name != ".pace"}


def counts_hold(report: ExtractReport) -> bool:
    return report.n_asked == report.n_embedded + report.n_failed + report.n_present


def published(store: Path) -> int:
    return sum(1 for _ in store.glob("shard-*.json"))


def wait_for(holds: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie: where nobody reaps orphans, they stay as such."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def own(tmp_path: Path, monkeypatch) -> Path:
    """A directory with an encoder of one's own that takes its time and leaves the id of each process that encodes."""
    folder = tmp_path / "own"
    (folder / "pids").mkdir(parents=True)
    (folder / "paced.py").write_text(PACED)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    sys.modules.pop("paced", None)
    return folder


def pids(own: Path) -> set[int]:
    return {int(path.name) for path in (own / "pids").iterdir()}


@pytest.fixture
def many(make_manifest, tmp_path: Path) -> Path:
    """A manifest of 200 images, one of them bad."""
    manifest = make_manifest(200)
    (manifest.root / manifest.frame["image"][7]).write_bytes(b"")
    manifest.write(tmp_path / "m.parquet")
    return tmp_path / "m.parquet"


@pytest.fixture
def whole(many: Path, own: Path, tmp_path: Path) -> Path:
    """What this process makes of it."""
    encoder = embedcache.load_encoder("py:paced:factory", device="cpu")
    report = embedcache.extract(Manifest.read(many), encoder, tmp_path / "whole", **OPTIONS)
    assert counts_hold(report)
    assert report.n_failed == 1
    assert pids(own) == {os.getpid()}
    (own / "pids" / str(os.getpid())).unlink()
    return tmp_path / "whole"


# processes of this machine


@pytest.mark.parametrize("workers", [2, 4])
def test_local_processes_give_the_same_bytes(many, whole, own, tmp_path: Path, workers: int, capsys) -> None:
    encoder = embedcache.load_encoder("py:paced:factory", device="cpu")
    report = embedcache.extract(Manifest.read(many), encoder, tmp_path / "s", workers=workers, **OPTIONS)
    assert (report.n_asked, report.n_embedded, report.n_failed) == (200, 199, 1)
    assert digests(tmp_path / "s") == digests(whole)
    assert len(pids(own)) == workers
    assert os.getpid() not in pids(own)
    assert report.phases.run_s > report.phases.worker_s / workers > 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert "200/200 image" in last
    assert "encoder waited" in last
    assert last.endswith(", 1 failed")


def test_an_encoder_that_is_called_from_one_thread_gives_the_same_bytes_in_any_process(
    many, own, tmp_path: Path
) -> None:
    """torch may add up in another order with another number of threads: workers take as many as this process."""
    manifest, before = Manifest.read(many), torch.get_num_threads()
    encoder = embedcache.load_encoder("py:paced:careful", device="cpu")
    try:
        torch.set_num_threads(2)
        for workers in (1, 2):
            embedcache.extract(manifest, encoder, tmp_path / str(workers), workers=workers, n_threads=1, **OPTIONS)
    finally:
        torch.set_num_threads(before)
    assert digests(tmp_path / "1") == digests(tmp_path / "2")
    assert not (own / "overlap").exists()


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


def test_an_encoder_that_nobody_else_can_load_is_refused(make_manifest, own, tmp_path: Path) -> None:
    from embedcache.encoders.base import EncoderOptions
    from embedcache.encoders.image import ImageEncoder

    import paced  # isort: skip

    encoder = ImageEncoder(paced.factory(), EncoderOptions(device="cpu"))
    with pytest.raises(EncoderError, match="was not made by load_encoder"):
        embedcache.extract(make_manifest(6), encoder, tmp_path / "s", workers=2)


# killed


def start(many: Path, store: Path, *more: str) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "embedcache", "extract", str(many), "py:paced:factory", "--store", str(store),
        "--device", "cpu", "--shard-rows", "5", "--batch-size", "2", *more,
    ]  # fmt: skip
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def ended_well(parent: subprocess.Popen) -> None:
    output, _ = parent.communicate(timeout=180)
    assert parent.returncode == 0, output
    assert "asked 200, encoded 199, present 0, failed 1" in output


def test_a_worker_that_is_killed_costs_nothing(many, whole, own, tmp_path: Path) -> None:
    store = tmp_path / "s"
    parent = start(many, store, "--workers", "2")
    wait_for(lambda: published(store) >= 3 and len(pids(own)) == 2)
    os.kill(min(pids(own)), signal.SIGKILL)
    ended_well(parent)
    assert digests(store) == digests(whole)
    assert len(pids(own)) == 3  # another took its place


def test_workers_that_die_once_each_cost_nothing(many, whole, own, tmp_path: Path) -> None:
    """Each takes two orders with it: the one in hand, and the one that lies ready."""
    store = tmp_path / "s"
    parent = start(many, store, "--workers", "3")
    wait_for(lambda: len(pids(own)) == 3)
    for pid in pids(own):
        os.kill(pid, signal.SIGKILL)
    ended_well(parent)
    assert digests(store) == digests(whole)


def test_a_second_ctrl_c_does_not_wait_for_orders(many, own, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PACE_S", "0.3")
    store = tmp_path / "s"
    parent = start(many, store, "--workers", "2", "--shard-rows", "50", "--threads", "1")
    wait_for(lambda: len(pids(own)) == 2)
    for _ in range(2):
        parent.send_signal(signal.SIGINT)
        time.sleep(0.03)
    output, _ = parent.communicate(timeout=60)
    assert parent.returncode == 130, output
    assert "To go on: " in output.splitlines()[-1]
    assert published(store) == 0  # a shard takes seven seconds
    assert not any(map(is_running, pids(own)))


def test_a_fault_in_a_worker_is_told_whatever_its_class(make_manifest, own, tmp_path: Path) -> None:
    encoder = embedcache.load_encoder("py:paced:odd", device="cpu")
    with pytest.raises(WorkerError, match=r"(?s)Odd in a worker .*a fault of the model: told as it is"):
        embedcache.extract(make_manifest(6), encoder, tmp_path / "s", workers=2)


@pytest.mark.parametrize("also_workers", [False, True])
def test_a_parent_that_is_killed_can_be_run_again(many, whole, own, tmp_path: Path, also_workers: bool) -> None:
    store = tmp_path / "s"
    parent = start(many, store, "--workers", "2")
    wait_for(lambda: published(store) >= 3 and len(pids(own)) == 2)
    if also_workers:
        os.killpg(parent.pid, signal.SIGKILL)
    else:
        parent.kill()
    parent.wait()
    wait_for(lambda: not any(map(is_running, pids(own))))  # orphans end by themselves
    assert published(store) < published(whole)
    encoder = embedcache.load_encoder("py:paced:factory", device="cpu")
    report = embedcache.extract(Manifest.read(many), encoder, store, **OPTIONS)
    assert counts_hold(report)
    assert report.n_present > 0
    assert digests(store) == digests(whole)


def test_workers_that_die_over_and_over_end_the_run(make_manifest, own, tmp_path: Path) -> None:
    encoder = embedcache.load_encoder("py:paced:fatal", device="cpu")
    with pytest.raises(WorkerError, match=r"workers died 3 times over shard 0, the last with Terminated.*--workers 1"):
        embedcache.extract(make_manifest(6), encoder, tmp_path / "s", workers=2)


# dask and ray


@pytest.fixture
def scheduler(own: Path, tmp_path: Path) -> Iterator[tuple[str, Callable[[int], subprocess.Popen]]]:
    """The address of a dask scheduler on loopback, and what starts a worker process of so many threads."""
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
        yield address, lambda n: run("worker", address, "--nthreads", str(n), "--no-nanny", "--no-dashboard")
    finally:
        for process in running:
            process.kill()
            process.wait()


def test_dask_workers_may_join_and_die(
    many, whole, own, tmp_path: Path, scheduler: tuple[str, Callable[[int], subprocess.Popen]]
) -> None:
    address, start_worker = scheduler
    store = tmp_path / "s"
    parent = start(many, store, "--backend", "dask", "--address", address)  # it waits for the first to join
    first = start_worker(1)
    wait_for(lambda: published(store) >= 2)
    assert pids(own) == {first.pid}
    (own / "hold").touch()  # until the second has joined, however long that takes
    second = start_worker(1)
    wait_for(lambda: second.pid in pids(own))
    (own / "hold").unlink()
    before = published(store)
    first.kill()  # in the middle of a shard: the other worker does it, and all that is left
    ended_well(parent)
    assert before < published(store)
    assert pids(own) == {first.pid, second.pid}
    assert digests(store) == digests(whole)


def test_a_dask_worker_of_several_threads_takes_one_order_at_a_time(
    many, own, tmp_path: Path, scheduler: tuple[str, Callable[[int], subprocess.Popen]]
) -> None:
    address, start_worker = scheduler
    worker = start_worker(3)
    encoder = embedcache.load_encoder("py:paced:careful", device="cpu")
    report = embedcache.extract(
        Manifest.read(many), encoder, tmp_path / "s", backend="dask", address=address, **OPTIONS
    )
    assert (report.n_embedded, report.n_failed) == (199, 1)
    assert pids(own) == {worker.pid}
    assert not (own / "overlap").exists()


def test_dask_starts_workers_of_its_own(many, whole, own, tmp_path: Path) -> None:
    encoder = embedcache.load_encoder("py:paced:factory", device="cpu")
    report = embedcache.extract(Manifest.read(many), encoder, tmp_path / "s", backend="dask", **OPTIONS)
    assert counts_hold(report)
    assert len(pids(own)) == 1
    assert os.getpid() not in pids(own)
    assert digests(tmp_path / "s") == digests(whole)


def test_a_scheduler_that_is_not_there_is_told(make_manifest, image_encoder, tmp_path: Path, monkeypatch) -> None:
    from embedcache.workers import pools

    monkeypatch.setattr(pools, "CONNECT_S", 1)
    with pytest.raises(WorkerError, match=r"no dask scheduler at tcp://127\.0\.0\.1:9.*expected an address such as"):
        embedcache.extract(make_manifest(4), image_encoder, tmp_path / "s", backend="dask", address="tcp://127.0.0.1:9")


def test_ray_workers_give_the_same_bytes_and_may_die(many, whole, own, tmp_path: Path) -> None:
    store = tmp_path / "s"
    parent = start(many, store, "--backend", "ray", "--workers", "2")
    wait_for(lambda: published(store) >= 3 and len(pids(own)) == 2)
    os.kill(min(pids(own)), signal.SIGKILL)
    ended_well(parent)
    assert digests(store) == digests(whole)
    assert len(pids(own)) >= 3
    assert parent.pid not in pids(own)


def test_a_stopped_run_on_ray_says_how_to_go_on(many, own, tmp_path: Path) -> None:
    """ray has a handler of its own for SIGTERM."""
    parent = start(many, tmp_path / "s", "--backend", "ray")
    wait_for(lambda: published(tmp_path / "s") >= 1)
    parent.terminate()
    output, _ = parent.communicate(timeout=60)
    assert parent.returncode == 143, output
    assert "To go on: " in output


# settings


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"backend": "mpi"}, "backend 'mpi', expected one of local, dask, ray"),
        ({"address": "tcp://x:1"}, "the backend local has none"),
        ({"backend": "dask", "address": "tcp://x:1", "workers": 8}, "a running cluster has its own workers"),
        ({"workers": 0}, "workers is 0, expected at least 1"),
        ({"n_threads": 0}, "n_threads is 0, expected at least 1"),
        ({"part": (3, 2)}, r"part 3/2, expected 1/2 to 2/2"),
        ({"part": (1, 2), "retry_failed": True}, "each part would try every failure"),
    ],
)
def test_settings_that_make_no_sense(make_manifest, image_encoder, tmp_path: Path, wrong, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        embedcache.extract(make_manifest(2), image_encoder, tmp_path / "s", **wrong)
    assert not (tmp_path / "s").exists()


def test_a_process_for_each_gpu(monkeypatch) -> None:
    from embedcache.workers import chosen

    monkeypatch.setattr(chosen, "count_gpus", lambda: 4)
    assert Workers().devices("cuda") == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert Workers(n=2).devices("cuda") == ["cuda:0", "cuda:1"]
    assert Workers(n=1).devices("cuda") == ["cuda"]
    assert Workers("dask", "tcp://x:1").devices("cuda") == ["cuda"]
    with pytest.raises(DeviceError, match="5 workers for 4 GPUs"):
        Workers(n=5).devices("cuda")
    with pytest.raises(DeviceError, match="the backend local takes one for each GPU"):
        Workers("ray", n=2).devices("cuda")


def test_parts_together_make_the_whole(many, whole, own, tmp_path: Path) -> None:
    manifest = Manifest.read(many)
    encoder = embedcache.load_encoder("py:paced:factory", device="cpu")
    reports = [
        embedcache.extract(manifest, encoder, tmp_path / "s", part=(number, 3), **OPTIONS) for number in (2, 1, 3)
    ]
    assert all(map(counts_hold, reports))
    assert sum(report.n_asked for report in reports) == 200
    assert sum(report.n_embedded for report in reports) == 199
    assert digests(tmp_path / "s") == digests(whole)
    again = embedcache.extract(manifest, encoder, tmp_path / "s", part=(1, 3), **OPTIONS)
    assert (again.n_embedded, again.n_present, again.n_failed) == (0, reports[1].n_embedded, reports[1].n_failed)
