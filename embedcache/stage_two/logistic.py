"""Logistic regression: the convex head, whose result no learning rate and no seed changes.

Shape notation: n training rows, p rows asked, d feature width, r their rank, t label columns, c outputs, s strengths.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from embedcache.stage_two.targets import Target

STRENGTHS = tuple(float(c) for c in np.logspace(-6, 4, 11))  # scikit-learn's C: small is strongly regularised
_LARGEST_HESSIAN = 4096  # unknowns that Newton's method solves for; L-BFGS above


def logistic_logits(
    x: np.ndarray,
    rows: np.ndarray,
    labels: np.ndarray,
    asked: np.ndarray,
    *,
    target: Target,
    strengths: Sequence[float],
    class_weight: str,
) -> list[np.ndarray]:
    """L2-regularised logistic regression, for each strength in turn, each starting where the one before ended.

    Args:
        x: features, (all rows, d), on a common scale.
        rows, labels: training rows, (n,), and their labels, (n, t); blank ones are left out, label by label.
        asked: (p,).
        strengths: scikit-learn's C, ascending.

    Returns:
        (p, c) for each strength.
    """
    blocks = [
        _path(x, rows[known], column[known].astype(np.int64), asked, strengths, class_weight, target)
        for column in labels.T
        for known in [~np.isnan(column)]
    ]
    return [np.concatenate(parts, axis=1) for parts in zip(*blocks, strict=True)]


def _path(
    x: np.ndarray,
    rows: np.ndarray,
    y: np.ndarray,
    asked: np.ndarray,
    strengths: Sequence[float],
    class_weight: str,
    target: Target,
) -> list[np.ndarray]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    n_outputs = target.n_outputs if target.task == "multi-class" else 1
    if not len(asked):
        return [np.empty((0, n_outputs), np.float32) for _ in strengths]
    classes = np.unique(y)
    if len(classes) < 2:
        return [_of_one_class(int(classes[0]) if len(classes) else 0, n_outputs, len(asked)) for _ in strengths]
    train, others = _in_their_span(x[rows].astype(np.float64), x[asked].astype(np.float64))
    n_unknowns = (train.shape[1] + 1) * (len(classes) if len(classes) > 2 else 1)
    model = LogisticRegression(
        solver="newton-cholesky" if n_unknowns <= _LARGEST_HESSIAN else "lbfgs",
        class_weight="balanced" if class_weight == "balanced" else None,
        warm_start=True,
        max_iter=1000,
    )
    found = []
    for strength in strengths:
        model.set_params(C=strength)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # nearly separable at a huge C: close enough
            model.fit(train, y)
        decision = model.decision_function(others).astype(np.float32)
        if n_outputs == 1:
            found.append(decision[:, None])
            continue
        logits = np.full((len(asked), n_outputs), _of_one_class(0, 2, 1)[0, 1], np.float32)
        logits[:, classes] = decision if decision.ndim == 2 else np.stack([-decision / 2, decision / 2], axis=1)
        found.append(logits)
    return found


def _of_one_class(only: int, n_outputs: int, n_rows: int) -> np.ndarray:
    """What a model says that has seen one class alone, (p, c): that one, all but surely."""
    sure = 15.0
    if n_outputs == 1:
        return np.full((n_rows, 1), sure if only else -sure, np.float32)
    logits = np.full((n_rows, n_outputs), -sure, np.float32)
    logits[:, only] = sure
    return logits


def _in_their_span(train: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows (n, d) and (p, d) in coordinates of the span of the former, (n, r) and (p, r).

    With fewer rows than dimensions, the regularised solution lies in their span, so r unknowns say as much as d.
    """
    if len(train) >= train.shape[1]:
        return train, others
    _, _, basis = np.linalg.svd(train, full_matrices=False)
    return train @ basis.T, others @ basis.T
