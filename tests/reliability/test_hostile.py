"""Stores from a stranger: refused by a typed error before any of it is read; nothing outside the store is opened."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
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


# words of a refusal, and the stores that must meet it
SAYS = {
    "lies in external files, expected contiguous bytes in this file": "external storage of *",
    "is an external link, expected a hard link": "external link to *",
    "is a soft link, expected a hard link": "soft link to *",
    r"unknown datasets \['(more|extra|x0)'": "*link of another name; another dataset; another group; a thousand names",
    "is virtual": "virtual dataset*",
    "is chunked, compact or filtered": "chunked; resizable; gzip; lzf; fletcher32; scaleoffset; shuffled ids; "
    "unknown filter; compact; shape that overflows",
    "claims [0-9]+ bytes at None of a file of": "never allocated; shape bomb; bomb *",
    "has dtype .* expected": "object ids; arrays of variable length; references; region references; compound; enum; "
    "opaque; big-endian; float64; complex",
    "has rank (0|32), expected rank 2": "no dimension; no extent; 32 dimensions",
    "is no dataset": "a group; a group that holds itself; deep groups; a named type",
    r"missing datasets \['": "no embeddings; no record; no block digests; no scales",
    r"has shape \(.*\), expected \(": "fewer views; more rows than ids; another width; offsets beyond the end",
    "not 5 numbers that rise from 0": "offsets that fall; offsets below zero; offsets of too many rows",
    "has block_rows 0|invalid literal for int": "blocks of *",
    "not a shard of embedcache": "no encoding type; another encoding type; a text file; an empty file; a zip file; "
    "an old superblock; a user block that nobody announced",
    "cannot be read as a shard": "encoding type of objects; only a signature; a signature and noise; "
    "version of a number; record that is *; record of pickle",
    "store format '2.0', this embedcache reads 1.x": "version 2; store of version 2",
    "not a store's document": "record of a*; record without layout; store without layout; store whose *; "
    "store of an unknown modality; store of another width than its fingerprint",
    "/failures is not a list of failures": "failures *; a failure *",
    "it is not there|no regular file": "a FIFO; a directory; a shard's document that is *",
    "a link to another place": "a link to *",
    "names the file .* which is not this shard's": "a file above the store; an absolute file",
    "sha256 is no digest, or size, n and n_failed are not all numbers": "a digest that leads elsewhere; "
    "a size that is text; rows below zero",
    "not a shard's document": "no fingerprint; a digest that is a number",
    "holds .*, its document says": "rows that are not there",
    "expected 'embedcache-store'": "store of another kind",
    "not a sealed store document": "store of a number that is none; store that is no Unicode; store that is very deep",
    "not there, but shards are": "store that is a FIFO",
}


def words_for(name: str) -> str:
    """The words with which a store must be refused."""
    (words,) = [words for words, names in SAYS.items() if any(fnmatch(name, each) for each in names.split("; "))]
    return words


def test_refusals_say_what_was_found_and_expected(tmp_path: Path) -> None:
    root = tmp_path / "stores"
    root.mkdir()
    for k, name in enumerate(build(root)):
        store = str(root / str(k))
        with pytest.raises(embedcache.EmbedCacheError, match=f"{re.escape(store)}.*({words_for(name)})"):
            embedcache.open_store(store)
        assert embedcache.verify_store(store) != []


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
    assert {path for path in paths if not path.is_relative_to(root)} == set()
    print(f"{len(names)} hostile stores refused; {len(lines[begin + 1 : end])} opens, none outside the stores")


@pytest.mark.parametrize("place", range(0, 1024, 37))
def test_a_packed_store_is_what_its_user_block_says(tmp_path: Path, place: int) -> None:
    embedcache.save_store(tmp_path / "s", ["a", "b"], [[1.0, 2.0], [3.0, 4.0]])
    packed = embedcache.pack_store(tmp_path / "s", tmp_path / "s.h5")
    data = bytearray((tmp_path / "s.h5").read_bytes())
    data[place] ^= 1  # of a document, or of the spaces behind it
    (tmp_path / "s.h5").write_bytes(data)
    with pytest.raises(embedcache.EmbedCacheError, match=r"not a sealed store document|damaged or edited|not a packed"):
        embedcache.open_store(packed.path)


def test_verify_runs_nothing_that_lies_beside_a_store(tmp_path: Path) -> None:
    """Damage is looked for in a process of its own, which must not import from the current directory."""
    embedcache.save_store(tmp_path / "s", ["a", "b"], [[1.0, 2.0], [3.0, 4.0]])
    for module in ("json", "numpy", "embedcache", "sitecustomize"):
        (tmp_path / "s" / f"{module}.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    file = next((tmp_path / "s").glob("*.h5"))
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    command = [sys.executable, "-P", "-m", "embedcache", "verify", "."]
    done = subprocess.run(command, cwd=tmp_path / "s", capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert file.name in done.stdout
    assert "of rows differ" in done.stdout or "the damage is in ids" in done.stdout
    assert not (tmp_path / "canary").exists()
