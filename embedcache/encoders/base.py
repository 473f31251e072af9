"""What every encoder offers, what it may be asked for, and the one place where a model is frozen.

Shape notation: b batch size, l tokens, d embedding width.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np

from embedcache import fingerprint
from embedcache.errors import EncoderError

if TYPE_CHECKING:
    import torch

    from embedcache.data.radiograph import DecodePolicy
    from embedcache.data.reports import ReportPolicy
    from embedcache.data.views import ViewPolicy

Modality = Literal["image", "text"]
Pooling = Literal["cls", "mean", "cls_mean", "pooler", "projection", "first"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")

PREPROCESSING_VERSION = 2  # raise it whenever our own preparation of inputs changes values


@dataclass(frozen=True)
class EncoderOptions:
    """What a caller may choose; None leaves it to the encoder's authors. Meanings are those of `load_encoder`."""

    pooling: Pooling | None = None
    layer: int | None = None
    transform: Literal["paper"] | None = None
    image_size: int | None = None
    token_grid: int | tuple[int, int] | None = None
    decode: DecodePolicy | None = None
    max_length: int | None = None
    report: ReportPolicy | None = None
    device: str = "auto"
    compute_dtype: str = "float32"
    compile: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False

    def chosen(self) -> dict[str, Any]:
        """What determines the values and was not left to the encoder's authors, JSON-ready.

        What a caller consents to, code and pickles, is not among it: nobody consents by opening a file.
        """
        usual = type(self)()
        values = {name: getattr(self, name) for name in self.of_values()}
        kept = {name: value for name, value in values.items() if value != getattr(usual, name)}
        return {name: asdict(value) if is_dataclass(value) else value for name, value in kept.items()}  # type: ignore[arg-type]  # no classes

    @classmethod
    def of_values(cls) -> tuple[str, ...]:
        """Options that determine the values; the others say where and how it is done, and what is consented to."""
        others = ("device", "compile", "trust_remote_code", "allow_pickle")
        return tuple(f.name for f in fields(cls) if f.name not in others)

    def check(self, name: str) -> None:
        """Refuses what no encoder takes.

        Raises:
            EncoderError: names the option and its value.
        """
        if self.pooling is not None and self.pooling not in POOLINGS:
            raise EncoderError(f"{name}: pooling {self.pooling!r}, expected one of {', '.join(POOLINGS)}")
        if self.transform not in (None, "paper"):
            raise EncoderError(f"{name}: transform {self.transform!r}, expected 'paper' or none for the encoder's own")
        if self.transform and self.image_size is not None:
            raise EncoderError(f"{name}: transform 'paper' gives 224 x 224 images, image_size cannot be chosen with it")
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise EncoderError(
                f"{name}: compute_dtype {self.compute_dtype!r}, expected one of {', '.join(COMPUTE_DTYPES)}"
            )
        if self.layer is not None and self.pooling in ("pooler", "projection"):
            raise EncoderError(
                f"{name}: pooling {self.pooling} belongs to the last layer, layer {self.layer} was asked for; choose "
                "pooling cls, mean or cls_mean"
            )

    def check_modality(self, modality: Modality, name: str) -> None:
        """Refuses options that belong to encoders of the other modality.

        Raises:
            EncoderError: names the option and its value.
        """
        of_images, of_texts = ("transform", "image_size", "token_grid", "decode"), ("max_length", "report")
        for option in of_texts if modality == "image" else of_images:
            if getattr(self, option) is not None:
                raise EncoderError(
                    f"{name}: {option} {getattr(self, option)!r} was given for an encoder of {modality}s"
                )


