from __future__ import annotations

import numpy as np
import pytest

from embedcache.data.splits import label_subset, patient_split
from embedcache.errors import ManifestError


def test_a_patient_is_on_one_side_and_strata_are_balanced() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 400, 1000)
    labels = (groups % 4 == 0).astype(float)
    split = patient_split(groups, labels, valid=0.1, test=0.25, seed=3)
    for patient in np.unique(groups):
        assert len(set(split[groups == patient])) == 1
    for value in (0, 1):
        members = np.unique(groups[labels == value])
        in_test = np.unique(groups[(labels == value) & (split == "test")])
        assert abs(len(in_test) - 0.25 * len(members)) <= 1
    np.testing.assert_array_equal(split, patient_split(groups, labels, valid=0.1, test=0.25, seed=3))
    assert (split != patient_split(groups, labels, valid=0.1, test=0.25, seed=4)).any()


def test_blank_strata_are_a_stratum_of_their_own() -> None:
    split = patient_split(np.arange(10), np.full(10, np.nan), valid=0.2, test=0.2, seed=0)
    assert sorted(split.tolist()) == ["test"] * 2 + ["train"] * 6 + ["valid"] * 2


def test_impossible_fractions_are_refused() -> None:
    with pytest.raises(ManifestError, match=r"valid 0\.6 and test 0\.5"):
        patient_split(np.arange(4), np.zeros(4), valid=0.6, test=0.5, seed=0)


def test_label_fractions_are_nested_stratified_and_never_empty() -> None:
    labels = np.array([0.0] * 300 + [1.0] * 100 + [np.nan] * 50)
    one, ten, all_of_them = (label_subset(labels, f, seed=1) for f in (0.01, 0.1, 1.0))
    assert set(one) < set(ten) < set(all_of_them) == set(range(400))
    assert [int((labels[ten] == c).sum()) for c in (0, 1)] == [30, 10]
    assert [int((labels[one] == c).sum()) for c in (0, 1)] == [3, 2]  # at least two of each class
    assert (np.diff(ten) > 0).all()


def test_label_fraction_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"label fraction 0"):
        label_subset(np.zeros(3), 0, seed=0)
