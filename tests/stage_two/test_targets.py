"""Losses equal torch's, weights of classes scikit-learn's; what a label is called decides what is told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made import BINARY, BOTH, KIND, SETS, TARGETS, blanked, manifest
from sklearn.utils.class_weight import compute_class_weight

from embedcache.data.labels import LabelSet
from embedcache.errors import ManifestError
from embedcache.stage_two.targets import Target, sigmoid

LABELLED = manifest(
    {
        "label.a": [0, 1, None, 1],
        "label.b": [1, None, None, 0],
        "label.kind": [0, 1, None, 3],
        "label.alone": [0, 1, 1, None],
        "label.grade": [0, 2, 1, None],
        "label.blank": [None] * 4,
    },
    *SETS,
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("both", BOTH),
        ("a", Target("a", "binary", ("a",), ("a",))),
        ("alone", Target("alone", "binary", ("alone",), ("alone",))),
        ("kind", Target("kind", "multi-class", ("kind",), ("no", "yes", "maybe", "3"))),  # a class without a name
        ("grade", Target("grade", "multi-class", ("grade",), ("0", "1", "2"))),
        ("blank", Target("blank", "binary", ("blank",), ("blank",))),
    ],
)
def test_a_label_or_a_set_is_found_by_name(name: str, expected: Target) -> None:
    assert Target.of(LABELLED, name) == expected


def test_the_one_label_of_a_set_of_classes_keeps_its_classes() -> None:
    named = manifest({"label.k": [0, 1, 2]}, LabelSet("severity", "multi-class", ("k",), ("no", "some", "much")))
    for name in ("severity", "k"):
        target = Target.of(named, name)
        assert (target.task, target.labels, target.classes) == ("multi-class", ("k",), ("no", "some", "much"))


def test_a_label_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(
        ManifestError, match=r"no label 'c'; it has a, b, kind, alone, grade, blank, and the sets both$"
    ):
        Target.of(LABELLED, "c")
    with pytest.raises(ManifestError, match=r"no label 'c'; it has none$"):
        Target.of(manifest({"view": ["PA"]}), "c")


def test_values_and_which_rows_have_any() -> None:
    values = BOTH.values(LABELLED)
    np.testing.assert_array_equal(values, [[0, 1], [1, np.nan], [np.nan, np.nan], [1, 0]])
    assert BOTH.known(values).tolist() == [True, True, False, True]
    assert BOTH.one_vs_rest(values) is values


def test_one_class_against_the_rest() -> None:
    np.testing.assert_array_equal(
        KIND.one_vs_rest(np.array([[0.0], [2], [np.nan], [7]])),
        [[1, 0, 0], [0, 0, 1], [np.nan] * 3, [0, 0, 0]],
    )


@pytest.mark.parametrize("target", [BINARY, BOTH])
def test_losses_of_labels_equal_torchs(target: Target) -> None:
    rng = np.random.default_rng(0)
    c = target.n_outputs
    logits = torch.from_numpy(rng.normal(size=(3, 20, c)) * 4).requires_grad_()
    y = blanked(rng.integers(0, 2, (3, 20, c)).astype(float), 0.3, rng)
    weights = rng.uniform(0.5, 2, (3, c, 2))
    found = target.loss(logits, torch.from_numpy(y), torch.from_numpy(weights))
    expected = []
    for k in range(3):
        there = ~np.isnan(y[k])
        each = np.where(y[k] == 1, weights[k, :, 1], weights[k, :, 0])
        asked, right, weight = logits[k][there], *(torch.from_numpy(a[there]) for a in (y[k], each))
        expected.append(F.binary_cross_entropy_with_logits(asked, right, weight=weight))
    torch.testing.assert_close(found, torch.stack(expected))
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(torch.stack(expected).sum(), logits)[0])
    assert (gradient.numpy()[np.isnan(y)] == 0).all()


def test_losses_of_classes_equal_torchs() -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(4, 20, 3)) * 4)
    y = blanked(rng.integers(0, 3, (4, 20, 1)).astype(float), 0.3, rng)
    weights = torch.from_numpy(rng.uniform(0.5, 2, (4, 3)))
    found = KIND.loss(logits, torch.from_numpy(y), weights)
    for k in range(4):
        there = ~np.isnan(y[k, :, 0])
        each = F.cross_entropy(
            logits[k][there], torch.from_numpy(y[k, there, 0]).long(), weight=weights[k], reduction="sum"
        )
        torch.testing.assert_close(found[k], each / there.sum())
    plain = KIND.loss(logits, torch.from_numpy(y), torch.ones(4, 3, dtype=torch.float64))
    there = ~np.isnan(y[0, :, 0])
    torch.testing.assert_close(plain[0], F.cross_entropy(logits[0][there], torch.from_numpy(y[0, there, 0]).long()))


@pytest.mark.parametrize("target", TARGETS)
def test_no_label_is_no_loss(target: Target) -> None:
    logits = torch.randn(2, 5, target.n_outputs, requires_grad=True)
    blank = torch.full((2, 5, len(target.labels)), torch.nan)
    weights = np.stack([target.class_weights(y, "balanced") for y in blank.numpy()])
    loss = target.loss(logits, blank, torch.from_numpy(weights).float())
    assert loss.tolist() == [0, 0]
    assert torch.autograd.grad(loss.sum(), logits)[0].abs().sum() == 0


def test_balanced_weights_equal_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    values = blanked((rng.random((60, 2)) < [0.2, 0.7]).astype(float), 0.2, rng)
    for k, found in enumerate(BOTH.class_weights(values, "balanced")):
        known = values[~np.isnan(values[:, k]), k]
        np.testing.assert_allclose(found, compute_class_weight("balanced", classes=np.array([0, 1]), y=known))
    classes = np.array([0.0] * 5 + [1] * 2 + [2] * 9 + [np.nan] * 3)[:, None]
    known = classes[:16, 0]
    expected = compute_class_weight("balanced", classes=np.arange(3), y=known)
    np.testing.assert_allclose(KIND.class_weights(classes, "balanced"), expected)
    two = compute_class_weight("balanced", classes=np.array([0, 2]), y=known[known != 1])
    np.testing.assert_allclose(KIND.class_weights(classes[classes[:, 0] != 1], "balanced")[[0, 2]], two)
    for target, labels in ((BOTH, values), (KIND, classes)):
        assert (target.class_weights(labels, "none") == 1).all()


def test_a_class_that_is_absent_has_a_finite_weight() -> None:
    assert BINARY.class_weights(np.ones((4, 1)), "balanced").tolist() == [[1, 1]]
    assert KIND.class_weights(np.full((4, 1), np.nan), "balanced").tolist() == [1, 1, 1]


def test_probabilities_of_extreme_logits_do_not_overflow() -> None:
    logits = np.array([[-1e4, 0, 1e4], [800, 800, -800], [1, 2, 3]])
    with np.errstate(all="raise", under="ignore"):
        of_labels, of_classes = BOTH.probabilities(logits), KIND.probabilities(logits)
    np.testing.assert_allclose(of_labels, torch.from_numpy(logits).sigmoid(), atol=1e-15)
    np.testing.assert_allclose(of_classes, torch.from_numpy(logits).softmax(-1), atol=1e-15)
    assert sigmoid(np.zeros(1))[0] == 0.5
