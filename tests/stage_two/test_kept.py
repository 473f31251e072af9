"""Heads and decoders come back from their files, and say what they said when they were scored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made import SETS

import embedcache
from embedcache import ProbeConfig, TrainConfig
from embedcache.errors import RunStateError
from embedcache.stage_two.adaptor import encoded_images, read_adaptor
from embedcache.stage_two.calibrating import Calibrator
from embedcache.stage_two.decoders import make_decoder
from embedcache.stage_two.files import write_tensors
from embedcache.stage_two.heads import HeadConfig
from embedcache.stage_two.kept import KeptDecoder, KeptHead, Source, read_kept, write_kept

CONFIG = ProbeConfig(
    n_seeds=2,
    n_draws=50,
    heads=("linear", "mlp", "logistic", "knn"),
    fractions=(0.5, 1.0),
    controls=(),
    head=HeadConfig(epochs=2, min_steps=30, lr=1e-2),
)
SOURCE = Source({"name": "e"}, "f" * 64, "", "float16", "a" * 64)


def labelled(world):
    """Its manifest with a set of labels, one of them rare and blank in places, and a label of three classes."""
    rng, y = np.random.default_rng(2), world.manifest.label("y")
    a = np.where(rng.random(len(y)) < 0.2, np.nan, y)
    kind = np.where(rng.random(len(y)) < 0.2, 2, y)
    frame = world.manifest.frame.assign(**{"label.a": a, "label.b": rng.integers(0, 2, len(y)), "label.kind": kind})
    return embedcache.Manifest(frame, name="made", root=".", about=replace(world.manifest.about, label_sets=SETS))


@pytest.mark.parametrize("label", ["y", "both", "kind"])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_head_that_is_kept_says_what_it_said_of_the_test_images(
    world, tmp_path: Path, label: str, adapted: bool
) -> None:
    manifest = labelled(world)
    config = replace(CONFIG, standardise=not adapted)
    if adapted:
        fast = TrainConfig(epochs=1, batch_size=64, projection_dim=24, n_heads=2, ff_dim=32)
        embedcache.train(manifest, world.image, world.text, tmp_path / "run", config=fast)
    run_dir = tmp_path / "run" if adapted else None
    result = embedcache.probe(manifest, world.image, label=label, run_dir=run_dir, config=config)
    result.write(tmp_path / "out")
    assert sorted(p.stem for p in (tmp_path / "out").glob("*.safetensors")) == [
        "head-linear",
        "head-logistic",
        "head-mlp",
    ]
    x = torch.from_numpy(world.values)
    if run_dir is not None:
        x = encoded_images(read_adaptor(run_dir), x)
    place = {i: k for k, i in enumerate(manifest.frame["id"])}
    for name in ("linear", "mlp", "logistic"):
        head = read_kept(tmp_path / "out" / f"head-{name}.safetensors")
        assert isinstance(head, KeptHead)
        assert head.source.fingerprint == world.image.encoder_fingerprint
        assert bool(head.source.adaptor_digest) is adapted
        table = result.predictions.query(f"head == '{name}' and fraction == 1.0 and seed == 0 and test == 'internal'")
        rows = [place[i] for i in table["id"].astype(str)[:: head.target.n_outputs]]
        with torch.inference_mode():
            raw, calibrated = (p.numpy().ravel() for p in head.module()(x[rows]))
        assert np.ptp(raw) > 0.1
        np.testing.assert_allclose(raw, table["probability"], atol=2e-6)
        np.testing.assert_allclose(calibrated, table["calibrated"], atol=2e-5)
        np.testing.assert_allclose(np.tile(head.thresholds, len(rows)), table["threshold"], rtol=1e-6)


def test_views_side_by_side_keep_no_head(world) -> None:
    views = np.where(np.arange(400) % 2, "LATERAL", "PA")
    manifest = world.manifest.with_frame(world.manifest.frame.assign(view=views, study=world.manifest.frame["patient"]))
    config = replace(CONFIG, heads=("linear",), unit="study", views="frontal+lateral", n_seeds=1, fractions=(1.0,))
    assert not embedcache.probe(manifest, world.image, label="y", config=config).kept


def test_a_decoder_comes_back_from_its_file(tmp_path: Path) -> None:
    module = make_decoder("conv", 6, (4, 4), (16, 16)).eval()
    write_kept(tmp_path / "d.safetensors", KeptDecoder("conv", 6, (4, 4), (16, 16), 0.4, SOURCE, module.state_dict()))
    back = read_kept(tmp_path / "d.safetensors")
    assert isinstance(back, KeptDecoder)
    assert (back.threshold, back.source) == (0.4, SOURCE)
    x = torch.randn(2, 6, 4, 4)
    assert torch.equal(back.module()(x), module(x))


def test_other_and_damaged_files_are_refused(world, tmp_path: Path) -> None:
    write_tensors(tmp_path / "other.safetensors", {"x": torch.zeros(2)})
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    write_tensors(tmp_path / "half.safetensors", {"x": torch.zeros(2)}, {"head": '{"name": "linear"}'})
    result = embedcache.probe(
        world.manifest, world.image, label="y", config=replace(CONFIG, heads=("logistic",), n_seeds=1)
    )
    head = result.kept["logistic"]
    write_kept(tmp_path / "two.safetensors", replace(head, calibrators=(Calibrator("none", 1.0, 0.0, 0.5),) * 2))
    for name in ("other", "bad", "half", "two"):
        with pytest.raises(RunStateError, match=rf"{name}.safetensors: cannot be read as a head or decoder"):
            read_kept(tmp_path / f"{name}.safetensors")