@dataclass(frozen=True)
class EncoderRecord:
    """All that is known of an encoder, JSON-ready.

    Args:
        name: how people call it; not part of the fingerprint.
        identity: what determines the values: weights, config, preparation, pooling, compute dtype.
        notes: worth keeping but not keyed: library versions, device kind, where it came from.
        loading: how `load_encoder` was called, not keyed either; empty if it was not. See `load_recorded`.
    """

    name: str
    identity: Mapping[str, Any]
    notes: Mapping[str, Any] = field(default_factory=dict)
    loading: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        return fingerprint.fingerprint(dict(self.identity))

    def to_json(self) -> dict[str, Any]:
        said = {"name": self.name, "identity": dict(self.identity), "notes": dict(self.notes)}
        return said | ({"loading": dict(self.loading)} if self.loading else {})


@dataclass(frozen=True, kw_only=True)
class Model:
    """What every source library gives of a model; `ImageModel` and `TextModel` add what their modality needs.

    Args:
        module: all weights that are used and no others; they are hashed by content.
        forward: from a batch to what the model has.
        config: architecture and settings that determine the output beside the weights, JSON-ready.
        source: the library's prefix, such as `hf`.
        name: what the record calls it.
        pooling: what its authors use, where they say.
        layer: the block whose output is taken; None: the last, with the model's final norm.
        concurrent: whether `forward` may run in several threads at once: it keeps nothing from call to call.
        libraries: packages whose versions are worth a note.
        notes: where it came from; not keyed.
    """

    module: torch.nn.Module
    forward: Callable[..., Any]
    config: Mapping[str, Any]
    source: str = "py"
    name: str = "own"
    pooling: Pooling | None = None
    layer: int | None = None
    concurrent: bool = False
    libraries: Sequence[str] = ()
    notes: Mapping[str, str] = field(default_factory=dict)

    def record(
        self, preparation: Mapping[str, Any], options: EncoderOptions, *, name: str | None, device: str
    ) -> EncoderRecord:
        """All that determines the values; to be asked before the weights are cast to the compute dtype.

        Args:
            preparation: modality, pooling, width, and how inputs are made ready, JSON-ready.
            name: what the record calls it instead of `name`.
        """
        identity = {
            "source": self.source,
            "model": plain_json(dict(self.config), f"{self.name}: config"),
            "weights": digest_weights(self.module),
            "layer": "last" if self.layer is None else self.layer,
            **plain_json(dict(preparation), f"{self.name}: preparation"),
            "compute_dtype": {"autocast": options.compute_dtype} if options.compute_dtype != "float32" else "float32",
            "preprocessing_version": PREPROCESSING_VERSION,
        }
        notes = {
            **run_notes(device, *self.libraries),
            "compiled": "yes" if options.compile else "no",
            "parameters": sum(p.numel() for p in self.module.parameters()),
            **self.notes,
        }
        return EncoderRecord(name or self.name, identity, notes)

    def compiled(self, options: EncoderOptions, *, dynamic: bool) -> Callable[..., Any]:
        """The model's `forward`, through `torch.compile` where that was asked for.

        Args:
            dynamic: whether the shapes of its inputs change from call to call.
        """
        import torch

        return torch.compile(self.forward, dynamic=dynamic) if options.compile else self.forward


@dataclass(frozen=True)
class Prepared:
    """One sample made ready for the encoder.

    Args:
        inputs: what the model takes, without a batch axis.
        digest: 16 bytes of the SHA-256 of the input: of the image file, or of the report with its white space folded.
        n_tokens: length of a tokenised text, for bucketing; 0 for images.
        n_truncated: tokens of a text that did not fit into the encoder's `max_length`.
        content: equal for samples that the model is given alike, which are encoded once; by default the digest.
        size: height and width of an image file, upright; None of texts.
    """

    inputs: Any
    digest: bytes
    n_tokens: int = 0
    n_truncated: int = 0
    content: bytes = b""
    size: tuple[int, int] | None = None

    @property
    def key(self) -> bytes:
        """What tells inputs of the model apart."""
        return self.content or self.digest


