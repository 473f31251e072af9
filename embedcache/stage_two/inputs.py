"""Normalisation of cached embeddings before an Adaptor or a head sees them, fitted on training rows.

Shape notation: n rows, d embedding width.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

_CONSTANT = 1e-6  # a dimension whose deviation is below this share of its mean is left on its own scale
_SHRINKAGE = 1e-5  # of the mean variance, added to every variance: directions without any stay finite
_LEAST_VARIANCE = 1e-12
_LEAST_DEVIATION = 1e-6  # of a head's feature, against its mean or 1


class InputNorm(nn.Module):
    """Brings embeddings (..., d) to a common scale; what it learnt is kept with the Adaptor's weights.

    `none` as they are. `l2` divides by the norm. `zscore` gives each dimension mean 0 and deviation 1. `whiten` also
    decorrelates the dimensions and turns them as little as that takes (zero-phase component analysis). All in float32,
    also under autocast.

    Args:
        kind: as above.
        dim: d.
    """

    mean: Tensor
    scale: Tensor
    matrix: Tensor

    def __init__(self, kind: str, dim: int) -> None:
        super().__init__()
        self.kind = kind
        if kind in ("zscore", "whiten"):
            self.register_buffer("mean", torch.zeros(dim))
        if kind == "zscore":
            self.register_buffer("scale", torch.ones(dim))
        if kind == "whiten":
            self.register_buffer("matrix", torch.eye(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) to (..., d)."""
        if self.kind == "l2":
            return unit(x)
        if self.kind == "zscore":
            return (x - self.mean) * self.scale
        if self.kind == "whiten":
            with torch.autocast(x.device.type, enabled=False):
                return (x - self.mean) @ self.matrix
        return x

    def fit(self, parts: Iterable[Tensor]) -> None:
        """Learns mean, deviation or covariance in float64.

        Args:
            parts: the training rows in pieces, each (..., d).
        """
        if self.kind not in ("zscore", "whiten"):
            return
        n, total, products, shift = 0, None, None, None
        for part in parts:
            x = part.detach().reshape(-1, part.shape[-1]).double()
            shift = x.mean(0) if shift is None else shift  # near the mean, so that squares do not cancel
            x = x - shift
            product = (x * x).sum(0) if self.kind == "zscore" else x.T @ x
            n += len(x)
            total = x.sum(0) if total is None else total + x.sum(0)
            products = product if products is None else products + product
        if n == 0 or total is None or products is None or shift is None:
            raise ValueError("no rows to fit a normalisation on")
        mean = total / n
        self.mean.copy_(mean + shift)
        if self.kind == "zscore":
            deviation = (products / n - mean * mean).clamp_min(0).sqrt()
            constant = deviation <= _CONSTANT * self.mean.abs().double()
            self.scale.copy_(torch.where(constant, 1.0, 1 / deviation))
        else:
            variance, axes = torch.linalg.eigh(products / n - torch.outer(mean, mean))
            least = _SHRINKAGE * variance.clamp_min(0).mean() + _LEAST_VARIANCE
            self.matrix.copy_(axes @ torch.diag((variance.clamp_min(0) + least).rsqrt()) @ axes.T)


def standardised(features: Tensor, train: np.ndarray) -> Tensor:
    """Mean 0 and deviation 1 over training rows; what does not vary there tells nothing elsewhere, and becomes 0.

    Args:
        features: (n, d).
        train: row numbers.
    """
    mean, deviation = scale_of(features, train)
    return (features - mean) / deviation


def scale_of(features: Tensor, train: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each feature over training rows, (d,) both; infinite where it does not vary."""
    deviation, mean = torch.std_mean(features[torch.from_numpy(train).to(features.device)], dim=0)
    return mean, torch.where(deviation > _LEAST_DEVIATION * mean.abs().clamp_min(1.0), deviation, torch.inf)


def unit(x: Tensor) -> Tensor:
    """Vectors divided by their L2 norm, (..., d), float32 also under autocast."""
    x = x.float()
    return x / x.norm(dim=-1, keepdim=True)
