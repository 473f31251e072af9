"""Classification scores over many weightings of the same rows at once, as a bootstrap needs them.

Shape notation: n rows, k weightings, p positive rows, m negative rows, c columns. A weighting says how often each row
counts; all ones is the plain score. A score that is undefined is NaN, never a number by accident.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

_EXACT_FLOAT32 = 2**24  # whole numbers up to here add up in float32 without rounding


@dataclass(frozen=True, eq=False)
class Ranking:
    """Rows in the order of their scores: sorted once, scored under any number of weightings.

    Args:
        scores: higher means more likely positive, (n,).
        positives: rows of label 1, from the highest score down, (p,).
        negatives: rows of label 0, from the lowest score up, (m,).
        below: how many negatives score less than each positive, (p,).
        not_above: how many negatives score at most as much, (p,).
        tied_until: the last place among the positives that has the same score, (p,).
    """

    scores: np.ndarray
    positives: np.ndarray
    negatives: np.ndarray
    below: np.ndarray
    not_above: np.ndarray
    tied_until: np.ndarray

    @classmethod
    def of(cls, labels: np.ndarray, scores: np.ndarray) -> Ranking:
        """Sorts the rows; labels are 0 or 1, (n,)."""
        order = np.argsort(scores, kind="stable")
        negatives, positives = order[labels[order] == 0], order[labels[order] == 1][::-1]
        low, high = scores[negatives], scores[positives]
        return cls(
            scores,
            positives,
            negatives,
            below=np.searchsorted(low, high, side="left"),
            not_above=np.searchsorted(low, high, side="right"),
            tied_until=len(high) - 1 - np.searchsorted(high[::-1], high, side="left"),
        )

    def auroc(self, weights: np.ndarray | None = None) -> np.ndarray:
        """Area under the ROC curve, (k,) float64; NaN where one class or one score is all that counts."""
        weights = _checked(weights, len(self.scores))
        hits, up_to = self._counted(weights)
        wins = _dot(hits, up_to.take(self.below, axis=1))
        if not np.array_equal(self.below, self.not_above):
            wins = (wins + _dot(hits, up_to.take(self.not_above, axis=1))) / 2
        pairs = hits.sum(axis=1, dtype=np.float64) * up_to[:, -1]
        return self._where_ranked(ratio(wins, pairs), np.full(len(weights), 0.5), weights)

    def average_precision(self, weights: np.ndarray | None = None) -> np.ndarray:
        """Precision averaged over the recall gained at each distinct score; result as `auroc`."""
        weights = _checked(weights, len(self.scores))
        hits, up_to = self._counted(weights)
        found = np.cumsum(hits, axis=1, dtype=up_to.dtype).take(self.tied_until, axis=1)
        n_negative = up_to[:, -1:]
        shown = found + n_negative - up_to.take(self.below, axis=1)
        precision = np.divide(found, shown, out=np.zeros(shown.shape), where=shown > 0)
        n_positive = hits.sum(axis=1, dtype=np.float64)
        value = ratio(_dot(hits, precision), n_positive)
        value[n_negative[:, 0] == 0] = np.nan
        return self._where_ranked(value, ratio(n_positive, n_positive + n_negative[:, 0]), weights)

    def _counted(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights of the positives, (k, p), and the total weight of the 0, 1, .. m lowest negatives, (k, m + 1)."""
        up_to = np.zeros((len(weights), len(self.negatives) + 1), _total_type(weights))
        np.cumsum(weights.take(self.negatives, axis=1), axis=1, dtype=up_to.dtype, out=up_to[:, 1:])
        return weights.take(self.positives, axis=1), up_to

    def _where_ranked(self, values: np.ndarray, chance: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """NaN where all rows that count score the same, which gives the value of chance, or a score is NaN."""
        if np.isnan(self.scores).any():
            return np.full(len(values), np.nan)
        for k in np.flatnonzero(np.isclose(values, chance, rtol=0, atol=1e-9)):
            counted = self.scores[weights[k] > 0]
            if counted.min() == counted.max():
                values[k] = np.nan
        return values


def auroc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Area under the ROC curve: the chance that a positive outranks a negative, ties counting half.

    Scores that are all equal rank nothing: NaN, not 0.5.

    Args:
        labels: 0 or 1, (n,).
        scores: higher means more likely positive, (n,).
        weights: counts, (k, n); by default one weighting of ones.

    Returns:
        (k,) float64.
    """
    return Ranking.of(labels, scores).auroc(weights)


def average_precision(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Precision averaged over the recall gained at each distinct score; arguments and result as `auroc`."""
    return Ranking.of(labels, scores).average_precision(weights)


def accuracy(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Share of rows whose predicted class is the label.

    Args:
        labels: class of each row, (n,).
        predictions: predicted class, (n,).
        weights: as for `auroc`.
    """
    right, all_rows = totals(weights, labels == predictions, np.ones(len(labels), bool)).T
    return ratio(right, all_rows)


def balanced_accuracy(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Mean recall over the classes that the labels hold under each weighting; arguments as for `accuracy`."""
    members = [labels == c for c in np.unique(labels)]
    right = totals(weights, *[rows & (predictions == labels) for rows in members])
    present = totals(weights, *members)
    recall = np.divide(right, present, out=np.zeros_like(right), where=present > 0)
    return ratio(recall.sum(axis=1), (present > 0).sum(axis=1))


@dataclass(frozen=True, eq=False)
class Calls:
    """Binary predictions counted against their labels, of one model, (k,) each, or of s models, (k, s).

    Args:
        hits: positives that are predicted positive.
        false_alarms: negatives that are predicted positive.
        n_positive: (k,) or (k, 1).
        n_negative: (k,) or (k, 1).
    """

    hits: np.ndarray
    false_alarms: np.ndarray
    n_positive: np.ndarray
    n_negative: np.ndarray

    @classmethod
    def of(cls, labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray | None = None) -> Calls:
        """Counts under each weighting.

        Args:
            labels: 0 or 1, (n,).
            predictions: 0 or 1, (n,) or (s, n).
            weights: as for `auroc`.
        """
        positive, negative, called = labels == 1, labels == 0, np.atleast_2d(predictions == 1)
        sums = totals(weights, *(called & positive), *(called & negative), positive, negative)
        s = len(called)
        parts = sums[:, :s], sums[:, s : 2 * s], sums[:, [-2]], sums[:, [-1]]
        return cls(*(part[:, 0] for part in parts)) if predictions.ndim == 1 else cls(*parts)

    @property
    def sensitivity(self) -> np.ndarray:
        """Share of the positives that are predicted positive."""
        return ratio(self.hits, self.n_positive)

    @property
    def specificity(self) -> np.ndarray:
        """Share of the negatives that are predicted negative."""
        return ratio(self.n_negative - self.false_alarms, self.n_negative)

    @property
    def f1(self) -> np.ndarray:
        """F1 of class 1; NaN where no row is positive nor predicted so."""
        return ratio(2 * self.hits, self.hits + self.false_alarms + self.n_positive)

    @property
    def accuracy(self) -> np.ndarray:
        """Share of rows that are predicted as they are labelled."""
        return ratio(self.hits + self.n_negative - self.false_alarms, self.n_positive + self.n_negative)

    @property
    def balanced_accuracy(self) -> np.ndarray:
        """Mean of sensitivity and specificity; NaN where either is."""
        return (self.sensitivity + self.specificity) / 2


def f1(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """F1 of class 1; NaN where no row is positive nor predicted so. Arguments as for `sensitivity`."""
    return Calls.of(labels, predictions, weights).f1


def sensitivity(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Share of the positives that are predicted positive.

    Args:
        labels: 0 or 1, (n,).
        predictions: 0 or 1, (n,).
        weights: as for `auroc`.
    """
    return Calls.of(labels, predictions, weights).sensitivity


def specificity(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Share of the negatives that are predicted negative; arguments as for `sensitivity`."""
    return Calls.of(labels, predictions, weights).specificity


def youden_threshold(labels: np.ndarray, scores: np.ndarray) -> float:
    """The threshold at which sensitivity + specificity - 1 is highest, where `score >= threshold` is positive.

    It lies midway between two neighbouring scores, or at the lowest score. Of equally good thresholds it is the
    middle one.

    Args:
        labels: 0 or 1, (n,).
        scores: (n,).

    Returns:
        NaN where the labels hold one class only.
    """
    positive, negative = np.sort(scores[labels == 1]), np.sort(scores[labels == 0])
    if not len(positive) or not len(negative) or np.isnan(scores).any():
        return math.nan
    distinct = np.unique(np.concatenate([positive, negative]))
    missed = np.searchsorted(positive, distinct)
    spared = np.searchsorted(negative, distinct)
    gain = spared * len(positive) - missed * len(negative)  # whole numbers, so that ties are ties
    best = np.flatnonzero(gain == gain.max())
    i = best[(len(best) - 1) // 2]
    if i == 0:
        return float(distinct[0])
    midway = distinct[i - 1] / 2 + distinct[i] / 2
    return float(midway if midway > distinct[i - 1] else distinct[i])  # no number may lie between the two


def totals(weights: np.ndarray | None, *columns: np.ndarray) -> np.ndarray:
    """Sums each column over the rows, each row as often as it counts.

    Args:
        weights: (k, n); by default one weighting of ones.
        columns: c arrays (n,), all bool (rows to count) or all numbers.

    Returns:
        (k, c) float64.
    """
    table = np.stack(columns, axis=1)
    weights = _checked(weights, len(table))
    counts = table.dtype == bool and weights.dtype.kind == "u"
    exact = counts and int(weights.max(initial=0)) * len(table) < _EXACT_FLOAT32
    kind = np.float32 if exact else np.float64
    return (weights.astype(kind) @ table.astype(kind)).astype(np.float64)


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """NaN where there is nothing to divide by."""
    return np.divide(part, whole, out=np.full(np.broadcast_shapes(part.shape, whole.shape), np.nan), where=whole > 0)


def _checked(weights: np.ndarray | None, n_rows: int) -> np.ndarray:
    if weights is None:
        return np.ones((1, n_rows), np.uint8)
    if weights.ndim != 2 or weights.shape[1] != n_rows:
        raise ValueError(f"weights of shape {weights.shape} for {n_rows} rows, expected (k, {n_rows})")
    return weights.view(np.uint8) if weights.dtype == bool else weights


def _total_type(weights: np.ndarray) -> type[np.number[Any]]:
    """The narrowest type in which a sum over all rows is exact."""
    if weights.dtype.kind not in "iu":
        return np.float64
    return np.int32 if int(np.iinfo(weights.dtype).max) * weights.shape[1] < 2**31 else np.int64


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Row by row, (k, p) and (k, p) to (k,) float64."""
    return np.einsum("kp,kp->k", a, b, dtype=np.float64, casting="unsafe")
