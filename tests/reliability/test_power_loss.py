"""Power loss, replayed: every prefix of what an extraction did to the disk.

What was not synced is lost, torn or out of order. Each such disk holds a store whole up to some shard, or none, and the
next run completes it.

The model of a disk that loses power: bytes are sure once their file was synced; before that any prefix of them may be
there, torn at 512 or 4,096 bytes or replaced by zeros. A name is sure once its directory was synced; before that each
change of a name is there or not, whatever became of the others.
"""

from __future__ import annotations

import itertools
import pickle
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from disks import Recorded, Recording
from workload import check_whole, dataset, extract, in_child, tree, with_disk

SUBSETS = 5  # pending changes of names up to which every subset is tried; beyond it a sample


@dataclass
class File:
    """Bytes written to a file, and how many of them were synced."""

    data: bytearray = field(default_factory=bytearray)
    synced: int = 0


@dataclass
class DiskState:
    """What a disk is sure of after some calls, and what is pending.

    Args:
        names: names that are sure, each with its file; a directory has no file.
        pending: changes of names since the last sync of their directory: name, and its file or None where it went.
        current: names as a running system sees them.
    """

    names: dict[str, File | None] = field(default_factory=dict)
    pending: list[tuple[str, File | None, bool]] = field(default_factory=list)
    current: dict[str, File | None] = field(default_factory=dict)

    def apply(self, call: Recorded) -> None:
        if call.name == "create":
            self._change(call.path, File(), there=True)
        elif call.name == "write":
            self.current[call.path].data.extend(call.data)  # type: ignore[union-attr]
        elif call.name == "fsync":
            file = self.current[call.path]
            assert file is not None
            file.synced = len(file.data)
        elif call.name == "link":
            self._change(call.target, self.current[call.path], there=True)
        elif call.name == "unlink":
            self._change(call.path, None, there=False)
        elif call.name == "mkdir":
            self._change(call.path, None, there=True)
        elif call.name == "sync_directory":
            done = [change for change in self.pending if str(Path(change[0]).parent) == call.path]
            self.pending = [change for change in self.pending if change not in done]
            for change in done:
                self._settle(self.names, change)

    def _change(self, name: str, file: File | None, *, there: bool) -> None:
        change = (name, file, there)
        self._settle(self.current, change)
        self.pending.append(change)

    @staticmethod
    def _settle(names: dict[str, File | None], change: tuple[str, File | None, bool]) -> None:
        name, file, there = change
        if there:
            names[name] = file
        else:
            names.pop(name, None)

    def after_power_loss(self, rng: random.Random) -> Iterator[dict[str, bytes | None]]:
        """Disks that may be found: name to bytes, None for a directory."""
        n = len(self.pending)
        every = itertools.product((False, True), repeat=n)
        chosen = every if n <= SUBSETS else (tuple(rng.random() < 0.5 for _ in range(n)) for _ in range(2**SUBSETS))
        for kept in chosen:
            names = dict(self.names)
            for change, is_kept in zip(self.pending, kept, strict=True):
                if is_kept:
                    self._settle(names, change)
            files = {id(f): f for f in names.values() if f is not None}
            unsynced = any(f.synced < len(f.data) for f in files.values())
            for tear in ("all", "none", "zeros", 512, 512, 512, 4096) if unsynced else ("all",):
                torn = {key: _torn(file, tear, rng) for key, file in files.items()}
                yield {name: None if f is None else torn[id(f)] for name, f in names.items()}


def _torn(file: File, tear: str | int, rng: random.Random) -> bytes:
    data, synced = bytes(file.data), file.synced
    if tear == "all":
        return data
    if tear == "none":
        return data[:synced]
    if tear == "zeros":
        return data[:synced] + bytes(len(data) - synced)
    sectors = range(synced // int(tear) * int(tear) + int(tear), len(data) + 1, int(tear))
    return data[: rng.choice(sectors) if sectors else synced]


def lay_out(disk: dict[str, bytes | None], store: Path) -> bool:
    """Writes a disk's store under its path; False if power went before there was a directory."""
    shutil.rmtree(store, ignore_errors=True)
    if str(store) not in disk:
        return False
    store.mkdir(mode=0o700)
    for name, data in disk.items():
        if data is not None and Path(name).parent == store:
            Path(name).write_bytes(data)
    return True


@pytest.mark.parametrize(("n", "every"), [(14, 8), pytest.param(100, 1, marks=pytest.mark.slow)])
def test_every_disk_after_power_loss_is_all_or_nothing(tmp_path: Path, n: int, every: int) -> None:
    """Of an extraction of n reports; in CI each eighth disk."""
    reference, store, manifest = tmp_path / "reference", tmp_path / "parent" / "s", dataset(n)
    extract(reference, manifest)
    recording = Recording()

    def record() -> None:
        extract(store, manifest)
        (tmp_path / "log").write_bytes(pickle.dumps(recording.log))

    assert in_child(with_disk(recording, record)) == 0
    log: list[Recorded] = pickle.loads((tmp_path / "log").read_bytes())  # noqa: S301  # written a line above
    rng, state, seen = random.Random(0), DiskState(), set()
    n_states = n_checked = 0
    for k in range(len(log) + 1):
        for disk in state.after_power_loss(rng):
            n_states += 1
            key = hash(frozenset(disk.items()))
            if key in seen or n_states % every:
                continue
            seen.add(key)
            n_checked += 1
            if lay_out(disk, store) and (store / "store.json").exists():
                check_whole(store, reference)
            extract(store, manifest)
            assert tree(store) == tree(reference)
        if k < len(log):
            state.apply(log[k])
    print(f"{len(log)} calls, {n_states} disks after power loss, {n_checked} of them different and completed")
    assert n_checked >= 10
