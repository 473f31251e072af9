"""Votes of the nearest rows, counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made import BINARY, BOTH, KIND, TARGETS, told_labels

from embedcache.stage_two import neighbours
from embedcache.stage_two.neighbours import neighbour_logits
from embedcache.stage_two.targets import Target


def by_hand(
    x: np.ndarray, rows: np.ndarray, labels: np.ndarray, asked: np.ndarray, target: Target, k: int, weight: str
) -> np.ndarray:
    """Probabilities, one row and one vote at a time."""
    x = x.astype(np.float64)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    found = np.zeros((len(asked), target.n_outputs))
    for i, row in enumerate(asked):
        for column in range(labels.shape[1]):
            known = [j for j in range(len(rows)) if not np.isnan(labels[j, column])]
            of_class = {c: sum(labels[j, column] == c for j in known) for c in {labels[j, column] for j in known}}
            nearest = sorted(known, key=lambda j: -(unit[row] @ unit[rows[j]]))[:k]
            votes: dict[float, float] = dict.fromkeys(of_class, 0.0)
            for j in nearest:
                counts = len(known) / (len(of_class) * of_class[labels[j, column]]) if weight == "balanced" else 1.0
                votes[labels[j, column]] += counts * np.exp(unit[row] @ unit[rows[j]] / 0.07)
            for c, vote in votes.items():
                if target.task == "multi-class":
                    found[i, int(c)] = vote / sum(votes.values())
                elif c == 1:
                    found[i, column] = vote / sum(votes.values())
    return found


@pytest.mark.parametrize("weight", ["none", "balanced"])
@pytest.mark.parametrize("target", TARGETS)
def test_votes_equal_those_counted_by_hand(target: Target, weight: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_AT_ONCE", 7)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 5)).astype(np.float32)
    rows, asked, ks = rng.permutation(40), np.arange(59, 39, -1), (1, 5, 20, 50)
    labels = told_labels(target, x, rng, blank=0.3)[rows]
    found = neighbour_logits(torch.from_numpy(x), rows, labels, asked, target=target, ks=ks, class_weight=weight)
    assert len(found) == 4
    for k, logits in zip(ks, found, strict=True):
        assert logits.dtype == np.float32
        expected = by_hand(x, rows, labels, asked, target, k, weight)
        np.testing.assert_allclose(target.probabilities(logits.astype(float)), expected, atol=1e-5)


def test_more_neighbours_than_rows_are_all_of_them() -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(9, 4)))
    labels = np.array([[0.0], [1], [np.nan], [1], [0], [1]])
    few, many = neighbour_logits(
        x, np.arange(6), labels, np.arange(6, 9), target=BINARY, ks=(5, 50), class_weight="none"
    )
    assert np.array_equal(few, many)


def test_one_label_alone_is_said_all_but_surely() -> None:
    x = torch.eye(3)
    labels = np.array([[1.0, 0.0], [1.0, 0.0]])
    (found,) = neighbour_logits(x, np.arange(2), labels, np.array([2]), target=BOTH, ks=(1,), class_weight="balanced")
    np.testing.assert_allclose(found, [[np.log(1e6), -np.log(1e6)]], rtol=0.02)
    (found,) = neighbour_logits(
        x, np.arange(2), labels[:, :1], np.array([2]), target=KIND, ks=(1,), class_weight="none"
    )
    np.testing.assert_allclose(KIND.probabilities(found), [[0, 1, 0]], atol=1e-5)


def test_a_label_that_no_row_has_is_said_to_be_absent() -> None:
    labels = np.array([[1.0, np.nan], [0.0, np.nan]])
    (found,) = neighbour_logits(
        torch.eye(3), np.arange(2), labels, np.array([2, 0]), target=BOTH, ks=(5,), class_weight="none"
    )
    assert np.isfinite(found).all()
    assert (found[:, 1] < -10).all()


def test_a_row_of_zeros_is_near_to_none() -> None:
    x = torch.tensor([[1.0, 0], [0, 1], [0, 0], [0, 0], [1, 0.1]])
    labels = np.array([[1.0], [0], [0]])
    (found,) = neighbour_logits(x, np.arange(3), labels, np.array([3, 4]), target=BINARY, ks=(50,), class_weight="none")
    assert np.isfinite(found).all()
    assert found[0, 0] == pytest.approx(np.log(1 / 2), abs=1e-4)  # all are as near
    assert found[1, 0] > 5


def test_lengths_of_features_do_not_matter() -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(30, 4)).astype(np.float32))
    labels = rng.integers(0, 2, (20, 1)).astype(float)
    scale = torch.from_numpy(rng.uniform(0.1, 9, (30, 1)).astype(np.float32))
    plain, scaled = (
        neighbour_logits(f, np.arange(20), labels, np.arange(20, 30), target=BINARY, ks=(5,), class_weight="none")[0]
        for f in (x, x * scale)
    )
    np.testing.assert_allclose(plain, scaled, atol=1e-4)
