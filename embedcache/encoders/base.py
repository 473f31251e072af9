"""What every encoder offers, and the one place where a model is frozen.

Shape notation: b batch size, d embedding width.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from embedcache import fingerprint
from embedcache.errors import EncoderError

if TYPE_CHECKING:
    import torch

Modality = Literal["image", "text"]
Pooling = Literal["cls", "mean", "pooler"]

PREPROCESSING_VERSION = 1  # raise it whenever our own preparation of inputs changes values


@dataclass(frozen=True)
class EncoderRecord:
    """All that is known of an encoder, JSON-ready.

    Args:
        name: how people call it; not part of the fingerprint.
        identity: what determines the values: weights, config, preparation, pooling, compute dtype.
        notes: worth keeping but not keyed: library versions, device kind, where it came from.
    """

    name: str
    identity: Mapping[str, Any]
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        return fingerprint.fingerprint(dict(self.identity))

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "identity": dict(self.identity), "notes": dict(self.notes)}


@dataclass(frozen=True)
class Prepared:
    """One sample made ready for the encoder.

    Args:
        inputs: what the model takes, without a batch axis.
        digest: 16 bytes of the SHA-256 of the input: of the image file, or of the cleaned report in UTF-8.
        n_tokens: length of a tokenised text, for bucketing; 0 for images.
    """

    inputs: Any
    digest: bytes
    n_tokens: int = 0


@dataclass(frozen=True)
class Encoded:
    """One batch through the encoder: embeddings (b, d) float32."""

    embeddings: np.ndarray


class Encoder(Protocol):
    """A frozen encoder. `prepare` is safe in threads; `encode` is called from one thread at a time."""

    modality: Modality
    dim: int
    record: EncoderRecord
    fingerprint: str

    def prepare(self, sample: Path | str) -> Prepared:
        """Decodes and transforms an image file, or tokenises a report.

        Raises:
            InputError: this sample cannot be used.
        """
        ...

    def encode(self, batch: Sequence[Prepared]) -> Encoded:
        """Runs the model on b prepared samples."""
        ...


def freeze(model: torch.nn.Module, *, device: str, compute_dtype: str) -> torch.nn.Module:
    """Evaluation mode, no gradients, on its device and in its dtype: the only way a model becomes an encoder."""
    return model.eval().requires_grad_(False).to(device=device, dtype=torch_dtype(compute_dtype))


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a compute dtype's name.

    Raises:
        EncoderError: not one that encoders compute in.
    """
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise EncoderError(f"compute_dtype {name!r}, expected one of {', '.join(dtypes)}")
    return dtypes[name]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the warnings and bars of transformers; what it would only warn of, we check."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def digest_weights(model: torch.nn.Module) -> str:
    """SHA-256 over the contents of all weights and buffers in the order the model holds them.

    Names are left out: libraries rename parameters between versions, and order tells equal shapes apart.
    """
    import torch

    def arrays() -> Any:
        for tensor in model.state_dict().values():
            tensor = tensor.detach().cpu().contiguous()
            raw = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor.reshape(0).to(torch.uint8)
            yield f"{tensor.dtype} {list(tensor.shape)}", raw.numpy()

    return fingerprint.digest_arrays(arrays())


def run_notes(device: str) -> dict[str, str]:
    """Versions and device kind, recorded with the encoder but not keyed."""
    import torch
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": device.split(":")[0],
    }
