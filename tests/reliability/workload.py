"""What the proofs run: real extraction and real stores with an encoder that costs nothing, in children that may die."""

from __future__ import annotations

import hashlib
import mmap
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

import embedcache
from embedcache import Manifest
from embedcache.encoders.base import Encoded, EncoderRecord, Prepared
from embedcache.errors import EmbedCacheError, InputError
from embedcache.store import commit

OPTIONS = {"shard_rows": 4, "batch_size": 2, "n_threads": 1}
REFUSED = 3  # exit code of a child that met a typed error


class HashEncoder:
    """A text encoder whose values are drawn from the digest of the text. Texts that say so are bad inputs.

    Args:
        encoded: counts what was encoded, across processes.
        differs: added to every value: what other hardware may do under the same fingerprint.
    """

    modality = "text"
    dim = 8
    record = EncoderRecord("hash", {"weights": "none"})
    fingerprint = record.fingerprint

    def __init__(self, encoded: Counter | None = None, differs: float = 0.0) -> None:
        self._encoded, self._differs = encoded, differs

    def prepare(self, sample: str) -> Prepared:
        if "bad" in sample:
            raise InputError("empty-report", "the report has no text")
        return Prepared(sample, hashlib.sha256(sample.encode()).digest()[:16], len(sample))

    def encode(self, batch: list[Prepared], *, tokens: bool = False) -> Encoded:
        if self._encoded is not None:
            self._encoded.add(len(batch))
        values = [np.frombuffer(hashlib.sha256(p.digest).digest(), np.uint32) / 2**32 for p in batch]
        return Encoded(np.stack(values).astype(np.float32) + np.float32(self._differs))


class Counter:
    """A number that forked children share: each adds in a slot of its own."""

    def __init__(self) -> None:
        self._slots = mmap.mmap(-1, 8 * 64)
        self.slot = 0

    def add(self, n: int) -> None:
        values = np.frombuffer(self._slots, np.int64)
        values[self.slot] += n

    def total(self) -> int:
        return int(np.frombuffer(self._slots, np.int64).sum())


def dataset(n: int = 14, *, bad: tuple[int, ...] = (3, 9)) -> Manifest:
    """A manifest of n reports, some of them unusable."""
    rows = [
        {"id": f"r{i:04d}", "report": f"{'bad' if i in bad else 'good'} report {i}", "image": "x"} for i in range(n)
    ]
    return Manifest(pd.DataFrame(rows), name="reports", root=Path())


def extract(store: Path, manifest: Manifest | None = None, encoder: HashEncoder | None = None) -> None:
    """The workload: 14 reports in four shards unless told otherwise, quietly."""
    embedcache.extract(manifest or dataset(), encoder or HashEncoder(), store, **OPTIONS)


def tree(store: Path) -> dict[str, str]:
    """Name and SHA-256 of every file."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(store.iterdir()) if p.name != ".pace"}


def in_child(work: Callable[[], object], *, timeout_s: float = 60.0, memory_bytes: int | None = None) -> int:
    """Runs `work` in a forked child; gives its wait status as `os.waitpid` does, or raises on a hang.

    The child exits with 0, with REFUSED after one of our own errors, with 1 and a message after any other.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 2)
            if memory_bytes is not None:
                resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
            work()
            code = 0
        except EmbedCacheError:
            code = REFUSED
        except BaseException as error:  # noqa: BLE001  # whatever it is, the parent must hear of it
            os.write(1, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)
    deadline = time.monotonic() + timeout_s
    wait_s = 0.0005
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"a child hung for {timeout_s} s")
        time.sleep(wait_s)
        wait_s = min(wait_s * 1.5, 0.02)


def with_disk(disk: commit.Disk, work: Callable[[], object]) -> Callable[[], object]:
    """The same work with all I/O of the store going through another disk; for a child, which need not put it back."""

    def worked() -> object:
        commit.disk = disk
        return work()

    return worked


def check_whole(store: Path, reference: Path) -> None:
    """What is there is sound, and part of what an undisturbed extraction wrote."""
    assert embedcache.verify_store(store) == []
    part, whole = embedcache.open_store(store, verify="digest"), embedcache.open_store(reference)
    assert len(set(part.ids)) == len(part)
    np.testing.assert_array_equal(part.embeddings, whole.embeddings[whole.rows(part.ids)])
