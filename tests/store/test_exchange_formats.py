"""Folders and files of CLAM, TRIDENT, clip-retrieval, FuseMix and PhysioNet to a store, and plain HDF5."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

import google_crc32c
import h5py
import numpy as np
import pandas as pd
import pytest
import torch

import embedcache
from embedcache.errors import ImportFormatError
from embedcache.store.exchange import import_store


def rows(n: int, d: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def assert_store(path: Path, ids: list[str], values: np.ndarray) -> None:
    store = embedcache.open_store(path)
    assert store.ids == ids
    np.testing.assert_array_equal(np.asarray(store.embeddings), values)
    assert embedcache.verify_store(path) == []


# ---- CLAM and TRIDENT


def write_slide(path: Path, features: np.ndarray | None, coords: np.ndarray | None = None, **filters) -> None:
    """As CLAM writes it: chunks of one row, growing without limit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in (("features", features), ("coords", coords)):
            if values is not None:
                chunks = (1, *values.shape[1:]) if values.ndim > 1 and values.size else True
                maxshape = (None, *values.shape[1:])
                file.create_dataset(name, data=values, chunks=chunks, maxshape=maxshape, **filters)


def grid(n: int) -> np.ndarray:
    return np.stack([np.arange(n) * 256, np.full(n, 512)], axis=1).astype(np.int64)


def test_slides_of_a_directory(tmp_path: Path) -> None:
    features = [rows(5, seed=0), rows(3, seed=1), rows(1, seed=2)]
    write_slide(tmp_path / "f" / "b.svs.h5", features[0], grid(5))
    write_slide(tmp_path / "f" / "c.h5", features[1][None], grid(3)[None])
    write_slide(tmp_path / "f" / "d.h5", features[2][0])
    write_slide(tmp_path / "f" / "a.h5", rows(0), grid(0))
    write_slide(tmp_path / "f" / "e.h5", np.empty(0, np.float32))
    (tmp_path / "f" / "z.h5.lock").write_text("TRIDENT")
    store = import_store(tmp_path / "f", tmp_path / "s")
    ids = [f"b.svs/{x}_512" for x in (0, 256, 512, 768, 1024)] + [f"c/{x}_512" for x in (0, 256, 512)] + ["d"]
    assert_store(tmp_path / "s", ids, np.concatenate(features))
    assert store.encoder["kind"] == store.encoder["name"] == "clam"
    assert [file["name"] for file in store.encoder["files"]] == ["a.h5", "b.svs.h5", "c.h5", "d.h5", "e.h5"]


@pytest.mark.parametrize(
    "filters", [{"compression": "gzip", "shuffle": True, "fletcher32": True}, {"compression": "lzf"}]
)
def test_a_slide_of_many_patches_is_read_by_slices(tmp_path: Path, filters: dict, monkeypatch) -> None:
    from embedcache.store.exchange import foreign_hdf5

    monkeypatch.setattr(foreign_hdf5, "_BLOCK_BYTES", 100 * 4 * 8)
    largest = []
    read = foreign_hdf5.ForeignRows._read
    monkeypatch.setattr(foreign_hdf5.ForeignRows, "_read", lambda self, a, b: largest.append(b - a) or read(self, a, b))
    monkeypatch.setattr("embedcache.store.save._CHUNK_BYTES", 64 * 4 * 8)
    monkeypatch.setattr("embedcache.store.exchange.source._CHUNK_BYTES", 64 * 4 * 8)
    write_slide(tmp_path / "a.h5", rows(1000), grid(1000), **filters)
    import_store(tmp_path / "a.h5", tmp_path / "s")
    assert_store(tmp_path / "s", [f"a/{256 * k}_512" for k in range(1000)], rows(1000))
    assert max(largest) <= 256


