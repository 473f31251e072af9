"""What the controls are made of, and what they cannot know."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from made import BINARY, BOTH, KIND, manifest

from embedcache import ProbeConfig
from embedcache.stage_two.controls import metadata_features, shuffled, told_by_text
from embedcache.stage_two.label_budget import Budget
from embedcache.stage_two.samples import Samples
from embedcache.stage_two.targets import Target

NOTHING = np.empty(0, np.int64)


# metadata


def test_a_column_for_each_value_that_training_knows() -> None:
    frame = pd.DataFrame({"view": ["PA", "AP", "", "PA", "LL"], "sex": ["F", "F", "F", "M", "F"], "id": list("abcde")})
    found = metadata_features(frame, np.array([0, 1, 2]))
    assert found is not None
    assert found.dtype == np.float32
    assert found.tolist() == [
        [0, 0, 1],
        [0, 1, 0],
        [1, 0, 0],
        [0, 0, 1],
        [0, 0, 0],
    ]  # '', AP, PA; one sex tells nothing


def test_ages_that_are_blank_are_the_mean_and_marked() -> None:
    frame = pd.DataFrame({"view": ["PA"] * 5, "age": ["40", "", None, "60", "90"]})
    found = metadata_features(frame, np.array([0, 1, 3]))
    assert found is not None
    assert found.tolist() == [[40, 0], [50, 1], [50, 1], [60, 0], [90, 0]]  # the mean of training


def test_a_mark_that_training_never_has_is_no_feature() -> None:
    """Standardised, it would be without bounds where a test row has it."""
    found = metadata_features(pd.DataFrame({"age": [40, 60, np.nan]}), np.array([0, 1]))
    assert found is not None
    assert found.tolist() == [[40], [60], [50]]


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"id": ["a", "b", "c"]}),
        pd.DataFrame({"view": ["PA", "PA", "AP"], "sex": [""] * 3, "age": [50, 50, 60]}),
        pd.DataFrame({"view": ["", "", "PA"], "age": [np.nan, np.nan, 60]}),
    ],
)
def test_what_does_not_differ_in_training_tells_nothing(frame: pd.DataFrame) -> None:
    assert metadata_features(frame, np.array([0, 1])) is None


def test_a_column_of_names_is_left_out() -> None:
    frame = pd.DataFrame({"source": [f"clinic {k}" for k in range(60)], "sex": ["F", "M"] * 30})
    found = metadata_features(frame, np.arange(60))
    assert found is not None
    assert found.shape == (60, 2)
    found = metadata_features(frame, np.arange(40))
    assert found is not None
    assert found.shape == (60, 42)


# shuffled labels


def budget(target: Target, seed: int = 0, n: int = 60) -> Budget:
    rng = np.random.default_rng(0)
    labels, valid = (
        np.where(rng.random((k, len(target.labels))) < 0.2, np.nan, rng.integers(0, 2, (k, len(target.labels))))
        for k in (n, 20)
    )
    return Budget(1.0, 0, seed, np.arange(n), labels, "folds", np.arange(n, n + 20), valid, np.arange(n) % 5)


def listed(labels: np.ndarray) -> list[str]:
    return sorted(map(str, labels.tolist()))


def test_shuffled_labels_are_the_same_labels_of_other_rows() -> None:
    before = budget(BOTH)
    copy = before.labels.copy()
    after = shuffled(before)
    assert np.array_equal(before.labels, copy, equal_nan=True)
    for name in ("labels", "valid_labels"):
        old, new = getattr(before, name), getattr(after, name)
        assert listed(new) == listed(old)  # rows whole
        assert not np.array_equal(new, old, equal_nan=True)
    for name in ("rows", "valid", "folds"):
        assert np.array_equal(getattr(after, name), getattr(before, name))
    assert (after.amount, after.seed, after.choice) == (before.amount, before.seed, before.choice)


def test_each_seed_shuffles_in_its_own_way() -> None:
    one, same, other = (shuffled(budget(BOTH, seed)).labels for seed in (0, 0, 1))
    assert np.array_equal(one, same, equal_nan=True)
    assert not np.array_equal(one, other, equal_nan=True)


# labels that texts tell


def told_world(target: Target) -> tuple[Samples, np.ndarray, np.ndarray]:
    """80 training samples, the labels that their texts tell, (80, t), and embeddings of these in another order."""
    rng = np.random.default_rng(0)
    classes = 3 if target.task == "multi-class" else 2
    truth = rng.integers(0, classes, (80, len(target.labels))).astype(float)
    table = manifest({f"label.{name}": truth[:, k] for k, name in enumerate(target.labels)} | {"split": ["train"] * 80})
    sides = np.concatenate([truth == k for k in range(classes)], axis=1)
    text_x = 4.0 * sides + rng.normal(size=sides.shape) / 4
    return Samples.of(table, np.arange(80), target, ProbeConfig()), truth, text_x[::-1].astype(np.float32)


@pytest.mark.parametrize("target", [BINARY, BOTH, KIND])
def test_texts_label_the_other_training_samples(target: Target) -> None:
    samples, truth, text_x = told_world(target)
    texts = {row: 79 - row for row in range(70)}  # ten have none
    rows = np.array([2, 75, *range(3, 30)])
    labels = truth[rows]
    labels[:2] = 1 - np.minimum(labels[:2], 1)  # a budget's own labels are kept, wrong or right
    labels[5, 0] = np.nan
    before = Budget(0.1, 0, 0, rows, labels, "valid", np.arange(3), truth[:3], NOTHING)
    after = told_by_text(before, samples, texts, text_x, target, "none")
    assert after.rows[:29].tolist() == rows.tolist()
    assert np.array_equal(after.labels[:29], labels, equal_nan=True)
    assert after.rows[29:].tolist() == [0, 1, *range(30, 70)]
    assert (after.labels[29:] == truth[after.rows[29:]]).mean() > 0.95
    assert after.labels.dtype == np.float64
    for name in ("valid", "valid_labels", "folds"):
        assert np.array_equal(getattr(after, name), getattr(before, name))
    assert after.amount == before.amount


def test_folds_are_made_anew_for_all_that_is_told() -> None:
    samples, truth, text_x = told_world(BINARY)
    before = Budget(0.5, 0, 0, np.arange(20), truth[:20], "folds", NOTHING, truth[:0], np.arange(20) % 5)
    after = told_by_text(before, samples, {row: 79 - row for row in range(80)}, text_x, BINARY, "balanced")
    assert sorted(after.rows.tolist()) == list(range(80))
    assert after.folds.shape == (80,)
    assert set(after.folds) == set(range(5))


def test_a_budget_without_any_text_learns_nothing_from_texts() -> None:
    samples, truth, text_x = told_world(BINARY)
    before = Budget(0.1, 0, 0, np.arange(70, 80), truth[70:], "fixed", NOTHING, truth[:0], NOTHING)
    after = told_by_text(before, samples, {row: 79 - row for row in range(70)}, text_x, BINARY, "none")
    assert after.rows.tolist() == before.rows.tolist()
    assert np.array_equal(after.labels, before.labels)


def test_other_rows_of_the_text_store_play_no_part() -> None:
    samples, truth, text_x = told_world(KIND)
    texts = {row: 79 - row for row in range(60)}
    before = Budget(0.1, 0, 0, np.arange(30), truth[:30], "fixed", NOTHING, truth[:0], NOTHING)
    one = told_by_text(before, samples, texts, text_x, KIND, "none")
    text_x[:20] = 50
    two = told_by_text(before, samples, texts, text_x, KIND, "none")
    assert np.array_equal(one.labels, two.labels)
