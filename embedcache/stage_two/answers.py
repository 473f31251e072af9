"""What the heads of a probe say: each fitted on its budget of labels, its settings chosen by no other labels.

Shape notation: p samples asked, v samples to choose by, n training samples, t columns of labels, c outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from embedcache.stage_two.head_fits import Fit, Fitted, fit_heads
from embedcache.stage_two.heads import TRAINED, linear_state
from embedcache.stage_two.label_budget import Budget
from embedcache.stage_two.logistic import STRENGTHS, fit_logistic
from embedcache.stage_two.neighbours import neighbour_logits
from embedcache.stage_two.probe_config import ProbeConfig
from embedcache.stage_two.targets import Target

NEIGHBOURS = (5, 20, 50)
_FIXED_STRENGTH, _FIXED_NEIGHBOURS = 0.01, 20  # where no label is left to choose by

State = Mapping[str, Tensor]  # the weights of one head, as a `HeadStack` of one has them
Candidates = Callable[[np.ndarray, np.ndarray, np.ndarray, Sequence[float]], list[tuple[np.ndarray, State]]]


@dataclass(frozen=True, eq=False)
class Answer:
    """What one head says.

    Args:
        logits: of the samples asked, (p, c).
        chosen_on: samples that thresholds and calibration may be chosen by, (v,); empty where settings are fixed.
        chosen_labels: (v, t).
        chosen_logits: what the head, or one that had not seen them, says of those, (v, c).
        setting: what was chosen: epochs, C, or k.
        state: its weights; none of nearest neighbours.
    """

    logits: np.ndarray
    chosen_on: np.ndarray
    chosen_labels: np.ndarray
    chosen_logits: np.ndarray
    setting: float
    state: State


def answers(
    head: str, x: Tensor, budgets: Sequence[Budget], asked: np.ndarray, *, target: Target, config: ProbeConfig
) -> list[Answer]:
    """Fits a head for each budget, all of them together where they are trained.

    Args:
        head: of `HEADS`.
        x: features of samples, (all, d).
        asked: (p,).

    Raises:
        TrainingError: logits that are not finite.
    """
    if head in TRAINED:
        return _trained(head, x, budgets, asked, target, config)
    if head == "knn":
        offered, fixed = [float(k) for k in NEIGHBOURS], float(_FIXED_NEIGHBOURS)
    else:
        offered, fixed = list(STRENGTHS), _FIXED_STRENGTH
    on_host = x.cpu().numpy() if head == "logistic" else np.empty(0)

    def candidates(
        rows: np.ndarray, labels: np.ndarray, of: np.ndarray, settings: Sequence[float]
    ) -> list[tuple[np.ndarray, State]]:
        weight = config.class_weight
        if head == "knn":
            ks = [int(k) for k in settings]
            found = neighbour_logits(x, rows, labels, of, target=target, ks=ks, class_weight=weight)
            return [(logits, {}) for logits in found]
        maps = fit_logistic(on_host[rows], labels, target=target, strengths=settings, class_weight=weight)
        return [(fitted(on_host[of]), linear_state(fitted.weights, fitted.bias)) for fitted in maps]

    found: dict[bytes, Answer] = {}  # where all labels are taken, seeds do not differ
    for budget in budgets:
        key = _key(budget)
        if key not in found:
            found[key] = _best(candidates, budget, asked, offered, fixed, target, config.class_weight)
    return [found[_key(budget)] for budget in budgets]


def _best(
    candidates: Candidates,
    budget: Budget,
    asked: np.ndarray,
    offered: Sequence[float],
    fixed: float,
    target: Target,
    class_weight: str,
) -> Answer:
    """The setting of least loss on the samples to choose by."""
    rows, labels = budget.rows, budget.labels
    if budget.choice == "fixed":
        return _fixed(*candidates(rows, labels, asked, [fixed])[0], budget, fixed, target)
    weights = target.class_weights(labels, class_weight)
    if budget.choice == "valid":
        v = len(budget.valid)
        of_all = candidates(rows, labels, np.concatenate([budget.valid, asked]), offered)
        best = _least_loss([logits[:v] for logits, _ in of_all], budget.valid_labels, weights, target)
        logits, state = of_all[best]
        return Answer(logits[v:], budget.valid, budget.valid_labels, logits[:v], offered[best], state)
    held = [np.empty((len(rows), target.n_outputs), np.float32) for _ in offered]
    for fold in np.unique(budget.folds):
        out = budget.folds == fold
        for logits, (of_fold, _) in zip(held, candidates(rows[~out], labels[~out], rows[out], offered), strict=True):
            logits[out] = of_fold
    best = _least_loss(held, labels, weights, target)
    logits, state = candidates(rows, labels, asked, [offered[best]])[0]
    return Answer(logits, rows, labels, held[best], offered[best], state)


def _trained(
    head: str, x: Tensor, budgets: Sequence[Budget], asked: np.ndarray, target: Target, config: ProbeConfig
) -> list[Answer]:
    """Budgets with validation labels and without train in one go; of those with folds, first all folds do."""

    def fitted(fits: Sequence[Fit], of: np.ndarray) -> list[Fitted]:
        return fit_heads(head, x, fits, target=target, config=config.head, class_weight=config.class_weight, asked=of)

    by_fold = [
        (k, out)
        for k, budget in enumerate(budgets)
        if budget.choice == "folds"
        for fold in np.unique(budget.folds)
        for out in [budget.folds == fold]
    ]
    of_folds = fitted([_without(budgets[k], out) for k, out in by_fold], np.empty(0, np.int64)) if by_fold else []
    n_epochs: dict[int, int] = {}  # the chosen share of the schedule, which is longer or shorter over all rows
    held = {k: np.empty((len(b.rows), target.n_outputs), np.float32) for k, b in enumerate(budgets)}
    for k in {k for k, _ in by_fold}:
        mine = [(out, fit) for (j, out), fit in zip(by_fold, of_folds, strict=True) if j == k]
        n = min(len(fit.losses) for _, fit in mine)  # a fold's share of all rows weighs its loss
        losses = np.sum([out.sum() * fit.losses[:n] for out, fit in mine], axis=0)
        best = int(np.nanargmin(losses))
        n_rows = len(budgets[k].rows)
        of_fold, of_all = (config.head.epochs_for(n) for n in (n_rows - int(mine[0][0].sum()), n_rows))
        n_epochs[k] = max(round(int(mine[0][1].looks[best]) / of_fold * of_all), 1)
        for out, fit in mine:
            held[k][out] = fit.curve[best]
    union = np.unique(np.concatenate([asked, *(b.valid for b in budgets)]))
    wholes = fitted(
        [
            Fit(
                b.rows,
                b.labels,
                b.seed,
                watched=b.valid if b.choice == "valid" else None,
                watched_labels=b.valid_labels if b.choice == "valid" else None,
                n_epochs=n_epochs.get(k),
                keeps_state=True,
            )
            for k, b in enumerate(budgets)
        ],
        union,
    )
    at = np.searchsorted(union, asked)
    found = []
    for k, (b, whole) in enumerate(zip(budgets, wholes, strict=True)):
        logits, setting = whole.logits[at], float(whole.n_epochs)
        if b.choice == "valid":
            of_valid = whole.logits[np.searchsorted(union, b.valid)]
            found.append(Answer(logits, b.valid, b.valid_labels, of_valid, setting, whole.state))
        elif b.choice == "folds":
            found.append(Answer(logits, b.rows, b.labels, held[k], setting, whole.state))
        else:
            found.append(_fixed(logits, whole.state, b, setting, target))
    return found


def _without(budget: Budget, out: np.ndarray) -> Fit:
    """A head for all folds but one, which it watches."""
    rows, labels = budget.rows, budget.labels
    return Fit(rows[~out], labels[~out], budget.seed, watched=rows[out], watched_labels=labels[out], keeps_curve=True)


def _fixed(logits: np.ndarray, state: State, budget: Budget, setting: float, target: Target) -> Answer:
    nothing = np.empty((0, target.n_outputs), np.float32)
    return Answer(logits, budget.rows[:0], budget.labels[:0], nothing, setting, state)


def _least_loss(candidates: Sequence[np.ndarray], labels: np.ndarray, class_weights: np.ndarray, target: Target) -> int:
    """Which candidate's logits, (n, c) each, have the least loss as it is trained on."""
    stacked = torch.from_numpy(np.stack(candidates)).float()
    y = torch.from_numpy(labels).float().expand(len(candidates), *labels.shape)
    weights = torch.from_numpy(class_weights).float()
    losses = target.loss(stacked, y, weights.expand(len(candidates), *weights.shape))
    return int(losses.argmin())


def _key(budget: Budget) -> bytes:
    """All of a budget but its seed."""
    parts = (budget.rows, budget.labels, budget.valid, budget.valid_labels, budget.folds)
    return b"|".join(part.tobytes() for part in parts) + budget.choice.encode()
