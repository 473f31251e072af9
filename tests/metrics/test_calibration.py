"""Calibration equals scikit-learn's logistic regression, torchmetrics and plain loops; fits stay finite."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss
from torchmetrics.functional.classification import binary_calibration_error

from embedcache.metrics.calibration import (
    CalibrationLine,
    brier,
    ece,
    fit_platt,
    fit_temperature,
    slope_and_intercept,
    to_prevalence,
)
from embedcache.metrics.intervals import PatientDraws, bootstrap


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def drawn(n: int, seed: int = 0, slope: float = 1.0, intercept: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Labels and logits of which a calibrated model would have the slope and intercept."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=n) * 1.5
    return (rng.random(n) < sigmoid(slope * logits + intercept)).astype(int), logits


def regression(
    labels: np.ndarray, logits: np.ndarray, weights: np.ndarray | None = None, **options: bool
) -> np.ndarray:
    """Slope and intercept by scikit-learn, without a penalty."""
    fitted = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000, **options)
    fitted.fit(logits[:, None], labels, sample_weight=weights)
    return np.array([fitted.coef_[0, 0], np.ravel(fitted.intercept_)[0]])


SEPARATED = np.array([0, 0, 0, 1, 1, 1]), np.array([-3.0, -2, -1, 1, 2, 4])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_the_temperature_is_found_again(temperature: float) -> None:
    labels, logits = drawn(20_000)
    found = fit_temperature(labels, logits * temperature)
    assert found == pytest.approx(temperature, rel=0.05)
    assert 1 / found == pytest.approx(regression(labels, logits * temperature, fit_intercept=False)[0], rel=1e-4)


def test_the_temperature_stays_within_bounds() -> None:
    labels, logits = SEPARATED
    assert fit_temperature(labels, logits) == pytest.approx(0.05)
    assert fit_temperature(1 - labels, logits) == pytest.approx(20)
    assert fit_temperature(labels, 1000 * logits.astype(np.float32)) >= 0.05
    assert fit_temperature(labels, np.zeros(6)) == 1


def test_platt_equals_a_regression_on_smoothed_labels() -> None:
    labels, logits = drawn(300, slope=0.6, intercept=-1)
    n_positive, n_negative = labels.sum(), (1 - labels).sum()
    targets = np.where(labels == 1, (n_positive + 1) / (n_positive + 2), 1 / (n_negative + 2))
    twice = np.tile(logits, 2)
    expected = regression(np.repeat([1, 0], 300), twice, np.concatenate([targets, 1 - targets]))
    np.testing.assert_allclose(fit_platt(labels, logits), expected, atol=1e-5)


def test_platt_is_finite_where_classes_are_separated_or_missing() -> None:
    labels, logits = SEPARATED
    slope, intercept = fit_platt(labels, logits)
    assert 0 < slope < 10
    # at the best fit, expected and smoothed labels agree in sum and in correlation with the logits
    rest = sigmoid(slope * logits + intercept) - np.where(labels == 1, 0.8, 0.2)
    np.testing.assert_allclose([rest.sum(), rest @ logits], 0, atol=1e-8)
    assert fit_platt(labels, 1e6 * logits) == pytest.approx((slope / 1e6, intercept))
    assert fit_platt(np.ones(6, int), logits) == pytest.approx((0, math.log(7)), abs=1e-6)
    assert fit_platt(labels, np.full(6, 2.0)) == pytest.approx((0, 0), abs=1e-6)


def test_brier_equals_scikit_learn() -> None:
    labels, logits = drawn(80)
    weights = np.random.default_rng(1).integers(0, 4, (5, 80))
    p = sigmoid(0.5 * logits)
    expected = [brier_score_loss(labels, p, sample_weight=w) for w in weights]
    for kind in (np.uint8, np.int64, np.float64):
        np.testing.assert_allclose(brier(labels, p, weights.astype(kind)), expected)
    np.testing.assert_allclose(brier(labels, p), [brier_score_loss(labels, p)])
    assert np.isnan(brier(labels, p, np.zeros((1, 80), np.uint8))).all()


def by_loop(labels: np.ndarray, p: np.ndarray, weights: np.ndarray, n_bins: int) -> float:
    total = 0.0
    for rows in np.array_split(np.argsort(p), n_bins):
        if weights[rows].sum():
            mean_p, mean_y = np.average(p[rows], weights=weights[rows]), np.average(labels[rows], weights=weights[rows])
            total += weights[rows].sum() * abs(mean_p - mean_y)
    return total / weights.sum()


@pytest.mark.parametrize("n_bins", [1, 10, 15])
def test_ece_equals_a_loop_over_bins(n_bins: int) -> None:
    labels, logits = drawn(300, slope=0.5)
    p = sigmoid(logits)
    weights = np.random.default_rng(0).integers(0, 3, (6, 300), dtype=np.uint8)
    expected = [by_loop(labels, p, w, n_bins) for w in weights]
    np.testing.assert_allclose(ece(labels, p, weights, n_bins=n_bins), expected)
    np.testing.assert_allclose(ece(labels, p, n_bins=n_bins), [by_loop(labels, p, np.ones(300), n_bins)])


def test_ece_equals_torchmetrics_where_equal_bins_are_of_equal_mass() -> None:
    rng = np.random.default_rng(0)
    p = rng.permutation((np.arange(600) + 0.5) / 600)
    labels = (rng.random(600) < p**2).astype(int)
    expected = binary_calibration_error(torch.from_numpy(p), torch.from_numpy(labels), n_bins=15, norm="l1")
    assert ece(labels, p)[0] == pytest.approx(float(expected), abs=1e-6)


def test_equal_probabilities_share_a_bin() -> None:
    labels = np.random.default_rng(0).integers(0, 2, 90)
    assert ece(labels, np.full(90, 0.5))[0] == pytest.approx(abs(labels.mean() - 0.5))
    p = np.repeat([0.2, 0.7, 0.9], [10, 50, 30])
    expected = sum(abs((labels - p)[p == value].sum()) for value in np.unique(p)) / 90
    order = np.random.default_rng(1).permutation(90)
    assert ece(labels[order], p[order])[0] == pytest.approx(expected)
    assert ece(np.array([0, 1]), np.array([0.0, 1.0]))[0] == 0
    assert np.isnan(ece(labels, p, np.zeros((2, 90), np.uint8))).all()


def test_the_slope_equals_scikit_learn() -> None:
    for seed in range(5):
        labels, logits = drawn(200, seed, slope=0.6, intercept=-0.5)
        slope, intercept = slope_and_intercept(labels, logits)[0]
        assert slope == pytest.approx(regression(labels, logits)[0], rel=1e-5)
        assert sigmoid(logits + intercept).sum() == pytest.approx(labels.sum())


def test_calibrated_logits_have_slope_one_and_intercept_zero() -> None:
    labels, logits = drawn(40_000)
    np.testing.assert_allclose(slope_and_intercept(labels, logits)[0], [1, 0], atol=0.03)
    np.testing.assert_allclose(slope_and_intercept(labels, 2 * logits)[0, 0], 0.5, atol=0.02)
    np.testing.assert_allclose(slope_and_intercept(labels, logits + 0.7)[0], [1, -0.7], atol=0.03)


def test_one_step_is_near_a_refit() -> None:
    labels, logits = drawn(900, slope=0.7, intercept=-0.4)
    groups = np.arange(900) // 3
    draws = PatientDraws(groups, 300, seed=0)
    stepped = bootstrap(CalibrationLine.of(labels, logits).slope_and_intercept, draws)
    np.testing.assert_allclose(stepped.value, slope_and_intercept(labels, logits)[0], atol=1e-9)
    weights = np.concatenate(list(draws.parts()))
    refitted = np.array([slope_and_intercept(np.repeat(labels, w), np.repeat(logits, w))[0] for w in weights])
    for column in (0, 1):
        assert np.corrcoef(stepped.samples[:, column], refitted[:, column])[0, 1] > 0.99
    np.testing.assert_allclose(stepped.samples.std(axis=0), refitted.std(axis=0), rtol=0.05)
    np.testing.assert_allclose(stepped.samples.mean(axis=0), refitted.mean(axis=0), atol=0.01)


def test_slope_and_intercept_are_undefined_without_two_classes() -> None:
    labels, logits = SEPARATED
    for one_class in (np.zeros(6, int), np.ones(6, int)):
        assert np.isnan(slope_and_intercept(one_class, logits)).all()
        assert np.isnan(slope_and_intercept(one_class, logits, np.ones((3, 6), np.uint8))).all()
    touching = np.array([-1.0, 0, 1, 1, 2, 3])
    for separated in (logits, -logits, touching, np.full(6, 0.5)):
        slope, intercept = slope_and_intercept(labels, separated)[0]
        assert math.isnan(slope)
        assert sigmoid(separated + intercept).sum() == pytest.approx(3)


def test_a_weighting_without_two_classes_or_without_overlap_is_undefined() -> None:
    labels, logits = np.tile([0, 1, 0, 1], 200), np.tile([0.5, 1.0, 1.5, 2.0], 200)
    logits[:200] -= 2.0
    kept = np.stack([np.ones(800, bool), labels == 0, labels == 1, logits != 1.5, (labels == 0) | (logits == 2)])
    found = slope_and_intercept(labels, logits, kept.astype(np.uint8))
    np.testing.assert_array_equal(np.isnan(found[:, 0]), [False, True, True, False, True])
    np.testing.assert_array_equal(np.isnan(found[:, 1]), [False, True, True, False, False])


def test_another_prevalence_shifts_the_odds() -> None:
    p = np.array([0.0, 0.2, 0.5, 1.0])
    np.testing.assert_allclose(to_prevalence(p, 0.3, 0.3), p)
    np.testing.assert_allclose(to_prevalence(np.array([0.5]), 0.5, 0.1), [0.1])
    np.testing.assert_allclose(to_prevalence(to_prevalence(p, 0.2, 0.6), 0.6, 0.2), p)
    # two normal densities one apart: Bayes' rule is known at every prevalence
    x = np.linspace(-2, 3, 20)
    bayes = {share: share / (share + (1 - share) * np.exp(0.5 - x)) for share in (0.5, 0.03)}
    np.testing.assert_allclose(to_prevalence(bayes[0.5], 0.5, 0.03), bayes[0.03])


@pytest.mark.parametrize(("source", "target", "name"), [(0, 0.5, "source"), (1, 0.5, "source"), (0.5, 1.5, "target")])
def test_an_impossible_prevalence_is_refused(source: float, target: float, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} prevalence .* expected above 0 and below 1"):
        to_prevalence(np.array([0.5]), source, target)