def test_slides_of_different_widths_name_both(tmp_path: Path) -> None:
    write_slide(tmp_path / "f" / "a.h5", rows(2, 8), grid(2))
    write_slide(tmp_path / "f" / "b.h5", rows(2, 9), grid(2))
    with pytest.raises(ImportFormatError, match=r"b.h5: features of width 9, but .*a.h5 has 8"):
        import_store(tmp_path / "f", tmp_path / "s")


@pytest.mark.parametrize(
    ("features", "coords", "message"),
    [
        (rows(2), np.array([[1, 2], [1, 2]]), r"rows 0 and 1 .*both have coords \(1, 2\)"),
        (None, grid(2), r"datasets 'coords' and no features.*'patches'"),
        (rows(2), grid(3), r"/coords has shape \(3, 2\), expected \(2, 2\)"),
        (rows(2), None, "/coords is not there"),
        (rows(2), grid(2).astype(float), "/coords has dtype float64, expected whole numbers"),
        (np.ones((2, 8), np.int32), grid(2), "/features has dtype int32, expected floats"),
        (rows(4).reshape(2, 2, 8), grid(2), r"/features has shape \(2, 2, 8\)"),
        (rows(0), grid(0), "1 slides and no patch in any of them"),
    ],
)
def test_slides_that_are_refused(tmp_path: Path, features: np.ndarray | None, coords: np.ndarray, message: str) -> None:
    write_slide(tmp_path / "f" / "a.h5", features, coords)
    with pytest.raises(ImportFormatError, match=message):
        import_store(tmp_path / "f", tmp_path / "s", kind="clam")


# ---- HDF5


def write_hdf5(path: Path, ids, values: np.ndarray, **options) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("ids", data=ids)
        file.create_dataset("embeddings", data=values, **options)
    return path


@pytest.mark.parametrize("text", [h5py.string_dtype(), h5py.string_dtype("utf-8", 12)])
@pytest.mark.parametrize("options", [{}, {"compression": "gzip"}, {"chunks": (3, 8)}])
def test_hdf5(tmp_path: Path, text: np.dtype, options: dict) -> None:
    ids = ["a", "NA", " é", "007"]
    source = write_hdf5(tmp_path / "x.h5", np.array([i.encode() for i in ids], dtype=text), rows(4), **options)
    import_store(source, tmp_path / "s")
    assert_store(tmp_path / "s", ids, rows(4))


def hostile(folder: Path, kind: str) -> Path:
    other = write_hdf5(folder / "other.h5", ["a"], rows(1))
    with h5py.File(folder / "x.h5", "w") as file:
        file["ids"] = ["a"]
        if kind == "external link":
            file["embeddings"] = h5py.ExternalLink(other.name, "embeddings")
        elif kind == "soft link":
            file["there"] = rows(1)
            file["embeddings"] = h5py.SoftLink("/there")
        elif kind == "external storage":
            file.create_dataset("embeddings", (1, 8), "f4", external=[(str(folder / "secret"), 0, 32)])
        elif kind == "virtual":
            layout = h5py.VirtualLayout((1, 8), "f4")
            layout[:] = h5py.VirtualSource(other, "embeddings", (1, 8))
            file.create_virtual_dataset("embeddings", layout)
        elif kind == "objects":
            file.create_dataset("embeddings", (1, 8), h5py.vlen_dtype(np.float32))
        elif kind == "filter":
            create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            create.set_chunk((1, 8))
            create.set_scaleoffset(h5py.h5z.SO_FLOAT_DSCALE, 3)
            space = h5py.h5s.create_simple((1, 8))
            h5py.h5d.create(file.id, b"embeddings", h5py.h5t.IEEE_F32LE, space, create)
        elif kind == "bomb":
            file.create_dataset("embeddings", (2**40, 8), "f4", chunks=(64, 8), compression="gzip")
        elif kind == "holes":
            file.create_dataset("embeddings", (1, 8), "f4")
        elif kind == "group":
            file.create_group("embeddings")
    return folder / "x.h5"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("external link", "/embeddings is a ExternalLink"),
        ("soft link", "/embeddings is a SoftLink"),
        ("external storage", "/embeddings lies in external files"),
        ("virtual", "/embeddings is virtual"),
        ("objects", "/embeddings has dtype object"),
        ("filter", "/embeddings has filter 6, expected no filter but gzip"),
        ("bomb", "/embeddings claims 35184372088832 bytes"),
        ("holes", "/embeddings claims 32 bytes .* and has 0"),
        ("group", "/embeddings is no dataset"),
    ],
)
def test_hostile_hdf5_is_refused_before_it_is_read(tmp_path: Path, kind: str, message: str) -> None:
    (tmp_path / "secret").write_bytes(rows(1).tobytes())
    with pytest.raises(ImportFormatError, match=message):
        import_store(hostile(tmp_path, kind), tmp_path / "s")


