"""Dropout: cheap masks on a CPU, and a generator of one's own for each of many models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_DRAWS = 2**16  # values that the 16 random bits of an element of a CPU's mask can have


def dropped(x: Tensor, p: float) -> Tensor:
    """Dropout by torch's own generator."""
    if not p or x.device.type != "cpu":
        return F.dropout(x, p)
    return x * dropout_mask(x.shape, p, x)


def dropout_mask(
    shape: torch.Size | tuple[int, ...], p: float, like: Tensor, *, generator: torch.Generator | None = None
) -> Tensor:
    """What dropout multiplies by: 0 with probability p, else 1 / (1 - p).

    On a CPU it takes 16 random bits an element, in which `p` is rounded, and a third of the time.

    Args:
        like: a tensor of the wanted type and device.
        generator: of that device; torch's own by default.
    """
    if like.device.type != "cpu":
        mask = torch.empty(shape, dtype=like.dtype, device=like.device)
        return mask.bernoulli_(1 - p, generator=generator).div_(1 - p)
    n, least = torch.Size(shape).numel(), round(p * _DRAWS)
    drawn = torch.randint(-(2**63), 2**63 - 1, (-(-n // 4),), dtype=torch.int64, generator=generator)
    kept = drawn.view(torch.int16)[:n].view(shape) >= least - _DRAWS // 2
    return kept.to(like.dtype).mul_(_DRAWS / (_DRAWS - least))
