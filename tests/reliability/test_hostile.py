"""Stores from a stranger: refused by a typed error before any of it is read; nothing outside the store is opened."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import build, make_sound, write_inside

import embedcache


def test_a_store_written_again_without_a_change_opens(tmp_path: Path) -> None:
    """Otherwise the hostile ones might be refused for how they were made."""
    make_sound(tmp_path / "s")
    write_inside(tmp_path / "s", lambda file, canary: None, tmp_path / "canary")
    assert len(embedcache.open_store(tmp_path / "s", verify="digest")) == 4
    assert embedcache.verify_store(tmp_path / "s") == []


SAYS = {
    "external storage of embeddings": "lies in external files, expected contiguous bytes in this file",
    "external link to embeddings": "is an external link, expected a hard link",
    "soft link to embeddings": "is a soft link, expected a hard link",
    "virtual dataset": "is virtual",
    "chunked": "is chunked, compact or filtered",
    "unknown filter": "is chunked, compact or filtered",
    "shape bomb": "claims 8796093022208 bytes at None of a file of",
    "object ids": "has dtype object, expected text of fixed length",
    "no dimension": "has rank 0, expected rank 2",
    "another width": r"has shape \(4, 9\), expected \(4, 8\)",
    "float64": "has dtype float64, expected float16 or float32 or int8 or uint16",
    "a group": "is no dataset",
    "another dataset": r"unknown datasets \['extra'\]",
    "no embeddings": r"missing datasets \['embeddings'\]",
    "another encoding type": "not a shard of embedcache",
    "version 2": "store format '2.0', this embedcache reads 1.x; use the embedcache that wrote it",
    "record that is no JSON": "cannot be read as a shard",
    "an old superblock": "expected an HDF5 superblock of version 3",
    "a file above the store": "names the file '../canary', which is not this shard's",
}


def test_refusals_say_what_was_found_and_expected(tmp_path: Path) -> None:
    root = tmp_path / "stores"
    root.mkdir()
    names = build(root)
    assert set(SAYS) <= set(names)
    for k, name in enumerate(names):
        store = str(root / str(k))
        with pytest.raises(embedcache.EmbedCacheError, match=f"{re.escape(store)}.*{SAYS.get(name, '')}"):
            embedcache.open_store(store)
        assert embedcache.verify_store(root / str(k)) != []


def test_hostile_stores_are_refused_and_open_nothing_outside(tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        assert not os.environ.get("CI"), "CI must have strace"
        pytest.skip("needs strace (Debian: apt-get install strace)")
    root = tmp_path / "stores"
    root.mkdir()
    names = build(root)
    trace = tmp_path / "trace"
    opener = Path(__file__).with_name("open_hostile.py")
    done = subprocess.run(
        ["strace", "-f", "-qq", "-s", "4096", "-e", "trace=open,openat,openat2,creat", "-o", str(trace),
         sys.executable, str(opener), str(root)],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "HDF5_PLUGIN_PATH": str(tmp_path / "plugins")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = dict(zip(names, json.loads(done.stdout), strict=True))
    not_refused = {name: what for name, what in outcomes.items() if not what.startswith("refused")}
    assert not_refused == {}
    lines = trace.read_text().splitlines()
    begin = next(k for k, line in enumerate(lines) if "/BEGIN" in line)
    end = next(k for k, line in enumerate(lines) if "/END" in line)
    opened = [re.search(r'"([^"]*)"', line) for line in lines[begin + 1 : end]]
    paths = {Path(found[1]) for found in opened if found}
    assert any(path.is_relative_to(root) for path in paths)
    # the symlinked shard resolves outside, and is refused by its size before it is opened
    assert {path for path in paths if not path.is_relative_to(root)} == set()
    print(f"{len(names)} hostile stores refused; {len(lines[begin + 1 : end])} opens, none outside the stores")


@pytest.mark.parametrize("place", range(0, 1024, 37))
def test_a_packed_store_is_what_its_user_block_says(tmp_path: Path, place: int) -> None:
    embedcache.save_store(tmp_path / "s", ["a", "b"], [[1.0, 2.0], [3.0, 4.0]])
    embedcache.pack_store(tmp_path / "s", tmp_path / "s.h5")
    data = bytearray((tmp_path / "s.h5").read_bytes())
    data[place] ^= 1
    (tmp_path / "s.h5").write_bytes(data)
    written = len((tmp_path / "s.h5").read_bytes()[:1024].rstrip(b" \n"))
    if place < written:
        with pytest.raises(embedcache.EmbedCacheError):
            embedcache.open_store(tmp_path / "s.h5")
