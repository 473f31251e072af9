"""Retrieval: from the ranks at which queries find what they look for.

Shape notation: q queries.
"""

from __future__ import annotations

import math

import numpy as np


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


def _all_elsewhere(n_matches: int, n: int, k: int) -> float:
    """Probability that none of k candidates drawn from n is a match."""
    return math.comb(n - n_matches, k) / math.comb(n, k)
