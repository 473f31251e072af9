"""Retrieval: from the ranks at which queries find what they look for.

Shape notation: q queries.
"""

from __future__ import annotations

import math

import numpy as np

from embedcache.metrics.classification import ratio, totals
from embedcache.metrics.intervals import Score


def recall_at(ranks: np.ndarray, k: int) -> float:
    """Share of queries whose first match is among the first k; NaN without queries.

    Args:
        ranks: of each query's best match, from 1, ties counted half, so that
            equal scores everywhere are no success, (q,).
    """
    return float(np.mean(ranks <= k)) if len(ranks) else math.nan


def chance_recall_at(n_matches: np.ndarray, n_candidates: int, k: int) -> float:
    """The recall at k that a random order of the candidates gives on average.

    Args:
        n_matches: how many candidates match each query, at least 1, (q,).
    """
    if not len(n_matches):
        return math.nan
    values, counts = np.unique(n_matches, return_counts=True)
    missed = [_all_elsewhere(int(m), n_candidates, min(k, n_candidates)) for m in values]
    return float(1 - np.average(missed, weights=counts))


def ranks_in_one_order(served: np.ndarray) -> np.ndarray:
    """Ranks of the first match where all queries get the same order of candidates, the best there is, (q,).

    Args:
        served: how many queries each candidate is the first match of, if those that serve most come first, (m,).
    """
    return np.repeat(np.arange(1, len(served) + 1), np.sort(served)[::-1])


def _all_elsewhere(n_matches: int, n: int, k: int) -> float:
    """Probability that none of k candidates drawn from n is a match."""
    return math.comb(n - n_matches, k) / math.comb(n, k)


def weighted_medians(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The median of values under each weighting, (k,); between two, their mean; NaN where nothing counts.

    Args:
        values: (q,).
        weights: how often each counts, whole numbers, (k, q).
    """
    order = np.argsort(values, kind="stable")
    up_to = np.cumsum(weights[:, order], axis=1, dtype=np.int64)
    total = up_to[:, -1:] if len(values) else np.zeros((len(weights), 1), np.int64)
    found = np.full(len(weights), np.nan)
    there = total[:, 0] > 0
    low, high = ((up_to[there] <= part).sum(axis=1) for part in ((total[there] - 1) // 2, total[there] // 2))
    found[there] = (values[order][low] + values[order][high]) / 2
    return found


def precision_at(relevant: np.ndarray, top: np.ndarray) -> np.ndarray:
    """Share of the best candidates of each query that are relevant, (q,); NaN where of none it is known.

    Args:
        relevant: of each candidate how relevant it is, 0 to 1, NaN where unknown, (m,).
        top: the best candidates of each query, (q, k).
    """
    values = relevant[top]
    known = ~np.isnan(values)
    n_known = known.sum(axis=1)
    sums = np.where(known, values, 0).sum(axis=1)
    return np.divide(sums, n_known, out=np.full(len(top), np.nan), where=n_known > 0)


def mean_of(values: np.ndarray) -> Score:
    """The mean of values (q,) that are defined, as a function of weights."""
    known = ~np.isnan(values)
    filled = np.where(known, values, 0.0)

    def mean(weights: np.ndarray) -> np.ndarray:
        sums = totals(weights, filled, known.astype(np.float64))
        return ratio(sums[:, 0], sums[:, 1])

    return mean
