"""What an extraction will take, told before it starts."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import embedcache
from embedcache import Manifest, resources
from embedcache.data.reports import ReportPolicy
from embedcache.data.views import ViewPolicy
from embedcache.encoders.base import Encoded, EncoderRecord, Prepared
from embedcache.errors import FingerprintMismatchError, InputError, NoRoomError
from embedcache.resources import in_bytes
from embedcache.stage_one import estimate as estimate_module
from embedcache.stage_one.estimate import bytes_on_disk
from embedcache.stage_one.extract import plan_extraction
from embedcache.store.layout import Layout, TokenLayout


def size_of(store: Path) -> int:
    return sum(p.stat().st_size for p in store.glob("*.h5"))


@pytest.mark.parametrize(("tokens", "store_dtype"), [(False, "float32"), (True, "float16"), (True, "int8")])
def test_bytes_of_images_are_as_foretold(make_manifest, image_encoder, tmp_path: Path, tokens, store_dtype) -> None:
    manifest, options = make_manifest(60), {"tokens": tokens, "store_dtype": store_dtype, "views": 2}
    found = plan_extraction(manifest, image_encoder, tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()
    assert (found.n_asked, found.n_present, found.n_to_do, found.n_distinct, found.n_shards) == (60, 0, 60, 60, 1)
    assert found.bytes_embeddings < found.bytes_tokens
    assert found.bytes_needed == (found.bytes_tokens if tokens else found.bytes_embeddings)
    assert found.prepare_per_s > 0 < found.encode_per_s
    assert found.seconds == pytest.approx(60 / found.prepare_per_s + 120 / found.encode_per_s)
    assert found.fits
    embedcache.extract(manifest, image_encoder, tmp_path / "s", **options)
    assert size_of(tmp_path / "s") == pytest.approx(found.bytes_needed, rel=0.1, abs=16_000)


def test_bytes_of_texts_follow_their_lengths(make_manifest, text_encoder, tmp_path: Path) -> None:
    manifest = make_manifest(200)
    found = plan_extraction(manifest, text_encoder, tmp_path / "s", tokens=True, batch_size=8)
    embedcache.extract(manifest, text_encoder, tmp_path / "s", tokens=True, batch_size=8)
    assert size_of(tmp_path / "s") == pytest.approx(found.bytes_needed, rel=0.15)


def test_the_tokens_of_a_large_dataset_are_told_before_the_start() -> None:
    """217,000 images at 257 x 768 in float16."""
    layout = Layout("float16", 768, tokens=TokenLayout(768, 257))
    assert in_bytes(bytes_on_disk(layout, 217_000, 0)) == "86 GB"


def test_what_is_done_and_what_is_said_twice_is_left_out(make_manifest, text_encoder, tmp_path: Path) -> None:
    manifest = make_manifest(30)
    frame = manifest.frame.copy()
    frame["report"] = [f"{'Clear lungs' if i % 2 else 'An opacity'} again." for i in range(30)]
    same = Manifest(frame, name="same", root=manifest.root)
    first = Manifest(frame.iloc[:10], name="same", root=manifest.root)
    embedcache.extract(first, text_encoder, tmp_path / "s")
    found = plan_extraction(same, text_encoder, tmp_path / "s")
    assert (found.n_asked, found.n_present, found.n_to_do, found.n_distinct) == (30, 10, 20, 2)
    assert "18 of them the same text as another" in "\n".join(found.lines())
    embedcache.extract(same, text_encoder, tmp_path / "s")
    done = plan_extraction(same, text_encoder, tmp_path / "s")
    assert (done.n_present, done.n_to_do, done.seconds, done.bytes_needed) == (30, 0, None, 0)


def test_a_part_takes_its_share(make_manifest, image_encoder, tmp_path: Path) -> None:
    manifest = make_manifest(30)
    shares = [
        plan_extraction(manifest, image_encoder, tmp_path / "s", shard_rows=4, part=(k, 3)).n_to_do for k in (1, 2, 3)
    ]
    assert shares == [12, 10, 8]


def test_bad_inputs_are_seen_in_the_probe(make_manifest, image_encoder, tmp_path: Path) -> None:
    manifest = make_manifest(6)
    for file in manifest.frame["image"][:2]:
        (manifest.root / file).write_bytes(b"")
    found = plan_extraction(manifest, image_encoder, tmp_path / "s")
    assert found.n_bad == 2
    assert "2 of the samples probed" in "\n".join(found.lines())
    for file in manifest.frame["image"]:
        (manifest.root / file).write_bytes(b"")
    with pytest.raises(
        InputError, match=r"6 of 6 samples probed cannot be used, first 's000': empty-file: .* no bytes"
    ):
        plan_extraction(manifest, image_encoder, tmp_path / "s")


def test_another_encoders_store_is_refused_by_the_plan_too(
    make_manifest, image_encoder, text_encoder, tmp_path: Path
) -> None:
    manifest = make_manifest(4)
    embedcache.extract(manifest, image_encoder, tmp_path / "s")
    with pytest.raises(FingerprintMismatchError, match="another encoder"):
        plan_extraction(manifest, text_encoder, tmp_path / "s")


def test_what_the_disk_cannot_hold_is_not_started(make_manifest, image_encoder, tmp_path: Path, monkeypatch) -> None:
    manifest = make_manifest(20)
    monkeypatch.setattr(resources, "free_bytes", lambda store: 5_000)
    monkeypatch.setattr(estimate_module, "free_bytes", lambda store: 5_000)
    with pytest.raises(NoRoomError, match=r"needs about 5\.1 kB, and 5\.0 kB are free there; nothing was started"):
        embedcache.extract(manifest, image_encoder, tmp_path / "s")
    assert not (tmp_path / "s").exists()  # so that what the message advises can be done
    assert not plan_extraction(manifest, image_encoder, tmp_path / "s").fits
    few = Manifest(manifest.frame.iloc[:10], name="few", root=manifest.root)
    assert embedcache.extract(few, image_encoder, tmp_path / "s").n_embedded == 10


@pytest.mark.parametrize(
    ("n", "words"), [(640, "640 bytes"), (1234, "1.2 kB"), (12_345_678, "12 MB"), (86e9, "86 GB"), (1.5e12, "1.5 TB")]
)
def test_sizes_for_people(n: float, words: str) -> None:
    assert in_bytes(int(n)) == words


def test_an_automatic_batch_size_on_a_cpu_is_the_usual_one(make_manifest, image_encoder, tmp_path: Path) -> None:
    from embedcache.store.catalogue import Catalogue

    embedcache.extract(make_manifest(4), image_encoder, tmp_path / "s", batch_size="auto")
    assert Catalogue.read(tmp_path / "s").plans[0].batch_size == estimate_module.DEFAULT_BATCH
    with pytest.raises(ValueError, match="batch_size is 'most'"):
        embedcache.extract(make_manifest(2, name="b"), image_encoder, tmp_path / "b", batch_size="most")


def test_an_empty_manifest_takes_nothing(image_encoder, tmp_path: Path) -> None:
    empty = Manifest(pd.DataFrame({"id": [], "image": []}, dtype=str), name="none", root=tmp_path)
    assert plan_extraction(empty, image_encoder, tmp_path / "s").n_to_do == 0


class Clock:
    """A clock that stands still but for what is done on it."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What an estimate measures by, on one core."""
    found = Clock()
    monkeypatch.setattr(estimate_module, "time", found)
    monkeypatch.setattr(estimate_module, "count_cores", lambda: 1)
    return found


