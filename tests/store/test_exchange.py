"""Arrays, tables and dictionaries of other tools to a store, and a store out for other tools."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import embedcache
from embedcache.errors import ImportFormatError, StoreWriteError
from embedcache.store.exchange import import_store
from embedcache.store.save import Joined

IDS = ["a", "NA", "007", " é\n", "null", "1.0"]


def rows(n: int = len(IDS), d: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def write_npy(folder: Path, values: np.ndarray | None = None, ids: list[str] = IDS) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "rows.npy", rows() if values is None else values)
    (folder / "ids.json").write_text(json.dumps(ids), encoding="utf-8")
    return folder / "rows.npy", folder / "ids.json"


def assert_store(path: Path, ids: list[str], values: np.ndarray) -> None:
    store = embedcache.open_store(path)
    assert store.ids == ids
    np.testing.assert_array_equal(np.asarray(store.embeddings), values)
    assert embedcache.verify_store(path) == []


# ---- one .npy and ids


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.dtype(">f4")])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_with_ids(tmp_path: Path, dtype: type, order: str) -> None:
    values = rows().astype(dtype, order=order)
    source, ids = write_npy(tmp_path, values)
    store = import_store(source, tmp_path / "s", ids=ids)
    assert store.layout.dtype == ("float16" if dtype is np.float16 else "float32")
    assert_store(tmp_path / "s", IDS, values.astype(np.float32) if dtype is np.float64 else values)


def test_npy_is_mapped_and_no_descriptor_stays_open(tmp_path: Path) -> None:
    from embedcache.store.exchange.npy import map_npy

    source, _ = write_npy(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    mapped = [map_npy(source) for _ in range(20)]
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    np.testing.assert_array_equal(mapped[7], rows())


def write_ids(path: Path, ids: list[str]) -> dict[str, str]:
    """Writes ids as the suffix says; gives the options that reading them needs."""
    if path.suffix == ".txt":
        path.write_bytes("".join(f"{i}\n" for i in ids).encode())
    elif path.suffix == ".csv":
        pd.DataFrame({"x": range(len(ids)), "name": ids}).to_csv(path, index=False)
        return {"id_column": "name"}
    elif path.suffix == ".parquet":
        pd.DataFrame({"x": range(len(ids)), "id": ids}).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(ids), encoding="utf-8")
    else:
        np.save(path, np.array(ids))
    return {}


@pytest.mark.parametrize("name", ["i.txt", "i.csv", "i.parquet", "i.json", "i.npy"])
def test_ids_stay_as_they_are(tmp_path: Path, name: str) -> None:
    ids = ["a", "NA", "007", " é", "null", "x\u2028y" if name == "i.txt" else "x\ny"]
    source, _ = write_npy(tmp_path)
    options = write_ids(tmp_path / name, ids)
    assert import_store(source, tmp_path / "s", ids=tmp_path / name, **options).ids == ids


def test_lines_that_end_as_on_windows(tmp_path: Path) -> None:
    source, _ = write_npy(tmp_path, rows(2))
    (tmp_path / "i.txt").write_bytes("\ufeffa\r\nb\r\n".encode())
    assert import_store(source, tmp_path / "s", ids=tmp_path / "i.txt").ids == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("i.txt", b"a\nb\na\n", r"i.txt line 1 and .*i.txt line 3: both have the id 'a'"),
        ("i.txt", b"a\n\nb\n", "i.txt line 2: the id is empty"),
        ("i.txt", b"a\n\xe9\nb\n", r"not UTF-8 at line 2 \(byte 2\)"),
        ("i.txt", b"a\nb\n", "3 rows, but 2 ids in .*i.txt"),
        ("i.txt", b"a\nb\nc\n\n", "3 rows, but 4 ids"),
        ("i.csv", b"x,y\n1,2\n", "2 columns among 'x', 'y'; name the column of the ids with --id-column"),
        ("i.csv", b"id,y\n1\n", "row 0 .*1 fields, expected the 2"),
        ("i.csv", b'id\n"a\n', "not a readable CSV"),
        ("i.csv", b"", "an empty file, expected a header"),
        ("i.json", b'["a", 7, "b"]', r"row 1 \(counted from 0\): the id is 7, a int, expected text"),
        ("i.json", b'{"a": 1}', "a dict, expected a list of ids"),
        ("i.json", b'["a",', "not readable JSON"),
        ("i.pkl", b"x", "ids in a .pkl file, expected .txt, .csv"),
        ("i.parquet", b"PAR1 no", "not a readable Parquet file"),
    ],
)
def test_ids_that_are_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    source, _ = write_npy(tmp_path, rows(3))
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ImportFormatError, match=message):
        import_store(source, tmp_path / "s", ids=tmp_path / name)
    assert not (tmp_path / "s").exists()


def test_numbers_in_a_table_are_no_ids(tmp_path: Path) -> None:
    source, _ = write_npy(tmp_path, rows(2))
    pd.DataFrame({"id": [1, 2]}).to_parquet(tmp_path / "i.parquet")
    with pytest.raises(ImportFormatError, match=r"column 'id' of int64, expected text; convert it with .astype"):
        import_store(source, tmp_path / "s", ids=tmp_path / "i.parquet")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (rows(6, 8).reshape(6, 2, 4), r"shape \(6, 2, 4\), expected \(n, d\)"),
        (np.ones((6, 8), np.int64), "dtype int64, expected float16, float32 or float64"),
        (np.full((6, 8), np.nan, np.float32), "6 rows are not finite.*leave them out"),
        (np.full((6, 8), 1e300), "6 rows are not finite"),
    ],
)
def test_rows_that_are_refused(tmp_path: Path, values: np.ndarray, message: str) -> None:
    source, ids = write_npy(tmp_path, values)
    with pytest.raises(ImportFormatError, match=f"rows.npy: .*{message}"):
        import_store(source, tmp_path / "s", ids=ids)


def test_a_npy_that_was_cut_short(tmp_path: Path) -> None:
    source, ids = write_npy(tmp_path)
    os.truncate(source, source.stat().st_size - 4)
    with pytest.raises(ImportFormatError, match=r"188 bytes of rows, its header says 192 for shape \(6, 8\)"):
        import_store(source, tmp_path / "s", ids=ids)
    source.write_bytes(b"not numpy")
    with pytest.raises(ImportFormatError, match=r"not a readable .npy"):
        import_store(source, tmp_path / "s", ids=ids)


# ---- nothing pickled is ever loaded


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def hostile(folder: Path, kind: str) -> tuple[Path, dict]:
    bomb = np.array([Canary(folder / "fired")], dtype=object)
    source, ids = write_npy(folder, rows(1), ["a"])
    if kind == "npy":
        np.save(source, bomb, allow_pickle=True)
        return source, {"ids": ids}
    if kind == "ids":
        np.save(folder / "i.npy", bomb, allow_pickle=True)
        return source, {"ids": folder / "i.npy"}
    if kind in ("npz ids", "npz rows"):
        given = (
            {"ids": bomb, "embeddings": rows(1)} if kind == "npz ids" else {"ids": np.array(["a"]), "embeddings": bomb}
        )
        np.savez(folder / "x.npz", **given)
        return folder / "x.npz", {}
    if kind == "torch":
        torch.save({"0": Canary(folder / "fired")}, folder / "x.dpt")
    else:
        (folder / "x.dpt").write_bytes(pickle.dumps(Canary(folder / "fired"), protocol=2))
    return folder / "x.dpt", {}


@pytest.mark.parametrize("kind", ["npy", "ids", "npz ids", "npz rows", "torch", "pickle"])
def test_pickled_objects_never_load(tmp_path: Path, kind: str) -> None:
    source, options = hostile(tmp_path, kind)
    with pytest.raises(ImportFormatError, match=r"pickled|Object arrays|never"):
        import_store(source, tmp_path / "s", **options)
    assert not (tmp_path / "fired").exists()
    if kind == "npy":  # the canary is alive
        np.load(source, allow_pickle=True)
        assert (tmp_path / "fired").exists()


# ---- the paper's own files


def write_paper(folder: Path, n_rows: int = 4, n_ids: int = 4, header: str = ",dicom_id") -> Path:
    np.save(folder / "resnet-ae_train.npy", rows(n_rows))
    lines = [header, *(f"{k},d{k}" for k in range(n_ids))]
    (folder / "mimic-cxr-2.0.0_idx2dicom_id_train.csv").write_text("\n".join(lines) + "\n")
    return folder / "resnet-ae_train.npy"


def test_the_papers_rows_are_taken_only_on_the_callers_word(tmp_path: Path) -> None:
    source = write_paper(tmp_path)
    with pytest.raises(ImportFormatError, match=r"sorts the rows within each batch.*--trust-row-order"):
        import_store(source, tmp_path / "s")
    store = import_store(source, tmp_path / "s", trust_row_order=True)
    assert_store(tmp_path / "s", ["d0", "d1", "d2", "d3"], rows(4))
    assert store.encoder["kind"] == "paper"
    assert store.encoder["join"] == "by row number, not verified"
    assert store.encoder["name"] == "resnet-ae_train"


@pytest.mark.parametrize("trust", [False, True])
def test_the_papers_files_of_different_numbers(tmp_path: Path, trust: bool) -> None:
    source = write_paper(tmp_path, n_ids=5)
    with pytest.raises(
        ImportFormatError, match=r"4 rows, but 5 ids .*which id a row has cannot be known.*extract again"
    ):
        import_store(source, tmp_path / "s", trust_row_order=trust)


def test_the_papers_csv_is_known_by_its_header_and_its_running_numbers(tmp_path: Path) -> None:
    source = write_paper(tmp_path, header="n,dicom_id")
    with pytest.raises(ImportFormatError, match="header 'n,dicom_id', expected ',dicom_id'"):
        import_store(source, tmp_path / "s", trust_row_order=True)
    (tmp_path / "mimic-cxr-2.0.0_idx2dicom_id_train.csv").write_text(",dicom_id\n0,a\n2,b\n1,c\n3,d\n")
    with pytest.raises(ImportFormatError, match=r"row 1 .*running number '2', expected '1'"):
        import_store(source, tmp_path / "s", trust_row_order=True)


# ---- npz, parquet


def test_npz(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", ids=np.array(IDS), embeddings=rows())
    import_store(tmp_path / "x.npz", tmp_path / "s")
    assert_store(tmp_path / "s", IDS, rows())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"ids": np.array(["a"])}, "arrays 'ids', expected 'ids' and 'embeddings'"),
        ({"ids": np.array(["a"]), "embeddings": rows(2)}, "embeddings: 2 rows, but 1 ids"),
        ({"ids": np.array(["a", "a"]), "embeddings": rows(2)}, "row 0 .*row 1 .*both have the id 'a'"),
        ({"ids": np.array([1, 2]), "embeddings": rows(2)}, r"shape \(2,\) of int64, expected \(n,\) of str"),
        ({"ids": np.array(["a"]), "embeddings": rows(2)[0]}, r"shape \(8,\), expected \(n, d\)"),
    ],
)
def test_npz_that_is_refused(tmp_path: Path, arrays: dict, message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ImportFormatError, match=message):
        import_store(tmp_path / "x.npz", tmp_path / "s")


def test_a_damaged_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", ids=np.array(["a"]), embeddings=rows(1, 64))
    data = bytearray((tmp_path / "x.npz").read_bytes())
    at = data.index(rows(1, 64).tobytes())
    data[at] ^= 1
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(ImportFormatError, match=r"not a readable .npz .*CRC"):
        import_store(tmp_path / "x.npz", tmp_path / "s")


@pytest.mark.parametrize("value_type", [pa.float16(), pa.float32(), pa.float64()])
@pytest.mark.parametrize("fixed", [True, False])
def test_parquet(tmp_path: Path, value_type: pa.DataType, fixed: bool) -> None:
    kind = pa.list_(value_type, 8) if fixed else pa.large_list(value_type)
    values = rows(5000).astype(value_type.to_pandas_dtype())
    ids = [f"i{k}" for k in range(5000)]
    table = pa.table({"name": ids, "vec": pa.array(list(values), kind), "other": ids})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=1700)
    store = import_store(tmp_path / "x.parquet", tmp_path / "s", id_column="name", vector_column="vec")
    assert_store(tmp_path / "s", ids, values.astype(np.float32) if value_type == pa.float64() else values)
    assert store.encoder["vector_column"] == "vec"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": ["a", "b"], "embedding": [[1.0, 2.0], [1.0]]}, "row 1 .*1 values, expected 2"),
        ({"id": ["a", "b"], "embedding": [[1.0, 2.0], None]}, "row 1 .*no vector"),
        ({"id": ["a", "b"], "embedding": [[1.0, 2.0], [1.0, None]]}, "row 1 .*a value is missing"),
        ({"id": ["a", None], "embedding": [[1.0], [1.0]]}, "row 1 .*the id is no value"),
        ({"id": ["a", "a"], "embedding": [[1.0], [2.0]]}, "row 0 .* and .*row 1 .*both have the id 'a'"),
        ({"id": ["a"], "embedding": [[1]]}, "column 'embedding' of list<.*int64>, expected lists of float16"),
        ({"id": ["a"], "vec": [[1.0]]}, "no column 'embedding' among 'id', 'vec'"),
        ({"key": ["a"], "embedding": [[1.0]]}, "name the column of the ids with --id-column"),
    ],
)
def test_parquet_that_is_refused(tmp_path: Path, columns: dict, message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(ImportFormatError, match=message):
        import_store(tmp_path / "x.parquet", tmp_path / "s")


@pytest.mark.parametrize("seed", range(3))
def test_parts_read_as_one(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(0, 4, 6)
    parts = [rows(n, 3, k) for k, n in enumerate(lengths)]
    whole, joined = np.concatenate(parts), Joined(parts, 3)
    for start in range(len(whole) + 1):
        for stop in range(start, len(whole) + 1):
            np.testing.assert_array_equal(joined[start:stop], whole[start:stop])


# ---- which format, what the record says


def test_the_record_covers_what_was_read_and_not_where_it_lay(tmp_path: Path) -> None:
    def fingerprint(name: str, values: np.ndarray | None = None, ids: list[str] = IDS, **options) -> str:
        source, ids_path = write_npy(tmp_path / name, values, ids)
        os.utime(source, (len(name), len(name)))
        store = import_store(source, tmp_path / f"{name}-store", ids=ids_path, **options)
        assert str(tmp_path) not in json.dumps(store.document)
        return store.fingerprint

    here = fingerprint("here")
    assert fingerprint("elsewhere/deeper") == here
    changed = rows()
    changed[3, 3] += 1
    others = [fingerprint("value", changed), fingerprint("id", ids=[*IDS[:-1], "z"]), fingerprint("note", note="x")]
    assert len({here, *others}) == 4
    assert embedcache.open_store(tmp_path / "note-store").encoder["name"] == "x"
    record = embedcache.open_store(tmp_path / "here-store").encoder
    assert {key: record[key] for key in ("source", "kind", "name")} == {
        "source": "external",
        "kind": "npy",
        "name": "rows",
    }
    assert [file["name"] for file in record["files"]] == ["ids.json", "rows.npy"]


def test_the_kind_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    source = write_paper(tmp_path)
    ids = tmp_path / "mimic-cxr-2.0.0_idx2dicom_id_train.csv"
    paper = import_store(source, tmp_path / "p", trust_row_order=True)
    npy = import_store(source, tmp_path / "n", kind="npy", ids=ids, id_column="dicom_id")
    assert paper.encoder["files"] == npy.encoder["files"]
    assert paper.fingerprint != npy.fingerprint


def test_what_cannot_be_told_apart_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"x")
    (tmp_path / "both" / "img_emb").mkdir(parents=True)
    (tmp_path / "both" / "slide.h5").touch()
    with pytest.raises(ImportFormatError, match=r"a .bin file of no kind .*--kind. Kinds are paper: .*physionet: "):
        import_store(tmp_path / "x.bin", tmp_path / "s")
    with pytest.raises(ImportFormatError, match="could be clip-retrieval or clam; name its kind with --kind"):
        import_store(tmp_path / "both", tmp_path / "s")
    with pytest.raises(ImportFormatError, match="kind 'zarr', expected one of paper, npy"):
        import_store(tmp_path / "x.bin", tmp_path / "s", kind="zarr")
    with pytest.raises(ImportFormatError, match="nothing there, expected embeddings"):
        import_store(tmp_path / "gone", tmp_path / "s")
    with pytest.raises(ImportFormatError, match="modality 'video', expected 'image' or 'text'"):
        import_store(tmp_path / "x.bin", tmp_path / "s", modality="video")


def test_options_without_a_meaning_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", ids=np.array(["a"]), embeddings=rows(1))
    with pytest.raises(ImportFormatError, match="--id-column has no meaning for kind 'npz'"):
        import_store(tmp_path / "x.npz", tmp_path / "s", id_column="a")
    source, _ = write_npy(tmp_path)
    with pytest.raises(ImportFormatError, match=r"a .npy holds no ids.*pass --ids"):
        import_store(source, tmp_path / "s")


def test_a_store_is_neither_source_nor_overwritten(tmp_path: Path) -> None:
    source, ids = write_npy(tmp_path)
    import_store(source, tmp_path / "s", ids=ids)
    with pytest.raises(ImportFormatError, match="a store of embedcache already"):
        import_store(tmp_path / "s", tmp_path / "t")
    source.unlink()  # refused before the source is read
    with pytest.raises(StoreWriteError, match="holds a store already"):
        import_store(source, tmp_path / "s", ids=ids)
