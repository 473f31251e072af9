"""Extraction: every id accounted for, bad inputs cost their own row, a resumed store is the same to the byte."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import embedcache
from embedcache import Manifest
from embedcache.data.radiograph import read_radiograph
from embedcache.encoders.base import Encoded, EncoderRecord, Prepared
from embedcache.errors import FingerprintMismatchError, ManifestError, StoreWriteError
from embedcache.stage_one import extract as extract_module
from embedcache.stage_one.extract import plan_extraction
from embedcache.store import commit
from embedcache.store.catalogue import Catalogue


def digests(store: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(store.iterdir()) if p.name != ".pace"}


def with_frame(manifest: Manifest, frame: pd.DataFrame) -> Manifest:
    return Manifest(frame, name=manifest.name, root=manifest.root)


class Counting:
    """Any encoder, with what it encoded counted; `gives` replaces its values."""

    def __init__(self, inner, gives=None) -> None:
        self.modality, self.dim = inner.modality, inner.dim
        self.token_dim, self.token_grid = inner.token_dim, inner.token_grid
        self.record, self.fingerprint = inner.record, inner.fingerprint
        self.prepare = inner.prepare
        self._inner, self._gives, self.n_encoded = inner, gives, 0

    def encode(self, batch: list[Prepared], *, tokens: bool = False) -> Encoded:
        self.n_encoded += len(batch)
        encoded = self._inner.encode(batch, tokens=tokens)
        return Encoded(self._gives(encoded.embeddings)) if self._gives else encoded


def test_rows_are_the_encoders_own(make_manifest, image_encoder, tmp_path: Path) -> None:
    manifest = make_manifest(11)
    report = embedcache.extract(
        manifest, image_encoder, tmp_path / "s", store_dtype="float32", shard_rows=4, batch_size=3
    )
    assert (report.n_asked, report.n_embedded, report.n_failed, report.n_present) == (11, 11, 0, 0)
    store = embedcache.open_store(tmp_path / "s", verify="digest")
    assert store.ids == manifest.frame["id"].tolist()
    for i, image in zip(store.ids, manifest.frame["image"], strict=True):
        alone = image_encoder.encode([image_encoder.prepare(manifest.path(image))]).embeddings[0]
        np.testing.assert_allclose(store.embeddings[store.rows([i])[0]], alone, atol=1e-5)
    assert store.encoder == json.loads(json.dumps(image_encoder.record.to_json()))


def test_a_second_call_encodes_nothing(make_manifest, image_encoder, tmp_path: Path) -> None:
    manifest, counting = make_manifest(), Counting(image_encoder)
    embedcache.extract(manifest, counting, tmp_path / "s")
    before, n_encoded = digests(tmp_path / "s"), counting.n_encoded
    report = embedcache.extract(manifest, counting, tmp_path / "s")
    assert (report.n_embedded, report.n_present, counting.n_encoded) == (0, 24, n_encoded)
    assert digests(tmp_path / "s") == before


def test_new_ids_grow_the_store_and_old_shards_stay(make_manifest, image_encoder, tmp_path: Path) -> None:
    manifest = make_manifest()
    part = with_frame(manifest, manifest.frame.iloc[:10])
    embedcache.extract(part, image_encoder, tmp_path / "s", shard_rows=4)
    before = digests(tmp_path / "s")
    report = embedcache.extract(manifest, image_encoder, tmp_path / "s", shard_rows=4)
    assert (report.n_asked, report.n_embedded, report.n_present) == (24, 14, 10)
    after = digests(tmp_path / "s")
    assert before.items() <= after.items()
    assert embedcache.open_store(tmp_path / "s").ids == manifest.frame["id"].tolist()


def break_some(manifest: Manifest) -> dict[str, str]:
    """Spoils some of the inputs; gives the reason that each id must fail for."""
    path = {i: manifest.root / p for i, p in zip(manifest.frame["id"], manifest.frame["image"], strict=True)}
    path["s002"].unlink()
    data = path["s003"].read_bytes()
    path["s003"].write_bytes(data[: len(data) * 6 // 10])
    path["s009"].write_bytes(b"")
    path["s010"].write_bytes(b"<html></html>")
    return {"s002": "missing", "s003": "truncated", "s009": "empty-file", "s010": "unknown-format"}


def test_bad_inputs_cost_their_own_rows_and_no_bit_of_others(make_manifest, image_encoder, tmp_path: Path) -> None:
    manifest = make_manifest()
    embedcache.extract(manifest, image_encoder, tmp_path / "good", shard_rows=7, batch_size=4)
    reasons = break_some(manifest)
    report = embedcache.extract(manifest, image_encoder, tmp_path / "bad", shard_rows=7, batch_size=4)
    assert report.n_asked == 24 == report.n_embedded + report.n_failed
    assert {f.id: f.reason for f in report.failures} == reasons
    good, bad = embedcache.open_store(tmp_path / "good"), embedcache.open_store(tmp_path / "bad")
    assert set(bad.ids) == set(good.ids) - set(reasons)
    np.testing.assert_array_equal(bad.embeddings, good.embeddings[good.rows(bad.ids)])
    ledger = json.dumps([dataclasses.asdict(f) for f in bad.failures])
    assert str(manifest.root) not in ledger


def test_failures_are_retried_only_when_asked(make_manifest, image_encoder, tmp_path: Path) -> None:
    manifest = make_manifest()
    spoiled = manifest.root / manifest.frame["image"][3]
    original = spoiled.read_bytes()
    break_some(manifest)
    embedcache.extract(manifest, image_encoder, tmp_path / "s")
    spoiled.write_bytes(original)
    counting = Counting(image_encoder)
    report = embedcache.extract(manifest, counting, tmp_path / "s")
    assert (report.n_embedded, report.n_failed, report.n_present, counting.n_encoded) == (0, 4, 20, 0)
    report = embedcache.extract(manifest, counting, tmp_path / "s", retry_failed=True)
    assert (report.n_embedded, report.n_failed, report.n_present, counting.n_encoded) == (1, 3, 20, 4)
    store = embedcache.open_store(tmp_path / "s")
    assert "s003" in store
    assert {f.id for f in store.failures} == {"s002", "s009", "s010"}


def test_every_input_bad_still_makes_a_store(make_manifest, image_encoder, tmp_path: Path) -> None:
    manifest = make_manifest(5)
    for path in manifest.root.iterdir():
        path.write_bytes(b"")
    report = embedcache.extract(manifest, image_encoder, tmp_path / "s")
    assert (report.n_embedded, report.n_failed) == (0, 5)
    assert embedcache.verify_store(tmp_path / "s") == []


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda e: np.where(np.arange(len(e))[:, None] == 1, np.nan, e), "not-finite"),
        (lambda e: np.where(np.arange(len(e))[:, None] == 1, 1e6, e) + np.arange(e.shape[1]), "overflow"),
        (lambda e: np.where(np.arange(len(e))[:, None] == 1, 0.0, e), "constant"),
        (lambda e: np.where(np.arange(len(e))[:, None] == 1, e * 1e-12, e), "zero"),
    ],
)
def test_values_unfit_to_keep_become_failures(make_manifest, image_encoder, tmp_path: Path, spoil, reason) -> None:
    manifest = make_manifest(6)
    encoder = Counting(image_encoder, gives=lambda e: spoil(e).astype(np.float32))
    report = embedcache.extract(manifest, encoder, tmp_path / "s", batch_size=6)
    assert [(f.id, f.reason) for f in report.failures] == [("s001", reason)]
    assert "s001" not in embedcache.open_store(tmp_path / "s")


def test_texts_are_encoded_once_each_and_grouped_by_length(make_manifest, text_encoder, tmp_path: Path) -> None:
    manifest = make_manifest(30)
    frame = manifest.frame.copy()
    frame["report"] = ["Clear." if i % 3 else f"Opacity number {i} " + "and so on " * (i // 3) for i in range(30)]
    frame.loc[4, "report"] = "  "
    manifest, counting = with_frame(manifest, frame), Counting(text_encoder)
    report = embedcache.extract(manifest, counting, tmp_path / "s", batch_size=4)
    assert (report.n_embedded, report.n_failed) == (29, 1)
    assert report.failures[0].reason == "empty-report"
    assert counting.n_encoded == 11  # ten opacities and one "Clear."
    store = embedcache.open_store(tmp_path / "s")
    clear = store.rows(["s001", "s002", "s029"])
    np.testing.assert_array_equal(store.embeddings[clear[0]], store.embeddings[clear[2]])
    alone = text_encoder.encode([text_encoder.prepare(frame["report"][9])]).embeddings[0]
    np.testing.assert_allclose(store.embeddings[store.rows(["s009"])[0]], alone, atol=2e-3)


def test_reports_shared_by_images_have_one_row(make_manifest, text_encoder, tmp_path: Path) -> None:
    manifest = make_manifest(6)
    frame = manifest.frame.copy()
    frame["report"], frame["report_id"] = "Same.", ["r1", "r1", "r1", "r2", "r2", "r2"]
    report = embedcache.extract(with_frame(manifest, frame), text_encoder, tmp_path / "s")
    assert report.n_asked == 2
    assert embedcache.open_store(tmp_path / "s").ids == ["r1", "r2"]


def test_changed_inputs_are_refused_by_id(make_manifest, image_encoder, text_encoder, tmp_path: Path) -> None:
    manifest = make_manifest(6)
    embedcache.extract(manifest, image_encoder, tmp_path / "image")
    embedcache.extract(manifest, text_encoder, tmp_path / "text")
    frame = manifest.frame.copy()
    frame.loc[2, "report"] = "Edited."
    with pytest.raises(ManifestError, match=r"1 text inputs .* 's002'; give changed inputs new ids"):
        embedcache.extract(with_frame(manifest, frame), text_encoder, tmp_path / "text")
    (manifest.root / frame["image"][1]).write_bytes((manifest.root / frame["image"][2]).read_bytes())
    embedcache.extract(manifest, image_encoder, tmp_path / "image")
    with pytest.raises(ManifestError, match=r"1 image inputs .*'s001'"):
        embedcache.extract(manifest, image_encoder, tmp_path / "image", check_inputs=True)


def test_a_text_that_another_extractor_encoded_differently_is_refused(
    make_manifest, text_encoder, tmp_path: Path, monkeypatch
) -> None:
    """It came between our look at the store and our work: its rows are not what was asked for here."""
    manifest = make_manifest(6)
    frame = manifest.frame.copy()
    frame.loc[2, "report"] = "Edited."
    real = extract_module._published_plan

    def overtaken(*arguments: object) -> Catalogue:
        planned = real(*arguments)
        monkeypatch.setattr(extract_module, "_published_plan", real)
        embedcache.extract(with_frame(manifest, frame), text_encoder, tmp_path / "s")
        return planned

    monkeypatch.setattr(extract_module, "_published_plan", overtaken)
    with pytest.raises(ManifestError, match=r"1 text inputs .* 's002'"):
        embedcache.extract(manifest, text_encoder, tmp_path / "s")


def test_another_encoder_is_refused(make_manifest, image_encoder, checkpoints: Path, tmp_path: Path) -> None:
    manifest = make_manifest(4)
    embedcache.extract(manifest, image_encoder, tmp_path / "s")
    other = embedcache.load_encoder(f"hf:{checkpoints / 'resnet'}", pooling="mean", device="cpu")
    with pytest.raises(FingerprintMismatchError, match="another encoder, preprocessing or layout"):
        embedcache.extract(manifest, other, tmp_path / "s")
    with pytest.raises(FingerprintMismatchError):
        embedcache.extract(manifest, image_encoder, tmp_path / "s", store_dtype="float32")


@pytest.mark.parametrize("n_threads", [1, 2, 5])
def test_threads_change_no_byte(make_manifest, image_encoder, tmp_path: Path, n_threads: int) -> None:
    manifest = make_manifest()
    embedcache.extract(manifest, image_encoder, tmp_path / "a", shard_rows=5, batch_size=2, n_threads=1)
    embedcache.extract(manifest, image_encoder, tmp_path / "b", shard_rows=5, batch_size=2, n_threads=n_threads)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


# stopped and gone on with


class Stopped(Exception):
    pass


def stop_after(monkeypatch, n_shards: int) -> None:
    """Makes the commit of shard `n_shards` raise, as a crash would."""
    real = commit.publish_shard

    def publish_shard(store: Path, number: int, image, document: dict):
        if number >= n_shards:
            raise Stopped
        return real(store, number, image, document)

    monkeypatch.setattr(extract_module.commit, "publish_shard", publish_shard)


@pytest.mark.parametrize("n_shards", range(5))
def test_resumed_equals_uninterrupted(make_manifest, image_encoder, tmp_path: Path, monkeypatch, n_shards: int) -> None:
    manifest = make_manifest()
    break_some(manifest)
    options = {"shard_rows": 5, "batch_size": 2}
    embedcache.extract(manifest, image_encoder, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        stop_after(patch, n_shards)
        with pytest.raises(Stopped):
            embedcache.extract(manifest, image_encoder, tmp_path / "stopped", **options)
    assert len(Catalogue.read(tmp_path / "stopped").shards) == n_shards
    # the plan decides, not what the second call asks for
    report = embedcache.extract(manifest, image_encoder, tmp_path / "stopped", shard_rows=9, batch_size=7)
    assert report.n_asked == report.n_embedded + report.n_failed + report.n_present
    assert digests(tmp_path / "stopped") == digests(tmp_path / "whole")


def test_a_shard_whose_ids_are_partly_gone_is_abandoned(
    make_manifest, image_encoder, tmp_path: Path, monkeypatch
) -> None:
    manifest = make_manifest(12)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Stopped):
            embedcache.extract(manifest, image_encoder, tmp_path / "s", shard_rows=4)
    fewer = with_frame(manifest, manifest.frame.drop(index=5))
    report = embedcache.extract(fewer, image_encoder, tmp_path / "s", shard_rows=4)
    assert (report.n_asked, report.n_embedded, report.n_present) == (11, 7, 4)
    catalogue = Catalogue.read(tmp_path / "s")
    assert catalogue.plans[1].abandons == [1]
    assert sorted(catalogue.shards) == [0, 2, 3]
    store = embedcache.open_store(tmp_path / "s")
    assert sorted(store.ids) == sorted(fewer.frame["id"])
    report = embedcache.extract(manifest, image_encoder, tmp_path / "s", shard_rows=4)
    assert (report.n_asked, report.n_embedded, report.n_present) == (12, 1, 11)
    assert embedcache.verify_store(tmp_path / "s") == []


def test_a_disjoint_manifest_leaves_unfinished_shards_alone(
    make_manifest, image_encoder, tmp_path: Path, monkeypatch
) -> None:
    first, second = make_manifest(8), make_manifest(4, name="others", prefix="o")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Stopped):
            embedcache.extract(first, image_encoder, tmp_path / "s", shard_rows=4)
    assert embedcache.extract(second, image_encoder, tmp_path / "s").n_embedded == 4
    assert [s.number for s in Catalogue.read(tmp_path / "s").pending()] == [1]
    report = embedcache.extract(first, image_encoder, tmp_path / "s")
    assert (report.n_embedded, report.n_present) == (4, 4)


def test_a_write_error_stops_the_run_and_the_next_goes_on(
    make_manifest, image_encoder, tmp_path: Path, monkeypatch
) -> None:
    manifest = make_manifest()
    with monkeypatch.context() as patch:
        real, calls = os.fsync, []

        def full_disk(descriptor: int) -> None:
            calls.append(descriptor)
            if len(calls) > 10:
                raise OSError(28, "No space left on device")
            real(descriptor)

        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(StoreWriteError, match="No space left"):
            embedcache.extract(manifest, image_encoder, tmp_path / "s", shard_rows=5)
    report = embedcache.extract(manifest, image_encoder, tmp_path / "s", shard_rows=5)
    assert report.n_asked == report.n_embedded + report.n_present
    assert embedcache.verify_store(tmp_path / "s") == []
    assert not list((tmp_path / "s").glob(".*.tmp"))


EXTRACT = """
import sys, embedcache
from embedcache import Manifest
manifest, checkpoint, store = sys.argv[1:]
encoder = embedcache.load_encoder("hf:" + checkpoint, pooling="mean", device="cpu")
print("ready", flush=True)
embedcache.extract(Manifest.read(manifest), encoder, store, shard_rows=6, batch_size=2)
"""


# forks a child for each attempt, so that the libraries are imported once, and kills it: in turn at a random instant
# of its start, and a random while after it has published a shard
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import embedcache
from embedcache import Manifest
from embedcache.encoders import hf
from embedcache.stage_one import extract as _
from transformers import AutoImageProcessor, ViTModel
manifest, checkpoint, store, attempts = sys.argv[1:]
published = lambda: sum(1 for _ in Path(store).glob("shard-*.json"))
rng, killed = random.Random(0), 0
for attempt in range(int(attempts)):
    ready, say_ready = os.pipe()
    before = published()
    child = os.fork()
    if child == 0:
        os.close(2)
        encoder = embedcache.load_encoder("hf:" + checkpoint, pooling="mean", device="cpu")
        os.write(say_ready, b"x")
        embedcache.extract(Manifest.read(manifest), encoder, store, shard_rows=6, batch_size=2)
        os._exit(0)
    os.close(say_ready)
    os.read(ready, 1)
    os.close(ready)
    if attempt % 2:
        while published() == before and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.04 if attempt % 2 else 0.2))
    os.kill(child, signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
print(killed)
"""


