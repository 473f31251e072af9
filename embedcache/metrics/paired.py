"""Two models on the same patients: how far their scores differ, and whether chance explains it.

Shape notation: n rows, p positive rows, m negative rows, k draws, s seeds. Intervals hold 95%, p-values are two-sided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

from embedcache.metrics.classification import Ranking
from embedcache.metrics.intervals import PatientDraws, Sampled, bootstrap, percentiles, with_seeds


@dataclass(frozen=True)
class PairedDifference:
    """How much a's score exceeds b's; NaN where undefined."""

    value: float
    low: float
    high: float
    p_value: float
    method: Literal["bootstrap", "delong"]


def jackknife_error(differences: np.ndarray) -> float:
    """Standard error of a difference over training sets, from groups of training patients left out in turn.

    Source: the delete-a-group jackknife (Efron and Tibshirani 1993, ch. 11).

    Args:
        differences: of models that were trained without each group, (g,).
    """
    g = len(differences)
    return math.sqrt((g - 1) / g * float(((differences - differences.mean()) ** 2).sum()))


def paired_bootstrap(a: Sampled, b: Sampled, *, left_out: np.ndarray | None = None) -> PairedDifference:
    """Compares two scores draw by draw: other patients, and other training runs where there were several.

    The p-value is twice the share of draws in which the difference reaches or crosses zero. The value itself counts
    as such a draw, so that k draws never give less than 2 / (k + 1).

    Args:
        a: value (s,) or (), samples (k, s) or (k,).
        b: on the same draws; as many seeds are paired one by one, another number is taken for other runs.
        left_out: differences of models that were trained without each of g groups of training patients, (g,): the
            draws then are of other training patients too, each moved by Student's t times the jackknife's error.
    """
    if len(a.samples) != len(b.samples):
        raise ValueError(f"{len(a.samples)} and {len(b.samples)} draws, expected the same draws")
    a, b = a.by_seed, b.by_seed
    value = float(a.mean.value - b.mean.value)
    if a.value.shape == b.value.shape:
        samples = with_seeds(Sampled(a.value - b.value, a.samples - b.samples), seed=0)
    else:
        samples = with_seeds(a, seed=0) - with_seeds(b, seed=1)
    if left_out is not None:
        moves = np.random.default_rng(2).standard_t(len(left_out) - 1, len(samples))
        samples = samples + moves * jackknife_error(left_out)
    interval = percentiles(value, samples)
    if math.isnan(interval.low):
        return PairedDifference(value, math.nan, math.nan, math.nan, "bootstrap")
    samples = samples[~np.isnan(samples)]
    crossing = min(int((samples <= 0).sum()), int((samples >= 0).sum()))
    p_value = min(1.0, 2 * (1 + crossing) / (len(samples) + 1))
    return PairedDifference(value, interval.low, interval.high, p_value, "bootstrap")


def delong(labels: np.ndarray, a: np.ndarray, b: np.ndarray, *, left_out: np.ndarray | None = None) -> PairedDifference:
    """Compares two AUROCs on independent rows (DeLong, DeLong and Clarke-Pearson 1988).

    Sorting takes the place of comparing all pairs (Sun and Xu 2014). Undefined where there are fewer than two rows of
    a class, or where one of the scores is the same for all rows.

    Args:
        labels: 0 or 1, (n,), one row a patient.
        a: scores, (n,).
        b: scores, (n,).
        left_out: as of `paired_bootstrap`: the variances of other test and of other training patients are added, and
            Student's t of the degrees of freedom that the sum has (Satterthwaite 1946) takes the normal's place.
    """
    n_positive, n_negative = int((labels == 1).sum()), int((labels == 0).sum())
    if min(n_positive, n_negative) < 2 or not (a.min() < a.max() and b.min() < b.max()):
        return PairedDifference(math.nan, math.nan, math.nan, math.nan, "delong")
    (a_positive, a_negative), (b_positive, b_negative) = _placements(labels, a), _placements(labels, b)
    of_positive, of_negative = a_positive - b_positive, a_negative - b_negative
    value = float(of_positive.mean())
    variance = of_positive.var(ddof=1) / n_positive + of_negative.var(ddof=1) / n_negative
    of_training = 0.0 if left_out is None else jackknife_error(left_out) ** 2
    error = math.sqrt(variance + of_training)
    if error == 0:
        return PairedDifference(value, value, value, float(value == 0), "delong")
    if left_out is None or of_training == 0:
        reach = NormalDist().inv_cdf(0.975) * error
        p_value = math.erfc(abs(value) / error / math.sqrt(2))
    else:
        from scipy.special import stdtr, stdtrit

        freedom = (len(left_out) - 1) * (error**2 / of_training) ** 2
        reach = float(stdtrit(freedom, 0.975)) * error
        p_value = 2 * float(stdtr(freedom, -abs(value) / error))
    return PairedDifference(value, value - reach, value + reach, p_value, "delong")


def compare_aurocs(
    labels: np.ndarray, a: np.ndarray, b: np.ndarray, *, draws: PatientDraws, left_out: np.ndarray | None = None
) -> PairedDifference:
    """Compares two AUROCs: by DeLong where each patient has one row and each side one run, else by draws.

    Args:
        labels: 0 or 1, (n,).
        a: scores, (n,) or of several runs (s, n).
        b: scores, alike.
        draws: of the patients that these rows belong to.
        left_out: as of `paired_bootstrap`.
    """
    if draws.n_rows != len(labels):
        raise ValueError(f"draws of {draws.n_rows} rows, expected the {len(labels)} that have labels")
    a, b = np.atleast_2d(a), np.atleast_2d(b)
    if draws.n_patients == draws.n_rows and len(a) == len(b) == 1:
        return delong(labels, a[0], b[0], left_out=left_out)
    first, second = (
        Sampled.of_runs([bootstrap(Ranking.of(labels, scores).auroc, draws) for scores in runs]) for runs in (a, b)
    )
    return paired_bootstrap(first, second, left_out=left_out)


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Adjusts p-values for how many there are (Holm 1979): those up to 0.05 then hold together at 5%.

    Args:
        p_values: NaN marks a test that was not made and stays NaN.

    Returns:
        Adjusted p-values in the same order, float64.
    """
    adjusted = np.array(p_values, np.float64)
    made = np.flatnonzero(~np.isnan(adjusted))
    order = made[np.argsort(adjusted[made], kind="stable")]
    steps = adjusted[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted


def _placements(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of negatives that each positive outranks, (p,), and of positives that outrank each negative, (m,)."""
    positive, negative = scores[labels == 1], scores[labels == 0]
    return _share_below(positive, negative), 1 - _share_below(negative, positive)


def _share_below(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Share of the others that each score exceeds, ties counting half."""
    others = np.sort(others)
    below, not_above = np.searchsorted(others, scores, "left"), np.searchsorted(others, scores, "right")
    return (below + not_above) / 2 / len(others)