def test_hdf5_that_is_damaged_or_a_store(tmp_path: Path) -> None:
    source = write_hdf5(tmp_path / "x.h5", ["a", "b"], rows(2))
    embedcache.pack_store(import_store(source, tmp_path / "s").path, tmp_path / "p.h5")
    with pytest.raises(ImportFormatError, match="a store of embedcache, or a shard of one"):
        import_store(tmp_path / "p.h5", tmp_path / "t")
    write_hdf5(source, ["a", "a"], rows(2))
    with pytest.raises(ImportFormatError, match=r"/ids row 0 .*/ids row 1 .*both have the id 'a'"):
        import_store(source, tmp_path / "t")
    os.truncate(source, 600)
    with pytest.raises(ImportFormatError, match="cannot be read as HDF5"):
        import_store(source, tmp_path / "t")


# ---- clip-retrieval


def write_clip(root: Path, sizes: dict[str, int], column: str = "image_path") -> np.ndarray:
    written = []
    for folder in ("img_emb", "text_emb", "metadata"):
        (root / folder).mkdir(parents=True)
    for k, (number, n) in enumerate(sizes.items()):
        values = rows(n, seed=k).astype(np.float16)
        np.save(root / "img_emb" / f"img_emb_{number}.npy", values)
        np.save(root / "text_emb" / f"text_emb_{number}.npy", -values)
        frame = pd.DataFrame({"caption": ["x"] * n, column: [f"{number}-{i}" for i in range(n)]})
        frame.to_parquet(root / "metadata" / f"metadata_{number}.parquet")
        written.append(values)
    return np.concatenate(written)


@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize("column", ["key", "image_path"])
def test_clip_retrieval(tmp_path: Path, modality: str, column: str) -> None:
    values = write_clip(tmp_path / "c", {"02": 3, "10": 4, "00": 0}, column)
    store = import_store(tmp_path / "c", tmp_path / "s", modality=modality)
    ids = [f"02-{i}" for i in range(3)] + [f"10-{i}" for i in range(4)]
    assert_store(tmp_path / "s", ids, values if modality == "image" else -values)
    assert (store.modality, store.layout.dtype, store.encoder["id_column"]) == (modality, "float16", column)


def test_clip_retrieval_that_is_refused(tmp_path: Path) -> None:
    write_clip(tmp_path / "c", {"0": 3, "1": 4})
    metadata = tmp_path / "c" / "metadata"
    with pytest.raises(ImportFormatError, match="no column 'url' among 'caption', 'image_path'"):
        import_store(tmp_path / "c", tmp_path / "s", id_column="url")
    shutil.copy(metadata / "metadata_0.parquet", metadata / "metadata_1.parquet")
    with pytest.raises(ImportFormatError, match=r"img_emb_1.npy: 4 rows, but 3 ids in .*metadata_1.parquet"):
        import_store(tmp_path / "c", tmp_path / "s")
    shutil.copy(tmp_path / "c" / "img_emb" / "img_emb_0.npy", tmp_path / "c" / "img_emb" / "img_emb_1.npy")
    with pytest.raises(ImportFormatError, match=r"metadata_0.parquet row 0 .*metadata_1.parquet row 0 .*id '0-0'"):
        import_store(tmp_path / "c", tmp_path / "s")
    (metadata / "metadata_1.parquet").unlink()
    with pytest.raises(ImportFormatError, match=r"'img_emb_1.npy' without the other of img_emb and metadata"):
        import_store(tmp_path / "c", tmp_path / "s")


