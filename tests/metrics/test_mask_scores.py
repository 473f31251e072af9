"""Scores of masks: against torchmetrics where an image has a mask, and what empty ones are worth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score

from embedcache.metrics.intervals import PatientDraws, bootstrap
from embedcache.metrics.masks import NAMES, Overlap


def overlap_of(predicted: np.ndarray, true: np.ndarray) -> Overlap:
    """From pixels, (s, n, pixels) and (n, pixels) bool."""
    return Overlap((predicted & true).sum(axis=2), predicted.sum(axis=2), true.sum(axis=1))


def of(scores: np.ndarray, name: str) -> np.ndarray:
    return scores[..., NAMES.index(name)]


def test_dice_and_iou_are_torchmetrics_and_scikit_learns() -> None:
    from torchmetrics.functional.classification import binary_f1_score

    rng = np.random.default_rng(0)
    predicted, true = rng.random((2, 9, 50)) < 0.4, rng.random((9, 50)) < 0.3
    found = overlap_of(predicted, true)
    for s in range(2):
        for k in range(9):
            p, y = predicted[s, k], true[k]
            assert found.dice[s, k] == pytest.approx(binary_f1_score(torch.tensor(p), torch.tensor(y)).item())
            assert found.iou[s, k] == pytest.approx(jaccard_score(y, p))


def test_empty_on_empty_counts_as_one_and_stands_beside_it() -> None:
    true = np.zeros((5, 4), bool)
    true[:2, :2] = True
    nothing, first = np.zeros((5, 4), bool), true.copy()
    first[1:] = False
    scores = overlap_of(np.stack([nothing, first]), true).scores(np.ones((1, 5), np.uint8))[0]
    assert of(scores, "dice").tolist() == pytest.approx([0.6, 0.8])
    assert of(scores, "empty_mask_dice").tolist() == pytest.approx([0.6, 0.6])
    assert of(scores, "dice_on_positives").tolist() == pytest.approx([0.0, 0.5])
    assert of(scores, "iou").tolist() == pytest.approx([0.6, 0.8])
    assert of(scores, "iou_on_positives").tolist() == pytest.approx([0.0, 0.5])
    assert of(scores, "predicted_empty").tolist() == pytest.approx([1.0, 0.8])
    assert of(scores, "positives_predicted_empty").tolist() == pytest.approx([1.0, 0.5])
    assert overlap_of(np.stack([nothing, first]), true).says_nothing.tolist() == [True, False]


def test_the_rsna_split_of_the_paper_gives_76_6_for_nothing() -> None:
    true = np.zeros(5337, np.int64)
    true[:1251] = 100
    nothing = np.zeros((1, 5337), np.int64)
    scores = Overlap(nothing, nothing, true).scores(np.ones((1, 5337), np.uint8))
    assert of(scores, "dice")[0, 0] == pytest.approx(0.7656, abs=1e-4)
    assert of(scores, "empty_mask_dice")[0, 0] == of(scores, "dice")[0, 0]


def test_weights_count_images_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    predicted, true = rng.random((3, 6, 20)) < 0.5, rng.random((6, 20)) < 0.3
    true[0] = False
    weights = rng.integers(0, 4, (5, 6)).astype(np.uint8)
    got = overlap_of(predicted, true).scores(weights)
    for k, row in enumerate(weights):
        again = np.repeat(np.arange(6), row)
        one = overlap_of(predicted[:, again], true[again]).scores(np.ones((1, len(again)), np.uint8))[0]
        np.testing.assert_allclose(got[k], one)


def test_without_positives_scores_on_them_are_undefined() -> None:
    true = np.zeros(4, np.int64)
    found = Overlap(np.zeros((1, 4), np.int64), np.full((1, 4), 3), true)
    sampled = bootstrap(found.scores, PatientDraws(np.arange(4), 10, seed=0))
    for name in ("dice_on_positives", "iou_on_positives", "positives_predicted_empty"):
        assert np.isnan(of(sampled.samples, name)).all()
    assert (of(sampled.samples, "dice") == 0).all()


def test_counts_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \(s, n\), \(s, n\) and \(n,\)"):
        Overlap(np.zeros((1, 3)), np.zeros((1, 4)), np.zeros(3))
