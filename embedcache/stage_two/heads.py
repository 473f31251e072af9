"""Task heads on fixed features, and how they are fitted.

Shape notation: n rows, d feature width, c classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from embedcache.errors import TrainingError
from embedcache.settings import STRICT, check

HEADS = ("linear", "mlp")
_HIDDEN = 512


@dataclass(frozen=True)
class HeadConfig:
    """How a head is fitted; the same for every fraction, encoder and control.

    Source: the paper's heads and AdamW with cosine warm restarts, the first period 0.4 of the steps. The number of
    steps is fixed instead of the number of epochs, so that few labels are not also few steps.
    """

    steps: Annotated[int, Ge(1)] = 200
    batch_size: Annotated[int, Ge(2)] = 128
    lr: Annotated[float, Gt(0)] = 1e-3
    weight_decay: Annotated[float, Ge(0)] = 0.05
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.1

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check(self)


def build_head(kind: str, dim: int, n_classes: int, *, dropout: float = 0.1) -> nn.Module:
    """A head from features (n, d) to logits (n, c).

    Args:
        kind: `linear`, or `mlp` with one hidden layer of 512, BatchNorm and dropout.
    """
    if kind == "linear":
        return nn.Linear(dim, n_classes)
    if kind == "mlp":
        return nn.Sequential(
            nn.Linear(dim, _HIDDEN),
            nn.BatchNorm1d(_HIDDEN),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(_HIDDEN, n_classes),
        )
    raise ValueError(f"head {kind!r}, expected one of {', '.join(HEADS)}")


def fit_predict(
    kind: str,
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    *,
    n_classes: int,
    config: HeadConfig,
    seed: int,
) -> Tensor:
    """Fits a head and gives class probabilities of other rows.

    Args:
        train_x: standardised features, (n_train, d).
        train_y: classes, (n_train,) int64.
        test_x: (n_test, d).

    Returns:
        (n_test, c) float32 on the CPU.

    Raises:
        TrainingError: probabilities that are not finite.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = build_head(kind, train_x.shape[1], n_classes, dropout=config.dropout).to(train_x.device).train()
        optimizer = torch.optim.AdamW(head.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
        first_period = max(round(0.4 * config.steps), 1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, first_period)
        for index in _batches(len(train_x), config):
            loss = F.cross_entropy(head(train_x[index]), train_y[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.inference_mode():
        probabilities = head.eval()(test_x).softmax(dim=1).float().cpu()
    if not bool(torch.isfinite(probabilities).all()):
        raise TrainingError(f"the {kind} head gave values that are not finite; lower its learning rate ({config.lr})")
    return probabilities


def _batches(n: int, config: HeadConfig) -> list[Tensor]:
    """Row numbers of each step: shuffled epochs cut into full batches, the whole set where it is smaller."""
    if n <= config.batch_size:
        return [torch.arange(n)] * config.steps
    batches: list[Tensor] = []
    while len(batches) < config.steps:
        order = torch.randperm(n)
        batches += [part for part in order.split(config.batch_size) if len(part) == config.batch_size]
    return batches[: config.steps]
