"""Heads and decoders come back from their files, and say what they said when they were scored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made import KIND, SETS

import embedcache
from embedcache import ProbeConfig, TrainConfig
from embedcache.errors import RunStateError
from embedcache.stage_two.adaptor import encoded_images, read_adaptor
from embedcache.stage_two.calibrating import Calibrator
from embedcache.stage_two.decoders import make_decoder
from embedcache.stage_two.files import write_tensors
from embedcache.stage_two.heads import HeadConfig
from embedcache.stage_two.kept import KeptDecoder, KeptHead, Source, probe_folder, read_kept, write_kept

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


def test_a_class_that_is_almost_sure_is_calibrated_as_in_double_precision() -> None:
    """Probabilities of 1 in single precision still differ in their log odds."""
    weights = torch.eye(3)[None] * torch.tensor([1.0, 1.0, 1.0])
    state = {
        "out": weights, "bias": torch.zeros(1, 1, 3), "feature_mean": torch.zeros(3), "feature_deviation": torch.ones(3)
    }  # fmt: skip
    fitted = tuple(
        Calibrator(*of) for of in (("platt", 0.1, 0.0, 0.3), ("platt", 0.2, 0.5, 0.3), ("none", 1.0, 0.0, np.nan))
    )
    head = KeptHead("linear", KIND, "image", "embedding_mean", "all", 9, (0.5,) * 3, fitted, SOURCE, state)
    x = torch.tensor([[18.0, 0, 0], [24.0, 1, -3], [0, 17.5, 2], [-1, 0, 1]])
    raw, calibrated = head.module()(x)
    p = KIND.probabilities(x.double().numpy())
    np.testing.assert_allclose(raw.numpy(), p, atol=1e-6)
    expected = np.stack([c(p[:, k]) for k, c in enumerate(fitted)], axis=1)
    np.testing.assert_allclose(calibrated.numpy(), expected, atol=1e-5)


def test_labels_have_folders_of_their_own(tmp_path: Path) -> None:
    labels = ["pneumonia", "Lung Opacity", "a/b", "a_b", "..", ".", "../x", "50%", "é", "Pleural Other (new)"]
    folders = [probe_folder(tmp_path, label) for label in labels]
    assert [folder.name for folder in folders[:2]] == ["pneumonia", "Lung Opacity"]
    assert len(set(folders)) == len(labels)
    assert all(folder.parent.resolve() == tmp_path / "probes" for folder in folders)
    assert all(folder.resolve().parent == tmp_path / "probes" for folder in folders)


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
    one = replace(CONFIG, heads=("logistic",), n_seeds=1)
    head = embedcache.probe(world.manifest, world.image, label="y", config=one).kept["logistic"]
    module = make_decoder("conv", 6, (4, 4), (16, 16))
    decoder = KeptDecoder("conv", 6, (4, 4), (16, 16), 0.4, SOURCE, module.state_dict())
    write_tensors(tmp_path / "other", {"x": torch.zeros(2)})
    (tmp_path / "bad").write_bytes(b"nothing")
    write_tensors(tmp_path / "half", {"x": torch.zeros(2)}, {"head": '{"name": "linear"}'})
    write_kept(tmp_path / "two", replace(head, calibrators=(Calibrator("none", 1.0, 0.0, 0.5),) * 2))
    write_kept(tmp_path / "named", replace(head, name="forest"))
    write_kept(tmp_path / "unit", replace(head, unit="hospital"))
    write_kept(tmp_path / "shape", replace(head, state={**head.state, "out": torch.zeros(1, 3, 1)}))
    write_kept(tmp_path / "huge", replace(decoder, size=(10**6, 10**6), dim=10**9))
    for name in ("other", "bad", "half", "two", "named", "unit", "shape", "huge"):
        with pytest.raises(RunStateError, match=rf"{name}: cannot be read as a head or decoder"):
            read_kept(tmp_path / name)