class Slow:
    """An encoder that takes a known time: so much for each sample, and for each row or token that it is given."""

    dim, token_dim, token_grid, device, concurrent, origin = 8, None, None, "cpu", False, None

    def __init__(self, modality: str, clock: Clock, *, sample_s: float, unit_s: float) -> None:
        self.modality, self._clock, self._sample_s, self._unit_s = modality, clock, sample_s, unit_s
        self.record = EncoderRecord("slow", {"modality": modality})
        self.fingerprint = self.record.fingerprint
        self.report_policy = ReportPolicy(unit="report")

    def prepare(self, sample) -> Prepared:
        return self.prepare_views(sample, 1, ViewPolicy())[0]

    def prepare_views(self, sample, n, policy) -> list[Prepared]:
        self._clock.now += self._sample_s
        n_tokens = len(str(sample).split()) if self.modality == "text" else 0
        digest = hashlib.sha256(str(sample).encode()).digest()[:16]
        return [Prepared(0, digest, n_tokens, 0, digest + bytes([view])) for view in range(n)]

    def encode(self, batch, *, tokens=False) -> Encoded:
        self._clock.now += self._unit_s * len(batch) * (max(p.n_tokens for p in batch) or 1)
        return Encoded(np.arange(8 * len(batch), dtype=np.float32).reshape(-1, 8))


