"""How a model is run: compute dtypes, torch.compile, several threads at once."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import embedcache
from embedcache.encoders.base import EncoderOptions
from embedcache.encoders.image import ImageEncoder, ImageModel
from embedcache.encoders.pooling import Output
from embedcache.encoders.transforms import paper_transform


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_autocast_is_a_recorded_choice_and_keeps_weights(
    make_manifest, checkpoints: Path, kind: str, dtype: str
) -> None:
    manifest = make_manifest(8)
    plain = embedcache.load_encoder(f"hf:{checkpoints / kind}", pooling="mean", device="cpu")
    cast = embedcache.load_encoder(f"hf:{checkpoints / kind}", pooling="mean", device="cpu", compute_dtype=dtype)
    assert cast.record.identity["compute_dtype"] == {"autocast": dtype}
    assert plain.record.identity["compute_dtype"] == "float32"
    assert cast.fingerprint != plain.fingerprint
    assert {p.dtype for p in cast._module.parameters()} == {torch.float32}
    samples = manifest.frame["report"] if kind == "bert" else [manifest.path(f) for f in manifest.frame["image"]]
    prepared = [plain.prepare(sample) for sample in samples]
    exact, rounded = plain.encode(prepared).embeddings, cast.encode(prepared).embeddings
    assert rounded.dtype == np.float32
    assert (exact != rounded).any()
    assert cosine(exact, rounded).min() > 0.999


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(("kind", "n"), [("vit", 8), ("bert", 10)])  # 10: the last batch is compiled anew
def test_a_compiled_model_gives_the_same_and_says_so(
    make_manifest, checkpoints: Path, tmp_path: Path, kind: str, n: int
) -> None:
    manifest = make_manifest(n)
    plain = embedcache.load_encoder(f"hf:{checkpoints / kind}", pooling="mean", device="cpu")
    compiled = embedcache.load_encoder(f"hf:{checkpoints / kind}", pooling="mean", device="cpu", compile=True)
    assert compiled.fingerprint == plain.fingerprint
    assert (plain.record.notes["compiled"], compiled.record.notes["compiled"]) == ("no", "yes")
    assert (plain.concurrent, compiled.concurrent) == (True, False)
    embedcache.extract(manifest, plain, tmp_path / "plain", store_dtype="float32", batch_size=4)
    embedcache.extract(manifest, compiled, tmp_path / "s", store_dtype="float32", batch_size=4)
    a, b = (embedcache.open_store(tmp_path / name).embeddings for name in ("plain", "s"))
    np.testing.assert_allclose(a, b, atol=1e-4)
    more = make_manifest(4, name="more", prefix="m")
    with pytest.warns(UserWarning, match="compiled yes -> no"):
        embedcache.extract(more, plain, tmp_path / "s", store_dtype="float32")


@pytest.mark.parametrize("kind", ["vit", "resnet", "bert"])
@pytest.mark.parametrize("layer", [None, 1])
def test_threads_do_not_disturb_each_other(make_manifest, checkpoints: Path, kind: str, layer: int | None) -> None:
    """Layers are captured inside the model while other threads run it."""
    manifest = make_manifest(24)
    encoder = embedcache.load_encoder(f"hf:{checkpoints / kind}", pooling="mean", layer=layer, device="cpu")
    samples = manifest.frame["report"] if kind == "bert" else [manifest.path(f) for f in manifest.frame["image"]]
    batches = [[encoder.prepare(sample)] for sample in samples]
    alone = [encoder.encode(batch, tokens=True) for batch in batches]
    assert encoder.concurrent
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for expected, got in zip(alone, pool.map(lambda b: encoder.encode(b, tokens=True), batches), strict=True):
                np.testing.assert_array_equal(expected.embeddings, got.embeddings)
                np.testing.assert_array_equal(expected.tokens, got.tokens)


def test_a_model_of_ones_own_is_run_by_one_thread_unless_it_says_so() -> None:
    module = torch.nn.Conv2d(3, 4, 32, 32)

    def forward(pixels: torch.Tensor) -> Output:
        return Output(pooler=module(pixels).mean(dim=(2, 3)))

    model = ImageModel(module=module, forward=forward, transform=paper_transform(), config={})
    assert not ImageEncoder(model, EncoderOptions(device="cpu")).concurrent
    sure = ImageModel(module=module, forward=forward, transform=paper_transform(), config={}, concurrent=True)
    assert ImageEncoder(sure, EncoderOptions(device="cpu")).concurrent
