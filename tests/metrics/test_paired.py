"""DeLong equals its definition over all pairs, and the bootstrap where both apply."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from embedcache.metrics.classification import Ranking, auroc
from embedcache.metrics.intervals import PatientDraws, Sampled, bootstrap
from embedcache.metrics.paired import (
    PairedDifference,
    compare_aurocs,
    delong,
    holm,
    jackknife_error,
    paired_bootstrap,
)


def two_models(n: int, seed: int = 0, gain: float = 0.3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels and the correlated scores of two models, a the better one."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    labels[:4] = 0, 0, 1, 1
    shared = rng.normal(size=n) + labels
    return labels, shared + gain * labels + 0.7 * rng.normal(size=n), shared + 0.7 * rng.normal(size=n)


def over_all_pairs(labels: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Difference and standard error from structural components, as the paper of 1988 writes them."""
    wins = []
    for scores in (a, b):
        apart = scores[labels == 1][:, None] - scores[labels == 0][None, :]
        wins.append(np.where(apart > 0, 1.0, np.where(apart == 0, 0.5, 0.0)))
    of_positive, of_negative = np.cov([w.mean(axis=1) for w in wins]), np.cov([w.mean(axis=0) for w in wins])
    covariance = of_positive / wins[0].shape[0] + of_negative / wins[0].shape[1]
    contrast = np.array([1, -1])
    return wins[0].mean() - wins[1].mean(), math.sqrt(contrast @ covariance @ contrast)


@pytest.mark.parametrize("decimals", [12, 0])
def test_delong_equals_its_definition(decimals: int) -> None:
    for seed in range(10):
        labels, a, b = two_models(60, seed)
        a, b = np.round(a, decimals), np.round(b, decimals)
        value, error = over_all_pairs(labels, a, b)
        found = delong(labels, a, b)
        assert found.method == "delong"
        assert found.value == pytest.approx(value)
        assert found.value == pytest.approx(roc_auc_score(labels, a) - roc_auc_score(labels, b))
        assert (found.low, found.high) == pytest.approx((value - 1.959964 * error, value + 1.959964 * error))
        assert found.p_value == pytest.approx(2 * NormalDist().cdf(-abs(value) / error))
        swapped = delong(labels, b, a)
        assert (swapped.value, swapped.p_value) == pytest.approx((-found.value, found.p_value))


def test_delong_and_bootstrap_agree_where_each_patient_has_one_row() -> None:
    labels, a, b = two_models(800, gain=0.2)
    draws = PatientDraws(np.arange(800), 4000, seed=0)
    drawn = paired_bootstrap(*(bootstrap(Ranking.of(labels, scores).auroc, draws) for scores in (a, b)))
    exact = delong(labels, a, b)
    assert drawn.value == pytest.approx(exact.value)
    assert (drawn.low, drawn.high) == pytest.approx((exact.low, exact.high), abs=0.1 * (exact.high - exact.low))
    assert 0.001 < exact.p_value < 0.2
    assert drawn.p_value == pytest.approx(exact.p_value, abs=0.02)


def test_delong_finds_as_many_false_differences_as_it_says() -> None:
    p_values = np.array([delong(*two_models(100, seed, gain=0)).p_value for seed in range(1000)])
    assert 0.03 < (p_values < 0.05).mean() < 0.07
    assert 0.45 < (p_values < 0.5).mean() < 0.55


def test_equal_scores_do_not_differ() -> None:
    labels, a, _ = two_models(50)
    for same in (a, 2 * a + 1):
        assert delong(labels, a, same) == PairedDifference(0.0, 0.0, 0.0, 1.0, "delong")
    sampled = bootstrap(Ranking.of(labels, a).auroc, PatientDraws(np.arange(50), 100, seed=0))
    assert paired_bootstrap(sampled, sampled) == PairedDifference(0.0, 0.0, 0.0, 1.0, "bootstrap")


def test_what_has_no_score_cannot_be_compared() -> None:
    labels, a, b = two_models(20)
    one_positive = (np.arange(20) == 3).astype(int)
    undefined = [
        delong(np.zeros(20, int), a, b),
        delong(one_positive, a, b),
        delong(labels, a, np.full(20, 0.5)),
        delong(labels, np.where(np.arange(20) == 2, np.nan, a), b),
        paired_bootstrap(Sampled(np.array(np.nan), np.full(10, np.nan)), Sampled(np.array(0.5), np.full(10, 0.5))),
    ]
    for found in undefined:
        assert np.isnan([found.value, found.low, found.high, found.p_value]).all()


def test_the_bootstrap_counts_draws_beyond_zero() -> None:
    a, b = Sampled(np.array(0.3), np.linspace(-0.1, 0.89, 100)), Sampled(np.array(0.0), np.zeros(100))
    found = paired_bootstrap(a, b)
    crossing = (a.samples <= 0).sum()
    assert found.p_value == 2 * (1 + crossing) / 101
    assert (found.low, found.high) == tuple(np.percentile(a.samples, [2.5, 97.5]))
    assert paired_bootstrap(b, a).p_value == found.p_value
    assert paired_bootstrap(Sampled(a.value, a.samples + 1), b).p_value == 2 / 101
    gaps = np.where(np.arange(100) % 4 == 0, np.nan, a.samples + 1)
    assert paired_bootstrap(Sampled(a.value, gaps), b).p_value == 2 / 76


