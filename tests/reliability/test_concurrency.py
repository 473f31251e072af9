"""Several extractors on one store: every row once, little work done twice, and never two answers for one shard."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from workload import Counter, HashEncoder, dataset, extract, in_child, tree

import embedcache
from embedcache.store.claims import Claims

ROWS = 200
SLOW = pytest.mark.slow


class SlowEncoder(HashEncoder):
    """Takes a millisecond a batch, as an encoder would, so that writers work beside each other."""

    def encode(self, batch, *, tokens=False):
        time.sleep(0.001)
        return super().encode(batch)


def run_together(writers: list[Callable[[], object]], encoded: Counter) -> list[int]:
    """Forks a child for each writer, lets all go at the same moment, and gives their exit codes."""
    gate_read, gate_write = os.pipe()
    children = []
    for k, work in enumerate(writers):
        child = os.fork()
        if child == 0:
            os.close(gate_write)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            encoded.slot = k
            os.read(gate_read, 1)  # returns when the parent closes its end
            code = 1
            try:
                work()
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    os.close(gate_read)
    os.close(gate_write)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def no_locks(*arguments: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("whole") / "s"
    extract(store, dataset(ROWS))
    return store


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
@pytest.mark.parametrize("n_writers", [2, 4, 8])
@pytest.mark.parametrize("rounds", [2, pytest.param(200, marks=SLOW)])
def test_writers_share_the_work(
    tmp_path: Path, whole: Path, monkeypatch, rounds: int, n_writers: int, locks: bool
) -> None:
    if not locks:  # a file system that knows none: correct all the same, only with work done twice
        monkeypatch.setattr(fcntl, "lockf", no_locks)
    manifest, n_good = dataset(ROWS), ROWS - 2
    n_encoded = 0
    for k in range(rounds):
        encoded = Counter()
        work = [partial(extract, tmp_path / str(k), manifest, SlowEncoder(encoded))] * n_writers
        assert run_together(work, encoded) == [0] * n_writers
        assert tree(tmp_path / str(k)) == tree(whole)
        n_encoded += encoded.total()
    wasted = n_encoded / (n_good * rounds) - 1
    print(f"{n_writers} writers, {rounds} rounds, locks {locks}: {wasted:.2%} of the rows encoded twice")
    assert 0 <= wasted <= (0.05 if locks else n_writers - 1.05)


@pytest.mark.parametrize("rounds", [3, pytest.param(200, marks=SLOW)])
def test_writers_with_other_bits_never_both_count(tmp_path: Path, whole: Path, monkeypatch, rounds: int) -> None:
    """Four kinds of hardware under one fingerprint: each shard is whole and from one of them."""
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    manifest, reference = dataset(40), embedcache.open_store(whole)
    n_mixed = 0
    for k in range(rounds):
        store, encoded = tmp_path / str(k), Counter()
        differs = [0.0, 1.0, 2.0, 3.0]
        work = [partial(extract, store, manifest, SlowEncoder(encoded, differs=d)) for d in differs]
        assert run_together(work, encoded) == [0] * 4
        assert embedcache.verify_store(store) == []
        opened = embedcache.open_store(store, verify="digest")
        assert len(set(opened.ids)) == len(opened) == 38
        added = np.rint(opened.embeddings - reference.embeddings[reference.rows(opened.ids)])
        assert set(np.unique(added)) <= set(differs)
        for shard in opened.by_shard():
            assert len(np.unique(added[opened.rows(shard.ids)])) == 1
        n_mixed += len(np.unique(added)) > 1
        assert len(list(store.glob("*.h5"))) == len(list(store.glob("shard-*.json")))  # losers took theirs away
    print(f"{rounds} rounds of 4 writers with other bits: {n_mixed} stores hold shards of more than one, none is mixed")


def test_a_dead_writers_claim_is_free_at_once(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    with Claims(tmp_path / "s") as ours:
        assert ours.claim(0)
        taken = in_child(lambda: os._exit(7 if Claims(tmp_path / "s").claim(0) else 8))
        assert os.WEXITSTATUS(taken) == 8
        free = in_child(lambda: os._exit(7 if Claims(tmp_path / "s").claim(1) else 8))
        assert os.WEXITSTATUS(free) == 7
    assert in_child(lambda: os._exit(7 if Claims(tmp_path / "s").claim(0) else 8)) >> 8 == 7
    assert in_child(lambda: os._exit(7 if Claims(tmp_path / "s").claim(1) else 8)) >> 8 == 7


def test_a_stopped_writers_shard_is_taken_over(tmp_path: Path, whole: Path, monkeypatch) -> None:
    """Stopped with a claim in hand and never continued: after a while of no progress its shard is computed here."""
    from embedcache.stage_one import work

    store, manifest = tmp_path / "s", dataset(ROWS)
    extract(store, dataset(1))
    (store / "plan-00000.json").unlink()
    (store / "shard-00000.json").unlink()
    next(store.glob("*.h5")).unlink()
    ready, say_ready = os.pipe()
    holder = os.fork()
    if holder == 0:
        held = Claims(store)
        os.write(say_ready, bytes([held.claim(5)]))
        time.sleep(600)
        os._exit(0)
    try:
        assert os.read(ready, 1) == b"\x01"
        monkeypatch.setattr(work, "_PATIENCE_S", 1.0)
        extract(store, manifest)
    finally:
        os.kill(holder, 9)
        os.waitpid(holder, 0)
    assert tree(store) == tree(whole)