@dataclass(frozen=True)
class Encoded:
    """One batch through the encoder.

    Args:
        embeddings: (b, d) float32.
        tokens: (b, l, d) float32 where they were asked for. Of an image, the cells of its token grid, row by row,
            without class or register tokens; of a text, all tokens up to the longest of the batch.
        lengths: real tokens of each text, (b,); what `tokens` holds behind them is padding. None for images.
    """

    embeddings: np.ndarray
    tokens: np.ndarray | None = None
    lengths: np.ndarray | None = None


class Origin(Protocol):
    """How an encoder was loaded, and so how another process gets the same one. Small, and made to be pickled."""

    def load(self) -> Encoder:
        """The encoder, loaded once in each process."""
        ...

    def on(self, device: str) -> Origin:
        """The same on another device."""
        ...


class Encoder(Protocol):
    """A frozen encoder. `prepare` is safe in threads; `encode` is called from several at once if `concurrent`."""

    modality: Modality
    dim: int
    token_dim: int | None
    token_grid: tuple[int, int] | None
    record: EncoderRecord
    fingerprint: str
    device: str
    concurrent: bool
    origin: Origin | None

    def prepare(self, sample: Path | str) -> Prepared:
        """Decodes and transforms an image file, or tokenises a report.

        Raises:
            InputError: this sample cannot be used.
        """
        ...

    def prepare_views(self, sample: Path | str, n: int, policy: ViewPolicy) -> list[Prepared]:
        """n views of a sample, the plain one first; an image is decoded once.

        Raises:
            InputError: this sample cannot be used.
        """
        ...

    def encode(self, batch: Sequence[Prepared], *, tokens: bool = False) -> Encoded:
        """Runs the model on b prepared samples."""
        ...


def device_of(encoder: Encoder) -> str:
    """Where an encoder runs; one of the caller's own that does not say so runs on the CPU."""
    return getattr(encoder, "device", "cpu")


def freeze(model: torch.nn.Module, *, device: str) -> torch.nn.Module:
    """Evaluation mode, no gradients, on its device: the only way a model becomes an encoder."""
    return model.eval().requires_grad_(False).to(device=device)


def computing_in(compute_dtype: str, device: str) -> contextlib.AbstractContextManager[Any]:
    """Within it, products are taken in the compute dtype; weights and what needs the range stay float32 (autocast)."""
    import torch

    if compute_dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.split(":")[0], dtype=getattr(torch, compute_dtype))


def reload(origin: Origin | None, name: str) -> tuple[Any, ...]:
    """For an encoder's `__reduce__`: pickled, it goes by how it was loaded.

    Raises:
        EncoderError: nobody knows how.
    """
    if origin is None:
        raise EncoderError(f"{name}: was not made by load_encoder, so that another process cannot load it")
    return origin.load, ()


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


# what comes of an input that a library cannot prepare; anything else is a fault of the code
OF_INPUTS = (ValueError, RuntimeError, TypeError, LookupError, OverflowError)


def digest_weights(model: torch.nn.Module) -> str:
    """SHA-256 over the contents of all weights and buffers in the order the model holds them.

    Names are left out: libraries rename parameters between versions, and order tells equal shapes apart.
    """
    import torch

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for tensor in model.state_dict().values():
            tensor = tensor.detach().cpu().contiguous()
            raw = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor.reshape(0).to(torch.uint8)
            yield f"{tensor.dtype} {list(tensor.shape)}", raw.numpy()

    return fingerprint.digest_arrays(arrays())


def plain_json(value: Any, what: str) -> Any:
    """A config as plain JSON values; what JSON cannot hold is refused, not guessed.

    Raises:
        EncoderError: it cannot be fingerprinted.
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise EncoderError(f"{what} cannot be fingerprinted ({error})") from error


def run_notes(device: str, *libraries: str) -> dict[str, str]:
    """Versions and device kind, recorded with the encoder but not keyed."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", *libraries)}
    return {**versions, "python": platform.python_version(), "device": device.split(":")[0]}
