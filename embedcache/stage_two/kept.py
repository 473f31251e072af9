"""What a run keeps to answer for new images: heads and decoders, each with what says which features it is for.

Shape notation: b samples, d feature width, c outputs, g x g' the token grid, H and W pixels of a mask.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import quote

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from embedcache.errors import RunStateError
from embedcache.metrics.calibration import LARGEST_LOGIT
from embedcache.stage_two.calibrating import Calibrator
from embedcache.stage_two.decoders import make_decoder
from embedcache.stage_two.files import read_tensors, write_tensors
from embedcache.stage_two.heads import TRAINED, HeadStack
from embedcache.stage_two.probe_config import Pool, Unit, Views
from embedcache.stage_two.targets import Target
from embedcache.store.location import read_location, write_location
from embedcache.store.store import Store

Kind = Literal["head", "decoder"]
KEPT_HEADS = ("mlp", "linear", "logistic")  # in the order in which they are taken where nobody chooses


@dataclass(frozen=True)
class Source:
    """Which features a head or decoder was fitted on.

    Args:
        encoder: record of the encoder, as the store has it.
        fingerprint: of that encoder.
        location: where it was found on this machine, where it came from a directory; not kept with the rest.
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
        unit, pool, views: what it was probed on, as of `ProbeConfig`.
        n_train: labels that it was fitted on.
        thresholds: of the probability, from which each output is called present, c of them.
        calibrators: of each output.
        state: weights of a `HeadStack` of one, and `feature_mean` and `feature_deviation`, (d,).
    """

    name: str
    target: Target
    unit: Unit
    pool: Pool
    views: Views
    n_train: int
    thresholds: tuple[float, ...]
    calibrators: tuple[Calibrator, ...]
    source: Source
    state: Mapping[str, Tensor]

    @property
    def dim(self) -> int:
        """d."""
        return len(self.state["feature_mean"])

    def module(self) -> HeadModule:
        """Features to probabilities, frozen."""
        return HeadModule(self).eval().requires_grad_(False)


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
        if self._is_multi_class:  # the log odds of each class against all others
            itself = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
            logits = logits - logits.unsqueeze(-2).masked_fill(itself, -torch.inf).logsumexp(dim=-1)
        mended = self.slope * logits.clamp(-LARGEST_LOGIT, LARGEST_LOGIT) + self.intercept
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
        """Feature maps (b, c, g, g') to logits (b, 1, H, W), frozen."""
        with torch.device("meta"):  # the weights are taken over, and no room is made on a file's word
            decoder = make_decoder(self.name, self.dim, self.grid, self.size)
        decoder.load_state_dict(dict(self.state), assign=True)
        return decoder.eval().requires_grad_(False)


Kept = KeptHead | KeptDecoder


def write_kept(path: Path, kept: Kept) -> None:
    """Writes one file, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    said = {name: value for name, value in vars(kept).items() if name not in ("state", "source", "target")}
    source = {name: value for name, value in asdict(kept.source).items() if name != "location"}
    if isinstance(kept, KeptHead):
        said |= {"target": asdict(kept.target), "calibrators": [asdict(c) for c in kept.calibrators]}
    kind = "head" if isinstance(kept, KeptHead) else "decoder"
    write_tensors(path, kept.state, {kind: json.dumps({**said, "source": source})})


def write_all(folder: Path, kind: Kind, kept: Mapping[str, Kept]) -> None:
    """Writes each as `<kind>-<name>.safetensors`; those of an earlier call that are not among them go.

    Where an encoder came from a directory, that is noted beside them, as beside a store.

    Raises:
        OutputError: they cannot be written there.
    """
    written = {folder / f"{kind}-{name}.safetensors": model for name, model in kept.items()}
    for path, model in written.items():
        write_kept(path, model)
        if model.source.location:
            write_location(folder, model.source.location)
    for path in set(folder.glob(f"{kind}-*.safetensors")) - set(written):
        path.unlink(missing_ok=True)


def kept_in(run_dir: Path) -> list[Path]:
    """Files of heads and decoders of a run, or of a single folder of them."""
    places = [run_dir, *sorted(run_dir.glob("probes/*")), mask_folder(run_dir)]
    return [file for place in places for kind in get_args(Kind) for file in sorted(place.glob(f"{kind}-*.safetensors"))]


def mask_folder(run_dir: Path) -> Path:
    """The folder of a run for what a segmentation gives."""
    return run_dir / "masks"


def probe_folder(run_dir: Path, label: str) -> Path:
    """The folder of a run for what a probe of a label gives."""
    name = quote(label, safe=" +,()")
    return run_dir / "probes" / (name if name.strip(".") else name.replace(".", "%2E"))


def read_kept(path: Path) -> Kept:
    """What `write_kept` wrote.

    Raises:
        RunStateError: a damaged file.
    """
    try:
        state, metadata = read_tensors(path)
        kind = "head" if "head" in metadata else "decoder"
        said = json.loads(metadata[kind])
        source = Source(**said["source"], location=read_location(path.parent))
        found = _head(said, source, state) if kind == "head" else _decoder(said, source, state)
        found.module()  # whether its weights fit together
        return found
    except (SafetensorError, LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise RunStateError(
            f"{path}: cannot be read as a head or decoder ({type(error).__name__}); run 'embedcache probe' or "
            "'embedcache segment' again"
        ) from error


def _head(said: dict[str, Any], source: Source, state: dict[str, Tensor]) -> KeptHead:
    told = said["target"]
    target = Target(told["name"], told["task"], tuple(told["labels"]), tuple(told["classes"]))
    calibrators = tuple(Calibrator(**c) for c in said["calibrators"])
    if not len(calibrators) == len(said["thresholds"]) == target.n_outputs:
        raise ValueError("thresholds or calibrations for other outputs")
    thresholds = tuple(map(float, said["thresholds"]))
    for name, known in (
        ("name", KEPT_HEADS),
        ("unit", get_args(Unit)),
        ("pool", get_args(Pool)),
        ("views", get_args(Views)),
    ):
        if said[name] not in known:
            raise ValueError(f"{name} {said[name]!r}")
    return KeptHead(
        said["name"], target, said["unit"], said["pool"], said["views"], int(said["n_train"]), thresholds, calibrators,
        source, state,
    )  # fmt: skip


def _decoder(said: dict[str, Any], source: Source, state: dict[str, Tensor]) -> KeptDecoder:
    (rows, columns), (height, width) = said["grid"], said["size"]
    return KeptDecoder(
        str(said["name"]), int(said["dim"]), (int(rows), int(columns)), (int(height), int(width)),
        float(said["threshold"]), source, state,
    )  # fmt: skip
