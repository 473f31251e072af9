"""Encoders from transformers: a hub name, `name@revision`, or a local directory.

Shape notation: b batch size, l tokens, d embedding width, h and w the grid of a convolutional map.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from embedcache.data.radiograph import DecodePolicy, read_radiograph
from embedcache.data.reports import clean_report
from embedcache.device import pick_device
from embedcache.encoders.base import (
    PREPROCESSING_VERSION,
    Encoded,
    EncoderRecord,
    Modality,
    Prepared,
    digest_weights,
    freeze,
    quiet_transformers,
    run_notes,
)
from embedcache.errors import EncoderError, InputError
from embedcache.fingerprint import fingerprint, input_digest

_POOLINGS = ("cls", "mean", "pooler")
# what a config says of files and versions, not of values
_CONFIG_NOT_VALUES = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")


@dataclass(frozen=True)
class _Checkpoint:
    """Where a checkpoint's files are: a directory, or a repository and revision on the hub."""

    location: str
    revision: str | None
    name: str

    @classmethod
    def parse(cls, source: str) -> _Checkpoint:
        local = Path(source).expanduser()
        if local.is_dir():
            return cls(str(local), None, local.resolve().name)
        if source.startswith((".", "/", "~")):
            raise EncoderError(f"hf:{source}: no such directory; give a local directory or a hub name")
        location, _, revision = source.partition("@")
        return cls(location, revision or None, source)

    @contextlib.contextmanager
    def loading(self, what: str) -> Iterator[dict[str, Any]]:
        """Arguments for `from_pretrained`; its errors become ours, with the command to run."""
        try:
            yield {"revision": self.revision} if self.revision else {}
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            revision = f" --revision {self.revision}" if self.revision else ""
            remedy = (
                f"check that the directory holds a whole {what} in the transformers format"
                if Path(self.location).is_dir()
                else f"fetch it once with 'hf download {self.location}{revision}' (gated: 'hf auth login' first)"
            )
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
            raise EncoderError(
                f"hf:{self.name}: cannot load its {what} ({type(error).__name__}: {first_line}); {remedy}"
            ) from error


class HfImageEncoder:
    """An image model of transformers with its own image processor."""

    modality: Modality = "image"

    def __init__(self, source: str, *, name: str | None, pooling: str | None, device: str, compute_dtype: str) -> None:
        from transformers import AutoImageProcessor

        checkpoint = _Checkpoint.parse(source)
        with checkpoint.loading("preprocessor_config.json") as where:
            self._processor = AutoImageProcessor.from_pretrained(checkpoint.location, **where)
        self._policy = DecodePolicy()
        self._device = pick_device(device)
        model = _load_model(checkpoint, pooling)
        self._pooling = _image_pooling(model, pooling, checkpoint)
        self.dim = _width(model.config, checkpoint)
        identity = {
            **_identity(model, self.modality, self._pooling, compute_dtype, self.dim),
            "decode": asdict(self._policy),
            "transform": _jsonable(self._processor.to_dict(), f"{checkpoint.name}: image processor"),
        }
        self.record = EncoderRecord(name or f"hf:{checkpoint.name}", identity, run_notes(self._device))
        self.fingerprint = self.record.fingerprint
        self._model = freeze(model, device=self._device, compute_dtype=compute_dtype)
        self._dtype = next(self._model.parameters()).dtype

    def prepare(self, sample: Path | str) -> Prepared:
        """Decodes and transforms one image file."""
        radiograph = read_radiograph(Path(sample), self._policy)
        return Prepared(self._transform(radiograph.pixels), radiograph.digest)

    def encode(self, batch: Sequence[Prepared]) -> Encoded:
        """Runs the model on b prepared images."""
        pixels = torch.stack([p.inputs for p in batch]).to(self._device, self._dtype)
        with torch.inference_mode():
            output = self._model(pixel_values=pixels)
            return _encoded(_pool(output, self._pooling, mask=None))

    def _transform(self, pixels: np.ndarray) -> torch.Tensor:
        channels_first = torch.from_numpy(pixels).permute(2, 0, 1)
        with _refusing("transform", "the encoder's image processor refused it"):
            return self._processor(channels_first, return_tensors="pt")["pixel_values"][0]