# ---- FuseMix


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_fusemix(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.from_numpy(rows(5)).to(dtype)
    vectors: dict = {str(k): values[k] for k in range(5)}
    torch.save({**vectors, "txt2img": {0: 1}, "img2txt": {0: [1]}}, tmp_path / "x.dpt")
    store = import_store(tmp_path / "x.dpt", tmp_path / "s")
    assert_store(tmp_path / "s", ["0", "1", "2", "3", "4"], values.float().numpy())
    assert store.layout.dtype == str(dtype).removeprefix("torch.")
    assert store.encoder["ids"] == "running numbers of its annotation file"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"0": torch.ones(3), "1": torch.ones(2)}, "key '1' has 2 values, but '0' has 3"),
        ({"0": torch.ones(3, 2)}, r"key '0': torch.float32 of shape \(3, 2\), expected floats \(d,\)"),
        ({"0": torch.ones(3, dtype=torch.int64)}, "key '0': torch.int64"),
        ({"0": torch.ones(1).expand(2**40)}, "key '0': claims 1099511627776 values"),
        ({"0": "x"}, "key '0': a str, expected a tensor"),
        ({0: torch.ones(3)}, "key 0: a int, expected text"),
        ({"txt2img": {}}, "no vectors"),
        (torch.ones(3, 2), "a Tensor, expected a flat dictionary"),
    ],
)
def test_fusemix_that_is_refused(tmp_path: Path, value: object, message: str) -> None:
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(ImportFormatError, match=message):
        import_store(tmp_path / "x.pt", tmp_path / "s")


def test_a_torch_that_is_too_old(tmp_path: Path, monkeypatch) -> None:
    torch.save({"0": torch.ones(3)}, tmp_path / "x.pt")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    with pytest.raises(ImportFormatError, match=r"torch 2.9.1\+cu128, expected 2.10 or later"):
        import_store(tmp_path / "x.pt", tmp_path / "s")