@pytest.mark.parametrize("attempts", [15, pytest.param(300, marks=pytest.mark.slow)])
def test_killed_again_and_again_it_ends_in_the_same_bytes(
    make_manifest, image_encoder, checkpoints: Path, tmp_path: Path, attempts: int
) -> None:
    """SIGKILL at random instants, bad inputs included."""
    manifest = make_manifest(18 * attempts)
    break_some(manifest)
    manifest.write(tmp_path / "m.parquet")
    embedcache.extract(manifest, image_encoder, tmp_path / "whole", shard_rows=6, batch_size=2)
    arguments = [tmp_path / "m.parquet", checkpoints / "vit", tmp_path / "s", attempts]
    done = subprocess.run(
        [sys.executable, "-c", KILLER, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    print(f"{int(done.stdout)} of {attempts} attempts ended by SIGKILL")
    assert int(done.stdout) >= attempts // 4
    assert Catalogue.read(tmp_path / "s").shards
    report = embedcache.extract(manifest, image_encoder, tmp_path / "s", shard_rows=6, batch_size=2)
    assert report.n_asked == 18 * attempts == report.n_embedded + report.n_failed + report.n_present
    assert embedcache.verify_store(tmp_path / "s") == []
    assert digests(tmp_path / "s") == digests(tmp_path / "whole")


def test_two_extractors_on_one_store_agree(make_manifest, image_encoder, checkpoints: Path, tmp_path: Path) -> None:
    manifest = make_manifest(60)
    manifest.write(tmp_path / "m.parquet")
    command = [
        sys.executable,
        "-c",
        EXTRACT,
        str(tmp_path / "m.parquet"),
        str(checkpoints / "vit"),
        str(tmp_path / "s"),
    ]
    children = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(2)]
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors.decode()
    embedcache.extract(manifest, image_encoder, tmp_path / "whole", shard_rows=6, batch_size=2)
    assert digests(tmp_path / "s") == digests(tmp_path / "whole")


def test_a_record_with_other_notes_is_the_same_encoder(make_manifest, image_encoder, tmp_path: Path) -> None:
    """Versions and device are recorded, not keyed: a store goes on after an upgrade."""
    manifest = make_manifest(8)
    embedcache.extract(with_frame(manifest, manifest.frame.iloc[:4]), image_encoder, tmp_path / "s")
    upgraded = Counting(image_encoder)
    upgraded.record = EncoderRecord("renamed", image_encoder.record.identity, {"torch": "99.0"})
    with pytest.warns(UserWarning, match=r"begun with other versions .*torch .* -> 99\.0"):
        assert embedcache.extract(manifest, upgraded, tmp_path / "s").n_embedded == 4


def test_settings_are_refused_before_a_plan_is_published(make_manifest, image_encoder, tmp_path: Path) -> None:
    for wrong in ({"batch_size": 0}, {"shard_rows": 0}, {"store_dtype": "float8"}, {"n_threads": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            embedcache.extract(make_manifest(2, name=str(wrong)), image_encoder, tmp_path / "s", **wrong)
    assert not (tmp_path / "s").exists()


def test_what_a_library_cannot_prepare_costs_its_own_row(
    make_manifest, image_encoder, tmp_path: Path, monkeypatch
) -> None:
    manifest, real = make_manifest(6), image_encoder._transform
    bad = read_radiograph(manifest.path(manifest.frame["image"][2]), image_encoder._policy).pixels

    def refusing(pixels):
        if np.array_equal(pixels, bad):
            raise ValueError("secret pixel values")
        return real.apply(pixels)

    monkeypatch.setattr(image_encoder, "_transform", dataclasses.replace(real, apply=refusing))
    report = embedcache.extract(manifest, image_encoder, tmp_path / "s")
    assert [(f.id, f.reason) for f in report.failures] == [("s002", "transform")]
    assert "secret" not in report.failures[0].message


def test_an_unexpected_fault_in_preparation_ends_the_run(make_manifest, image_encoder, tmp_path: Path) -> None:
    """A fault of the code is no bad input: it must not be written down as one."""
    encoder = Counting(image_encoder)

    def faulty(path: Path) -> Prepared:
        raise ZeroDivisionError

    encoder.prepare = faulty
    with pytest.raises(ZeroDivisionError):
        embedcache.extract(make_manifest(8), encoder, tmp_path / "s")
    assert Catalogue.read(tmp_path / "s").shards == {}


def test_prepare_reports_what_a_manifest_path_refuses(make_manifest, image_encoder, tmp_path: Path) -> None:
    manifest = make_manifest(4)
    frame = manifest.frame.copy()
    frame.loc[0, "image"] = "../../etc/passwd"
    report = embedcache.extract(with_frame(manifest, frame), image_encoder, tmp_path / "s")
    assert [(f.id, f.reason) for f in report.failures] in ([("s000", "outside-root")], [("s000", "missing")])


def test_a_disk_that_is_gone_is_no_failure_of_each_image(make_manifest, image_encoder, tmp_path: Path) -> None:
    """Not mounted on one machine, its images must not be written down as missing."""
    manifest = make_manifest(30)
    manifest.root.rename(tmp_path / "away")
    for _ in range(2):  # no root, and the bare place where it is mounted
        with pytest.raises(ManifestError, match=r"squares: none of the 30 images looked at is there, first 's000.jpg'"):
            embedcache.extract(manifest, image_encoder, tmp_path / "s")
        with pytest.raises(ManifestError, match="none of the 30 images looked at is there"):
            plan_extraction(manifest, image_encoder, tmp_path / "s")
        assert not (tmp_path / "s").exists()
        manifest.root.mkdir(exist_ok=True)
    manifest.root.rmdir()
    (tmp_path / "away").rename(manifest.root)
    encoder = Counting(image_encoder)

    def prepare(path: Path) -> Prepared:
        if "s010" in path.name:  # now it goes, and an empty mount point stays
            manifest.root.rename(tmp_path / "away")
            manifest.root.mkdir()
        return image_encoder.prepare(path)

    encoder.prepare = prepare
    with pytest.raises(ManifestError, match=r"not there, but it was when the work was planned; see that .* is mounted"):
        embedcache.extract(manifest, encoder, tmp_path / "s", shard_rows=4, batch_size=2, n_threads=1)
    assert embedcache.open_store(tmp_path / "s").failures == []
    manifest.root.rmdir()
    (tmp_path / "away").rename(manifest.root)
    report = embedcache.extract(manifest, image_encoder, tmp_path / "s", shard_rows=4, batch_size=2)
    assert report.n_embedded + report.n_present == 30
    manifest.root.rename(tmp_path / "away")  # nothing is to do, so that nothing is missed
    assert embedcache.extract(manifest, image_encoder, tmp_path / "s", shard_rows=4, batch_size=2).n_present == 30


def test_others_that_have_everything_in_hand_are_waited_for_in_silence(
    make_manifest, image_encoder, tmp_path: Path, monkeypatch, capsys
) -> None:
    from embedcache.stage_one import work
    from embedcache.store.claims import Claims

    manifest, looks = make_manifest(12), []

    def is_free(self, number: int) -> bool:
        looks.append(number)
        return len(looks) > 30

    monkeypatch.setattr(Claims, "is_free", is_free)
    monkeypatch.setattr(work, "_POLL_S", 0.01)
    assert embedcache.extract(manifest, image_encoder, tmp_path / "s", shard_rows=4).n_embedded == 12
    assert len(looks) == 33
    assert len(capsys.readouterr().err.splitlines()) == 1