class HfTextEncoder:
    """A text model of transformers with its own tokenizer."""

    modality: Modality = "text"

    def __init__(
        self,
        source: str,
        *,
        name: str | None,
        pooling: str | None,
        max_length: int | None,
        device: str,
        compute_dtype: str,
    ) -> None:
        from transformers import AutoTokenizer

        checkpoint = _Checkpoint.parse(source)
        with checkpoint.loading("tokenizer") as where:
            self._tokenizer = AutoTokenizer.from_pretrained(checkpoint.location, **where)
        self._tokenizer.padding_side = "right"  # else a row's values would depend on its neighbours' lengths
        self._tokenizing = threading.Lock()  # a fast tokenizer keeps its truncation as state
        self._device = pick_device(device)
        self._pooling = pooling or _sentence_pooling(checkpoint) or "mean"
        model = _load_model(checkpoint, self._pooling)
        self.dim = _width(model.config, checkpoint)
        self._max_length = _max_length(self._tokenizer, model, max_length, checkpoint)
        identity = {
            **_identity(model, self.modality, self._pooling, compute_dtype, self.dim),
            "tokenizer": _tokenizer_identity(self._tokenizer, checkpoint),
            "max_length": self._max_length,
            "truncation_side": self._tokenizer.truncation_side,
        }
        self.record = EncoderRecord(name or f"hf:{checkpoint.name}", identity, run_notes(self._device))
        self.fingerprint = self.record.fingerprint
        self._model = freeze(model, device=self._device, compute_dtype=compute_dtype)

    def prepare(self, sample: Path | str) -> Prepared:
        """Cleans and tokenises one report."""
        text = clean_report(str(sample))
        with self._tokenizing, _refusing("tokenise", "the encoder's tokenizer refused it"):
            inputs = dict(self._tokenizer(text, truncation=True, max_length=self._max_length))
        return Prepared(inputs, input_digest(text.encode("utf-8")), len(inputs["input_ids"]))

    def encode(self, batch: Sequence[Prepared]) -> Encoded:
        """Runs the model on b tokenised reports, padded to the longest of them."""
        padded = self._tokenizer.pad([p.inputs for p in batch], return_tensors="pt").to(self._device)
        with torch.inference_mode():
            output = self._model(**padded)
            return _encoded(_pool(output, self._pooling, mask=padded["attention_mask"]))


def guess_modality(source: str) -> Modality:
    """Image or text, by whether the model's config speaks of channels or of a vocabulary.

    Raises:
        EncoderError: both or neither.
    """
    from transformers import AutoConfig

    checkpoint = _Checkpoint.parse(source)
    with checkpoint.loading("config.json") as where:
        config = AutoConfig.from_pretrained(checkpoint.location, **where)
    is_image, is_text = hasattr(config, "num_channels"), hasattr(config, "vocab_size")
    if is_image == is_text or hasattr(config, "vision_config"):
        raise EncoderError(
            f"hf:{checkpoint.name}: a {config.model_type} model, which this version does not load as one encoder; "
            "give a checkpoint of an image model or of a text model"
        )
    return "image" if is_image else "text"


@contextlib.contextmanager
def _refusing(reason: str, message: str) -> Iterator[None]:
    """What a library cannot prepare costs its own row; the message holds none of the input."""
    try:
        yield
    except (ValueError, RuntimeError, TypeError) as error:
        raise InputError(reason, f"{message} ({type(error).__name__})") from error


def _load_model(checkpoint: _Checkpoint, pooling: str | None) -> Any:
    """The model with every weight from the checkpoint; a missing one is an error, never a random layer."""
    from transformers import AutoModel

    if pooling not in (None, *_POOLINGS):
        raise EncoderError(f"hf:{checkpoint.name}: pooling {pooling!r}, expected one of {', '.join(_POOLINGS)}")
    with quiet_transformers(), checkpoint.loading("model") as where:
        model, info = AutoModel.from_pretrained(
            checkpoint.location,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            dtype=torch.float32,
            **where,
        )
    missing = sorted({*info["missing_keys"], *info["mismatched_keys"]})
    if pooling != "pooler":
        missing = [key for key in missing if not key.startswith("pooler.")]
        if hasattr(model, "pooler") and any(True for _ in model.pooler.parameters()):
            model.pooler = None  # not used, and often random
    if missing:
        only_pooler = all(key.startswith("pooler.") for key in missing)
        raise EncoderError(
            f"hf:{checkpoint.name}: the checkpoint lacks {', '.join(missing[:4])}"
            f"{' and more' if len(missing) > 4 else ''}, which would be random; "
            + ("choose pooling cls or mean" if only_pooler else "use a checkpoint of the whole model")
        )
    return model