def test_runs_that_differ_by_chance_are_not_called_different() -> None:
    rng = np.random.default_rng(0)
    for shape in ((3, 3), (3, 5)):
        p_values = []
        for _ in range(300):
            a, b = (Sampled(v, v + 1e-3 * rng.normal(size=(500, 1))) for v in (rng.normal(size=n) for n in shape))
            p_values.append(paired_bootstrap(a, b).p_value)
        assert np.mean(np.array(p_values) < 0.05) < 0.09


def test_seeds_are_paired_one_by_one() -> None:
    rng = np.random.default_rng(0)
    b = Sampled(np.array([0.6, 0.9]), np.array([0.6, 0.9]) + 0.01 * rng.normal(size=(200, 1)))
    a = Sampled(b.value + 0.05, b.samples + 0.05)
    found = paired_bootstrap(a, b)
    assert (found.value, found.low, found.high) == pytest.approx((0.05, 0.05, 0.05))
    shuffled = paired_bootstrap(a, Sampled(b.value[::-1], b.samples[:, ::-1]))
    assert shuffled.value == pytest.approx(0.05)
    assert shuffled.high - shuffled.low > 1
    with pytest.raises(ValueError, match="200 and 50 draws"):
        paired_bootstrap(a, Sampled(b.value, b.samples[:50]))


def test_the_method_follows_from_the_rows_a_patient_has() -> None:
    labels, a, b = two_models(300)
    assert compare_aurocs(labels, a, b, draws=PatientDraws(np.arange(300), 50, seed=0)) == delong(labels, a, b)
    draws = PatientDraws(np.arange(300) // 3, 500, seed=0)
    found = compare_aurocs(labels, a, b, draws=draws)
    assert found.method == "bootstrap"
    assert found.value == pytest.approx(float((auroc(labels, a) - auroc(labels, b))[0]))
    drawn = np.concatenate([auroc(labels, a, part) - auroc(labels, b, part) for part in draws.parts()])
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])))
    with pytest.raises(ValueError, match="draws of 300 rows, expected the 10"):
        compare_aurocs(labels[:10], a[:10], b[:10], draws=draws)


def test_rows_of_a_patient_that_go_together_prove_less() -> None:
    labels, a, b = (np.repeat(x, 5) for x in two_models(80, gain=0.25))
    whole = compare_aurocs(labels, a, b, draws=PatientDraws(np.arange(400) // 5, 2000, seed=0))
    naive = delong(labels, a, b)
    assert whole.high - whole.low > 1.8 * (naive.high - naive.low)
    assert whole.p_value > naive.p_value


def test_holm_adjusts_for_the_number_of_tests() -> None:
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.array([0.04, np.nan, 0.01])), [0.04, np.nan, 0.02])
    np.testing.assert_array_equal(holm([0.5, 0.9]), [1, 1])
    assert holm([]).shape == (0,)
    p_values = np.random.default_rng(0).random(30) ** 2
    # step by step, as Holm describes it: an adjusted value is the least level at which its test is rejected
    for level in (0.05, 0.3, 0.7):
        rejected = set()
        for step, i in enumerate(np.argsort(p_values)):
            if p_values[i] > level / (30 - step):
                break
            rejected.add(i)
        assert set(np.flatnonzero(holm(p_values) <= level)) == rejected


def test_groups_left_out_give_the_jackknifes_error() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=1000)
    groups = np.arange(1000) % 10
    without = np.array([x[groups != k].mean() for k in range(10)])
    assert jackknife_error(without) == pytest.approx(x.std() / math.sqrt(1000), rel=0.5)
    of_groups = np.array([x[groups == k].mean() for k in range(10)])
    assert jackknife_error(without) == pytest.approx(of_groups.std(ddof=1) / math.sqrt(10))  # of a mean it is exact


def test_other_training_patients_widen_a_difference() -> None:
    labels, a, b = two_models(200)
    draws = PatientDraws(np.arange(200), 2000, seed=0)
    same, far = np.full(10, 0.1), np.linspace(-0.02, 0.02, 10)
    alone = compare_aurocs(labels, a, b, draws=draws)
    assert compare_aurocs(labels, a, b, draws=draws, left_out=same) == alone
    wider = compare_aurocs(labels, a, b, draws=draws, left_out=far)
    assert wider.method == "delong"
    assert wider.value == alone.value
    assert wider.high - wider.low > alone.high - alone.low
    assert wider.p_value > alone.p_value
    spread = math.hypot((alone.high - alone.low) / 2 / NormalDist().inv_cdf(0.975), jackknife_error(far))
    assert wider.high - wider.value > NormalDist().inv_cdf(0.975) * spread  # Student's t reaches further
    first, second = (bootstrap(Ranking.of(labels, scores).auroc, draws) for scores in (a, b))
    drawn, moved = (paired_bootstrap(first, second, left_out=groups) for groups in (None, far))
    assert moved.high - moved.low > drawn.high - drawn.low
    assert moved.value == drawn.value
