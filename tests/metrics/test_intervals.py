"""Intervals resample whole patients, and cover the truth as often as they say."""

from __future__ import annotations

import math
import warnings
from statistics import NormalDist

import numpy as np
import pytest

from embedcache.metrics import intervals
from embedcache.metrics.classification import Ranking, accuracy
from embedcache.metrics.intervals import (
    Interval,
    PatientDraws,
    Sampled,
    bootstrap,
    difference,
    over_patients,
    over_patients_and_seeds,
    over_seeds,
    percentiles,
)


def rows(draws: PatientDraws) -> np.ndarray:
    return np.concatenate(list(draws.parts()))


def test_patients_are_drawn_whole() -> None:
    draws = PatientDraws(np.array(["p", "q", "p", "r", "q"]), 500, seed=0)
    weights = rows(draws)
    assert (weights.shape, weights.dtype) == ((500, 5), np.uint8)
    assert (draws.n_rows, draws.n_patients, draws.n_draws) == (5, 3, 500)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 2])
    np.testing.assert_array_equal(weights[:, 1], weights[:, 4])
    np.testing.assert_array_equal(weights[:, 0] + weights[:, 1] + weights[:, 3], 3)
    assert abs(weights.mean() - 1) < 0.05


def test_every_patient_is_as_likely() -> None:
    counts = PatientDraws(np.arange(50), 4000, seed=1).counts
    np.testing.assert_array_equal(counts.sum(axis=1), 50)
    np.testing.assert_allclose(counts.mean(axis=0), 1, atol=0.08)
    np.testing.assert_allclose(counts.var(axis=0), 1 - 1 / 50, atol=0.15)


def test_draws_depend_on_the_seed_and_not_on_the_size_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = np.arange(40) // 2
    draws = PatientDraws(groups, 250, seed=3)
    assert [len(part) for part in draws.parts()] == [100, 100, 50]
    first = rows(draws)
    np.testing.assert_array_equal(first, rows(draws))
    np.testing.assert_array_equal(first[:130], rows(PatientDraws(groups, 130, seed=3)))
    assert (first != rows(PatientDraws(groups, 250, seed=4))).any()
    monkeypatch.setattr(intervals, "_DRAWS_AT_ONCE", 7)
    np.testing.assert_array_equal(first, rows(PatientDraws(groups, 250, seed=3)))


def test_a_count_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "_MOST_COUNT", 2)
    with pytest.raises(OverflowError, match=r"drawn [3-9] times, at most 2"):
        PatientDraws(np.arange(100), 10, seed=0)


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="0 rows and 10 draws"):
        PatientDraws(np.array([]), 10, seed=0)
    with pytest.raises(ValueError, match="5 rows and 0 draws"):
        PatientDraws(np.arange(5), 0, seed=0)


def test_a_bootstrap_scores_all_rows_and_each_draw() -> None:
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 2, 30), rng.integers(0, 2, (3, 30))
    draws = PatientDraws(np.arange(30) // 3, 150, seed=0)
    sampled = bootstrap(lambda w: np.stack([accuracy(labels, p, w) for p in predictions], axis=1), draws)
    assert (sampled.value.shape, sampled.samples.shape) == ((3,), (150, 3))
    np.testing.assert_allclose(sampled.value, (predictions == labels).mean(axis=1))
    by_hand = [[np.repeat(p == labels, w).mean() for p in predictions] for w in rows(draws)]
    np.testing.assert_allclose(sampled.samples, by_hand)
    second = sampled[1]
    assert second.value == sampled.value[1]
    np.testing.assert_array_equal(second.samples, sampled.samples[:, 1])
    np.testing.assert_array_equal(sampled[..., :2].samples, sampled.samples[:, :2])


def test_the_interval_is_wider_where_rows_of_a_patient_go_together() -> None:
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(60), 5)
    labels = np.repeat(rng.integers(0, 2, 60), 5)
    score = Ranking.of(labels, np.repeat(rng.normal(size=60), 5) + labels).auroc
    clustered = over_patients(bootstrap(score, PatientDraws(patient, 1000, seed=0)))
    naive = over_patients(bootstrap(score, PatientDraws(np.arange(300), 1000, seed=0)))
    assert clustered.value == naive.value
    assert clustered.low < clustered.value < clustered.high
    assert clustered.high - clustered.low > 1.5 * (naive.high - naive.low)


def width(interval: Interval) -> float:
    return interval.high - interval.low


def test_patients_and_seeds_each_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    value = rng.normal(size=20)
    of_patient = rng.normal(size=4000)[:, None]
    sampled = Sampled(value, value + of_patient)
    patients, seeds = over_patients(sampled), over_seeds(sampled)
    both = over_patients_and_seeds(sampled, seed=0)
    assert patients.value == seeds.value == both.value == pytest.approx(value.mean())
    assert width(patients) == pytest.approx(2 * 1.96, rel=0.05)
    assert width(seeds) == pytest.approx(2 * 2.093 * value.std(ddof=1) / math.sqrt(20))  # Student's t of 19
    assert width(both) == pytest.approx(math.hypot(width(patients), width(seeds)), rel=0.05)
    assert over_seeds(sampled) == seeds


