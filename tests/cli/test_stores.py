"""Commands for stores: what they print, their exit codes, and that bad input costs nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from calling import call

import embedcache


@pytest.fixture
def store(tmp_path: Path) -> Path:
    values = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    embedcache.save_store(tmp_path / "cache" / "s", [f"i{k}" for k in range(300)], values, record={"name": "mine"})
    return tmp_path / "cache" / "s"


def damage(store: Path) -> Path:
    file = next(store.glob("*.h5"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return file


def test_ls_shows_each_store_and_what_is_wrong_with_one(store: Path) -> None:
    (store.parent / "broken").mkdir()
    (store.parent / "broken" / "store.json").write_bytes(b"{}")
    listed = call("ls", store.parent)
    assert listed.exit_code == 0
    assert "300 x 8 float32" in listed.output
    assert "broken  cannot be opened" in listed.output
    assert {s.get("rows") for s in json.loads(call("ls", store.parent, "--json").stdout)} == {300, None}


def test_ls_of_nothing(tmp_path: Path) -> None:
    assert "no stores; make one with 'embedcache extract'" in call("ls", tmp_path).output
    assert call("ls", tmp_path / "nowhere").exit_code == 2


def test_pack_info_verify(store: Path, tmp_path: Path) -> None:
    packed = call("pack", store, tmp_path / "s.h5")
    assert packed.exit_code == 0
    assert "300 rows" in packed.output
    assert json.loads(call("info", tmp_path / "s.h5", "--json").stdout)["rows"] == 300
    assert "sound" in call("verify", tmp_path / "s.h5").output
    again = call("pack", store, tmp_path / "s.h5")
    assert again.exit_code == 1
    assert "is there already" in again.output


def test_verify_names_shard_block_and_ids_and_repair_follows(store: Path) -> None:
    file = damage(store)
    found = call("verify", store)
    assert found.exit_code == 1
    assert file.name in found.output
    assert "of rows differ" in found.output or "the damage is in ids" in found.output
    assert f"embedcache repair {store}" in found.output
    mended = call("repair", store)
    assert mended.exit_code == 0
    assert "300 ids: 'i0'" in mended.output
    assert "run the command that wrote this store again" in mended.output
    assert "nothing damaged" in call("repair", store).output
    assert json.loads(call("repair", store, "--json").stdout)["quarantined"] == []


@pytest.mark.parametrize("listed", ["i3,i7", "file"])
def test_drop_names_the_old_store_for_deletion(store: Path, tmp_path: Path, listed: str) -> None:
    if listed == "file":
        (tmp_path / "withdrawn.txt").write_text("i3\ni7\n")
        listed = str(tmp_path / "withdrawn.txt")
    done = call("drop", store, "--ids", listed, "--out", tmp_path / "less")
    assert done.exit_code == 0, done.output
    assert "298 rows; left out 2 rows and 0 failures" in done.output
    assert f"{store} still holds them: check {tmp_path / 'less'}, then delete it" in done.output
    assert "i3" not in embedcache.open_store(tmp_path / "less")
    missing = call("drop", store, "--ids", "nobody", "--out", tmp_path / "other")
    assert missing.exit_code == 2
    assert "'nobody'; nothing was written" in missing.output


def test_out_and_in_again(store: Path, tmp_path: Path) -> None:
    done = call("export", store, tmp_path / "s.parquet")
    assert done.exit_code == 0, done.output
    done = call("import", tmp_path / "s.parquet", tmp_path / "back", "--note", "exported and imported")
    assert done.exit_code == 0, done.output
    assert "300 rows of 8 float32" in done.output
    before, after = embedcache.open_store(store), embedcache.open_store(tmp_path / "back")
    assert after.ids == before.ids
    np.testing.assert_array_equal(after.embeddings, before.embeddings)
    assert after.encoder["source"] == "external"


def test_import_of_what_it_cannot_tell_lists_the_kinds(tmp_path: Path) -> None:
    (tmp_path / "thing.xyz").write_bytes(b"?")
    done = call("import", tmp_path / "thing.xyz", tmp_path / "s")
    assert done.exit_code == 2
    assert "physionet" in done.output
    assert not (tmp_path / "s").exists()
