"""Image encoders: one class for every source library, which gives it a model and a transform.

Shape notation: b batch size, c channels, H and W input size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from embedcache.data.radiograph import DecodePolicy, read_radiograph
from embedcache.device import pick_device
from embedcache.encoders.base import (
    OF_INPUTS,
    PREPROCESSING_VERSION,
    Encoded,
    EncoderOptions,
    EncoderRecord,
    Modality,
    Pooling,
    Prepared,
    digest_weights,
    freeze,
    plain_json,
    run_notes,
)
from embedcache.encoders.pooling import Output, choose_grid, choose_pooling, pool, to_grid
from embedcache.encoders.transforms import ImageTransform
from embedcache.errors import EncoderError, refusing

_REDUCED_JPEG = 2  # a reduced JPEG stays at least so many times as large as what it is resized to


@dataclass(frozen=True)
class ImageModel:
    """What a source library gives, or a factory of the user's own.

    Args:
        source: the library's prefix, such as `hf`.
        name: what the record calls it.
        module: all weights that `forward` uses and no others; they are hashed by content.
        forward: from (b, c, H, W) to what the model has.
        transform: from decoded pixels to (c, H, W).
        config: architecture and settings that determine the output beside the weights, JSON-ready.
        pooling: what its authors use, where they say.
        native_size: (H, W) that its position embeddings were trained at; None where it has none.
        layer: the block whose output `forward` gives; None: the last, with the model's final norm.
        libraries: packages whose versions are worth a note.
        notes: where it came from; not keyed.
    """

    source: str
    name: str
    module: torch.nn.Module
    forward: Callable[[torch.Tensor], Output]
    transform: ImageTransform
    config: Mapping[str, Any]
    pooling: Pooling | None = None
    native_size: tuple[int, int] | None = None
    layer: int | None = None
    libraries: Sequence[str] = ()
    notes: Mapping[str, str] = field(default_factory=dict)


class ImageEncoder:
    """A frozen image model with its transform, pooled as asked.

    Args:
        name: what the record calls it instead of the model's own name.

    Raises:
        EncoderError: the model has no such pooling or grid, or does not run at this input size.
    """

    modality: Modality = "image"

    def __init__(self, model: ImageModel, options: EncoderOptions, *, name: str | None = None) -> None:
        self._transform = model.transform
        shape = model.transform.output_shape(model.name)
        self._policy = _decode_policy(options.decode, model.transform)
        device = pick_device(options.device)
        weights = digest_weights(model.module)
        self._model = freeze(model.module, device=device, compute_dtype=options.compute_dtype)
        self._forward, self._device = model.forward, device
        self._dtype = next(self._model.parameters()).dtype
        output = self._probe(shape, model)
        self._pooling = choose_pooling(output, options.pooling or model.pooling, self.modality, model.name)
        self.token_grid = choose_grid(output.grid, options.token_grid, model.name)
        self.token_dim = None if output.tokens is None else output.tokens.shape[-1]
        self.dim = pool(output, self._pooling).shape[-1]
        size = shape[1:]
        identity = {
            "source": model.source,
            "modality": self.modality,
            "model": plain_json(dict(model.config), f"{model.name}: config"),
            "weights": weights,
            "layer": "last" if model.layer is None else model.layer,
            "pooling": self._pooling,
            "dim": self.dim,
            "input_size": list(size),
            "position_embeddings": None
            if model.native_size is None
            else {"native_size": list(model.native_size), "interpolated": tuple(model.native_size) != tuple(size)},
            "token_grid": None if self.token_grid is None else list(self.token_grid),
            "decode": plain_json(asdict(self._policy), "decode policy"),
            "transform": dict(model.transform.identity),
            "compute_dtype": options.compute_dtype,
            "preprocessing_version": PREPROCESSING_VERSION,
        }
        notes = {**run_notes(device, "pillow", *model.libraries), **model.notes}
        self.record = EncoderRecord(name or model.name, identity, notes)
        self.fingerprint = self.record.fingerprint

    def prepare(self, sample: Path | str) -> Prepared:
        """Decodes and transforms one image file."""
        radiograph = read_radiograph(Path(sample), self._policy)
        with refusing("transform", "the encoder's image transform refused it", OF_INPUTS):
            return Prepared(self._transform.apply(radiograph.pixels), radiograph.digest)

    def encode(self, batch: Sequence[Prepared], *, tokens: bool = False) -> Encoded:
        """Runs the model on b prepared images.

        Args:
            tokens: give the tokens too, pooled to `token_grid`.

        Raises:
            EncoderError: tokens were asked of a model that has none.
        """
        pixels = torch.stack([p.inputs for p in batch]).to(self._device, self._dtype)  # (b, c, H, W)
        with torch.inference_mode():
            output = self._forward(pixels)
            embeddings = pool(output, self._pooling).float().cpu().numpy()
            if not tokens:
                return Encoded(embeddings)
            if output.tokens is None or output.grid is None or self.token_grid is None:
                raise EncoderError(f"{self.record.name}: the model has no tokens, only pooled embeddings")
            cells = to_grid(output.tokens.float(), output.grid, self.token_grid)
            return Encoded(embeddings, cells.cpu().numpy())

    def _probe(self, shape: tuple[int, int, int], model: ImageModel) -> Output:
        """One black image through the model: shows what it has, and that it runs at this size."""
        try:
            with torch.inference_mode():
                return self._forward(torch.zeros((1, *shape), device=self._device, dtype=self._dtype))
        except EncoderError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
            raise EncoderError(
                f"{model.name}: the model does not run on {shape[1]} x {shape[2]} images "
                f"({type(error).__name__}: {first_line}); leave image_size out for its native size"
            ) from error


def _decode_policy(asked: DecodePolicy | None, transform: ImageTransform) -> DecodePolicy:
    policy = asked or DecodePolicy(jpeg_min_side=_REDUCED_JPEG * transform.resize_side or None)
    return replace(policy, channels=transform.channels)
