"""A run as one ONNX graph says what torch says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import embedcache
from embedcache import Predictor
from embedcache.encoders.image import ImageEncoder
from embedcache.errors import ExportError, OutputError, SettingsError
from embedcache.predicting import exporting
from embedcache.predicting.chain import AnswerChain
from embedcache.predicting.exporting import export_onnx

OUTPUTS = ["embedding", "kind", "kind.raw", "opacity", "opacity.raw", "two", "two.raw", "mask"]


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "run.onnx"
    found = export_onnx(run.run_dir, out)
    assert found.files == (out,)
    assert list(found.outputs) == OUTPUTS
    assert found.difference <= 1e-4
    return out


def test_the_graph_says_of_images_what_predict_says(run, exported: Path) -> None:
    """Through onnxruntime on real files, any number at once; also the probabilities of masks."""
    onnx.checker.check_model(str(exported))
    session = onnxruntime.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == OUTPUTS
    predictor = Predictor(run.run_dir, device="cpu")
    assert isinstance(predictor.encoder, ImageEncoder)
    predictor._chain = AnswerChain(predictor.models, rounds=False)  # a graph rounds nothing
    for k in (1, 2, 7):
        files = [run.file(f"s{i:03d}") for i in range(k)]
        pixels = np.stack([predictor.encoder.prepare(file).inputs.numpy() for file in files])
        found = dict(zip(OUTPUTS, session.run(None, {"pixels": pixels}), strict=True))
        answers = predictor.predict(files)
        np.testing.assert_allclose(found["opacity"][:, 0], answers["opacity"], atol=1e-4)
        np.testing.assert_allclose(found["opacity.raw"][:, 0], answers["opacity.raw"], atol=1e-4)
        np.testing.assert_allclose(found["two"], answers[["two.opacity", "two.even"]], atol=1e-4)
        np.testing.assert_allclose(
            found["kind.raw"], answers[[f"kind.{c}.raw" for c in ("first", "second", "third")]], atol=1e-4
        )
        encoded = predictor.encoder.encode([predictor.encoder.prepare(file) for file in files], tokens=True)
        np.testing.assert_allclose(found["embedding"], encoded.embeddings, atol=1e-4)
        with torch.inference_mode():
            _, masks = predictor._chain(torch.from_numpy(encoded.embeddings), torch.from_numpy(encoded.tokens))
        np.testing.assert_allclose(found["mask"], masks.numpy(), atol=1e-4)


def test_the_graph_tells_what_it_is(run, exported: Path) -> None:
    facts = json.loads({p.key: p.value for p in onnx.load(str(exported)).metadata_props}["embedcache"])
    assert facts["encoder fingerprint"] == run.image.encoder_fingerprint
    assert facts["pixels"]["transform"]["steps"]
    labels = {label["label"]: label for label in facts["labels"]}
    assert labels["kind"]["classes"] == ["first", "second", "third"]
    assert labels["opacity"]["thresholds of raw"] == list(Predictor(run.run_dir).models.heads["opacity"].thresholds)
    assert facts["mask"] == {"decoder": "conv", "threshold": 0.5}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_encoders_and_stores_of_other_kinds(run, checkpoints: Path, tmp_path: Path, dtype: str) -> None:
    encoder = embedcache.load_encoder(f"hf:{checkpoints / 'resnet'}", device="cpu")
    embedcache.extract(run.manifest, encoder, tmp_path / "store", store_dtype=dtype)
    config = embedcache.ProbeConfig(heads=("logistic",), fractions=(1.0,), n_seeds=1, n_draws=20, controls=())
    embedcache.probe(run.manifest, tmp_path / "store", label="kind", config=config).write(tmp_path / "probe")
    found = export_onnx(tmp_path / "probe", tmp_path / "deep" / "probe.onnx")
    assert found.outputs == ("embedding", "kind", "kind.raw")
    session = onnxruntime.InferenceSession(str(found.files[0]), providers=["CPUExecutionProvider"])
    predictor = Predictor(tmp_path / "probe", device="cpu")
    predictor._chain = AnswerChain(predictor.models, rounds=False)  # a graph rounds nothing
    files = [run.file(f"s{i:03d}") for i in range(5)]
    pixels = np.stack([predictor.encoder.prepare(file).inputs.numpy() for file in files])
    answers = predictor.predict(files)[[f"kind.{c}" for c in ("first", "second", "third")]]
    np.testing.assert_allclose(session.run(["kind"], {"pixels": pixels})[0], answers, atol=1e-4)


def test_large_weights_lie_in_a_second_file(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "_ONE_FILE_BYTES", 0)
    found = export_onnx(run.run_dir, tmp_path / "run.onnx")
    assert [file.name for file in found.files] == ["run.onnx", "run.onnx.data"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.onnx", "run.onnx.data"]
    assert found.files[0].stat().st_size < found.files[1].stat().st_size
    (tmp_path / "moved").mkdir()
    for file in found.files:
        file.rename(tmp_path / "moved" / file.name)
    onnxruntime.InferenceSession(str(tmp_path / "moved" / "run.onnx"), providers=["CPUExecutionProvider"])


def test_a_graph_that_differs_is_not_written(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that is a little off, and an encoder that is."""
    real = exporting._write

    def other_head(graph, *rest):
        real(graph, *rest)
        with torch.no_grad():
            next(iter(graph.chain.heads)).intercept += 0.01

    def other_encoder(graph, *rest):
        real(graph, *rest)
        with torch.no_grad():
            for weights in graph.encoder.model.parameters():
                weights.mul_(1.01)

    for other in (other_head, other_encoder):
        monkeypatch.setattr(exporting, "_write", other)
        with pytest.raises(ExportError, match=r"up to .* from torch's, expected at most 0.0001; nothing was written"):
            export_onnx(run.run_dir, tmp_path / "run.onnx")
        assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_said(run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="nothing can be made there"):
        export_onnx(run.run_dir, tmp_path / "file" / "run.onnx")
    with pytest.raises(OutputError, match="cannot be written"):
        export_onnx(run.run_dir, tmp_path / ("x" * 300))


def test_a_graph_of_a_coarse_encoder_says_so(run, tmp_path: Path) -> None:
    encoder = embedcache.load_encoder(f"hf:{run.checkpoint}", device="cpu", compute_dtype="bfloat16")
    embedcache.extract(run.manifest, encoder, tmp_path / "store")
    config = embedcache.ProbeConfig(heads=("logistic",), fractions=(1.0,), n_seeds=1, n_draws=20, controls=())
    embedcache.probe(run.manifest, tmp_path / "store", label="opacity", config=config).write(tmp_path / "probe")
    found = export_onnx(tmp_path / "probe", tmp_path / "probe.onnx")
    assert found.notes[-1].startswith("the encoder computed in bfloat16, the graph computes in float32")


def test_a_missing_package_is_named(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "_NEEDED", ("onnx", "no_such_package"))
    with pytest.raises(SettingsError, match=r"no package no_such_package; .*embedcache\[onnx\]"):
        export_onnx(run.run_dir, tmp_path / "run.onnx")
