"""Fitting many trained heads at once: heads with equally many batches go through each step as one batched model.

Shape notation: m heads, n training rows (the most of any head), w watched rows, d feature width, t label columns,
c outputs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from embedcache.errors import TrainingError
from embedcache.stage_two.heads import HeadConfig, HeadStack
from embedcache.stage_two.targets import Target

_TOGETHER = 32  # heads of one stack: bounds memory
_WATCHED_AT_ONCE = 1024  # rows of all heads: what becomes of them stays in a processor's cache


@dataclass(frozen=True)
class Fit:
    """A head to fit.

    Args:
        rows: rows of the features, (n,).
        labels: of each, (n, t), NaN where blank.
        seed: of weights, order of rows and dropout.
        watched: rows by whose loss the epoch is chosen, (w,); None trains to the end.
        watched_labels: (w, t).
        n_epochs: ends after so many, on the same schedule; None for all.
        keeps_curve: whether the logits of the watched rows are kept for every epoch.
        keeps_state: whether its weights are.
    """

    rows: np.ndarray
    labels: np.ndarray
    seed: int
    watched: np.ndarray | None = None
    watched_labels: np.ndarray | None = None
    n_epochs: int | None = None
    keeps_curve: bool = False
    keeps_state: bool = False


@dataclass(frozen=True)
class Fitted:
    """What became of it.

    Args:
        logits: of the rows asked for, (p, c) float32.
        n_epochs: after how many the weights are.
        losses: of the watched rows after each epoch until it stopped, (epochs,); empty where none are.
        curve: logits of the watched rows after each epoch, (epochs, w, c), where they were to be kept.
        state: its weights, as a `HeadStack` of this one alone has them, where they were to be kept.
    """

    logits: np.ndarray
    n_epochs: int
    looks: np.ndarray
    losses: np.ndarray
    curve: np.ndarray
    state: Mapping[str, Tensor]


def fit_heads(
    kind: str,
    x: Tensor,
    fits: Sequence[Fit],
    *,
    target: Target,
    config: HeadConfig,
    class_weight: str,
    asked: np.ndarray,
) -> list[Fitted]:
    """Fits heads of one kind on rows of the same features.

    Args:
        kind: `linear` or `mlp`.
        x: features, (all rows, d) float32, on the device.
        asked: rows whose logits are wanted, (p,).

    Raises:
        TrainingError: logits that are not finite.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for k, fit in enumerate(fits):
        groups[config.n_batches(len(fit.rows))].append(k)
    found: dict[int, Fitted] = {}
    for members in groups.values():
        for start in range(0, len(members), _TOGETHER):
            chosen = members[start : start + _TOGETHER]
            stack = _Together(kind, x, [fits[k] for k in chosen], target, config, class_weight)
            found |= zip(chosen, stack.fitted(asked), strict=True)
    return [found[k] for k in range(len(fits))]


