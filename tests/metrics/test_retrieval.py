from __future__ import annotations

import math

import numpy as np
import pytest

from embedcache.metrics.retrieval import chance_recall_at, recall_at


def test_recall_counts_first_matches() -> None:
    ranks = np.array([1, 2, 5, 5.5, 11])
    assert [recall_at(ranks, k) for k in (1, 5, 10)] == [0.2, 0.6, 0.8]
    assert math.isnan(recall_at(np.array([]), 1))


def test_chance_is_what_a_random_order_gives() -> None:
    rng = np.random.default_rng(0)
    n_matches = np.array([1, 3])
    firsts = np.array([[rng.permutation(20)[:m].min() + 1 for m in n_matches] for _ in range(20_000)])
    for k in (1, 5, 10):
        assert chance_recall_at(n_matches, 20, k) == pytest.approx((firsts <= k).mean(), abs=0.01)
    assert chance_recall_at(np.array([1]), 3, 10) == 1
    assert chance_recall_at(np.array([3]), 3, 1) == 1
    assert math.isnan(chance_recall_at(np.array([]), 3, 1))
