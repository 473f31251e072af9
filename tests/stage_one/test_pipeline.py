"""The pipeline of one process: what is encoded once, what happens when memory runs out, what bounds memory."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import embedcache
from embedcache import Manifest
from embedcache.encoders.base import Encoded, Prepared
from embedcache.errors import DeviceError, SettingsError
from embedcache.stage_one.phases import Clock
from embedcache.store.catalogue import Catalogue


def digests(store: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(store.iterdir()) if p.name != ".pace"}


class Wrapped:
    """Any encoder with `encode` replaced by `over(inner, batch, tokens)`."""

    def __init__(self, inner, over, *, concurrent: bool = True) -> None:
        for name in ("modality", "dim", "token_dim", "token_grid", "record", "fingerprint", "prepare", "device"):
            setattr(self, name, getattr(inner, name))
        self.concurrent, self.origin, self._inner, self._over = concurrent, None, inner, over

    def encode(self, batch: list[Prepared], *, tokens: bool = False) -> Encoded:
        return self._over(self._inner, batch, tokens)


class Sizes:
    """Counts what is encoded; beyond `most` samples at once memory runs out."""

    def __init__(self, most: int = 10**9) -> None:
        self.sizes: list[int] = []
        self._most = most

    def __call__(self, inner, batch, tokens):
        self.sizes.append(len(batch))
        if len(batch) > self._most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return inner.encode(batch, tokens=tokens)


# once


def test_equal_images_of_a_shard_are_encoded_once(make_manifest, image_encoder, tmp_path: Path) -> None:
    manifest = make_manifest(20)
    files = manifest.frame["image"].tolist()
    (manifest.root / files[9]).write_bytes((manifest.root / files[3]).read_bytes())
    (manifest.root / files[4]).write_bytes((manifest.root / files[3]).read_bytes())
    (manifest.root / files[18]).write_bytes((manifest.root / files[3]).read_bytes())  # in another shard
    (manifest.root / files[6]).write_bytes(b"")
    sizes = Sizes()
    report = embedcache.extract(manifest, Wrapped(image_encoder, sizes), tmp_path / "s", shard_rows=10, batch_size=4)
    assert (report.n_embedded, report.n_failed) == (19, 1)
    assert sizes.sizes.count(4) == 4
    assert sum(sizes.sizes) == 18  # eight places of the first shard, the failure's among them, and ten of the second
    store = embedcache.open_store(tmp_path / "s")
    rows = store.embeddings[store.rows(["s003", "s004", "s009", "s018"])]
    np.testing.assert_array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(rows[0], rows[2])
    np.testing.assert_allclose(rows[0], rows[3], atol=2e-3)
    assert embedcache.verify_store(tmp_path / "s") == []


def test_a_text_is_tokenised_once(make_manifest, checkpoints: Path, tmp_path: Path, monkeypatch) -> None:
    from embedcache.encoders.tokenizing import Tokenize

    manifest, seen = make_manifest(40), []
    real = Tokenize.__call__
    monkeypatch.setattr(Tokenize, "__call__", lambda self, text: (seen.append(text), real(self, text))[1])
    encoder = embedcache.load_encoder(f"hf:{checkpoints / 'bert'}", device="cpu")
    frame = manifest.frame.copy()
    frame["report"] = ["Heart size is normal. " * (1 + i % 8) for i in range(40)]
    seen.clear()
    same = Manifest(frame, name="same", root=manifest.root)
    assert embedcache.extract(same, encoder, tmp_path / "s", n_threads=8).n_embedded == 40
    assert len(seen) == len(set(seen)) == len(set(frame["report"]))


def test_a_report_is_encoded_once_wherever_it_stands(make_manifest, text_encoder, tmp_path: Path) -> None:
    """The plan puts equal texts side by side, so that shards of five hold all of one."""
    manifest = make_manifest(40)
    frame = manifest.frame.copy()
    frame["report"] = ["Heart size is normal. " * (1 + i % 8) for i in range(40)]
    same = Manifest(frame, name="same", root=manifest.root)
    sizes = Sizes()
    report = embedcache.extract(same, Wrapped(text_encoder, sizes), tmp_path / "s", shard_rows=12, batch_size=4)
    assert report.n_embedded == 40
    distinct = {tuple(text_encoder.prepare(text).inputs) for text in frame["report"]}
    assert sum(sizes.sizes) == len(distinct) > 1
    assert all(len(shard.ids) <= 12 for shard in Catalogue.read(tmp_path / "s").plans[0].shards())
    store = embedcache.open_store(tmp_path / "s")
    for k in range(8):
        rows = store.embeddings[store.rows([f"s{i:03d}" for i in range(k, 40, 8)])]
        assert (rows == rows[0]).all()


# the bits of a row depend on its batch alone


@pytest.mark.parametrize("kind", ["vit", "resnet", "bert"])
def test_threads_and_torchs_own_threads_change_no_byte(
    make_manifest, checkpoints: Path, tmp_path: Path, kind: str
) -> None:
    manifest, before = make_manifest(30), torch.get_num_threads()
    encoder = embedcache.load_encoder(f"hf:{checkpoints / kind}", pooling="mean", device="cpu")
    stores = []
    try:
        for n_threads, of_torch in ((1, 1), (1, 4), (2, 1), (5, 3)):
            torch.set_num_threads(of_torch)
            stores.append(tmp_path / f"{n_threads}-{of_torch}")
            embedcache.extract(manifest, encoder, stores[-1], shard_rows=13, batch_size=4, n_threads=n_threads)
            assert torch.get_num_threads() == of_torch  # this thread's setting is its own
    finally:
        torch.set_num_threads(before)
    assert len({json.dumps(digests(store)) for store in stores}) == 1


def test_an_encoder_that_keeps_state_is_called_from_one_thread(make_manifest, image_encoder, tmp_path: Path) -> None:
    seen, at_once, most = set(), [0], [0]

    def over(inner, batch, tokens):
        seen.add(threading.get_ident())
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        time.sleep(0.01)
        at_once[0] -= 1
        return inner.encode(batch, tokens=tokens)

    options = {"shard_rows": 6, "batch_size": 2, "n_threads": 4}
    embedcache.extract(make_manifest(24), Wrapped(image_encoder, over, concurrent=False), tmp_path / "s", **options)
    assert len(seen) == 1
    embedcache.extract(make_manifest(24, name="b"), Wrapped(image_encoder, over), tmp_path / "b", **options)
    assert most[0] > 1  # and others are encoded side by side


# memory


def test_a_shard_that_memory_is_too_small_for_is_done_again(make_manifest, image_encoder, tmp_path: Path) -> None:
    manifest, sizes = make_manifest(26), Sizes(most=3)
    (manifest.root / manifest.frame["image"][2]).write_bytes(b"")
    encoder = Wrapped(image_encoder, sizes)
    report = embedcache.extract(manifest, encoder, tmp_path / "s", shard_rows=10, batch_size=8, n_threads=1)
    assert (report.n_asked, report.n_embedded, report.n_failed) == (26, 25, 1)
    assert set(report.reduced.values()) == {2}
    assert max(sizes.sizes[-5:]) == 2  # what comes later begins with less
    for number in range(3):
        document = json.loads((tmp_path / "s" / f"shard-{number:05d}.json").read_text())
        assert document["batch_size"] == report.reduced[number] == 2
    assert embedcache.verify_store(tmp_path / "s") == []
    embedcache.extract(manifest, image_encoder, tmp_path / "small", shard_rows=10, batch_size=2)
    small, reduced = embedcache.open_store(tmp_path / "small"), embedcache.open_store(tmp_path / "s", verify="digest")
    np.testing.assert_array_equal(small.embeddings, reduced.embeddings)
    assert "batch_size" not in json.loads((tmp_path / "small" / "shard-00000.json").read_text())


def test_what_ran_out_of_memory_is_let_go_before_it_is_done_again(make_manifest, image_encoder, tmp_path: Path) -> None:
    """The error of a batch holds its frames, and these what the model had taken."""
    taken: list[weakref.ref] = []

    def over(inner, batch, tokens):
        if len(batch) > 2:
            activations = torch.zeros(1000)
            taken.append(weakref.ref(activations))
            raise RuntimeError("CUDNN_STATUS_ALLOC_FAILED") from torch.OutOfMemoryError("CUDA out of memory")
        assert all(tensor() is None for tensor in taken)
        return inner.encode(batch, tokens=tokens)

    encoder = Wrapped(image_encoder, over)
    report = embedcache.extract(make_manifest(24), encoder, tmp_path / "s", shard_rows=8, batch_size=4, n_threads=2)
    assert report.n_embedded == 24
    assert set(report.reduced.values()) == {2}
    assert taken


def test_a_compiled_model_gets_batches_of_one_size(make_manifest, image_encoder, tmp_path: Path) -> None:
    sizes = Sizes()
    encoder = Wrapped(image_encoder, sizes)
    encoder.even_batches = True
    embedcache.extract(make_manifest(22), encoder, tmp_path / "s", shard_rows=9, batch_size=4)
    assert set(sizes.sizes) == {4}
    embedcache.extract(make_manifest(22, name="b"), image_encoder, tmp_path / "b", shard_rows=9, batch_size=4)
    a, b = (embedcache.open_store(tmp_path / name) for name in "sb")
    np.testing.assert_allclose(a.embeddings, b.embeddings, atol=1e-3)
    with pytest.raises(SettingsError, match="batch_size 'auto' for a compiled model"):
        embedcache.extract(make_manifest(2, name="c"), encoder, tmp_path / "c", batch_size="auto")


@pytest.mark.parametrize("allowed", ["legacy", "present"])
def test_float32_means_float32_whatever_the_process_allows(
    make_manifest, image_encoder, tmp_path: Path, allowed: str
) -> None:
    """torch has two ways to allow less, which must not be mixed."""
    kinds = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul]
    kinds += [torch.backends.mkldnn.conv]
    seen = []

    def over(inner, batch, tokens):
        seen.append([kind.fp32_precision for kind in kinds])
        return inner.encode(batch, tokens=tokens)

    before, whole = [kind.fp32_precision for kind in kinds], torch.backends.fp32_precision
    try:
        if allowed == "legacy":
            torch.set_float32_matmul_precision("medium")
        else:
            torch.backends.fp32_precision = "tf32"
            torch.backends.mkldnn.conv.fp32_precision = "bf16"
        less = [kind.fp32_precision for kind in kinds]
        assert less != before
        embedcache.extract(make_manifest(4), Wrapped(image_encoder, over), tmp_path / "s")
        assert [kind.fp32_precision for kind in kinds] == less
    finally:
        torch.backends.fp32_precision = whole
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision
    assert seen == [["ieee"] * 4]


def test_memory_that_is_too_small_for_one_sample_is_told(make_manifest, text_encoder, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"ran out of memory with one sample; name another device"):
        embedcache.extract(make_manifest(6), Wrapped(text_encoder, Sizes(most=0)), tmp_path / "s", batch_size=4)
    assert Catalogue.read(tmp_path / "s").shards == {}


def test_a_fault_in_the_encoder_ends_the_run_at_once(make_manifest, image_encoder, tmp_path: Path) -> None:
    sizes: list[int] = []

    def over(inner, batch, tokens):
        sizes.append(len(batch))
        raise RuntimeError("a fault of the model")

    with pytest.raises(RuntimeError, match="a fault of the model"):
        embedcache.extract(make_manifest(200), Wrapped(image_encoder, over), tmp_path / "s", batch_size=2, n_threads=2)
    assert len(sizes) < 20


MEMORY = """
import hashlib, sys
from pathlib import Path
import numpy as np, pandas as pd
import embedcache
from embedcache import Manifest
from embedcache.encoders.base import Encoded, EncoderRecord, Prepared