class _Together:
    """Heads of one kind that all have the same number of batches."""

    def __init__(
        self,
        kind: str,
        x: Tensor,
        fits: Sequence[Fit],
        target: Target,
        config: HeadConfig,
        class_weight: str,
    ) -> None:
        self._x, self._fits, self._target, self._config = x, fits, target, config
        self._n_batches = config.n_batches(len(fits[0].rows))
        device = str(x.device)
        self._heads = HeadStack(
            kind, x.shape[1], target.n_outputs, seeds=[f.seed for f in fits], dropout=config.dropout, device=device
        )
        self._rows, self._y = (t.to(device) for t in _padded([f.rows for f in fits], [f.labels for f in fits]))
        nothing = np.empty((0, self._y.shape[2]))
        self._watched, self._watched_y = (
            t.to(device)
            for t in _padded(
                [nothing[:, 0] if f.watched is None else f.watched for f in fits],
                [nothing if f.watched_labels is None else f.watched_labels for f in fits],
            )
        )
        self._watch_alike = bool((self._watched == self._watched[:1]).all())
        weights = [target.class_weights(f.labels, class_weight) for f in fits]
        self._weights = torch.from_numpy(np.stack(weights)).float().to(device)
        self._optimizer = torch.optim.AdamW(
            self._heads.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self._orders = [np.random.default_rng(f.seed) for f in fits]
        self._once = None if config.reshuffle else self._shuffled()

    def fitted(self, asked: np.ndarray) -> list[Fitted]:
        """Trains them all; arguments and results as of `fit_heads`."""
        m, n_epochs = len(self._fits), self._config.n_epochs(self._n_batches)
        device = self._x.device
        is_watched = torch.tensor([f.watched is not None for f in self._fits], device=device)
        last = torch.tensor([min(f.n_epochs or n_epochs, n_epochs) for f in self._fits], device=device)
        patience, keeps_curves = self._config.patience or n_epochs, any(f.keeps_curve for f in self._fits)
        running, n_looks = torch.ones(m, dtype=torch.bool, device=device), torch.zeros_like(last)
        ends = {f.n_epochs or n_epochs for f in self._fits}
        looks = [e for e in sorted({*self._config.looks(self._n_batches), *ends}) if e <= int(last.max())]
        best = {name: value.clone() for name, value in self._heads.state_dict().items()}
        best_loss, best_epoch = torch.full((m,), torch.inf, device=device), torch.zeros_like(last)
        losses, curves = [], []
        for epoch in range(1, int(last.max()) + 1):
            self._pass(epoch - 1)
            if epoch not in looks:
                continue
            loss, logits = self._watch()
            better = torch.where(is_watched, (loss < best_loss) & running, epoch == last)
            best_loss, best_epoch = torch.where(better, loss, best_loss), torch.where(better, epoch, best_epoch)
            moved = better.nonzero().flatten()
            if len(moved):
                for name, value in self._heads.state_dict().items():
                    best[name].index_copy_(0, moved, value[moved])
            losses.append(loss)
            if keeps_curves:
                curves.append(logits)
            n_looks += running
            running &= (epoch < last) & (~is_watched | (epoch - best_epoch < patience))
            if self._config.patience and not bool(running.any()):
                break
        self._heads.load_state_dict(best)
        rows = torch.from_numpy(asked).to(device)
        answers = self._heads.evaluated(self._x[rows]).cpu().numpy()
        if not np.isfinite(answers).all() or not bool((best_epoch > 0).all()):  # or never had a finite loss
            raise TrainingError(f"a head gave values that are not finite; lower its learning rate ({self._config.lr})")
        chosen, n_run, by_look = best_epoch.tolist(), n_looks.tolist(), torch.stack(losses, 1).cpu().numpy()
        return [
            Fitted(
                answers[k],
                chosen[k],
                np.array(looks[: 0 if f.watched is None else n_run[k]], np.int64),
                by_look[k, : 0 if f.watched is None else n_run[k]],
                self._curve(k, curves[: n_run[k]]),
                {name: value[k : k + 1].cpu().clone() for name, value in best.items()} if f.keeps_state else {},
            )
            for k, f in enumerate(self._fits)
        ]

    def _curve(self, k: int, curves: list[Tensor]) -> np.ndarray:
        fit = self._fits[k]
        if not fit.keeps_curve or fit.watched is None:
            return np.empty((0, 0, self._target.n_outputs), np.float32)
        return torch.stack([logits[k, : len(fit.watched)] for logits in curves]).cpu().numpy()

    def _pass(self, epoch: int) -> None:
        """One epoch."""
        order = self._shuffled() if self._once is None else self._once
        size = self._config.batch_size
        y = self._y.take_along_dim(order.unsqueeze(-1), 1)
        rows = self._rows.gather(1, order)
        n = torch.tensor([len(f.rows) for f in self._fits], device=self._x.device)
        uneven = len({len(f.rows) for f in self._fits}) > 1
        self._heads.train()
        for k in range(self._n_batches):
            part = slice(k * size, (k + 1) * size)
            index = rows[:, part]
            is_last = k == self._n_batches - 1
            present = None
            if uneven and is_last:  # some heads have fewer rows in their last batch
                there = torch.arange(part.start, part.start + index.shape[1], device=n.device) < n[:, None]
                present = there.unsqueeze(-1).to(self._x.dtype)
            features = self._x.index_select(0, index.flatten()).view(*index.shape, -1)
            loss = self._target.loss(self._heads(features, present), y[:, part], self._weights)
            self._optimizer.zero_grad(set_to_none=True)
            loss.sum().backward()
            for group in self._optimizer.param_groups:
                group["lr"] = self._config.lr_at(epoch * self._n_batches + k, self._n_batches)
            self._optimizer.step()

    def _shuffled(self) -> Tensor:
        """An order of each head's rows, its padding at the end, (m, n) int64."""
        n = self._rows.shape[1]
        orders = [
            np.concatenate([rng.permutation(len(f.rows)), np.arange(len(f.rows), n)])
            for rng, f in zip(self._orders, self._fits, strict=True)
        ]
        return torch.from_numpy(np.stack(orders)).to(self._x.device)

    @torch.no_grad()
    def _watch(self) -> tuple[Tensor, Tensor]:
        """Losses (m,) and logits (m, w, c) of the watched rows; those of the heads that watch none mean nothing."""
        self._heads.eval()
        m, w = self._watched.shape
        parts = [torch.empty(m, 0, self._target.n_outputs, device=self._x.device)]
        for index in self._watched.split(max(_WATCHED_AT_ONCE // m, 64), dim=1) if w else ():
            if self._watch_alike:
                features = self._x.index_select(0, index[0])
            else:
                features = self._x.index_select(0, index.flatten()).view(*index.shape, -1)
            parts.append(self._heads(features))
        logits = torch.cat(parts, dim=1)
        return self._target.loss(logits, self._watched_y, self._weights), logits


def _padded(rows: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Rows (m, n) int64 and labels (m, n, t); padding is row 0 without labels."""
    n = max(len(r) for r in rows)
    index = np.zeros((len(rows), n), np.int64)
    y = np.full((len(rows), n, labels[0].shape[1]), np.nan, np.float32)
    for k, (r, values) in enumerate(zip(rows, labels, strict=True)):
        index[k, : len(r)], y[k, : len(r)] = r, values
    return torch.from_numpy(index), torch.from_numpy(y)
