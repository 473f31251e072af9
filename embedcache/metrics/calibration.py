"""Probabilities of a binary label: how well they match what happens, and how to mend them.

Shape notation: n rows, k weightings, q bins. Logits z are the log odds of probabilities p. Labels are 0 or 1, (n,).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from embedcache.metrics.classification import ratio, totals

_TEMPERATURES = (0.05, 20.0)  # separated classes would have 0, classes that the logits invert infinity
LARGEST_LOGIT = 30.0
_HALVINGS = 60
_NEWTON_STEPS = 100
_FEW, _MORE_STEPS = 5000, 4  # rows up to which one step is too far from a refit
_AT_ONCE = 64  # rows looked through: nearly every draw holds one of them


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities of log odds, to full precision on either side."""
    small = np.exp(-np.abs(logits))
    return np.asarray(np.where(logits >= 0, 1.0, small) / (1 + small))


def logit(p: np.ndarray) -> np.ndarray:
    """Log odds of probabilities, kept within `LARGEST_LOGIT` of 0."""
    with np.errstate(divide="ignore"):
        return np.clip(np.log(p) - np.log1p(-p), -LARGEST_LOGIT, LARGEST_LOGIT)


def fit_temperature(labels: np.ndarray, logits: np.ndarray) -> float:
    """The temperature T at which z / T has the least log loss (Guo et al. 2017), from 0.05 to 20.

    Args:
        labels: 0 or 1, (n,).
        logits: (n,).

    Returns:
        1 where all logits are 0 and no temperature changes them.
    """
    z = np.asarray(logits, np.float64)
    if not z.any():
        return 1.0
    low, high = (math.log(bound) for bound in _TEMPERATURES)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        # the slope of the log loss in 1 / T grows with 1 / T, so that its sign tells the side
        if z @ (sigmoid(z / math.exp(middle)) - labels) > 0:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def fit_platt(labels: np.ndarray, logits: np.ndarray) -> tuple[float, float]:
    """Slope and intercept of the logits that mend them best (Platt 1999).

    Labels are pulled from 0 and 1 as if each class held one row more of either kind, so that the slope of separated
    classes stays finite (Lin, Lin and Weng 2007).

    Args:
        labels: 0 or 1, (n,).
        logits: (n,).

    Returns:
        (a, b): the mended logit is a * z + b. The slope of logits that are all equal is 0.
    """
    positive = labels == 1
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    targets = np.where(positive, (n_positive + 1) / (n_positive + 2), 1 / (n_negative + 2))
    return _logistic(targets, logits)


def to_prevalence(p: np.ndarray, source: float, target: float) -> np.ndarray:
    """Probabilities for patients among whom the label is more or less common (Elkan 2001; Saerens et al. 2002).

    It holds where the label changes how often it occurs, and not how it looks.

    Args:
        p: probabilities, (n,).
        source: share of positives among the patients that p was fitted on.
        target: share of positives among the patients that p is meant for.
    """
    for name, share in (("source", source), ("target", target)):
        if not 0 < share < 1:
            raise ValueError(f"{name} prevalence {share:g}, expected above 0 and below 1")
    positive, negative = p * (target / source), (1 - p) * ((1 - target) / (1 - source))
    return positive / (positive + negative)


