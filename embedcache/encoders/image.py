"""Image encoders: one class for every source library, which gives it a model and a transform.

Shape notation: b batch size, c channels, H and W input size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from embedcache.data.augment import augmented
from embedcache.data.radiograph import DecodePolicy, read_radiograph
from embedcache.data.views import ViewPolicy
from embedcache.device import pick_device, stacked
from embedcache.encoders.base import (
    OF_INPUTS,
    Encoded,
    EncoderOptions,
    Modality,
    Model,
    Origin,
    Prepared,
    computing_in,
    freeze,
    reload,
)
from embedcache.encoders.pooling import Output, choose_grid, choose_pooling, pool, to_grid
from embedcache.encoders.transforms import ImageTransform
from embedcache.errors import EncoderError, refusing

_REDUCED_JPEG = 2  # a reduced JPEG stays at least so many times as large as what it is resized to


@dataclass(frozen=True, kw_only=True)
class ImageModel(Model):
    """An image model as a source library gives it, or a factory of the user's own.

    Args:
        forward: from (b, c, H, W) to what the model has.
        transform: from decoded pixels to (c, H, W).
        native_size: (H, W) that its position embeddings were trained at; None where it has none.
    """

    forward: Callable[[torch.Tensor], Output]
    transform: ImageTransform
    native_size: tuple[int, int] | None = None


class ImageEncoder:
    """A frozen image model with its transform, pooled as asked.

    Args:
        name: what the record calls it instead of the model's own name.

    Raises:
        EncoderError: the model has no such pooling or grid, or does not run at this input size.

    Attributes:
        input_shape: (c, H, W) that the transform gives.
    """

    modality: Modality = "image"
    origin: Origin | None = None

    def __init__(self, model: ImageModel, options: EncoderOptions, *, name: str | None = None) -> None:
        self._transform, self._forward = model.transform, model.compiled(options, dynamic=False)
        self._policy = _decode_policy(options.decode, model.transform)
        self.device, self._compute_dtype = pick_device(options.device), options.compute_dtype
        self.concurrent = model.concurrent and not options.compile
        self.even_batches = options.compile  # a model is compiled for each size of a batch
        self.input_shape = shape = model.transform.output_shape(model.name)
        output = self._first_look(model, shape)
        self._pooling = choose_pooling(output, options.pooling or model.pooling, self.modality, model.name)
        self.token_grid = choose_grid(output.grid, options.token_grid, model.name)
        self.token_dim = None if output.tokens is None else output.tokens.shape[-1]
        self.dim = pool(output, self._pooling).shape[-1]
        native, size = model.native_size, shape[1:]
        preparation = {
            "modality": self.modality,
            "pooling": self._pooling,
            "dim": self.dim,
            "input_size": size,
            "position_embeddings": native and {"native_size": native, "interpolated": native != size},
            "token_grid": self.token_grid,
            "decode": asdict(self._policy),
            "transform": model.transform.identity,
        }
        self.record = model.record(preparation, options, name=name, device=self.device)
        self.fingerprint = self.record.fingerprint
        self._module = freeze(model.module, device=self.device)

    def __reduce__(self) -> tuple[Any, ...]:
        return reload(self.origin, self.record.name)

    def prepare(self, sample: Path | str | bytes) -> Prepared:
        """Decodes and transforms one image file, or the bytes of one."""
        return self.prepare_views(sample, 1, ViewPolicy())[0]

    def prepare_views(self, sample: Path | str | bytes, n: int, policy: ViewPolicy) -> list[Prepared]:
        """Decodes one image file once, and transforms it and n - 1 augmentations of it."""
        radiograph = read_radiograph(sample if isinstance(sample, bytes) else Path(sample), self._policy)
        digest, views = radiograph.digest, [radiograph.pixels]
        views += [augmented(radiograph.pixels, digest, view, policy) for view in range(1, n)]
        with refusing("transform", "the encoder's image transform refused it", OF_INPUTS):
            inputs = [self._transform.apply(pixels) for pixels in views]
        contents = [digest + (view.to_bytes(2, "little") if view else b"") for view in range(n)]
        size = radiograph.size
        return [Prepared(i, digest, content=content, size=size) for i, content in zip(inputs, contents, strict=True)]

    def encode(self, batch: Sequence[Prepared], *, tokens: bool = False) -> Encoded:
        """Runs the model on b prepared images.

        Args:
            tokens: give the tokens too, pooled to `token_grid`.

        Raises:
            EncoderError: tokens were asked of a model that has none.
        """
        if tokens and self.token_grid is None:
            raise EncoderError(f"{self.record.name}: the model has no tokens, only pooled embeddings")
        with torch.inference_mode(), computing_in(self._compute_dtype, self.device):
            embeddings, cells = self._outputs(stacked([p.inputs for p in batch], self.device), tokens=tokens)
            return Encoded(embeddings.cpu().numpy(), None if cells is None else cells.cpu().numpy())

    def as_module(self, *, tokens: bool = False) -> torch.nn.Module:
        """The frozen model as one module, for export: prepared pixels (b, c, H, W) to what `encode` gives.

        Its forward gives embeddings, (b, d), and tokens, (b, l, d), or None where they are not asked for.
        """
        return _ImageGraph(self._module, lambda pixels: self._outputs(pixels, tokens=tokens))

    def _outputs(self, pixels: torch.Tensor, *, tokens: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings (b, d) and the tokens of the grid (b, l, d), both float32, of pixels (b, c, H, W)."""
        output = self._forward(pixels)
        embeddings = pool(output, self._pooling).float()
        if not tokens or output.tokens is None or output.grid is None or self.token_grid is None:
            return embeddings, None
        return embeddings, to_grid(output.tokens.float(), output.grid, self.token_grid)

    def _first_look(self, model: ImageModel, shape: tuple[int, int, int]) -> Output:
        """One black image through the model: shows what it has, and that it runs at this size."""
        try:
            with torch.inference_mode():
                freeze(model.module, device="cpu")
                return model.forward(torch.zeros((1, *shape)))
        except EncoderError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
            raise EncoderError(
                f"{model.name}: the model does not run on {shape[1]} x {shape[2]} images "
                f"({type(error).__name__}: {first_line}); leave image_size out for its native size"
            ) from error


class _ImageGraph(torch.nn.Module):
    """A model's weights, and what is computed with them."""

    def __init__(self, model: torch.nn.Module, outputs: Callable[[torch.Tensor], tuple[Any, Any]]) -> None:
        super().__init__()
        self.model, self._outputs = model, outputs

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self._outputs(pixels)


def _decode_policy(asked: DecodePolicy | None, transform: ImageTransform) -> DecodePolicy:
    policy = asked or DecodePolicy(jpeg_min_side=_REDUCED_JPEG * transform.resize_side or None)
    return replace(policy, channels=transform.channels)
