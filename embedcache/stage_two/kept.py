"""What a run keeps to answer for new images: heads and decoders, each with what says which features it is for.

Shape notation: b samples, d feature width, c outputs, g x g' the token grid, H and W pixels of a mask.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from embedcache.errors import RunStateError
from embedcache.stage_two.calibrating import Calibrator
from embedcache.stage_two.decoders import make_decoder
from embedcache.stage_two.files import read_tensors, write_tensors
from embedcache.stage_two.heads import TRAINED, HeadStack
from embedcache.stage_two.probe_config import Unit
from embedcache.stage_two.targets import Target
from embedcache.store.location import read_location
from embedcache.store.store import Store

Kind = Literal["head", "decoder"]

_LARGEST_LOGIT = 30.0  # as calibration was fitted


@dataclass(frozen=True)
class Source:
    """Which features a head or decoder was fitted on.

    Args:
        encoder: record of the encoder, as the store has it.
        fingerprint: of that encoder.
        location: where it was found on the machine that encoded, where it came from a directory.
        dtype: stored dtype that its outputs were rounded to.
        adaptor_digest: of the weights of the Adaptor behind it, see `adaptor_digest`; blank for none.
    """

    encoder: Mapping[str, Any]
    fingerprint: str
    location: str
    dtype: str
    adaptor_digest: str

    @classmethod
    def of(cls, store: Store, adaptor_digest: str) -> Source:
        """The outputs in a store, behind an Adaptor where there is one."""
        location = read_location(store.path)
        return cls(store.encoder, store.encoder_fingerprint, location, store.layout.dtype, adaptor_digest)


@dataclass(frozen=True, eq=False)
class KeptHead:
    """A head, its thresholds and its calibration.

    Args:
        name: `linear`, `mlp` or `logistic`.
        target: what it tells.
        unit: what its thresholds and calibration were chosen on.
        dim: d.
        n_train: labels that it was fitted on.
        thresholds: of the probability, from which each output is called present, c of them.
        calibrators: of each output.
        state: weights of a `HeadStack` of one, and `feature_mean` and `feature_deviation`, (d,).
    """

    name: str
    target: Target
    unit: Unit
    dim: int
    n_train: int
    thresholds: tuple[float, ...]
    calibrators: tuple[Calibrator, ...]
    source: Source
    state: Mapping[str, Tensor]

    def module(self) -> HeadModule:
        """Features to probabilities, in evaluation mode."""
        return HeadModule(self).eval()


class HeadModule(nn.Module):
    """A kept head as one module."""

    feature_mean: Tensor
    feature_deviation: Tensor
    slope: Tensor
    intercept: Tensor

    def __init__(self, head: KeptHead) -> None:
        super().__init__()
        self._is_multi_class = head.target.task == "multi-class"
        kind, n_outputs = head.name if head.name in TRAINED else "linear", head.target.n_outputs
        self.stack = HeadStack(kind, head.dim, n_outputs, seeds=[0], dropout=0.0, device="cpu")
        state = dict(head.state)
        for name in ("feature_mean", "feature_deviation"):
            self.register_buffer(name, state.pop(name))
        self.stack.load_state_dict(state)
        self.register_buffer("slope", torch.tensor([c.slope for c in head.calibrators]))
        self.register_buffer("intercept", torch.tensor([c.intercept for c in head.calibrators]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (b, d) to probabilities as the head says them, and calibrated, (b, c) each."""
        logits = self.stack((x - self.feature_mean) / self.feature_deviation)[0]
        p = logits.softmax(dim=-1) if self._is_multi_class else logits.sigmoid()
        if self._is_multi_class:
            logits = torch.log(p) - torch.log1p(-p)
        mended = self.slope * logits.clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT) + self.intercept
        return p, mended.sigmoid()


@dataclass(frozen=True, eq=False)
class KeptDecoder:
    """A decoder and its threshold.

    Args:
        name: `paper`, `conv` or `linear`.
        dim: c.
        threshold: of the probability, above which a pixel is in the mask.
        state: its weights.
    """

    name: str
    dim: int
    grid: tuple[int, int]
    size: tuple[int, int]
    threshold: float
    source: Source
    state: Mapping[str, Tensor]

    def module(self) -> nn.Module:
        """Feature maps (b, c, g, g') to logits (b, 1, H, W), in evaluation mode."""
        decoder = make_decoder(self.name, self.dim, self.grid, self.size)
        decoder.load_state_dict(dict(self.state))
        return decoder.eval()


Kept = KeptHead | KeptDecoder


def write_kept(path: Path, kept: Kept) -> None:
    """Writes one file, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    said = {name: value for name, value in vars(kept).items() if name not in ("state", "source", "target")}
    if isinstance(kept, KeptHead):
        said |= {"target": asdict(kept.target), "calibrators": [asdict(c) for c in kept.calibrators]}
    kind = "head" if isinstance(kept, KeptHead) else "decoder"
    write_tensors(path, kept.state, {kind: json.dumps({**said, "source": asdict(kept.source)})})


def write_all(folder: Path, kind: Kind, kept: Mapping[str, Kept]) -> None:
    """Writes each as `<kind>-<name>.safetensors`; those of an earlier call that are not among them go.

    Raises:
        OutputError: they cannot be written there.
    """
    written = {folder / f"{kind}-{name}.safetensors": model for name, model in kept.items()}
    for path, model in written.items():
        write_kept(path, model)
    for path in set(folder.glob(f"{kind}-*.safetensors")) - set(written):
        path.unlink(missing_ok=True)


def kept_in(folder: Path) -> list[Path]:
    """Files of heads and decoders in a folder."""
    return sorted(path for kind in get_args(Kind) for path in folder.glob(f"{kind}-*.safetensors"))


def probe_folder(run_dir: Path, label: str) -> Path:
    """The folder of a run for what a probe of a label gives."""
    return run_dir / "probes" / re.sub(r"[^\w +-]", "_", label)


def read_kept(path: Path) -> Kept:
    """What `write_kept` wrote.

    Raises:
        RunStateError: a damaged file.
    """
    try:
        state, metadata = read_tensors(path)
        if "head" in metadata:
            return _head(json.loads(metadata["head"]), state)
        return _decoder(json.loads(metadata["decoder"]), state)
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise RunStateError(
            f"{path}: cannot be read as a head or decoder ({type(error).__name__}); run 'embedcache probe' or "
            "'embedcache segment' again"
        ) from error


def _head(said: dict[str, Any], state: dict[str, Tensor]) -> KeptHead:
    told = said["target"]
    target = Target(told["name"], told["task"], tuple(told["labels"]), tuple(told["classes"]))
    calibrators = tuple(Calibrator(**c) for c in said["calibrators"])
    if not len(calibrators) == len(said["thresholds"]) == target.n_outputs:
        raise ValueError("thresholds or calibrations for other outputs")
    thresholds = tuple(map(float, said["thresholds"]))
    return KeptHead(
        str(said["name"]), target, said["unit"], int(said["dim"]), int(said["n_train"]), thresholds, calibrators,
        Source(**said["source"]), state,
    )  # fmt: skip


def _decoder(said: dict[str, Any], state: dict[str, Tensor]) -> KeptDecoder:
    (rows, columns), (height, width) = said["grid"], said["size"]
    return KeptDecoder(
        str(said["name"]), int(said["dim"]), (int(rows), int(columns)), (int(height), int(width)),
        float(said["threshold"]), Source(**said["source"]), state,
    )  # fmt: skip