def brier(labels: np.ndarray, p: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Mean squared distance of the probability from the label.

    Args:
        labels: 0 or 1, (n,).
        p: probabilities, (n,).
        weights: counts, (k, n); by default one weighting of ones.

    Returns:
        (k,) float64; NaN where no row counts.
    """
    distance, n_rows = totals(weights, (p - labels) ** 2, np.ones(len(labels))).T
    return ratio(distance, n_rows)


def ece(labels: np.ndarray, p: np.ndarray, weights: np.ndarray | None = None, *, n_bins: int = 15) -> np.ndarray:
    """Expected calibration error: how far mean probability and share of positives lie apart in a bin, on average.

    Bins hold as many rows each as equal probabilities allow, which share a bin. They are the same for all weightings.

    Args:
        labels: 0 or 1, (n,).
        p: probabilities, (n,).
        weights: as for `brier`.
        n_bins: q, fewer where probabilities are few.
    """
    ordered = np.sort(p)
    bins = np.searchsorted(ordered, p, side="left") * n_bins // max(len(p), 1)
    gaps = [np.where(bins == b, p - labels, 0.0) for b in np.unique(bins)]
    *apart, n_rows = totals(weights, *gaps, np.ones(len(labels))).T
    return ratio(np.abs(apart).sum(axis=0), n_rows)


def slope_and_intercept(labels: np.ndarray, logits: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Calibration slope and calibration in the large (Van Calster et al. 2019); 1 and 0 are perfect.

    The slope is that of a logistic regression of the label on the logit: below 1, the probabilities are too extreme.
    The intercept is the one that the logits, at slope 1, lack: below 0, the probabilities are too high.

    Args:
        labels: 0 or 1, (n,).
        logits: (n,).
        weights: as for `brier`.

    Returns:
        (k, 2): slope, and intercept. NaN where a weighting holds one class only; the slope is also NaN where a
        threshold separates the classes, so that no slope is steep enough.
    """
    return CalibrationLine.of(labels, logits).slope_and_intercept(weights)


@dataclass(frozen=True, eq=False)
class CalibrationLine:
    """Slope and intercept fitted to all rows once, from which any number of weightings are one step away.

    Args:
        logits: (n,).
        positives: rows of label 1, from the lowest logit up.
        negatives: rows of label 0, likewise.
        slope: of all rows.
        base: what the regression adds, of all rows.
        intercept: of all rows, at slope 1.
        terms: what each row adds to gradients and Hessians there, seven arrays (n,).
    """

    logits: np.ndarray
    positives: np.ndarray
    negatives: np.ndarray
    slope: float
    base: float
    intercept: float
    terms: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, labels: np.ndarray, logits: np.ndarray) -> CalibrationLine:
        """Fits the exact maxima of the likelihood; arguments as for `slope_and_intercept`."""
        z = np.asarray(logits, np.float64)
        order = np.argsort(z)
        positives, negatives = order[labels[order] == 1], order[labels[order] == 0]
        slope = base = intercept = math.nan
        if len(positives) and len(negatives):
            intercept = _offset(labels, z)
            up, down = z[positives], z[negatives]
            if up[0] < down[-1] and down[0] < up[-1]:
                slope, base = _logistic(labels, z)
        p, p_large = sigmoid(slope * z + base), sigmoid(z + intercept)
        v = p * (1 - p)
        terms = (labels - p, (labels - p) * z, v, v * z, v * z * z, labels - p_large, p_large * (1 - p_large))
        return cls(z, positives, negatives, slope, base, intercept, terms)

    def slope_and_intercept(self, weights: np.ndarray | None = None) -> np.ndarray:
        """As the function of this name. Under weights, both are Newton steps away from their values on all rows.

        The first step is a matrix product for all weightings, and near enough to a refit where rows are many; where
        they are few, more steps follow.
        """
        g0, g1, h00, h01, h11, g, h = totals(weights, *self.terms).T
        weights = np.ones((1, len(self.logits)), bool) if weights is None else weights
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            determinant = h00 * h11 - h01**2
            slopes = self.slope + (h00 * g1 - h01 * g0) / determinant
            bases = self.base + (h11 * g0 - h01 * g1) / determinant
            intercepts = self.intercept + g / h
            for _ in range(_MORE_STEPS if len(self.logits) <= _FEW else 0):
                slopes, bases, intercepts = self._step(weights, slopes, bases, intercepts)
        lowest, highest = (self._first(rows, weights) for rows in (self.positives, self.positives[::-1]))
        low, high = (self._first(rows, weights) for rows in (self.negatives, self.negatives[::-1]))
        one_class = np.isnan(lowest) | np.isnan(low)
        separated = one_class | (high <= lowest) | (highest <= low)
        return np.stack([np.where(separated, np.nan, slopes), np.where(one_class, np.nan, intercepts)], axis=1)

    def _step(
        self, weights: np.ndarray, slopes: np.ndarray, bases: np.ndarray, intercepts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One more Newton step of each weighting from where it stands, (k,) each."""
        z, y = self.logits, np.zeros(len(self.logits))
        y[self.positives] = 1
        p = sigmoid(slopes[:, None] * z + bases[:, None])  # (k, n)
        left, v = weights * (y - p), weights * (p * (1 - p))
        g0, g1, h00, h01, h11 = left.sum(axis=1), left @ z, v.sum(axis=1), v @ z, v @ z**2
        determinant = h00 * h11 - h01**2
        large = sigmoid(z + intercepts[:, None])
        missing, spread = (weights * (y - large)).sum(axis=1), (weights * (large * (1 - large))).sum(axis=1)
        return (
            slopes + (h00 * g1 - h01 * g0) / determinant,
            bases + (h11 * g0 - h01 * g1) / determinant,
            intercepts + missing / spread,
        )

    def _first(self, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The logit of the first of the rows that counts, (k,), NaN without any."""
        found = np.full(len(weights), np.nan)
        left = np.arange(len(weights))
        for start in range(0, len(rows), _AT_ONCE):
            some = rows[start : start + _AT_ONCE]
            counts = weights[np.ix_(left, some)] > 0
            hit = counts.any(axis=1)
            found[left[hit]] = self.logits[some[counts[hit].argmax(axis=1)]]
            left = left[~hit]
            if not len(left):
                break
        return found


def _logistic(targets: np.ndarray, logits: np.ndarray) -> tuple[float, float]:
    """Slope and intercept of the least log loss, by Newton steps that are halved until the loss falls.

    Args:
        targets: from 0 to 1, (n,).
        logits: (n,).
    """
    z = np.asarray(logits, np.float64)
    mean, deviation = z.mean(), z.std() or 1.0  # the Hessian of standardised logits is well conditioned
    x = np.stack([(z - mean) / deviation, np.ones(len(z))], axis=1)
    theta = np.zeros(2)
    loss = _log_loss(targets, x @ theta)
    for _ in range(_NEWTON_STEPS):
        p = sigmoid(x @ theta)
        hessian = x.T @ (x * (p * (1 - p))[:, None])
        hessian += 1e-12 * np.trace(hessian) * np.eye(2)  # logits that are all equal have no second direction
        step = np.linalg.solve(hessian, x.T @ (targets - p))
        size = 1.0
        while size > 1e-10 and _log_loss(targets, x @ (theta + size * step)) > loss:
            size /= 2
        theta = theta + size * step
        loss = _log_loss(targets, x @ theta)
        if np.abs(size * step).max() < 1e-10:
            break
    return float(theta[0] / deviation), float(theta[1] - theta[0] * mean / deviation)


def _offset(labels: np.ndarray, logits: np.ndarray) -> float:
    """What to add to all logits so that they expect as many positives as there are; both classes are present."""
    low, high = -logits.max() - math.log(len(labels)), -logits.min() + math.log(len(labels))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if sigmoid(logits + middle).sum() < labels.sum():
            low = middle
        else:
            high = middle
    return float((low + high) / 2)


def _log_loss(targets: np.ndarray, logits: np.ndarray) -> float:
    return float((np.logaddexp(0, logits) - targets * logits).sum())