@pytest.mark.parametrize("n_seeds", [3, 5])
def test_a_few_seeds_cover_as_often_as_many(n_seeds: int) -> None:
    rng = np.random.default_rng(0)
    covered = []
    for k in range(400):
        value = rng.normal(size=n_seeds)
        found = over_patients_and_seeds(Sampled(value, value + 1e-3 * rng.normal(size=(1000, 1))), seed=k)
        covered.append(found.low < 0 < found.high)
    assert 0.92 < np.mean(covered) < 0.98


def test_one_seed_has_no_spread() -> None:
    samples = np.random.default_rng(0).normal(0.8, 0.1, 1000)
    for sampled in (Sampled(np.array(0.8), samples), Sampled(np.array([0.8]), samples[:, None])):
        assert over_seeds(sampled) == Interval(0.8, 0.8, 0.8)
        assert over_patients_and_seeds(sampled, seed=0) == over_patients(sampled)


def test_what_has_no_score_has_no_interval() -> None:
    labels = np.zeros(10, int)
    sampled = bootstrap(Ranking.of(labels, np.arange(10.0)).auroc, PatientDraws(np.arange(10), 50, seed=0))
    alone, both = over_seeds(sampled), over_patients_and_seeds(sampled, seed=0)
    for interval in (over_patients(sampled), alone, both, difference(sampled, sampled)):
        assert np.isnan([interval.value, interval.low, interval.high]).all()


def test_draws_without_a_score_are_left_out_unless_they_are_most() -> None:
    samples = np.arange(100.0)
    samples[50:] = np.nan
    assert percentiles(20.0, samples) == Interval(20.0, *np.percentile(np.arange(50), [2.5, 97.5]).tolist())
    samples[49] = np.nan
    mostly_missing = percentiles(20.0, samples)
    assert mostly_missing.value == 20
    assert np.isnan([mostly_missing.low, mostly_missing.high]).all()


def test_the_difference_of_other_patients_has_both_their_spreads() -> None:
    rng = np.random.default_rng(0)
    drawn = rng.normal(0.85, 0.03 / math.sqrt(2), (4000, 1))
    internal = Sampled(np.array([0.85, 0.85]), drawn.repeat(2, axis=1))
    external = Sampled(np.array([0.7, 0.7]), rng.normal(0.7, 0.04, (4000, 1)).repeat(2, axis=1))
    found = difference(internal, external)
    assert found.value == pytest.approx(0.15)
    assert width(found) == pytest.approx(2 * 1.96 * math.hypot(0.03 / math.sqrt(2), 0.04), rel=0.05)
    with pytest.raises(ValueError, match="4000 and 10 draws"):
        difference(internal, Sampled(external.value, external.samples[:10]))


def test_draws_of_one_seed_are_no_bond_between_two_sets() -> None:
    scores = np.random.default_rng(0).normal(size=200)
    sampled = [
        bootstrap(lambda w: (w @ scores) / w.sum(axis=1), PatientDraws(np.arange(200), 2000, seed=0)) for _ in "ab"
    ]
    assert width(difference(*sampled)) == pytest.approx(math.sqrt(2) * width(over_patients(sampled[0])), rel=0.1)


def test_several_scores_are_compared_one_by_one() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3\), expected one score"):
        over_patients(Sampled(np.zeros((2, 3)), np.zeros((10, 2, 3))))


def coverage(n_simulations: int, n_patients: int, n_draws: int) -> tuple[float, float]:
    """How often intervals over patients, and over rows, hold the true AUROC of four correlated rows a patient.

    A patient's rows share the label and half of the variance of the score. Positives score one deviation more, so
    that the truth is the chance that a normal variable of variance 2 exceeds -1.
    """
    truth = NormalDist().cdf(1 / math.sqrt(2))
    patient = np.repeat(np.arange(n_patients), 4)
    held = np.zeros((n_simulations, 2), bool)
    for i in range(n_simulations):
        rng = np.random.default_rng([7, i])
        labels = rng.integers(0, 2, n_patients)[patient]
        shared, own = rng.normal(size=n_patients)[patient], rng.normal(size=len(patient))
        score = Ranking.of(labels, labels + math.sqrt(0.5) * (shared + own)).auroc
        for j, groups in enumerate((patient, np.arange(len(patient)))):
            interval = over_patients(bootstrap(score, PatientDraws(groups, n_draws, seed=i)))
            held[i, j] = interval.low <= truth <= interval.high
    clustered, naive = held.mean(axis=0)
    return float(clustered), float(naive)


def test_intervals_over_patients_cover_and_those_over_rows_do_not() -> None:
    clustered, naive = coverage(200, n_patients=100, n_draws=300)
    assert clustered > 0.9
    assert naive < 0.87


@pytest.mark.slow
def test_coverage_over_many_simulations() -> None:
    clustered, naive = coverage(2000, n_patients=250, n_draws=1000)
    print(f"95% intervals hold the truth: over patients {clustered:.2%}, over rows {naive:.2%}")
    assert abs(clustered - 0.95) <= 0.015
    assert naive < 0.93


def test_runs_at_either_infinity_have_no_mean_and_make_no_noise() -> None:
    sampled = Sampled(np.array([1.0, 2.0]), np.array([[1.0, 3.0], [np.inf, -np.inf]]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mean = sampled.mean
    assert mean.value == 1.5
    np.testing.assert_array_equal(mean.samples, [2.0, np.nan])
