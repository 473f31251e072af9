"""Scores equal scikit-learn's, weighted or not; what is undefined is NaN."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as reference

from embedcache.metrics.classification import accuracy, auroc, average_precision
from embedcache.metrics.intervals import bootstrap, patient_draws

PAIRS = [(auroc, reference.roc_auc_score), (average_precision, reference.average_precision_score)]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("ties", [False, True])
def test_equal_to_scikit_learn(ours, theirs, ties: bool) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        labels = rng.integers(0, 2, 80)
        scores = rng.normal(size=80) + labels
        scores = np.round(scores) if ties else scores
        weights = rng.integers(0, 4, (5, 80))
        expected = [theirs(labels, scores, sample_weight=w) for w in weights]
        np.testing.assert_allclose(ours(labels, scores, weights), expected, atol=1e-12)
        np.testing.assert_allclose(ours(labels, scores), [theirs(labels, scores)], atol=1e-12)


def test_accuracy_equals_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels, predicted, weights = rng.integers(0, 3, 50), rng.integers(0, 3, 50), rng.integers(0, 3, (4, 50))
    expected = [reference.accuracy_score(labels, predicted, sample_weight=w) for w in weights]
    np.testing.assert_allclose(accuracy(labels, predicted, weights), expected)


@pytest.mark.parametrize("score", [auroc, average_precision])
def test_one_class_only_is_undefined(score) -> None:
    assert np.isnan(score(np.zeros(5, int), np.arange(5.0))).all()
    assert np.isnan(auroc(np.ones(5, int), np.arange(5.0))).all()


def test_constant_scores_rank_nothing() -> None:
    labels = np.array([0, 1, 1, 0, 0])
    assert auroc(labels, np.zeros(5))[0] == 0.5
    assert average_precision(labels, np.zeros(5))[0] == pytest.approx(0.4)


def test_weights_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \(k, 3\)"):
        auroc(np.zeros(3), np.zeros(3), np.ones((2, 4)))


def test_patients_are_drawn_whole() -> None:
    groups = np.array(["p", "q", "p", "r", "q"])
    draws = patient_draws(groups, 500, seed=0)
    assert draws.shape == (500, 5)
    np.testing.assert_array_equal(draws[:, 0], draws[:, 2])
    np.testing.assert_array_equal(draws[:, 1], draws[:, 4])
    np.testing.assert_array_equal(draws[:, 0] + draws[:, 1] + draws[:, 3], 3)
    assert abs(draws.mean() - 1) < 0.05


def test_the_interval_is_wider_where_rows_of_a_patient_go_together() -> None:
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(60), 5)
    labels = np.repeat(rng.integers(0, 2, 60), 5)
    scores = np.repeat(rng.normal(size=60), 5) + labels
    clustered = bootstrap(auroc, labels, [scores], patient_draws(patient, 1000, seed=0), seed=0)
    naive = bootstrap(auroc, labels, [scores], patient_draws(np.arange(300), 1000, seed=0), seed=0)
    assert clustered.value == naive.value
    assert clustered.low < clustered.value < clustered.high
    assert clustered.high - clustered.low > 1.5 * (naive.high - naive.low)


def test_seeds_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    good, poor = labels + rng.normal(size=400), labels + 4 * rng.normal(size=400)
    draws = patient_draws(np.arange(400), 1000, seed=0)
    both = bootstrap(auroc, labels, [good, poor], draws, seed=0)
    alone = bootstrap(auroc, labels, [good, good], draws, seed=0)
    assert both.high - both.low > 2 * (alone.high - alone.low)
    assert both.value == pytest.approx((auroc(labels, good)[0] + auroc(labels, poor)[0]) / 2)


def test_an_undefined_score_has_no_interval() -> None:
    labels = np.zeros(10, int)
    interval = bootstrap(auroc, labels, [np.arange(10.0)], patient_draws(np.arange(10), 50, seed=0), seed=0)
    assert np.isnan([interval.value, interval.low, interval.high]).all()
