"""SIGKILL at every call of the protocol and at random instants: nothing lost, doubled or partial, and resumed to the
same bytes."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from disks import Killing, Marking, Wrapped
from workload import check_whole, dataset, extract, in_child, tree, with_disk


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("reference") / "s"
    extract(store)
    return store


def resume_and_compare(store: Path, reference: Path) -> None:
    if (store / "store.json").exists():
        check_whole(store, reference)
    extract(store)
    assert tree(store) == tree(reference)


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_every_call(tmp_path: Path, reference: Path, every: int) -> None:
    """Before and after each call that the store makes, or in CI each fourth."""
    counted = Wrapped()

    def count() -> None:
        extract(tmp_path / "counted")
        (tmp_path / "n").write_text(str(counted.n_calls))

    assert in_child(with_disk(counted, count)) == 0
    n_calls = int((tmp_path / "n").read_text())
    assert n_calls > 60
    for at in range(0, n_calls, every):
        for after in (False, True):
            store = tmp_path / f"{at}{after}"
            status = in_child(with_disk(Killing(at, after=after), lambda store=store: extract(store)))
            assert os.WIFSIGNALED(status)
            assert os.WTERMSIG(status) == signal.SIGKILL
            resume_and_compare(store, reference)


@pytest.mark.parametrize("n_kills", [15, pytest.param(1000, marks=pytest.mark.slow)])
def test_killed_at_random_instants(tmp_path: Path, n_kills: int) -> None:
    """Of a longer extraction, each kill in a store of its own; half of them aimed into a call of the protocol."""
    manifest = dataset(60)
    whole = tmp_path / "whole"
    started = time.monotonic()
    assert in_child(lambda: extract(whole, manifest)) == 0
    seconds = time.monotonic() - started
    rng, marking = random.Random(0), Marking()
    n_killed = n_inside = 0
    while n_killed < n_kills:
        store = tmp_path / str(n_killed)
        delay = rng.uniform(0, seconds)
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            with_disk(marking, lambda store=store: extract(store, manifest))()
            os._exit(0)
        time.sleep(delay)
        if n_killed % 2:
            deadline = time.monotonic() + seconds
            while not marking._flag[0] and time.monotonic() < deadline:
                pass
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        inside = marking.take()
        if os.WIFSIGNALED(status):
            n_killed += 1
            n_inside += inside
            if (store / "store.json").exists():
                check_whole(store, whole)
        extract(store, manifest)
        assert tree(store) == tree(whole)
    print(f"{n_killed} kills, {n_inside} of them within a call of the protocol")
    assert n_inside >= max(n_kills // 10, 1)
