"""Classification scores over many weightings of the same rows at once, as a bootstrap needs them.

Shape notation: n rows, k weightings. A weighting says how often each row counts; all ones is the plain score.
A score that is undefined (one class only) is NaN, never a number by accident.
"""

from __future__ import annotations

import numpy as np


def auroc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Area under the ROC curve: the chance that a positive outranks a negative, ties counting half.

    Args:
        labels: 0 or 1, (n,).
        scores: higher means more likely positive, (n,).
        weights: (k, n); by default one weighting of ones.

    Returns:
        (k,) float64.
    """
    weights = _weights(weights, labels)
    order = np.argsort(scores, kind="stable")
    positive = weights[:, order] * (labels[order] == 1)
    negative = weights[:, order] * (labels[order] == 0)
    starts = _tie_starts(scores[order])
    positive, negative = np.add.reduceat(positive, starts, axis=1), np.add.reduceat(negative, starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative
    wins = (positive * (below + 0.5 * negative)).sum(axis=1)
    pairs = positive.sum(axis=1) * negative.sum(axis=1)
    return np.divide(wins, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)


def average_precision(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Precision averaged over the recall gained at each distinct score; arguments and result as `auroc`."""
    weights = _weights(weights, labels)
    order = np.argsort(-scores, kind="stable")
    hits = weights[:, order] * (labels[order] == 1)
    starts = _tie_starts(scores[order])
    hits = np.add.reduceat(hits, starts, axis=1)
    shown = np.cumsum(np.add.reduceat(weights[:, order], starts, axis=1), axis=1)
    precision = np.divide(np.cumsum(hits, axis=1), shown, out=np.zeros_like(shown), where=shown > 0)
    positives = hits.sum(axis=1)
    total = (hits * precision).sum(axis=1)
    return np.divide(total, positives, out=np.full(len(weights), np.nan), where=positives > 0)


def accuracy(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Share of rows whose predicted class is the label.

    Args:
        labels: class of each row, (n,).
        predictions: predicted class, (n,).
        weights: as for `auroc`.
    """
    weights = _weights(weights, labels)
    total = weights.sum(axis=1)
    right = weights @ (labels == predictions).astype(np.float64)
    return np.divide(right, total, out=np.full(len(weights), np.nan), where=total > 0)


def _weights(weights: np.ndarray | None, labels: np.ndarray) -> np.ndarray:
    if weights is None:
        return np.ones((1, len(labels)))
    if weights.ndim != 2 or weights.shape[1] != len(labels):
        raise ValueError(f"weights of shape {weights.shape} for {len(labels)} rows, expected (k, {len(labels)})")
    return weights.astype(np.float64)


def _tie_starts(ordered: np.ndarray) -> np.ndarray:
    """Where runs of equal scores begin in an ordered array."""
    return np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
