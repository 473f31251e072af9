"""Trainable heads on fixed features, many side by side: one for each seed, label fraction and fold.

Shape notation: m heads, b rows of a batch, n rows, d feature width, h hidden width, c outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from embedcache.settings import STRICT, check
from embedcache.stage_two.dropout import dropout_mask

TRAINED = ("linear", "mlp")
_HIDDEN = 512
_EVALUATED_AT_ONCE = 4096  # rows


@dataclass(frozen=True)
class HeadConfig:
    """How a trained head is fitted; the same for every fraction, encoder and control.

    AdamW with cosine warm restarts, the first period 0.4 of the steps, as in the paper.

    Args:
        epochs: passes over the labels.
        min_steps: so many steps at least, so that few labels are not also few steps.
        batch_size: the last batch of an epoch may be smaller.
        reshuffle: rows are shuffled anew for each epoch; else once, and batches stay the same.
        restarts_by: whether the schedule moves on with each step; or with each `epoch` while its period is counted in
            steps, as the published code has it, whose learning rate so hardly falls.
        patience: a head stops after so many epochs without a better validation loss; None trains to the end. Where
            there is validation, the weights of the best epoch are kept either way.
    """

    epochs: Annotated[int, Ge(1)] = 50
    min_steps: Annotated[int, Ge(0)] = 200
    batch_size: Annotated[int, Ge(2)] = 128
    lr: Annotated[float, Gt(0)] = 1e-3
    weight_decay: Annotated[float, Ge(0)] = 0.05
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.1
    reshuffle: bool = True
    restarts_by: Literal["step", "epoch"] = "step"
    patience: Annotated[int, Ge(1)] | None = None

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check(self)

    def n_batches(self, n_rows: int) -> int:
        """Batches of an epoch; a last one of a single row, which has no deviation, sits out."""
        if n_rows < 2:
            raise ValueError(f"{n_rows} training rows, expected at least 2")
        return n_rows // self.batch_size + (n_rows % self.batch_size > 1)

    def epochs_for(self, n_rows: int) -> int:
        """Passes over a set of so many rows."""
        return self.n_epochs(self.n_batches(n_rows))

    def n_epochs(self, n_batches: int) -> int:
        """Passes over a set of so many batches."""
        return max(self.epochs, -(-self.min_steps // n_batches))

    def looks(self, n_batches: int) -> list[int]:
        """Epochs after which validation looks: each; some, where `min_steps` asks for more than `epochs` of them."""
        n = self.n_epochs(n_batches)
        return sorted({*range(-(-n // self.epochs), n, -(-n // self.epochs)), n})

    def lr_at(self, step: int, n_batches: int) -> float:
        """The learning rate of a step, from 0."""
        period = max(int(0.4 * n_batches * self.n_epochs(n_batches)), 1)
        place = step if self.restarts_by == "step" else step // n_batches
        floor = 1e-8
        return floor + (self.lr - floor) * (1 + math.cos(math.pi * (place % period) / period)) / 2


class HeadStack(nn.Module):
    """Heads of one kind, each with weights and randomness of its own.

    `linear`: dropout and a linear map. `mlp`: dropout, a linear map to 512 without bias, BatchNorm, ReLU, dropout, a
    linear map. Source: the heads of the paper's code.

    Args:
        seeds: of each head; one comes out the same whichever stand beside it, up to the order of sums.
    """

    mean: Tensor
    variance: Tensor

    def __init__(
        self, kind: str, dim: int, n_outputs: int, *, seeds: Sequence[int], dropout: float, device: str
    ) -> None:
        super().__init__()
        if kind not in TRAINED:
            raise ValueError(f"head {kind!r}, expected one of {', '.join(TRAINED)}")
        m, self.dropout, self.is_mlp = len(seeds), dropout, kind == "mlp"
        drawn = [torch.Generator().manual_seed(seed) for seed in seeds]
        width = _HIDDEN if self.is_mlp else dim
        if self.is_mlp:
            self.hidden = nn.Parameter(_initial(drawn, dim, dim, _HIDDEN))  # (m, d, h)
            self.scale = nn.Parameter(torch.ones(m, 1, _HIDDEN))
            self.shift = nn.Parameter(torch.zeros(m, 1, _HIDDEN))
            self.register_buffer("mean", torch.zeros(m, 1, _HIDDEN))
            self.register_buffer("variance", torch.ones(m, 1, _HIDDEN))
        self.out = nn.Parameter(_initial(drawn, width, width, n_outputs))  # (m, h, c)
        self.bias = nn.Parameter(_initial(drawn, width, 1, n_outputs))
        self.to(device)
        # one generator for each head on the device, for dropout
        self._generators = [
            torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=g))) for g in drawn
        ]

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """Features (m, b, d), or (b, d) for all heads alike, to logits (m, b, c).

        Args:
            present: in training, which rows are no padding, (m, b, 1) of 1 and 0; None for all.
        """
        x = self._drop(x, present)
        if self.is_mlp:
            x = self._drop(torch.relu(self._normalised(torch.matmul(x, self.hidden), present)), present)
        return torch.matmul(x, self.out) + self.bias

    @torch.inference_mode()
    def evaluated(self, x: Tensor) -> Tensor:
        """Logits of rows (n, d) that all heads share, (m, n, c)."""
        self.eval()
        return torch.cat([self(part) for part in x.split(_EVALUATED_AT_ONCE)], dim=1)

    def _normalised(self, x: Tensor, present: Tensor | None) -> Tensor:
        """BatchNorm for each head by itself, over the rows that are there."""
        if not self.training:
            return (x - self.mean) * (self.scale * (self.variance + 1e-5).rsqrt()) + self.shift
        if present is None:
            n: Tensor | int = x.shape[1]
            variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
        else:
            n = present.sum(1, keepdim=True)
            mean = (x * present).sum(1, keepdim=True) / n
            variance = ((x - mean).square() * present).sum(1, keepdim=True) / n
        with torch.no_grad():
            self.mean.lerp_(mean, 0.1)
            self.variance.lerp_(variance * (n / (n - 1)), 0.1)
        return (x - mean) * (self.scale * (variance + 1e-5).rsqrt()) + self.shift

    def _drop(self, x: Tensor, present: Tensor | None) -> Tensor:
        if not self.training or not self.dropout:
            return x
        b, width = x.shape[-2:]
        n_rows = [b] * len(self._generators) if present is None else present.sum((1, 2)).int().tolist()
        masks = [  # as many as a head has rows, so that its later ones do not depend on its neighbours' rows
            dropout_mask((n, width), self.dropout, x, generator=g)
            for n, g in zip(n_rows, self._generators, strict=True)
        ]
        return x * nn.utils.rnn.pad_sequence(masks, batch_first=True)


def linear_state(weights: np.ndarray, bias: np.ndarray) -> dict[str, Tensor]:
    """The state of a stack of one `linear` head.

    Args:
        weights: (d, c).
        bias: (c,).
    """
    return {"out": torch.from_numpy(weights[None]).float(), "bias": torch.from_numpy(bias[None, None]).float()}


def _initial(drawn: Sequence[torch.Generator], fan_in: int, rows: int, columns: int) -> Tensor:
    """As `nn.Linear` starts: uniform within 1 / sqrt(fan_in), (m, rows, columns)."""
    bound = fan_in**-0.5
    return torch.stack([torch.empty(rows, columns).uniform_(-bound, bound, generator=g) for g in drawn])
