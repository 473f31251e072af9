"""A run as one ONNX graph: encoder, Adaptor, heads and decoder, for programs without this library.

Shape notation: b images, c channels, H and W pixels of the encoder's input, k outputs of a head.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embedcache.encoders.image import ImageEncoder
from embedcache.errors import ExportError, OutputError, SettingsError
from embedcache.predicting.chain import AnswerChain
from embedcache.predicting.predictor import Predictor
from embedcache.report.answer_text import RAW

_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_ONE_FILE_BYTES = 1_900_000_000  # a graph of more keeps its weights in a second file
_TOLERANCE = 1e-4  # from torch


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        files: the graph, and the file of its weights where it has one.
        inputs: `pixels` and its shape.
        outputs: names, in order.
        difference: the largest from torch: of probabilities, and of embeddings over their largest number.
        notes: what is to be known of it.
    """

    files: tuple[Path, ...]
    inputs: dict[str, list[int | str]]
    outputs: tuple[str, ...]
    difference: float
    notes: tuple[str, ...]


class _Graph(nn.Module):
    """Pixels to a flat tuple: embeddings, then answers."""

    def __init__(self, encoder: nn.Module, chain: AnswerChain) -> None:
        super().__init__()
        self.encoder, self.chain = encoder, chain

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        embeddings, tokens = self.encoder(pixels)
        said, mask = self.chain(embeddings, tokens)
        return (embeddings, *(part for of_head in said for part in of_head[::-1]), *([] if mask is None else [mask]))