class Wide:
    modality, dim, token_dim, token_grid = "image", 2048, 2048, (4, 4)
    record = EncoderRecord("wide", {"weights": "none"})
    fingerprint, device, concurrent, origin = record.fingerprint, "cpu", True, None

    def prepare(self, sample):
        return Prepared(np.full((3, 64, 64), 1.5, np.float32), hashlib.sha256(sample.read_bytes()).digest()[:16])

    def encode(self, batch, *, tokens=False):
        rows = np.stack([np.frombuffer(p.digest * 128, np.uint8) for p in batch]).astype(np.float32)
        return Encoded(rows, np.repeat(rows[:, None], 16, axis=1))

root, n = Path(sys.argv[1]), int(sys.argv[2])
for i in range(n):
    (root / f"{i}.bin").write_bytes(str(i).encode())
frame = pd.DataFrame({"id": [str(i) for i in range(n)], "image": [f"{i}.bin" for i in range(n)]})
manifest = Manifest(frame, name="wide", root=root)
report = embedcache.extract(manifest, Wide(), root / "s", tokens=True, shard_rows=64, batch_size=16)
assert report.n_embedded == n
status = Path("/proc/self/status").read_text()  # what getrusage says may be of the process that started this one
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))
"""


def peak_mb(root: Path, n: int) -> float:
    root.mkdir()
    done = subprocess.run([sys.executable, "-c", MEMORY, str(root), str(n)], capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


def test_memory_does_not_grow_with_the_dataset(tmp_path: Path) -> None:
    """20 times more samples: 360 MB on disk where 18 MB were, and hardly more memory."""
    small, large = peak_mb(tmp_path / "small", 256), peak_mb(tmp_path / "large", 20 * 256)
    stored = sum(p.stat().st_size for p in (tmp_path / "large" / "s").iterdir()) / 2**20
    print(f"peak {small:.0f} MB with 256 samples, {large:.0f} MB with 5,120, which take {stored:.0f} MB on disk")
    assert stored > 300
    assert large - small < 40


def test_the_clock_tells_how_long_nothing_was_encoded() -> None:
    clock = Clock()
    time.sleep(0.05)
    with clock.encoding():
        time.sleep(0.1)
    time.sleep(0.05)
    phases = clock.read()
    assert 0.09 < phases.encode_s < phases.run_s
    assert 0.09 < phases.waited_s < phases.run_s
    assert phases.waited == pytest.approx(phases.waited_s / phases.run_s)
    assert phases.waited_s + phases.encode_s == pytest.approx(phases.run_s, abs=0.02)
    assert (phases + phases).encode_s == 2 * phases.encode_s
