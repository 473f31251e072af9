"""Bootstrap intervals that resample patients, not images.

Shape notation: n rows, k draws, s seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

_DRAWS_AT_ONCE = 100  # bounds memory: a score holds several float64 copies of its weights

Score = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval; NaN where undefined."""

    value: float
    low: float
    high: float


def patient_draws(groups: np.ndarray, n_draws: int, *, seed: int) -> np.ndarray:
    """How often each row counts when patients are drawn with replacement.

    Args:
        groups: the patient of each row, (n,).

    Returns:
        (k, n) uint16; all rows of a patient count alike.
    """
    patients, row_patient = np.unique(groups, return_inverse=True)
    n = len(patients)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_draws)
    return counts.astype(np.uint16)[:, row_patient]


def bootstrap(
    score: Score, labels: np.ndarray, predictions: Sequence[np.ndarray], draws: np.ndarray, *, seed: int
) -> Interval:
    """Mean score over seeds, with a percentile interval over patients and seeds together.

    Each draw resamples the patients and, with replacement, the seeds; so the interval holds both what another test
    set and what another training run would change.

    Args:
        score: takes labels (n,), predictions (n,) and weights (k, n), gives (k,).
        labels: (n,).
        predictions: one array (n,) for each of s seeds.
        draws: row weights, (k, n).
    """
    ones = np.ones((1, len(labels)))
    value = float(np.mean([score(labels, p, ones)[0] for p in predictions]))
    parts = [draws[start : start + _DRAWS_AT_ONCE] for start in range(0, len(draws), _DRAWS_AT_ONCE)]
    by_seed = np.stack([np.concatenate([score(labels, p, part) for part in parts]) for p in predictions])  # (s, k)
    n_seeds, n_draws = by_seed.shape
    seeds = np.random.default_rng(seed).multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=n_draws)
    means = (by_seed * seeds.T).sum(axis=0) / n_seeds
    means = means[~np.isnan(means)]  # draws of one class only have no score
    if np.isnan(value) or not len(means):
        return Interval(float("nan"), float("nan"), float("nan"))
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(value, float(low), float(high))