def export_onnx(
    run_dir: str | Path,
    out: str | Path,
    *,
    encoder: str | None = None,
    head: str | None = None,
    decoder: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Exported:
    """Writes a run as one graph in float32, and compares it with torch through onnxruntime.

    The input is `pixels`, (b, c, H, W): images as the encoder's transform leaves them; which that is, labels,
    thresholds and fingerprints stand in the graph's metadata, under `embedcache`. Outputs are `embedding`, the
    encoder's, (b, d); for each label `<label>`, calibrated probabilities (b, k), and `<label>.raw`; of a decoder also
    `mask`, probabilities in the frame that the encoder saw. Nothing is rounded as a store rounds it, so that answers
    may differ from those of `Predictor` by as much.

    Args:
        out: the file; a graph of more than 1.9 GB has its weights beside it, in `<out>.data`.
        encoder, head, decoder, trust_remote_code, allow_pickle: as of `Predictor`.

    Raises:
        SettingsError: a package is missing, or this encoder cannot be a graph.
        ExportError: the graph does not give what torch gives; nothing was written.
        OutputError: it cannot be written.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingsError(f"no package {', '.join(missing)}; install it with: pip install 'embedcache[onnx]'")
    predictor = Predictor(
        run_dir,
        encoder=encoder,
        head=head,
        decoder=decoder,
        device="cpu",
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    models, of_images = predictor.models, predictor.encoder
    if not isinstance(of_images, ImageEncoder):
        raise SettingsError(f"{of_images.record.name}: an encoder of your own class, of which no graph is known")
    chain = AnswerChain(models, rounds=False)
    graph = _Graph(of_images.as_module(tokens=models.decoder is not None), chain).eval()
    shape, notes = of_images.input_shape, predictor.notes
    if (computed := of_images.record.identity["compute_dtype"]) != "float32":
        notes += (f"the encoder computed in {computed['autocast']}, the graph computes in float32: answers may differ",)
    names = ["embedding", *(name for label in models.heads for name in (label, label + RAW))]
    names += [] if models.decoder is None else ["mask"]
    if len(set(names)) < len(names):
        raise SettingsError(f"{run_dir}: outputs of one name among {', '.join(names)}; name the label otherwise")
    out = Path(out)
    with _beside(out) as place:
        file = place / out.name
        _write(graph, file, shape, names, json.dumps(_facts(predictor, notes)))
        difference = _compared(graph, file, shape)
        if not difference <= _TOLERANCE:
            raise ExportError(
                f"{out}: the graph's outputs are up to {difference:.1e} from torch's, expected at most {_TOLERANCE}; "
                "nothing was written; try another version of torch, onnxscript or onnxruntime"
            )
        written = sorted(place.iterdir(), reverse=True)  # weights before the graph that names them
        try:
            for part in written:
                part.replace(out.with_name(part.name))
        except OSError as error:
            raise OutputError(f"{out}: cannot be written ({error.strerror}); name another place") from error
    files = tuple(out.with_name(part.name) for part in written[::-1])
    return Exported(files, {"pixels": ["batch", *shape]}, tuple(names), difference, notes)


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A folder beside a file, for as long as it is made.

    Raises:
        OutputError: it cannot be made there.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(dir=out.parent, prefix="."))
    except OSError as error:
        raise OutputError(f"{out.parent}: nothing can be made there ({error.strerror}); name another place") from error
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _write(graph: nn.Module, file: Path, shape: tuple[int, ...], names: list[str], facts: str) -> None:
    """One graph for any number of images, with its facts.

    Raises:
        SettingsError: torch knows no graph of this encoder.
    """
    import onnx

    n_bytes = sum(t.numel() * t.element_size() for t in graph.state_dict().values())
    try:
        with _in_silence():
            torch.onnx.export(
                graph,
                (torch.zeros(2, *shape),),
                str(file),
                input_names=["pixels"],
                output_names=names,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                external_data=n_bytes > _ONE_FILE_BYTES,
            )
        model = onnx.load(str(file), load_external_data=False)
        onnx.helper.set_model_props(model, {"embedcache": facts})
        onnx.save(model, str(file))
    except torch.onnx.errors.OnnxExporterError as error:
        said = str(error).strip().partition("\n")[0]
        raise SettingsError(
            f"{file.name}: torch makes no graph of this run's encoder ({type(error).__name__}: {said})"
        ) from error
    except OSError as error:
        raise OutputError(f"{file.name}: cannot be written ({error.strerror}); name another place") from error


@contextmanager
def _in_silence() -> Iterator[None]:
    """Without what the exporter prints, logs and warns of; what comes out is compared instead."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _compared(graph: nn.Module, file: Path, shape: tuple[int, ...]) -> float:
    """The largest difference of any output from torch's, as of `Exported`, over flat, graded and noisy images."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    drawn, largest = np.random.default_rng(0), 0.0
    flat = np.broadcast_to(np.array([-1.0, 0.0, 1.0], np.float32)[:, None, None, None], (3, *shape))
    graded = np.broadcast_to(np.linspace(-2, 2, shape[2], dtype=np.float32), (1, *shape))
    noise = drawn.normal(size=(3, *shape)).astype(np.float32)
    everything = np.concatenate([flat, graded, noise, graded + noise / 4], dtype=np.float32)
    for pixels in (everything[:1], everything[1:]):  # of one and of many
        with torch.inference_mode():
            expected = [part.numpy() for part in graph(torch.from_numpy(pixels))]
        scales = [max(float(np.abs(expected[0]).max()), 1e-6), *[1.0] * (len(expected) - 1)]
        for ours, theirs, scale in zip(session.run(None, {"pixels": pixels}), expected, scales, strict=True):
            difference = np.abs(ours - theirs) / scale
            largest = max(largest, float(difference.max()) if np.isfinite(difference).all() else np.inf)
    return largest


def _facts(predictor: Predictor, notes: Sequence[str]) -> dict[str, Any]:
    """What somebody needs who has the graph alone, JSON-ready."""
    models, source = predictor.models, predictor.models.source
    identity = source.encoder.get("identity", {})
    labels = [
        {
            "label": label,
            "task": head.target.task,
            "classes": list(head.target.classes),
            "thresholds of raw": list(head.thresholds),
            "head": head.name,
            "n_train": head.n_train,
            "unit": head.unit,
            "views": head.views,
        }
        for label, head in models.heads.items()
    ]
    decoder = models.decoder
    return {
        "encoder": source.encoder.get("name", "external"),
        "encoder fingerprint": source.fingerprint,
        "adaptor digest": source.adaptor_digest,
        "pixels": {key: identity.get(key) for key in ("decode", "transform", "input_size")},
        "labels": labels,
        "mask": None if decoder is None else {"decoder": decoder.name, "threshold": decoder.threshold},
        "notes": list(notes),
    }
