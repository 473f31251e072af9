"""Corruption at rest: flipped bits in every part of every file, truncations, swaps.

With digests it is found, or changes nothing that is read; each case runs in a child, which may neither die nor hang.
"""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
from workload import REFUSED, in_child

import embedcache

MEMORY = 16 * 2**30
VALUES = ("embeddings", "scales", "tokens", "token_scales")
DIFFERENT = 4  # exit code of a child that read other values without a word


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Stores of every layout: fixed and ragged tokens, all dtypes, a directory and a packed file."""
    root, rng = tmp_path_factory.mktemp("stores"), np.random.default_rng(0)
    ids = [f"id-{k:03d}" for k in range(40)]
    values = rng.normal(size=(40, 24)).astype(np.float32)
    ragged = [rng.normal(size=(k % 5, 6)).astype(np.float32) for k in range(40)]
    embedcache.save_store(root / "plain", ids, values, store_dtype="float16")
    embedcache.save_store(root / "fixed", ids, values, tokens=rng.normal(size=(40, 3, 6)), store_dtype="bfloat16")
    embedcache.save_store(root / "ragged", ids, values, tokens=ragged, store_dtype="int8")
    embedcache.pack_store(root / "ragged", root / "packed.h5")
    embedcache.drop_ids(root / "fixed", ids[:3], root / "dropped")
    return [root / name for name in ("plain", "fixed", "ragged", "packed.h5", "dropped")]


def content(store: Path, verify: str) -> list[bytes]:
    """Everything that a reader can read of a store."""
    opened = embedcache.open_store(store, verify=verify)  # type: ignore[arg-type]
    parts = [np.asarray(opened.embeddings), opened.views, opened.input_digests]
    if opened.layout.tokens is not None:
        parts += list(opened.tokens[:])
    texts = [repr(x) for x in (opened.ids, opened.failures, opened.fingerprint, opened.encoder, opened.modality)]
    return [p.tobytes() for p in parts] + [t.encode() for t in texts]


def outcome(store: Path, sound: list[bytes], verify: str) -> str:
    """What a reader of a damaged store meets: `found`, `identical`, `different`, or a fault of ours."""

    def read() -> None:
        if content(store, verify) != sound:
            os._exit(DIFFERENT)

    status = in_child(read, timeout_s=10, memory_bytes=MEMORY)
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}"
    return {0: "identical", REFUSED: "found", DIFFERENT: "different"}.get(os.WEXITSTATUS(status), "untyped error")


@contextmanager
def damaged(file: Path, change: Callable[[bytearray], bytes]) -> Iterator[None]:
    """A file with its bytes changed in place, and mended afterwards."""
    sound = file.read_bytes()
    file.write_bytes(change(bytearray(sound)))
    try:
        yield
    finally:
        file.write_bytes(sound)


def strata(store: Path) -> dict[str, tuple[Path, list[int]]]:
    """The bytes of a store by what they are: file, and positions in it."""
    found: dict[str, tuple[Path, list[int]]] = {}
    for file in [store] if store.is_file() else sorted(store.iterdir()):
        size = file.stat().st_size
        if file.suffix == ".json":
            found[f"{store.name}: {file.name}"] = (file, list(range(size)))
        if file.suffix != ".h5":
            continue
        rest = set(range(size))
        with h5py.File(file) as shard:
            parts = {"user block": (0, shard.userblock_size), "superblock": (shard.userblock_size, 48)}
            parts |= {
                name: (shard[name].id.get_offset(), shard[name].id.get_storage_size())
                for name in shard
                if shard[name].id.get_storage_size()
            }
        for name, (start, n_bytes) in parts.items():
            if n_bytes:
                found[f"{store.name}: {name}"] = (file, list(range(start, start + n_bytes)))
                rest -= set(range(start, start + n_bytes))
        found[f"{store.name}: headers and padding"] = (file, sorted(rest))
    return found


@pytest.mark.parametrize("n_flips", [120, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_found_or_changes_nothing(stores: list[Path], n_flips: int) -> None:
    parts = {name: part for store in stores for name, part in strata(store).items()}
    sound = {store: content(store, "digest") for store in stores}
    rng, outcomes = random.Random(0), {"digest": Counter(), "structure": Counter()}
    for k in range(n_flips):
        name = list(parts)[k % len(parts)]
        file, positions = parts[name]
        at, bit = rng.choice(positions), 1 << rng.randrange(8)

        def flip(data: bytearray, at: int = at, bit: int = bit) -> bytes:
            data[at] ^= bit
            return bytes(data)

        store = file if file in stores else file.parent
        with damaged(file, flip):
            for verify, counted in outcomes.items():
                result = outcome(store, sound[store], verify)
                counted[result] += 1
                # without digests a number may be another one, but never whose it is
                unverified = verify == "structure" and name.split(": ")[1] in VALUES
                limit = {"found", "identical"} | ({"different"} if unverified else set())
                assert result in limit, f"{name}, byte {at}, bit {bit}, verify={verify}: {result}"
    for verify, counted in outcomes.items():
        print(f"{n_flips} flips in {len(parts)} parts, verify={verify!r}: {dict(counted)}")


def changes(data: bytes, other: bytes, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Ways in which a file is not what it was."""
    n = len(data)
    cut = rng.randrange(n)
    yield "truncated", data[:cut]
    yield "zeros at its end", data[:cut] + bytes(n - cut)
    yield "bytes appended", data + rng.randbytes(rng.randrange(1, 5000))
    block = 512
    if n > 2 * block:
        a, b = sorted(rng.sample(range(n // block), 2))
        swapped = bytearray(data)
        swapped[a * block : (a + 1) * block] = data[b * block : (b + 1) * block]
        swapped[b * block : (b + 1) * block] = data[a * block : (a + 1) * block]
        yield "blocks swapped", bytes(swapped)
    yield "another file in its place", other
    yield "empty", b""


@pytest.mark.parametrize("rounds", [2, pytest.param(24, marks=pytest.mark.slow)])
def test_truncations_and_swaps_are_found_or_change_nothing(stores: list[Path], rounds: int) -> None:
    sound = {store: content(store, "digest") for store in stores}
    files = [(s, f) for s in stores for f in ([s] if s.is_file() else sorted(p for p in s.iterdir() if p.is_file()))]
    rng, counted = random.Random(0), Counter()
    for _ in range(rounds):
        for store, file in files:
            _, other = rng.choice([f for f in files if f[1].suffix == file.suffix and f[1] != file] or files)
            for kind, data in changes(file.read_bytes(), other.read_bytes(), rng):
                with damaged(file, lambda _, data=data: data):
                    result = outcome(store, sound[store], "digest")
                counted[result] += 1
                assert result in ("found", "identical"), f"{file.name}: {kind}: {result}"
    print(f"{sum(counted.values())} truncations, swaps and the like, verify='digest': {dict(counted)}")


@pytest.mark.parametrize("n_flips", [6, pytest.param(150, marks=pytest.mark.slow)])
def test_verify_names_shard_block_and_rows(tmp_path: Path, n_flips: int) -> None:
    ids = [f"id-{k:04d}" for k in range(1500)]
    rng = np.random.default_rng(0)
    values, tokens = rng.normal(size=(1500, 8)), rng.normal(size=(1500, 2, 4))
    store = embedcache.save_store(tmp_path / "s", ids, values, tokens=tokens, store_dtype="float32")
    file = next((tmp_path / "s").glob("*.h5"))
    with h5py.File(file) as shard:
        places = {name: (shard[name].id.get_offset(), shard[name].id.get_storage_size()) for name in shard}
        rows_each = int(shard["block_digests"].attrs["block_rows"])
    for k in range(n_flips):
        name = ("embeddings", "tokens", "ids")[k % 3]
        start, n_bytes = places[name]
        at = start + int(rng.integers(n_bytes))

        def flip(data: bytearray, at: int = at) -> bytes:
            data[at] ^= 4
            return bytes(data)

        with damaged(file, flip):
            (problem,) = embedcache.verify_store(tmp_path / "s")
        assert problem.shard == file.name
        if name == "ids":
            assert problem.ids == tuple(ids)
            assert "every block of rows is sound" in problem.message or "beyond the rows" in problem.message
        else:
            block = (at - start) * len(store) // n_bytes // rows_each
            assert problem.ids == tuple(ids[block * rows_each : (block + 1) * rows_each])
            assert f"blocks {block} of rows differ" in problem.message


@pytest.mark.parametrize("name", ["store.json", "plan-00000.json", "shard-00000.json", "shard-*.h5"])
def test_repair_mends_what_its_sound_shards_tell(tmp_path: Path, stores: list[Path], name: str) -> None:
    """Damage to each file in turn: afterwards the store is sound, and only a damaged shard is to be computed again."""
    store = tmp_path / "s"
    shutil.copytree(stores[2], store)
    whole = content(store, "digest")
    file = next(store.glob(name))
    file.write_bytes(file.read_bytes()[:-3] + b"xyz")
    report = embedcache.repair_store(store)
    assert report.quarantined[0] == file.name or report.quarantined[1] == file.name
    assert (store / "quarantine" / file.name).is_file()
    assert embedcache.verify_store(store) == []
    if file.suffix == ".json":
        assert report.restored == (file.name,)
        assert report.to_extract == ()
        assert content(store, "digest") == whole
    else:
        assert len(report.to_extract) == 40
        assert len(embedcache.open_store(store)) == 0
