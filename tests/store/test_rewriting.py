"""Packing, dropping, repairing, listing: new files beside old ones, and nothing lost."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from test_store import rows, shard_file, write_shards

import embedcache
from embedcache.errors import MissingIdsError, RepairError, StoreFormatError, StoreWriteError
from embedcache.store.catalogue import Catalogue
from embedcache.store.listing import list_stores

PARTS = [(["a", "b"], ["x"]), (["c", "b"], ["y"]), (["x", "d"], [])]  # b is encoded again, x first failed


def tree(path: Path) -> dict[str, str]:
    return {
        str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in path.rglob("*")
        if p.is_file() and p.name != ".pace"
    }


def test_packing_keeps_the_latest_rows_ids_failures_and_fingerprint(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", PARTS)
    store, before = embedcache.open_store(tmp_path / "s"), tree(tmp_path / "s")
    packed = embedcache.pack_store(tmp_path / "s", tmp_path / "new" / "s.h5")
    assert packed.ids == store.ids == ["a", "c", "b", "x", "d"]
    np.testing.assert_array_equal(packed.embeddings, store.embeddings)
    np.testing.assert_array_equal(packed.input_digests, store.input_digests)
    assert packed.failures == store.failures
    assert [f.id for f in packed.failures] == ["y"]
    assert packed.fingerprint == store.fingerprint
    assert packed.encoder == store.encoder
    assert tree(tmp_path / "s") == before
    assert (tmp_path / "new" / "s.h5").stat().st_mode & 0o777 == 0o600
    again = embedcache.pack_store(tmp_path / "s", tmp_path / "again.h5")
    assert again.path.read_bytes() == packed.path.read_bytes()
    twice = embedcache.pack_store(packed.path, tmp_path / "twice.h5")
    assert twice.path.read_bytes() == packed.path.read_bytes()


def test_packing_replaces_nothing(tmp_path: Path) -> None:
    embedcache.save_store(tmp_path / "s", ["a"], rows(1))
    (tmp_path / "s.h5").write_bytes(b"precious")
    with pytest.raises(StoreWriteError, match="is there already"):
        embedcache.pack_store(tmp_path / "s", tmp_path / "s.h5")
    assert (tmp_path / "s.h5").read_bytes() == b"precious"


def test_a_damaged_store_is_not_packed(tmp_path: Path) -> None:
    embedcache.save_store(tmp_path / "s", ["a", "b"], rows(2))
    file = shard_file(tmp_path / "s")
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    with pytest.raises(StoreFormatError, match="SHA-256"):
        embedcache.pack_store(tmp_path / "s", tmp_path / "s.h5")
    assert list(tmp_path.glob("*.h5")) == list(tmp_path.glob(".*")) == []


def test_a_packed_store_does_not_grow(make_manifest, image_encoder, tmp_path: Path) -> None:
    manifest = make_manifest(4)
    embedcache.extract(manifest, image_encoder, tmp_path / "s")
    packed = embedcache.pack_store(tmp_path / "s", tmp_path / "s.h5")
    assert packed.n_pending_shards == 0
    with pytest.raises(StoreWriteError, match="a packed store does not grow"):
        embedcache.extract(manifest, image_encoder, tmp_path / "s.h5")


def test_a_shard_or_another_file_is_no_packed_store(tmp_path: Path) -> None:
    embedcache.save_store(tmp_path / "s", ["a"], rows(1))
    with pytest.raises(StoreFormatError, match=r"not a packed store .*open the directory of a store"):
        embedcache.open_store(shard_file(tmp_path / "s"))


@pytest.mark.parametrize("packed", [False, True], ids=["directory", "packed"])
def test_dropped_ids_leave_no_trace(tmp_path: Path, packed: bool) -> None:
    write_shards(tmp_path / "s", PARTS)
    path, out = tmp_path / "s", tmp_path / "d"
    if packed:
        path, out = embedcache.pack_store(path, tmp_path / "s.h5").path, tmp_path / "d.h5"
    store, before = embedcache.open_store(path), tree(tmp_path)
    report = embedcache.drop_ids(path, ["b", "y", "d"], out)
    assert (report.n_rows, report.n_dropped, report.n_failures_dropped, report.delete) == (3, 2, 1, path)
    left = embedcache.open_store(out, verify="digest")
    assert left.ids == ["a", "c", "x"]
    np.testing.assert_array_equal(left.embeddings, store.gather(store.rows(left.ids)))
    assert left.failures == []
    assert left.fingerprint == store.fingerprint
    assert embedcache.verify_store(out) == []
    assert before.items() <= tree(tmp_path).items()
    for file in [out] if packed else out.iterdir():
        assert not any(dropped in file.read_bytes() for dropped in (b'"b"', b'"y"', b'"d"'))
    with pytest.raises(StoreWriteError, match="already"):
        embedcache.drop_ids(path, ["b"], out)


def test_dropping_what_is_not_there_writes_nothing(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", PARTS)
    with pytest.raises(
        MissingIdsError, match=r"1 of 2 ids to drop are not in the store: 'nobody'; nothing was written"
    ):
        embedcache.drop_ids(tmp_path / "s", ["a", "nobody"], tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_dropping_everything_leaves_an_empty_store(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", [(["a"], ["x"])])
    report = embedcache.drop_ids(tmp_path / "s", ["a", "x"], tmp_path / "d")
    assert (report.n_rows, report.n_dropped) == (0, 1)
    assert embedcache.verify_store(tmp_path / "d") == []


def test_a_store_without_some_ids_is_gone_on_with(make_manifest, image_encoder, tmp_path: Path) -> None:
    manifest = make_manifest(10)
    embedcache.extract(manifest, image_encoder, tmp_path / "s", shard_rows=4)
    embedcache.drop_ids(tmp_path / "s", ["s003"], tmp_path / "d")
    less = embedcache.Manifest(manifest.frame.drop(index=3), name="squares", root=manifest.root)
    report = embedcache.extract(less, image_encoder, tmp_path / "d")
    assert (report.n_asked, report.n_present, report.n_embedded) == (9, 9, 0)


def test_repair_takes_out_what_is_damaged_and_the_next_extraction_computes_just_that(
    make_manifest, image_encoder, tmp_path: Path
) -> None:
    manifest = make_manifest(20)
    embedcache.extract(manifest, image_encoder, tmp_path / "s", shard_rows=5)
    whole = tree(tmp_path / "s")
    damaged = sorted((tmp_path / "s").glob("*.h5"))[2]
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 64
    damaged.write_bytes(data)
    sorted((tmp_path / "s").glob("*.h5"))[3].unlink()
    report = embedcache.repair_store(tmp_path / "s")
    assert set(report.quarantined) == {damaged.name, "shard-00002.json", "shard-00003.json"}
    assert set(report.to_extract) == {f"s{k:03d}" for k in range(10, 20)}
    assert len(embedcache.open_store(tmp_path / "s")) == 10
    again = embedcache.extract(manifest, image_encoder, tmp_path / "s")
    assert (again.n_embedded, again.n_present) == (10, 10)
    mended = tree(tmp_path / "s")
    assert {name: digest for name, digest in mended.items() if "/" not in name} == whole
    assert embedcache.repair_store(tmp_path / "s").quarantined == ()


def test_repair_writes_lost_documents_anew(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", PARTS)
    before = embedcache.open_store(tmp_path / "s")
    ids, embeddings, failures = before.ids, before.embeddings.copy(), before.failures
    (tmp_path / "s" / "store.json").unlink()
    (tmp_path / "s" / "plan-00001.json").write_bytes(b"{}")
    (tmp_path / "s" / "shard-00002.json").write_bytes(b"")
    with pytest.raises(StoreFormatError, match=r"store\.json: not there, but shards are; run 'embedcache repair"):
        embedcache.open_store(tmp_path / "s")
    report = embedcache.repair_store(tmp_path / "s")
    assert set(report.restored) == {"store.json", "plan-00001.json", "shard-00002.json"}
    assert report.to_extract == ()
    assert embedcache.verify_store(tmp_path / "s") == []
    after = embedcache.open_store(tmp_path / "s", verify="digest")
    assert (after.ids, after.failures) == (ids, failures)
    np.testing.assert_array_equal(after.embeddings, embeddings)
    assert [plan.first_shard for plan in Catalogue.read(tmp_path / "s").plans] == [0, 1, 2]


def test_a_last_plan_that_was_taken_away_is_noticed_and_written_anew(
    make_manifest, image_encoder, tmp_path: Path
) -> None:
    manifest = make_manifest(12)
    part = embedcache.Manifest(manifest.frame.iloc[:4], name="squares", root=manifest.root)
    embedcache.extract(part, image_encoder, tmp_path / "s", shard_rows=3)
    embedcache.extract(manifest, image_encoder, tmp_path / "s", shard_rows=3)
    (tmp_path / "s" / "plan-00001.json").unlink()
    (problem,) = embedcache.verify_store(tmp_path / "s")
    assert (problem.shard, problem.kind) == ("plan-00001.json", "missing")
    assert embedcache.repair_store(tmp_path / "s").restored == ("plan-00001.json",)
    assert embedcache.verify_store(tmp_path / "s") == []
    assert embedcache.extract(manifest, image_encoder, tmp_path / "s").n_present == 12


def test_without_its_last_plan_a_store_still_grows_and_no_number_is_taken_twice(
    make_manifest, image_encoder, tmp_path: Path
) -> None:
    manifest = make_manifest(12)
    part = embedcache.Manifest(manifest.frame.iloc[:8], name="squares", root=manifest.root)
    embedcache.extract(part, image_encoder, tmp_path / "s", shard_rows=4)
    before = embedcache.open_store(tmp_path / "s")
    (tmp_path / "s" / "plan-00000.json").unlink()
    report = embedcache.extract(manifest, image_encoder, tmp_path / "s", shard_rows=4)
    assert report.n_asked == 12 == report.n_embedded + report.n_present
    after = embedcache.open_store(tmp_path / "s", verify="digest")
    assert sorted(after.ids) == sorted(manifest.frame["id"])
    np.testing.assert_array_equal(after.gather(after.rows(before.ids)), before.embeddings)


def test_repair_converges_when_a_store_grew_after_it_lost_its_last_plan(
    make_manifest, image_encoder, tmp_path: Path
) -> None:
    manifest = make_manifest(16)
    for n in (4, 8, 16):
        part = embedcache.Manifest(manifest.frame.iloc[:n], name="squares", root=manifest.root)
        if n == 16:
            (tmp_path / "s" / "plan-00001.json").unlink()
        embedcache.extract(part, image_encoder, tmp_path / "s", shard_rows=3)
    assert [p.kind for p in embedcache.verify_store(tmp_path / "s")] == ["missing"]
    assert embedcache.repair_store(tmp_path / "s").restored == ("plan-00002.json",)
    assert embedcache.verify_store(tmp_path / "s") == []
    assert embedcache.repair_store(tmp_path / "s").restored == ()
    assert embedcache.extract(manifest, image_encoder, tmp_path / "s").n_present == 16


def test_repair_leaves_sound_shards_alone_when_plans_were_lost_twice(
    make_manifest, image_encoder, tmp_path: Path
) -> None:
    manifest = make_manifest(24)
    for n, lost in ((6, None), (12, None), (18, "plan-00001.json"), (24, None)):
        if lost:
            (tmp_path / "s" / lost).unlink()
        part = embedcache.Manifest(manifest.frame.iloc[:n], name="squares", root=manifest.root)
        embedcache.extract(part, image_encoder, tmp_path / "s", shard_rows=3)
    (tmp_path / "s" / "plan-00002.json").unlink(missing_ok=True)
    before = embedcache.open_store(tmp_path / "s")
    for _ in range(2):
        embedcache.repair_store(tmp_path / "s")
        assert embedcache.verify_store(tmp_path / "s") == []
    assert not list((tmp_path / "s" / "quarantine").glob("*.h5"))
    after = embedcache.open_store(tmp_path / "s")
    np.testing.assert_array_equal(after.gather(after.rows(before.ids)), before.embeddings)


@pytest.mark.parametrize("kind", ["fifo", "dangling", "directory"])
@pytest.mark.parametrize(
    "name", ["shard-00000-*.h5", "shard-00000.json", "plan-00000.json", "store.json", "shard-00007-0123456789ab.h5"]
)
def test_repair_moves_aside_what_is_no_file(tmp_path: Path, name: str, kind: str) -> None:
    write_shards(tmp_path / "s", [(["a", "b"], []), (["c"], [])])
    path = next((tmp_path / "s").glob(name), tmp_path / "s" / name)
    path.unlink(missing_ok=True)
    {
        "fifo": lambda: os.mkfifo(path),
        "dangling": lambda: path.symlink_to("/nonexistent"),
        "directory": path.mkdir,
    }[kind]()
    report = embedcache.repair_store(tmp_path / "s")
    assert path.name in report.quarantined
    assert embedcache.verify_store(tmp_path / "s") == []
    assert "c" in embedcache.open_store(tmp_path / "s", verify="digest")


@pytest.mark.parametrize("kind", ["fifo", "dangling", "directory"])
def test_a_name_taken_by_no_file_is_refused_and_does_not_spin(tmp_path: Path, kind: str) -> None:
    embedcache.save_store(tmp_path / "s", ["a"], rows(1))
    file = shard_file(tmp_path / "s")
    (tmp_path / "s" / "shard-00000.json").unlink()
    file.unlink()
    {"fifo": lambda: os.mkfifo(file), "dangling": lambda: file.symlink_to("/no"), "directory": file.mkdir}[kind]()
    with pytest.raises(StoreFormatError, match="damaged before it counted"):
        embedcache.save_store(tmp_path / "s", ["a"], rows(1))


def test_a_plan_in_the_place_of_another_is_blamed_itself(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", [(["a"], []), (["b"], [])])
    plans = [tmp_path / "s" / f"plan-0000{k}.json" for k in range(2)]
    plans[0].write_bytes(plans[1].read_bytes())
    (problem,) = embedcache.verify_store(tmp_path / "s")
    assert (problem.shard, problem.kind) == ("plan-00000.json", "damaged")
    assert embedcache.repair_store(tmp_path / "s").to_extract == ()
    assert embedcache.verify_store(tmp_path / "s") == []


def test_what_a_killed_pack_save_or_export_left_is_swept(tmp_path: Path) -> None:
    """A temporary of a process that is dead, beside other people's files."""
    from embedcache.store import commit
    from embedcache.store.exchange import export_store

    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    write_shards(tmp_path / "s", PARTS)

    def leave(path: Path) -> Path:
        left = commit.temporary_name(path)
        left = left.with_name(left.name.replace(f".{os.getpid()}.", f".{child}."))
        left.write_bytes(b"")
        return left

    names = ["s.h5", "s.parquet", "other.h5"]
    left = {name: leave(tmp_path / name) for name in names}
    embedcache.pack_store(tmp_path / "s", tmp_path / "s.h5")
    export_store(tmp_path / "s", tmp_path / "s.parquet")
    assert [left[name].exists() for name in names] == [False, False, True]
    (tmp_path / "new").mkdir()
    inside = leave(tmp_path / "new" / "shard-00000.h5")
    embedcache.save_store(tmp_path / "new", ["a"], rows(1))
    assert not inside.exists()
    (tmp_path / "e.ids.json").write_bytes(b'["a", "c", "b", "x", "d"]')  # of an export that was killed before its rows
    assert [p.name for p in export_store(tmp_path / "s", tmp_path / "e.npy")] == ["e.npy", "e.ids.json"]


