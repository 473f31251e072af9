"""Foreign files that claim what cannot be, and random damage to good ones: always an error of ours, never another."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

import embedcache
from embedcache.errors import EmbedCacheError, ImportFormatError
from embedcache.store.exchange import export_store, foreign_hdf5, import_store

IDS = [f"i{k}" for k in range(6)]


def values() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


def npy(shape: str, dtype: str = "<f4", data: bytes = b"") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n" + data


def safetensors(shape: str, offsets: str, data: bytes = bytes(96)) -> bytes:
    header = f'{{"embeddings": {{"dtype": "F32", "shape": {shape}, "data_offsets": {offsets}}}}}'.encode()
    return struct.pack("<Q", len(header)) + header + data


@pytest.mark.parametrize(
    "shape", ["(-2, -3)", "(True, True)", "(6, 4.0)", f"({10**30}, 4)", "(6,)", "(" + "1, " * 40 + ")"]
)
def test_npy_of_an_impossible_shape(tmp_path: Path, shape: str) -> None:
    (tmp_path / "x.npy").write_bytes(npy(shape, data=values().tobytes()))
    (tmp_path / "ids.json").write_text(json.dumps(IDS))
    with pytest.raises(ImportFormatError, match=r"x\.npy"):
        import_store(tmp_path / "x.npy", tmp_path / "s", ids=tmp_path / "ids.json")


@pytest.mark.parametrize(
    "ids",
    [npy("(-1,)", "<U2"), npy("(6,)", "<U1", b"\xff" * 24), npy(f"({2**60},)", "<U2"), npy("(6,)", "|O", b"\x80")],
)
def test_npz_of_impossible_ids(tmp_path: Path, ids: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("ids.npy", ids)
        archive.writestr("embeddings.npy", npy("(6, 4)", data=values().tobytes()))
    with pytest.raises(ImportFormatError, match=r"x\.npz"):
        import_store(tmp_path / "x.npz", tmp_path / "s")


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [
        ("[6, 4]", "[0, 1e999]"), ("[6, 4]", "[0, 1e30]"), (f"[{10**30}, 4]", "[0, 96]"), ("[-6, -4]", "[0, 96]"),
        ("[" + "1, " * 70 + "1]", "[0, 4]"), ("[6, true]", "[0, 96]"), ("[6, 4]", "[96, 0]"), ("6", "[0, 96]"),
    ],
)  # fmt: skip
def test_safetensors_of_an_impossible_shape(tmp_path: Path, shape: str, offsets: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(safetensors(shape, offsets))
    with pytest.raises(ImportFormatError, match=r"x\.safetensors"):
        import_store(tmp_path / "x.safetensors", tmp_path / "s")


@pytest.mark.parametrize("fill", [0, 7])
def test_hdf5_of_which_half_was_never_written(tmp_path: Path, fill: int) -> None:
    """As a killed writer leaves it: HDF5 gives the fill value for chunks that are not there."""
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["ids"] = [i.encode() for i in IDS]
        made = file.create_dataset("embeddings", (6, 4), "f4", chunks=(2, 2), compression="gzip", fillvalue=fill)
        made[:4] = values()[:4]
    with pytest.raises(
        ImportFormatError, match=r"/embeddings has 4 of its 6 chunks, expected rows that were all written"
    ):
        import_store(tmp_path / "x.h5", tmp_path / "s")


def sources(folder: Path) -> dict[str, Path]:
    """A good file of each kind that is one file."""
    store = embedcache.save_store(folder / "store", IDS, values())
    made = {kind: folder / f"x.{kind}" for kind in ("parquet", "npy", "safetensors")}
    for kind, path in made.items():
        export_store(store.path, path, kind=kind)
    made["npz"] = folder / "x.npz"
    np.savez_compressed(made["npz"], ids=np.array(IDS), embeddings=values())
    made["h5"] = folder / "x.h5"
    with h5py.File(made["h5"], "w") as file:
        file.create_dataset("ids", data=np.array(IDS, "S"))
        file.create_dataset("embeddings", data=values(), chunks=(2, 4), compression="gzip", fletcher32=True)
    return made


@pytest.mark.parametrize("kind", ["parquet", "npy", "safetensors", "npz", "h5"])
@pytest.mark.parametrize("n_cases", [60, pytest.param(1500, marks=pytest.mark.slow)])
def test_random_damage_is_our_error_or_a_store_that_verifies(tmp_path: Path, kind: str, n_cases: int) -> None:
    good = sources(tmp_path)[kind].read_bytes()
    ids = tmp_path / "x.ids.json"
    rng, n_refused = np.random.default_rng(0), 0
    for k in range(n_cases):
        data = bytearray(good)
        for at in rng.integers(len(data), size=rng.integers(1, 4)):
            data[at] ^= 1 << int(rng.integers(8))
        path = tmp_path / str(k) / f"x.{kind}"
        path.parent.mkdir()
        path.write_bytes(data[: rng.integers(len(data))] if k % 5 == 0 else data)
        try:
            store = import_store(path, path.parent / "s", ids=ids if kind == "npy" else None)
        except EmbedCacheError:
            n_refused += 1
            continue
        assert embedcache.verify_store(store.path) == []
        assert np.isfinite(store.embeddings).all()
    print(f"{kind}: {n_refused} of {n_cases} damaged files refused, the others read as what they say")
    assert n_refused > n_cases // 10


def test_a_damaged_heap_of_text_does_not_hang(tmp_path: Path, monkeypatch) -> None:
    """HDF5 2.0 walks it for ever where an object of it says that it has no length."""
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("ids", data=IDS, dtype=h5py.string_dtype())
        file.create_dataset("embeddings", data=values())
    good = (tmp_path / "x.h5").read_bytes()
    assert import_store(tmp_path / "x.h5", tmp_path / "good").ids == IDS
    monkeypatch.setattr(foreign_hdf5, "_TEXT_TIMEOUT_S", 3.0)
    heap = good.index(b"GCOL") + 16
    outcomes = set()
    for at in range(heap, heap + 24, 8):
        damaged = bytearray(good)
        damaged[at : at + 8] = b"\xff" * 8
        (tmp_path / "x.h5").write_bytes(damaged)
        try:
            import_store(tmp_path / "x.h5", tmp_path / f"s{at}")
        except ImportFormatError as error:
            outcomes.add(str(error))
    assert outcomes
