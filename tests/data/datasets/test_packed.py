"""Datasets within archives: webdataset tars and the hub's Parquet files."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import embedcache
from embedcache.errors import DatasetError, ManifestError


def png(value: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (8, 8), value).save(out, "PNG")
    return out.getvalue()


def tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def shards(root: Path) -> Path:
    for part, n in (("train", 20), ("test", 4)):
        members: dict[str, bytes] = {}
        for k in range(n):
            members |= {
                f"./a/{k:04d}.png": png(k),
                f"./a/{k:04d}.txt": f"Report {k}.".encode(),
                f"./a/{k:04d}.cls": str(k % 3).encode(),
                f"./a/{k:04d}.json": json.dumps({"patient": f"{part}{k // 2}", "view": "PA", "odd": [1]}).encode(),
            }
        tar(root / f"{part}-0000.tar", {**members, "../../evil.txt": b"no image", "alone.txt": b"no image"})
    return root


def test_webdataset_tars(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="its images lie within archives; --unpack writes them as files"):
        embedcache.load_dataset("webdataset", shards(tmp_path))
    manifest = embedcache.load_dataset("webdataset", tmp_path, unpack=True)
    frame = manifest.frame.set_index("id")
    assert len(frame) == 24
    row = frame.loc["train-0000/a/0007"]
    assert row[["report", "patient", "view", "image"]].tolist() == [
        "Report 7.", "train3", "PA", "unpacked/train-0000/a__0007.png",
    ]  # fmt: skip
    assert manifest.path(row["image"]).read_bytes() == png(7)
    assert manifest.tasks == {"class": "multi-class"}
    assert row["label.class"] == 1
    assert (frame["split"][:4] == "test").all()
    assert (manifest.about.split_rule, manifest.audit().leaks) == ("patient", True)  # test images equal training ones
    assert not list(tmp_path.parent.glob("evil*"))
    stamp = (tmp_path / row["image"]).stat().st_mtime_ns
    embedcache.load_dataset("webdataset", tmp_path, unpack=True)
    assert (tmp_path / row["image"]).stat().st_mtime_ns == stamp


def test_folders_with_dots_and_texts_that_are_none(tmp_path: Path) -> None:
    members = {f"v1.0/{k}.png": png(k) for k in range(3)}
    tar(tmp_path / "all.tar", members)
    assert embedcache.load_dataset("webdataset", tmp_path, unpack=True).frame["id"].tolist() == [
        "all/v1.0/0", "all/v1.0/1", "all/v1.0/2",
    ]  # fmt: skip
    tar(tmp_path / "all.tar", {**members, "v1.0/0.txt": b"\xff"})
    with pytest.raises(ManifestError, match=r"all\.tar/v1\.0/0\.txt: not UTF-8 at byte 0") as caught:
        embedcache.load_dataset("webdataset", tmp_path, unpack=True)
    assert "cut short" not in str(caught.value)


def test_a_tar_cut_short_is_named(tmp_path: Path) -> None:
    path = shards(tmp_path) / "train-0000.tar"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ManifestError, match=r"train-0000\.tar: cut short, damaged, or no webdataset"):
        embedcache.load_dataset("webdataset", tmp_path, unpack=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"no \*\.tar in it"):
        embedcache.load_dataset("webdataset", tmp_path / "empty", unpack=True)


def test_parquet_files_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    names = {"info": {"features": {"label": {"names": ["normal", "tb"], "_type": "ClassLabel"}}}}
    for part, n in (("train", 10), ("test", 4)):
        rows = [
            {"image": {"bytes": png(k), "path": None if k else "first.png"}, "label": k % 2, "text": f"Report {k}."}
            for k in range(n)
        ]
        table = pa.Table.from_pylist(rows).replace_schema_metadata({"huggingface": json.dumps(names)})
        pq.write_table(table, tmp_path / "data" / f"{part}-00000-of-00001.parquet")
    manifest = embedcache.load_dataset("hf", tmp_path, unpack=True)
    assert manifest.label_sets[0].classes == ("normal", "tb")
    assert manifest.frame["report"].tolist()[:4] == [f"Report {k}." for k in range(4)]  # test comes first by name
    assert manifest.audit(files=False).n_rows["test"] == 4
    first = manifest.frame["image"][0]
    assert first == "unpacked/test-00000-of-00001/00000000-first.png"
    assert manifest.path(first).read_bytes() == png(0)
    pq.write_table(pa.table({"picture": [1]}), tmp_path / "data" / "train-00001.parquet")
    with pytest.raises(ManifestError, match="no column image; it has picture"):
        embedcache.load_dataset("hf", tmp_path, unpack=True)