def test_repair_sets_rivals_bytes_aside(tmp_path: Path) -> None:
    """Two writers linked their bytes and one died before it could take its own away."""
    embedcache.save_store(tmp_path / "s", ["a"], rows(1))
    rival = tmp_path / "s" / "shard-00000-0123456789ab.h5"
    rival.write_bytes(b"other bytes")
    assert embedcache.verify_store(tmp_path / "s") == []
    assert embedcache.repair_store(tmp_path / "s").quarantined == (rival.name,)
    assert (tmp_path / "s" / "quarantine" / rival.name).read_bytes() == b"other bytes"


def test_what_cannot_be_repaired_says_so(tmp_path: Path) -> None:
    embedcache.save_store(tmp_path / "s", ["a"], rows(1))
    embedcache.pack_store(tmp_path / "s", tmp_path / "s.h5")
    with pytest.raises(RepairError, match="packed store"):
        embedcache.repair_store(tmp_path / "s.h5")
    (tmp_path / "s" / "store.json").write_bytes(b"")
    shard_file(tmp_path / "s").write_bytes(b"")
    with pytest.raises(RepairError, match="no sound shard is left"):
        embedcache.repair_store(tmp_path / "s")


def test_a_name_taken_by_damaged_bytes_is_refused(make_manifest, image_encoder, tmp_path: Path) -> None:
    """A shard was linked, then damaged, and power was lost before its document: nothing is built on it."""
    manifest = make_manifest(4)
    embedcache.extract(manifest, image_encoder, tmp_path / "s")
    file = shard_file(tmp_path / "s")
    (tmp_path / "s" / "shard-00000.json").unlink()
    sound = file.read_bytes()
    file.write_bytes(sound[:-1] + b"\1")
    with pytest.raises(StoreFormatError, match="damaged before it counted; run 'embedcache repair"):
        embedcache.extract(manifest, image_encoder, tmp_path / "s")
    embedcache.repair_store(tmp_path / "s")
    embedcache.extract(manifest, image_encoder, tmp_path / "s")
    assert file.read_bytes() == sound


