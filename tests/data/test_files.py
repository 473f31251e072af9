"""Which listed files are there, and which are the same."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from embedcache.data import files
from embedcache.data.files import content_digests, present


def test_absent_and_extra_files_by_one_listing_of_each_folder(tmp_path: Path, monkeypatch) -> None:
    for name in ("a/1.png", "a/2.png", "a/notes.txt", "b/3.png", "top.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    listed = []
    real = os.listdir
    monkeypatch.setattr(files.os, "listdir", lambda folder: listed.append(folder) or real(folder))
    there, extra = present(tmp_path, ["a/1.png", "b/3.png", "b/4.png", "c/5.png", "top.png", "a/1.png/6.png"])
    assert there.tolist() == [True, True, False, False, True, False]
    assert extra == ["a/2.png"]
    assert len(listed) == len(set(map(str, listed))) == 5


def test_equal_files_are_found_and_few_are_read(tmp_path: Path, monkeypatch) -> None:
    rng = np.random.default_rng(0)
    body = rng.bytes(50_000)
    middle = body[:25_000] + b"x" + body[25_001:]  # the same size, beginning and end
    other = b"y" + body[1:]
    contents = {"one": body, "same": body, "middle": middle, "other": other, "small": b"s", "empty": b"", "void": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    read = []
    whole = files.digest_file
    monkeypatch.setattr(files, "digest_file", lambda path: read.append(path.name) or whole(path))
    paths = [*(tmp_path / name for name in contents), None, tmp_path / "absent", tmp_path]
    found = dict(zip([*contents, "none", "absent", "folder"], content_digests(paths), strict=True))
    assert found["one"] == found["same"] is not None
    assert found["middle"] not in (None, found["one"])
    unequal = ["other", "small", "empty", "void", "none", "absent", "folder"]
    assert [name for name, digest in found.items() if digest is None] == unequal
    assert sorted(read) == ["middle", "one", "same"]
