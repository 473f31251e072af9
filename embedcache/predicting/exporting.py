"""A run as one ONNX graph: encoder, Adaptor, heads and decoder, for programs without this library.

Shape notation: b images, c channels, H and W pixels of the encoder's input, k outputs of a head.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import tempfile
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embedcache.encoders.image import ImageEncoder
from embedcache.errors import OutputError, SettingsError, TrainingError
from embedcache.predicting.chain import AnswerChain
from embedcache.predicting.predictor import Predictor

_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_ONE_FILE_BYTES = 1_900_000_000  # a graph of more keeps its weights in a second file
_TOLERANCE = 1e-4  # of probabilities, against torch
_CHECKED = (1, 3)  # batch sizes


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        files: the graph, and the file of its weights where it has one.
        inputs: `pixels` and its shape.
        outputs: names, in order.
        difference: the largest from torch's probabilities, over random inputs.
    """

    files: tuple[Path, ...]
    inputs: dict[str, list[int | str]]
    outputs: tuple[str, ...]
    difference: float


class _Graph(nn.Module):
    """Pixels to a flat tuple of answers."""

    def __init__(self, encoder: nn.Module, chain: AnswerChain) -> None:
        super().__init__()
        self.encoder, self.chain = encoder, chain

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        said, mask = self.chain(*self.encoder(pixels))
        return (*(part for of_head in said for part in of_head[::-1]), *([] if mask is None else [mask]))


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
    thresholds and fingerprints stand in the graph's metadata, under `embedcache`. For each label the outputs are
    `<label>`, calibrated probabilities (b, k), and `<label>.raw`; of a decoder also `mask`, probabilities in the frame
    that the encoder saw.

    Args:
        out: the file; a graph of more than 1.9 GB has its weights beside it, in `<out>.data`.
        encoder, head, decoder, trust_remote_code, allow_pickle: as of `Predictor`.

    Raises:
        SettingsError: a package is missing, or this encoder cannot be a graph.
        TrainingError: the graph does not give what torch gives; nothing was written.
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
    graph = _Graph(of_images.as_module(tokens=models.decoder is not None), AnswerChain(models)).eval()
    shape = of_images.input_shape
    names = [name for label in models.heads for name in (label, f"{label}.raw")]
    names += [] if models.decoder is None else ["mask"]
    out = Path(out)
    with tempfile.TemporaryDirectory(dir=_folder(out), prefix=f".{out.name}.") as place:
        file = Path(place) / out.name
        _write(graph, file, shape, names, json.dumps(_facts(predictor)))
        difference = _compared(graph, file, shape)
        if not difference <= _TOLERANCE:
            raise TrainingError(
                f"{out}: the graph's probabilities are up to {difference:.1e} from torch's, expected at most "
                f"{_TOLERANCE}; nothing was written"
            )
        written = sorted(Path(place).iterdir(), reverse=True)  # weights before the graph that names them
        try:
            for part in written:
                part.replace(out.with_name(part.name))
        except OSError as error:
            raise OutputError(f"{out}: cannot be written ({error.strerror}); name another place") from error
    files = tuple(out.with_name(part.name) for part in written[::-1])
    return Exported(files, {"pixels": ["batch", *shape]}, tuple(names), difference)


def _folder(out: Path) -> Path:
    """Where it is to be, made if need be.

    Raises:
        OutputError: it cannot be.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out.parent}: cannot be made ({error.strerror}); name another place") from error
    return out.parent


def _write(graph: nn.Module, file: Path, shape: tuple[int, ...], names: list[str], facts: str) -> None:
    """One graph for any number of images, with its facts.

    Raises:
        SettingsError: torch knows no graph of this encoder.
    """
    import onnx

    n_bytes = sum(t.numel() * t.element_size() for t in graph.state_dict().values())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
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
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        raise SettingsError(
            f"{file.name}: torch makes no graph of this run's encoder ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0]})"
        ) from error
    model = onnx.load(str(file), load_external_data=False)
    onnx.helper.set_model_props(model, {"embedcache": facts})
    onnx.save(model, str(file))


def _compared(graph: nn.Module, file: Path, shape: tuple[int, ...]) -> float:
    """The largest difference of any probability from torch's, over random inputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    drawn, largest = np.random.default_rng(0), 0.0
    for n in _CHECKED:
        pixels = drawn.normal(size=(n, *shape)).astype(np.float32)
        with torch.inference_mode():
            expected = graph(torch.from_numpy(pixels))
        for ours, theirs in zip(session.run(None, {"pixels": pixels}), expected, strict=True):
            difference = np.abs(ours - theirs.numpy())
            largest = max(largest, float(difference.max()) if np.isfinite(difference).all() else np.inf)
    return largest


def _facts(predictor: Predictor) -> dict[str, Any]:
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
            "unit": head.unit,
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
        "notes": list(predictor.notes),
    }