def _identity(model: Any, modality: str, pooling: str, compute_dtype: str, dim: int) -> dict[str, Any]:
    config = {key: value for key, value in model.config.to_dict().items() if key not in _CONFIG_NOT_VALUES}
    return {
        "source": "hf",
        "modality": modality,
        "model_class": type(model).__name__,
        "config": _jsonable(config, "model config"),
        "weights": digest_weights(model),
        "layer": "last",
        "pooling": pooling,
        "dim": dim,
        "compute_dtype": compute_dtype,
        "preprocessing_version": PREPROCESSING_VERSION,
    }


def _pool(output: Any, pooling: str, mask: torch.Tensor | None) -> torch.Tensor:
    """Model output to embeddings (b, d); `mask` (b, l) marks real tokens."""
    if pooling == "pooler":
        return output.pooler_output.flatten(1)
    tokens = output.last_hidden_state
    if tokens.ndim == 4:  # a convolutional map (b, d, h, w)
        tokens = tokens.flatten(2).transpose(1, 2)
    if pooling == "cls":
        return tokens[:, 0]
    if mask is None:
        return tokens.mean(dim=1)
    weights = mask.unsqueeze(-1).to(tokens.dtype)  # (b, l, 1)
    return (tokens * weights).sum(dim=1) / weights.sum(dim=1)


def _encoded(embeddings: torch.Tensor) -> Encoded:
    return Encoded(embeddings.float().cpu().numpy())


def _width(config: Any, checkpoint: _Checkpoint) -> int:
    for width in (
        getattr(config, "hidden_size", None),
        (getattr(config, "hidden_sizes", None) or [None])[-1],
    ):
        if isinstance(width, int):
            return width
    raise EncoderError(f"hf:{checkpoint.name}: its config names no hidden size, so its width is unknown")


def _image_pooling(model: Any, asked: str | None, checkpoint: _Checkpoint) -> str:
    """What was asked for, else `cls` where the model has such a token and `mean` where not."""
    names = (name.split(".")[-1] for name, _ in model.named_parameters())
    has_class_token = any(name in ("cls_token", "class_embedding") for name in names)
    if asked == "cls" and not has_class_token:
        raise EncoderError(f"hf:{checkpoint.name}: the model has no class token; choose pooling mean or pooler")
    return asked or ("cls" if has_class_token else "mean")


def _max_length(tokenizer: Any, model: Any, asked: int | None, checkpoint: _Checkpoint) -> int:
    positions = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(positions, "padding_idx", None)  # RoBERTa counts positions from behind its padding index
    taken = padding + 1 if padding is not None else 0
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 10**9) - taken)
    wanted = asked or _sentence_setting(checkpoint, "sentence_bert_config.json").get("max_seq_length") or limit
    if not 2 < wanted <= limit:
        raise EncoderError(f"hf:{checkpoint.name}: max_length {wanted}, the model takes 3 to {limit} tokens")
    return int(wanted)


def _sentence_pooling(checkpoint: _Checkpoint) -> str | None:
    """The pooling that a sentence-transformers directory names, if it is one."""
    setting = _sentence_setting(checkpoint, "1_Pooling/config.json")
    named = [
        pooling
        for pooling, key in (("cls", "pooling_mode_cls_token"), ("mean", "pooling_mode_mean_tokens"))
        if setting.get(key)
    ]
    return named[0] if len(named) == 1 else None


def _sentence_setting(checkpoint: _Checkpoint, file: str) -> Mapping[str, Any]:
    from transformers.utils import cached_file

    path = cached_file(
        checkpoint.location,
        file,
        revision=checkpoint.revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return json.loads(Path(path).read_text("utf-8")) if path else {}


def _tokenizer_identity(tokenizer: Any, checkpoint: _Checkpoint) -> dict[str, Any]:
    if not tokenizer.is_fast:
        raise EncoderError(
            f"hf:{checkpoint.name}: its tokenizer has no tokenizer.json, so its content cannot be fingerprinted; "
            "save it once with AutoTokenizer.from_pretrained(...).save_pretrained(...) as a fast tokenizer"
        )
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content.pop("truncation", None)  # state, set at every call
    content.pop("padding", None)
    return {"content": fingerprint(content), "padding_side": tokenizer.padding_side}


def _jsonable(value: dict[str, Any], what: str) -> dict[str, Any]:
    """A config as plain JSON values; what JSON cannot hold is refused, not guessed."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise EncoderError(f"{what} cannot be fingerprinted ({error})") from error