def test_hours_of_several_views(make_manifest, tmp_path: Path, clock: Clock) -> None:
    encoder = Slow("image", clock, sample_s=0.004, unit_s=0.001)
    found = plan_extraction(make_manifest(100), encoder, tmp_path / "s", views=4, batch_size=10)
    assert found.seconds == pytest.approx(100 * (0.004 + 4 * 0.001))


@pytest.mark.parametrize("batch_size", [4, 32])
def test_hours_of_texts_are_those_of_bucketed_shards(tmp_path: Path, clock: Clock, batch_size: int) -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(60), 0.6, 2000), 5, 300).astype(int)
    reports = [" ".join(["word"] * n) + f" {k}" for k, n in enumerate(lengths)]
    frame = pd.DataFrame({"id": [str(k) for k in range(2000)], "image": "x", "report": reports})
    manifest = Manifest(frame, name="texts", root=tmp_path)
    encoder = Slow("text", clock, sample_s=1e-4, unit_s=1e-4)
    found = plan_extraction(manifest, encoder, tmp_path / "s", batch_size=batch_size)
    assert 2000 / found.encode_per_s == pytest.approx(1e-4 * (lengths + 1).sum(), rel=0.2)


def test_gpus_share_the_encoding_and_each_process_has_its_memory(monkeypatch) -> None:
    probe = estimate_module.Probe(prepare_per_s=400, encode_per_s=100, n_tokens=0, row_bytes=1000, n_bad=0)
    assert probe.seconds(1000, 2, n_gpus=0) == pytest.approx(1000 / 400 + 2000 / 100)
    assert probe.seconds(1000, 2, n_gpus=1) == pytest.approx(20)
    assert probe.seconds(1000, 2, n_gpus=8) == pytest.approx(2.5)


def test_memory_of_several_workers(make_manifest, image_encoder, tmp_path: Path) -> None:
    manifest = make_manifest(20)
    one, two = (plan_extraction(manifest, image_encoder, tmp_path / "s", workers=n) for n in (1, 2))
    assert (one.n_workers, two.n_workers) == (1, 2)
    before = resources.resident_bytes()
    assert two.memory_bytes == pytest.approx(2 * one.memory_bytes + before, rel=0.1)  # and the one that asks them
    assert 0 < one.memory_bytes - before < 128 * 2**20


def test_what_this_process_had_before_is_not_charged_to_its_workers(
    make_manifest, image_encoder, tmp_path: Path
) -> None:
    manifest = make_manifest(20)
    before = plan_extraction(manifest, image_encoder, tmp_path / "s", workers=4).memory_bytes
    np.ones(2**27).sum()  # 1 GB, and gone
    assert plan_extraction(manifest, image_encoder, tmp_path / "s", workers=4).memory_bytes - before < 2**29


