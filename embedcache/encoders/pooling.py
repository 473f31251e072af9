"""From what a model gives to one vector for each sample, explicitly and only from parts that the model has.

Shape notation: b batch size, l tokens, d width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from embedcache.encoders.base import POOLINGS, Modality, Pooling
from embedcache.errors import EncoderError

_PREFERRED: dict[Modality, tuple[Pooling, ...]] = {  # where neither caller nor authors say
    "image": ("projection", "cls", "pooler", "mean"),
    "text": ("projection", "mean", "pooler", "cls"),
}


@dataclass(frozen=True)
class Output:
    """What a model gives for a batch, as far as it has it.

    Args:
        tokens: (b, l, d). Of images the cells of the grid, row by row, without class or register tokens; of texts all
            tokens, padding included.
        grid: rows and columns of the cells of images.
        cls: the class token, (b, d).
        pooler: what the model's own pooling gives, (b, p).
        projection: the pooled sample in a space that images and texts share, (b, s).
    """

    tokens: torch.Tensor | None = None
    grid: tuple[int, int] | None = None
    cls: torch.Tensor | None = None
    pooler: torch.Tensor | None = None
    projection: torch.Tensor | None = None

    def parts(self, pooling: Pooling) -> list[torch.Tensor | None]:
        """What the pooling puts together; None where the model has no such part."""
        if pooling == "cls_mean":
            return [self.cls, self.tokens]
        if pooling == "first":
            return [None if self.tokens is None else self.tokens[:, 0]]
        return [self.tokens if pooling == "mean" else getattr(self, pooling)]


def pool(output: Output, pooling: Pooling, mask: torch.Tensor | None = None) -> torch.Tensor:
    """One vector for each sample: (b, d), or (b, 2 d) for `cls_mean`, the class token beside the mean.

    Args:
        mask: real tokens of texts, (b, l); means are over them alone, special tokens included.
    """
    vectors = []
    for part in output.parts(pooling):
        if part is None:
            raise EncoderError(f"no {pooling} in what the model gives")
        vectors.append(_mean(part, mask) if part is output.tokens else part)
    return torch.cat([vector.flatten(1) for vector in vectors], dim=1)


def choose_pooling(output: Output, asked: Pooling | None, modality: Modality, name: str) -> Pooling:
    """What was asked for, if the model has the parts for it; else what its kind is mostly used by.

    Raises:
        EncoderError: the model lacks what was asked for; names the poolings that it has.
    """
    offers = [pooling for pooling in POOLINGS if all(part is not None for part in output.parts(pooling))]
    if asked is None:
        return next(pooling for pooling in _PREFERRED[modality] if pooling in offers)
    if asked not in offers:
        lacks = {"cls": "class token", "cls_mean": "class token", "mean": "tokens"}.get(asked, asked)
        raise EncoderError(f"{name}: the model has no {lacks}; choose pooling {' or '.join(offers)}")
    return asked


def block_index(layer: int, n_blocks: int, name: str) -> int:
    """The index from 0 of a block that is counted from 1, or from -1 backwards.

    Raises:
        EncoderError: no such block.
    """
    if not (1 <= layer <= n_blocks or -n_blocks <= layer <= -1):
        raise EncoderError(f"{name}: layer {layer}, the model has blocks 1 to {n_blocks} (or -1 to -{n_blocks})")
    return layer - 1 if layer > 0 else n_blocks + layer


def square_grid(n_cells: int, height: int, width: int, name: str) -> tuple[int, int]:
    """Rows and columns of n cells that lie over an image of this height and width.

    Raises:
        EncoderError: no such grid.
    """
    rows = round((n_cells * height / width) ** 0.5)
    if rows < 1 or n_cells % rows or rows * width != (n_cells // rows) * height:
        raise EncoderError(f"{name}: {n_cells} tokens do not make a grid over {height} x {width} pixels")
    return rows, n_cells // rows


def choose_grid(
    native: tuple[int, int] | None, asked: int | tuple[int, int] | None, name: str
) -> tuple[int, int] | None:
    """The grid that tokens are pooled to; by default the model's own.

    Raises:
        EncoderError: finer than the model's, or the model has none.
    """
    if asked is None:
        return native
    wanted = (asked, asked) if isinstance(asked, int) else (int(asked[0]), int(asked[1]))
    if native is None or not all(1 <= w <= n for w, n in zip(wanted, native, strict=True)):
        has = "no token grid" if native is None else f"a grid of {native[0]} x {native[1]}"
        raise EncoderError(f"{name}: token_grid {wanted[0]} x {wanted[1]}, the model has {has}")
    return wanted


def to_grid(tokens: torch.Tensor, native: tuple[int, int], wanted: tuple[int, int]) -> torch.Tensor:
    """Means over the cells of a coarser grid: (b, l, d) to (b, wanted cells, d)."""
    if native == wanted:
        return tokens
    cells = tokens.transpose(1, 2).unflatten(2, native)  # (b, d, rows, columns)
    return torch.nn.functional.adaptive_avg_pool2d(cells, wanted).flatten(2).transpose(1, 2)


def _mean(tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return tokens.mean(dim=1)
    weights = mask.unsqueeze(-1).to(tokens.dtype)  # (b, l, 1)
    return (tokens * weights).sum(dim=1) / weights.sum(dim=1)