def test_stores_are_listed_and_a_broken_one_does_not_hinder(tmp_path: Path) -> None:
    write_shards(tmp_path / "c" / "one", PARTS)
    embedcache.pack_store(tmp_path / "c" / "one", tmp_path / "c" / "one.h5")
    embedcache.save_store(tmp_path / "c" / "deep" / "two", ["a"], rows(1), modality="text")
    (tmp_path / "c" / "three").mkdir()
    (tmp_path / "c" / "three" / "store.json").write_bytes(b"{}")
    (tmp_path / "c" / "other.h5").write_bytes(b"no store")
    listed = {str(Path(s["path"]).relative_to(tmp_path / "c")): s for s in list_stores(tmp_path / "c")}
    assert set(listed) == {"one", "one.h5", "deep/two", "three"}
    assert (listed["one"]["rows"], listed["one"]["failed"], listed["one.h5"]["rows"]) == (5, 1, 5)
    assert listed["deep/two"]["encoder"] == "made elsewhere"
    assert "not a sealed store document" in listed["three"]["error"]


def test_a_stopped_save_is_gone_on_with(tmp_path: Path, monkeypatch) -> None:
    from embedcache.store import save

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(save.commit, "publish_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            embedcache.save_store(tmp_path / "s", ["a", "b"], rows(2))
    with pytest.raises(embedcache.EmbedCacheError):
        embedcache.save_store(tmp_path / "s", ["a", "c"], rows(2))
    assert embedcache.save_store(tmp_path / "s", ["a", "b"], rows(2)).ids == ["a", "b"]
    with pytest.raises(StoreWriteError, match="holds a store already"):
        embedcache.save_store(tmp_path / "s", ["a", "b"], rows(2))
