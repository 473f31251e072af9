"""Scores equal scikit-learn's and torchmetrics', weighted or not; what is undefined is NaN."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn
from torchmetrics.functional import classification as torchmetrics

from embedcache.metrics.classification import (
    Ranking,
    accuracy,
    auroc,
    average_precision,
    balanced_accuracy,
    f1,
    sensitivity,
    specificity,
    totals,
    youden_threshold,
)

RANKED = [
    (auroc, sklearn.roc_auc_score, torchmetrics.binary_auroc),
    (average_precision, sklearn.average_precision_score, torchmetrics.binary_average_precision),
]
BINARY = [
    (accuracy, sklearn.accuracy_score, torchmetrics.binary_accuracy),
    (f1, sklearn.f1_score, torchmetrics.binary_f1_score),
    (sensitivity, sklearn.recall_score, torchmetrics.binary_recall),
    (specificity, lambda *a, **k: sklearn.recall_score(*a, pos_label=0, **k), torchmetrics.binary_specificity),
]
WEIGHT_TYPES = [np.uint8, np.uint16, np.int64, np.float32, np.float64]


def repeated(theirs: Callable, labels: np.ndarray, scores: np.ndarray, counts: np.ndarray, **options: object) -> float:
    """A score that takes no weights, of rows that are repeated instead."""
    rows = np.repeat(np.arange(len(labels)), counts)
    return float(theirs(torch.from_numpy(scores[rows]), torch.from_numpy(labels[rows]), **options))


@pytest.mark.parametrize(("ours", "theirs", "others"), RANKED)
@pytest.mark.parametrize("decimals", [16, 1, 0])
def test_rankings_equal_the_references(ours, theirs, others, decimals: int) -> None:
    rng = np.random.default_rng(0)
    for share in (0.1, 0.5, 0.9) * 5:
        labels = (rng.random(80) < share).astype(int)
        labels[:2] = 0, 1
        scores = np.round(1 / (1 + np.exp(-rng.normal(size=80) - labels)), decimals)
        weights = rng.integers(0, 4, (5, 80))
        weights[:, :2] += 1
        expected = [theirs(labels, scores, sample_weight=w) for w in weights]
        for kind in WEIGHT_TYPES:
            np.testing.assert_allclose(ours(labels, scores, weights.astype(kind)), expected, atol=1e-12)
        np.testing.assert_allclose(ours(labels, scores), [theirs(labels, scores)], atol=1e-12)
        others_say = [repeated(others, labels, scores, w) for w in weights]
        np.testing.assert_allclose(ours(labels, scores, weights), others_say, atol=1e-5)


@pytest.mark.parametrize(("ours", "theirs", "others"), BINARY)
def test_scores_of_predictions_equal_the_references(ours, theirs, others) -> None:
    rng = np.random.default_rng(0)
    labels, predicted, weights = rng.integers(0, 2, 50), rng.integers(0, 2, 50), rng.integers(0, 4, (6, 50))
    expected = [theirs(labels, predicted, sample_weight=w) for w in weights]
    for kind in WEIGHT_TYPES:
        np.testing.assert_allclose(ours(labels, predicted, weights.astype(kind)), expected)
    np.testing.assert_allclose(ours(labels, predicted), [theirs(labels, predicted)])
    np.testing.assert_allclose(
        ours(labels, predicted, weights), [repeated(others, labels, predicted, w) for w in weights], atol=1e-6
    )


def test_multi_class_accuracies_equal_the_references() -> None:
    rng = np.random.default_rng(0)
    labels, predicted, weights = rng.integers(0, 3, 60), rng.integers(0, 4, 60), rng.integers(0, 3, (4, 60))
    expected = [sklearn.accuracy_score(labels, predicted, sample_weight=w) for w in weights]
    np.testing.assert_allclose(accuracy(labels, predicted, weights), expected)
    balanced = balanced_accuracy(labels, predicted, weights)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        expected = [sklearn.balanced_accuracy_score(labels, predicted, sample_weight=w) for w in weights]
    np.testing.assert_allclose(balanced, expected)
    macro = {"num_classes": 4, "average": "none"}
    by_class = torchmetrics.multiclass_accuracy(torch.from_numpy(predicted), torch.from_numpy(labels), **macro)
    assert balanced_accuracy(labels, predicted)[0] == pytest.approx(float(by_class[:3].mean()))


def test_a_class_that_a_weighting_lacks_has_no_recall() -> None:
    labels, predicted = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0])
    weights = np.array([[1, 1, 1, 0], [0, 0, 0, 0], [2, 0, 0, 1]])
    np.testing.assert_allclose(balanced_accuracy(labels, predicted, weights), [0.75, np.nan, 0.5])


@pytest.mark.parametrize("score", [auroc, average_precision])
def test_one_class_or_one_score_ranks_nothing(score) -> None:
    mixed = np.array([0, 1, 1, 0, 0])
    assert np.isnan(score(np.zeros(5, int), np.arange(5.0))).all()
    assert np.isnan(score(np.ones(5, int), np.arange(5.0))).all()
    for constant in (0.0, 0.3, -np.inf, np.nan):
        assert np.isnan(score(mixed, np.full(5, constant))).all()
    assert np.isnan(score(mixed, np.array([0.1, np.nan, 0.3, 0.4, 0.5]))).all()


@pytest.mark.parametrize(("score", "chance"), [(auroc, 0.5), (average_precision, 0.5)])
def test_a_weighting_of_one_class_or_one_score_ranks_nothing(score, chance: float) -> None:
    labels, scores = np.array([0, 1, 0, 1]), np.array([0.2, 0.2, 0.6, 0.6])
    weights = np.array([[1, 0, 3, 0], [0, 2, 0, 1], [1, 1, 0, 0], [0, 0, 2, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
    found = score(labels, scores, weights)
    assert np.isnan(found[:5]).all()
    assert found[5] == chance  # two scores that tell nothing are ranked, though not well


def test_predictions_without_a_class_are_undefined() -> None:
    zeros, ones = np.zeros(3, int), np.ones(3, int)
    assert np.isnan(f1(zeros, zeros)).all()
    assert f1(zeros, ones)[0] == f1(ones, zeros)[0] == 0
    assert np.isnan(sensitivity(zeros, ones)).all()
    assert np.isnan(specificity(ones, ones)).all()
    for score in (accuracy, balanced_accuracy, f1, sensitivity, specificity):
        assert np.isnan(score(ones, ones, np.zeros((2, 3), np.uint8))).all()


def test_a_ranking_is_sorted_once_and_scored_often() -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 30), rng.normal(size=30)
    ranking = Ranking.of(labels, scores)
    for _ in range(3):
        weights = rng.integers(0, 3, (4, 30), dtype=np.uint8)
        np.testing.assert_array_equal(ranking.auroc(weights), auroc(labels, scores, weights))
        np.testing.assert_array_equal(ranking.average_precision(weights), average_precision(labels, scores, weights))


def test_large_counts_do_not_overflow() -> None:
    labels, scores = np.repeat([0, 1], 70_000), np.arange(140_000.0)
    assert auroc(labels, scores, np.full((1, 140_000), 65_535, np.uint16))[0] == pytest.approx(1)
    assert average_precision(labels, scores, np.full((1, 140_000), 65_535, np.uint16))[0] == pytest.approx(1)
    assert totals(np.full((1, 140_000), 255, np.uint8), labels == 0)[0, 0] == 255 * 70_000
    assert accuracy(labels, 1 - labels, np.full((1, 140_000), 255, np.uint8))[0] == 0


def test_weights_of_another_shape_are_refused() -> None:
    for score in (auroc, average_precision, accuracy, balanced_accuracy, f1):
        with pytest.raises(ValueError, match=r"\(2, 4\) for 3 rows, expected \(k, 3\)"):
            score(np.zeros(3, int), np.zeros(3), np.ones((2, 4)))


@pytest.mark.parametrize("decimals", [12, 1, 0])
def test_no_threshold_beats_youdens(decimals: int) -> None:
    rng = np.random.default_rng(0)
    for shift in (-1, 0, 1) * 5:
        labels = rng.integers(0, 2, 40)
        scores = np.round(rng.normal(size=40) + shift * labels, decimals)

        def gain(threshold: float, labels: np.ndarray = labels, scores: np.ndarray = scores) -> float:
            called = (scores >= threshold).astype(int)
            return float((sensitivity(labels, called) + specificity(labels, called) - 1)[0])

        best = max(gain(s) for s in scores)
        threshold = youden_threshold(labels, scores)
        assert gain(threshold) == pytest.approx(best)
        false_alarms, hits, _ = sklearn.roc_curve(labels, scores)
        assert gain(threshold) == pytest.approx((hits - false_alarms).max())
        equal = [s for s in np.unique(scores) if gain(s) == pytest.approx(best)]
        next_best = equal[(len(equal) - 1) // 2]
        assert threshold <= next_best
        assert not ((scores >= threshold) & (scores < next_best)).any()


def test_youdens_threshold_lies_between_scores() -> None:
    labels = np.array([0, 0, 1, 1])
    assert youden_threshold(labels, np.array([0.0, 1.0, 2.0, 3.0])) == 1.5
    assert youden_threshold(np.array([0, 1, 0, 1, 0, 1]), np.arange(6.0)) == 2.5  # the middle of 0.5, 2.5 and 4.5
    assert youden_threshold(labels, np.array([3.0, 2.0, 1.0, 0.0])) == 0
    assert youden_threshold(labels, np.full(4, 0.3)) == 0.3
    neighbours = np.array([0.3, np.nextafter(np.float32(0.3), np.float32(1))], np.float32)
    assert youden_threshold(np.array([0, 1]), neighbours) == neighbours[1]
    for one_class in (np.zeros(4, int), np.ones(4, int)):
        assert math.isnan(youden_threshold(one_class, np.arange(4.0)))