# ---- PhysioNet


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def message(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def example(values: np.ndarray, how: str = "packed", name: bytes = b"embedding") -> bytes:
    data = [v.tobytes() for v in values.astype("<f4")]
    floats = {
        "packed": lambda: message(1, b"".join(data)),
        "chunks": lambda: message(1, b"".join(data[:3])) + message(1, b"".join(data[3:])),
        "unpacked": lambda: b"".join(varint(1 << 3 | 5) + v for v in data),
    }[how]()
    unknown = varint(9 << 3) + varint(300) + varint(10 << 3 | 1) + b"12345678" + varint(11 << 3 | 5) + b"1234"
    feature = unknown + message(2, floats + message(7, b"x"))
    entry = message(1, name) + message(2, feature)
    label = message(1, b"label") + message(2, message(3, message(1, varint(1))))
    return message(1, message(1, label) + unknown + message(1, entry)) + unknown


def framed(data: bytes) -> bytes:
    def masked(part: bytes) -> bytes:
        crc = google_crc32c.value(part)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def write_record(root: Path, dicom_id: str, data: bytes, patient: str = "p10000032") -> Path:
    path = root / "files" / "p10" / patient / "s50414267" / f"{dicom_id}.tfrecord"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_physionet(tmp_path: Path) -> None:
    values = rows(3, 1376)
    for k, (dicom_id, how) in enumerate({"a-1": "packed", "b-2": "unpacked", "c-3": "chunks"}.items()):
        write_record(tmp_path / "p", dicom_id, framed(example(values[k], how)), f"p1000003{k}")
    (tmp_path / "p" / "SHA256SUMS.txt").write_text("x")
    store = import_store(tmp_path / "p", tmp_path / "s")
    assert_store(tmp_path / "s", ["a-1", "b-2", "c-3"], values)
    assert store.encoder["files"][0]["name"] == "files/p10/p10000030/s50414267/a-1.tfrecord"
    shutil.move(tmp_path / "p", tmp_path / "moved")
    assert import_store(tmp_path / "moved", tmp_path / "t").fingerprint == store.fingerprint


def test_many_files_are_one_digest_in_the_record(tmp_path: Path) -> None:
    values = rows(101, 4)
    for k in range(101):
        write_record(tmp_path / "p", f"d{k:03d}", framed(example(values[k])))
    store = import_store(tmp_path / "p", tmp_path / "s")
    assert store.encoder["n_files"] == 101
    assert "files" not in store.encoder
    write_record(tmp_path / "p", "d050", framed(example(values[50]) + varint(9 << 3) + varint(1)))
    other = import_store(tmp_path / "p", tmp_path / "t")
    assert other.encoder["contents"] == store.encoder["contents"]
    assert other.encoder["files_sha256"] != store.encoder["files_sha256"]


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


ONE = example(rows(1)[0])


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (flipped(framed(ONE), 20), "the checksum of its record is wrong: damaged"),
        (flipped(framed(ONE), 0), "the checksum of its record's length is wrong"),
        (framed(ONE)[:-1], "its record needs .*cut short"),
        (framed(ONE)[:8], "8 bytes, expected one record"),
        (b"", "0 bytes, expected one record"),
        (framed(ONE) + framed(ONE), "bytes after its first record, expected one record"),
        (ONE, "a bare tf.train.Example without TFRecord framing.*TFRecordWriter"),
        (framed(ONE[:-4]), "its record is no tf.train.Example .*cut short"),
        (framed(b"\x0a" + b"\xff" * 11), r"no tf.train.Example \(a number at byte 1 does not end\)"),
        (framed(b"\x0b"), r"no tf.train.Example \(wire type 3 at byte 1\)"),
        (
            framed(message(1, message(1, message(1, b"embedding") + message(2, message(2, message(1, b"123")))))),
            "3 bytes",
        ),
        (framed(example(rows(1)[0], name=b"other")), "features 'label', 'other', expected the feature 'embedding'"),
        (framed(example(rows(1)[0], name=b"label")), "expected the feature 'embedding'"),
        (
            framed(message(1, message(1, message(1, b"embedding") + message(2, message(1, b""))))),
            "'embedding' of bytes_list",
        ),
        (framed(example(rows(0).reshape(-1))), "'embedding' without values"),
        (framed(example(rows(1, 9)[0])), "x.tfrecord: 9 values, but .*a.tfrecord has 8"),
    ],
)
def test_records_that_are_refused(tmp_path: Path, data: bytes, error: str) -> None:
    write_record(tmp_path / "p", "a", framed(ONE))
    write_record(tmp_path / "p", "x", data)
    with pytest.raises(ImportFormatError, match=f"x.tfrecord: .*{error.removeprefix('x.tfrecord: ')}"):
        import_store(tmp_path / "p", tmp_path / "s")


def test_an_image_in_two_places(tmp_path: Path) -> None:
    for patient in ("p1", "p2"):
        write_record(tmp_path / "p", "a", framed(ONE), patient)
    with pytest.raises(ImportFormatError, match=r"p1/.*a.tfrecord and .*p2/.*a.tfrecord: both have the id 'a'"):
        import_store(tmp_path / "p", tmp_path / "s")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImportFormatError, match=r"no .tfrecord file in or below it"):
        import_store(tmp_path / "empty", tmp_path / "s", kind="physionet")
