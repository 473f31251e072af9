"""Logistic regression equals scikit-learn's, solved to the end from nothing."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from made import BINARY, BOTH, KIND, told_labels
from sklearn.linear_model import LogisticRegression

from embedcache.stage_two import logistic
from embedcache.stage_two.logistic import STRENGTHS, fit_logistic
from embedcache.stage_two.targets import Target

MILD = (1e-6, 1e-4, 1e-2, 1.0)


def world(target: Target, n: int, d: int, *, blank: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features (n + 30, d), labels (n, t) of the first n in another order, and those rows."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n + 30, d)).astype(np.float32)
    rows = rng.permutation(n)
    return x, rows, told_labels(target, x, rng, blank=blank)[rows]


def logistic_logits(x: np.ndarray, rows: np.ndarray, labels: np.ndarray, asked: np.ndarray, **settings: Any) -> list:
    """What the maps say of the rows asked, (p, c) for each strength."""
    return [fitted(x[asked]) for fitted in fit_logistic(x[rows], labels, **settings)]


def reference(x: np.ndarray, y: np.ndarray, asked: np.ndarray, strength: float, weight: str | None) -> np.ndarray:
    model = LogisticRegression(C=strength, class_weight=weight, tol=1e-10, max_iter=100_000)
    decision = model.fit(x.astype(np.float64), y).decision_function(asked.astype(np.float64))
    return decision[:, None] if decision.ndim == 1 else decision


def close(ours: np.ndarray, theirs: np.ndarray, rtol: float = 2e-3) -> None:
    """Within a share of how far the logits spread, however little that is; their mean within 0.001."""
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(
        ours - ours.mean(0), theirs - theirs.mean(0), atol=rtol * np.ptp(theirs - theirs.mean(0))
    )
    np.testing.assert_allclose(ours.mean(0), theirs.mean(0), atol=1e-3, rtol=rtol)


@pytest.mark.parametrize("weight", ["none", "balanced"])
@pytest.mark.parametrize(("n", "d"), [(20, 60), (200, 8)])  # fewer rows than dimensions, and more
def test_every_strength_equals_scikit_learns(n: int, d: int, weight: str) -> None:
    for target in (BINARY, BOTH, KIND):
        x, rows, labels = world(target, n, d, blank=0.2)
        strengths = MILD if n < d else (*MILD, 100.0)
        found = logistic_logits(
            x, rows, labels, np.arange(n, n + 30), target=target, strengths=strengths, class_weight=weight
        )
        assert len(found) == len(strengths)
        for strength, logits in zip(strengths, found, strict=True):
            parts = []
            for column in labels.T:
                known = ~np.isnan(column)
                assert 0 < known.sum() < n
                sklearns = None if weight == "none" else "balanced"
                parts.append(reference(x[rows[known]], column[known], x[n:], strength, sklearns))
            close(logits, np.concatenate(parts, axis=1))


def test_one_strength_equals_the_same_at_the_end_of_a_path() -> None:
    x, rows, labels = world(KIND, 120, 6)
    asked = np.arange(120, 150)
    path = logistic_logits(x, rows, labels, asked, target=KIND, strengths=STRENGTHS, class_weight="none")
    for k in (0, 5, 8):
        (alone,) = logistic_logits(
            x, rows, labels, asked, target=KIND, strengths=STRENGTHS[k : k + 1], class_weight="none"
        )
        close(path[k], alone)


def test_many_unknowns_are_solved_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for target in (BINARY, KIND):
        x, rows, labels = world(target, 120, 6)
        asked = np.arange(120, 150)
        newton = logistic_logits(x, rows, labels, asked, target=target, strengths=MILD, class_weight="none")
        with monkeypatch.context() as patch:
            patch.setattr(logistic, "_LARGEST_HESSIAN", 0)
            other = logistic_logits(x, rows, labels, asked, target=target, strengths=MILD, class_weight="none")
        for ours, theirs in zip(other, newton, strict=True):
            close(ours, theirs, rtol=0.01)


@pytest.mark.parametrize("target", [BINARY, KIND])
def test_labels_that_a_plane_parts_are_no_trouble(target: Target) -> None:
    """At a huge C the solution runs away: it stays finite, right, and silent."""
    x, rows, labels = world(target, 20, 60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = logistic_logits(x, rows, labels, rows, target=target, strengths=STRENGTHS, class_weight="none")
    assert all(np.isfinite(logits).all() for logits in found)
    last = found[-1]
    said = last.argmax(axis=1) if target is KIND else last[:, 0] > 0
    assert (said == labels[:, 0]).all()


def test_one_class_alone_is_all_that_is_said() -> None:
    x, rows, _ = world(BOTH, 10, 4)
    labels = np.stack([np.ones(10), np.full(10, np.nan)], axis=1)
    (found,) = logistic_logits(x, rows, labels, np.arange(3), target=BOTH, strengths=[1.0], class_weight="balanced")
    assert found.tolist() == [[15, -15]] * 3
    (found,) = logistic_logits(
        x, rows, np.ones((10, 1)), np.arange(3), target=KIND, strengths=[1.0], class_weight="none"
    )
    assert found.tolist() == [[-15, 15, -15]] * 3


def test_a_class_that_training_lacks_is_never_said() -> None:
    x, rows, labels = world(KIND, 60, 5)
    asked = np.arange(60, 90)
    two = np.where(labels == 1, 2, labels)  # classes 0 and 2: their logits differ as those of two classes do
    (found,) = logistic_logits(x, rows, two, asked, target=KIND, strengths=[0.1], class_weight="none")
    expected = reference(x[rows], two[:, 0] == 2, x[asked], 0.1, None)
    close(found[:, 2:] - found[:, :1], expected)
    assert (KIND.probabilities(found)[:, 1] < 1e-4).all()
    four = Target("four", "multi-class", ("kind",), ("no", "yes", "maybe", "never"))
    (found,) = logistic_logits(x, rows, labels, asked, target=four, strengths=[0.1], class_weight="none")
    close(found[:, :3], reference(x[rows], labels[:, 0], x[asked], 0.1, None))
    assert (found[:, 3] == -15).all()
