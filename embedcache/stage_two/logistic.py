"""Logistic regression: the convex head, whose result no learning rate and no seed changes.

Shape notation: n training rows, p any rows, d feature width, r the rank of training rows, t label columns, c outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from embedcache.stage_two.targets import Target

STRENGTHS = tuple(float(c) for c in np.logspace(-6, 4, 11))  # scikit-learn's C: small is strongly regularised
_SURE = 15.0  # a logit
_LARGEST_HESSIAN = 4096  # unknowns that Newton's method solves for; L-BFGS above


@dataclass(frozen=True, eq=False)
class LinearMap:
    """Features to logits: x W + b, with W (d, c) and b (c,) in float64."""

    weights: np.ndarray
    bias: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """(p, d) to (p, c) float32."""
        return (x.astype(np.float64) @ self.weights + self.bias).astype(np.float32)


def fit_logistic(
    x: np.ndarray, labels: np.ndarray, *, target: Target, strengths: Sequence[float], class_weight: str
) -> list[LinearMap]:
    """L2-regularised logistic regression, for each strength in turn, each starting where the one before ended.

    Args:
        x: features of training rows, (n, d), on a common scale.
        labels: (n, t); blank ones are left out, label by label.
        strengths: scikit-learn's C, ascending.

    Returns:
        A map for each strength.
    """
    blocks = [
        _path(x[known], column[known].astype(np.int64), strengths, class_weight, target)
        for column in labels.T
        for known in [~np.isnan(column)]
    ]
    return [
        LinearMap(np.concatenate([m.weights for m in parts], axis=1), np.concatenate([m.bias for m in parts]))
        for parts in zip(*blocks, strict=True)
    ]


def _path(
    x: np.ndarray, y: np.ndarray, strengths: Sequence[float], class_weight: str, target: Target
) -> list[LinearMap]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    n_outputs = target.n_outputs if target.task == "multi-class" else 1
    nothing = np.zeros((x.shape[1], n_outputs))
    classes = np.unique(y)
    if len(classes) < 2:
        return [LinearMap(nothing, _of_one_class(int(classes[0]) if len(classes) else 0, n_outputs)) for _ in strengths]
    train, basis = _in_its_span(x.astype(np.float64))
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
        weights = model.coef_.T if basis is None else basis.T @ model.coef_.T  # (d, 1), or a column for each class
        if n_outputs == 1:
            found.append(LinearMap(weights, model.intercept_))
            continue
        if weights.shape[1] == 1:
            weights, bias = weights * (-0.5, 0.5), model.intercept_ * (-0.5, 0.5)
        else:
            bias = model.intercept_
        whole = LinearMap(nothing.copy(), np.full(n_outputs, -_SURE))
        whole.weights[:, classes], whole.bias[classes] = weights, bias
        found.append(whole)
    return found


def _of_one_class(only: int, n_outputs: int) -> np.ndarray:
    """What a model says that has seen one class alone, (c,): that one, all but surely."""
    if n_outputs == 1:
        return np.array([_SURE if only else -_SURE])
    return np.where(np.arange(n_outputs) == only, _SURE, -_SURE)


def _in_its_span(train: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows (n, d) in coordinates of their span, (n, r), and its basis, (r, d); None where it is all of the space.

    With fewer rows than dimensions, the regularised solution lies in their span, so r unknowns say as much as d.
    """
    if len(train) >= train.shape[1]:
        return train, None
    _, _, basis = np.linalg.svd(train, full_matrices=False)
    return train @ basis.T, basis
