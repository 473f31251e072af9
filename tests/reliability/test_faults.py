"""Every call that the store makes fails in turn, once or from then on: a typed error, and the next run recovers."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from disks import CODES, Failing, Killing, Wrapped
from workload import REFUSED, check_whole, extract, in_child, tree, with_disk

import embedcache
from embedcache.store import commit


def count_calls(work: Callable[[], object]) -> int:
    """How many calls the work makes of the disk."""
    counted, real = Wrapped(), commit.disk
    commit.disk = counted
    try:
        work()
    finally:
        commit.disk = real
    return counted.n_calls


def sweep(tmp_path: Path, every: int) -> list[tuple[int, int, bool]]:
    """Where to fail, with which code, and whether for good."""
    n_calls = count_calls(lambda: extract(tmp_path / "counted"))
    cases = itertools.product(range(0, n_calls, every), CODES, (False, True))
    return list(cases) if every == 1 else [case for k, case in enumerate(cases) if k % 3 == 0]


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_every_call_fails_in_turn(tmp_path: Path, every: int) -> None:
    reference = tmp_path / "reference"
    extract(reference)
    cases = sweep(tmp_path, every)
    n_typed = 0
    for k, (at, code, forever) in enumerate(cases):
        store = tmp_path / str(k)
        status = in_child(with_disk(Failing(at, code, forever=forever), lambda store=store: extract(store)))
        assert os.WIFEXITED(status), f"call {at} {CODES[code]}: signal {os.WTERMSIG(status)}"
        # a call that only tidies up, such as unlinking a temporary, may fail without harm
        assert os.WEXITSTATUS(status) in (0, REFUSED), f"call {at} {CODES[code]}: not a typed error"
        n_typed += os.WEXITSTATUS(status) == REFUSED
        if (store / "store.json").exists():
            check_whole(store, reference)
        extract(store)
        assert tree(store) == tree(reference)
    print(f"{len(cases)} faults: {n_typed} typed errors, {len(cases) - n_typed} without harm, all recovered")
    assert n_typed > len(cases) // 2


@pytest.mark.parametrize("n_cases", [12, pytest.param(400, marks=pytest.mark.slow)])
def test_a_fault_while_resuming_after_a_kill(tmp_path: Path, n_cases: int) -> None:
    reference = tmp_path / "reference"
    extract(reference)
    n_calls = count_calls(lambda: extract(tmp_path / "counted"))
    rng = random.Random(0)
    for k in range(n_cases):
        store = tmp_path / str(k)
        killing = Killing(rng.randrange(n_calls), after=rng.random() < 0.5)
        assert os.WIFSIGNALED(in_child(with_disk(killing, lambda store=store: extract(store))))
        failing = Failing(rng.randrange(n_calls // 2), rng.choice(list(CODES)), forever=rng.random() < 0.5)
        status = in_child(with_disk(failing, lambda store=store: extract(store)))
        assert os.WIFEXITED(status)
        assert os.WEXITSTATUS(status) in (0, REFUSED)
        extract(store)
        assert tree(store) == tree(reference)
    print(f"{n_cases} kills, each followed by a fault while resuming: all recovered")


OTHER_WORK = {
    "pack": lambda made, out: embedcache.pack_store(made, out / "packed.h5"),
    "drop": lambda made, out: embedcache.drop_ids(made, ["r0001"], out / "dropped"),
    "save": lambda made, out: embedcache.save_store(out / "saved", ["a"], embedcache.open_store(made).embeddings[:1]),
}


FINISHED = {"pack": "packed.h5", "drop": "dropped/shard-00003.json", "save": "saved/shard-00000.json"}


@pytest.mark.parametrize("work", OTHER_WORK)
def test_packing_dropping_and_saving_fail_typed_and_recover(tmp_path: Path, work: str) -> None:
    made = tmp_path / "made"
    extract(made)
    (tmp_path / "whole").mkdir()
    run = OTHER_WORK[work]
    n_calls = count_calls(lambda: run(made, tmp_path / "whole"))
    for at in range(n_calls):
        out = tmp_path / str(at)
        out.mkdir()
        failing = Failing(at, 28, forever=at % 2 == 0)
        status = in_child(with_disk(failing, lambda out=out: run(made, out)))
        assert os.WIFEXITED(status)
        assert os.WEXITSTATUS(status) in (0, REFUSED)
        if not (out / FINISHED[work]).exists():
            run(made, out)
        assert embedcache.verify_store(out / FINISHED[work].split("/")[0]) == []


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("work", OTHER_WORK)
def test_packing_dropping_and_saving_go_on_after_a_kill(tmp_path: Path, work: str, every: int) -> None:
    made, whole = tmp_path / "made", tmp_path / "whole"
    extract(made)
    whole.mkdir()
    n_calls = count_calls(lambda: OTHER_WORK[work](made, whole))
    for at in range(0, n_calls, every):
        for after in (False, True):
            out = tmp_path / f"{at}{after}"
            out.mkdir()
            killing = Killing(at, after=after)
            assert os.WIFSIGNALED(in_child(with_disk(killing, lambda out=out: OTHER_WORK[work](made, out))))
            if not (out / FINISHED[work]).exists():
                OTHER_WORK[work](made, out)
            for name in ("packed.h5", "dropped", "saved"):
                if (whole / name).is_dir():
                    left = {k: v for k, v in tree(out / name).items() if not k.endswith(".tmp")}
                    assert left == tree(whole / name)
                elif (whole / name).is_file():
                    assert (out / name).read_bytes() == (whole / name).read_bytes()


FILL = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from workload import dataset, extract
from embedcache.errors import StoreWriteError
try:
    extract(Path(sys.argv[2]) / "s", dataset(400, bad=()))
except StoreWriteError as error:
    print(error)
    sys.exit(3)
"""


@pytest.mark.parametrize("limit", ["full disk", "size of a file"])
def test_a_real_limit_of_the_system_is_a_typed_error(tmp_path: Path, limit: str) -> None:
    """No shim: a file system with no room left, and the limit of RLIMIT_FSIZE."""
    script = [sys.executable, "-c", FILL, str(Path(__file__).parent), str(tmp_path)]
    if limit == "full disk":
        if subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False).returncode:
            pytest.skip("needs user namespaces")
        mount = f'mount -t tmpfs -o size=256k none {tmp_path} && exec "$@"'
        command = ["unshare", "-Urm", "sh", "-c", mount, "sh", *script]
    else:
        command = ["sh", "-c", 'ulimit -f 4; exec "$@"', "sh", *script]  # 4 blocks of 512 bytes or 1 KiB
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == REFUSED, done.stderr[-2000:]
    words = "No space left on device" if limit == "full disk" else "File too large"
    assert words in done.stdout
    assert "bytes free" in done.stdout
    assert "run the same command again" in done.stdout