def test_memory_that_is_needed_is_memory_that_is_taken(tmp_path: Path) -> None:
    """The peak of an extraction in a process of its own, beside what was foretold in it."""
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    foretold, before, peak = map(int, done.stdout.split())
    print(f"foretold {foretold / 2**20:.0f} MB, taken {peak / 2**20:.0f} MB, {before / 2**20:.0f} MB of it before")
    assert peak - before > 40 * 2**20
    assert 0.8 * (peak - before) < foretold - before < 2.5 * (peak - before)


PEAK = """
import hashlib, sys
from pathlib import Path
import numpy as np, pandas as pd
import embedcache
from embedcache import Manifest
from embedcache.encoders.base import Encoded, EncoderRecord, Prepared
from embedcache.stage_one.extract import plan_extraction
from embedcache.resources import forget_peak, peak_bytes, resident_bytes

class Wide:
    modality, dim, token_dim, token_grid = "image", 1024, 1024, (4, 4)
    record = EncoderRecord("wide", {"weights": "none"})
    fingerprint, device, concurrent, origin = record.fingerprint, "cpu", True, None

    def prepare(self, sample):
        return Prepared(np.full((3, 64, 64), 1.5, np.float32), hashlib.sha256(sample.read_bytes()).digest()[:16])

    def encode(self, batch, *, tokens=False):
        rows = np.stack([np.frombuffer(p.digest * 64, np.uint8) for p in batch]).astype(np.float32)
        return Encoded(rows, np.repeat(rows[:, None], 16, axis=1))

root, n = Path(sys.argv[1]), 4096
for i in range(n):
    (root / f"{i}.bin").write_bytes(str(i).encode())
frame = pd.DataFrame({"id": [str(i) for i in range(n)], "image": [f"{i}.bin" for i in range(n)]})
manifest = Manifest(frame, name="wide", root=root)
found = plan_extraction(manifest, Wide(), root / "s", tokens=True, shard_rows=512, batch_size=16)
before = resident_bytes()
forget_peak()
embedcache.extract(manifest, Wide(), root / "s", tokens=True, shard_rows=512, batch_size=16)
print(found.memory_bytes, before, peak_bytes())
"""


def test_limits_of_control_groups_count(tmp_path: Path) -> None:
    (tmp_path / "said").write_text("0::/jobs/7\n")
    group = tmp_path / "cgroup" / "jobs" / "7"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("8000\n")
    (group / "memory.current").write_text("3000\n")
    (group / "memory.stat").write_text("anon 900\ninactive_file 1000\nactive_file 7\n")
    (group.parent / "memory.max").write_text("max\n")
    (group.parent / "memory.current").write_text("9000\n")
    assert list(resources.left_by_groups(tmp_path / "said", tmp_path / "cgroup")) == [6000]
    (tmp_path / "said").write_text("5:cpu:/x\n4:memory:/y\n")
    old = tmp_path / "cgroup" / "memory" / "y"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("700\n")
    (old / "memory.usage_in_bytes").write_text("200\n")
    assert list(resources.left_by_groups(tmp_path / "said", tmp_path / "cgroup")) == [500]
    assert list(resources.left_by_groups(tmp_path / "nothing", tmp_path / "cgroup")) == []


def test_stores_on_one_disk_share_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(resources, "free_bytes", lambda store: 1000)
    resources.check_room({tmp_path / "a": 600, tmp_path / "b": 400})
    with pytest.raises(NoRoomError, match=r"a, .*b: needs about 1\.2 kB, and 1\.0 kB are free there"):
        resources.check_room({tmp_path / "a": 600, tmp_path / "b": 600})


def test_a_batch_that_memory_is_too_small_for_is_halved_in_the_probe_too(
    make_manifest, tmp_path: Path, clock: Clock
) -> None:
    class Small(Slow):
        def encode(self, batch, *, tokens=False) -> Encoded:
            if len(batch) > 3:
                raise MemoryError
            return super().encode(batch, tokens=tokens)

    small = Small("image", clock, sample_s=0.001, unit_s=0.001)
    assert plan_extraction(make_manifest(20), small, tmp_path / "s", batch_size=8).encode_per_s == pytest.approx(1000)
