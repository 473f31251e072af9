from __future__ import annotations

import numpy as np
import pytest

from embedcache.data.splits import in_parts, label_subset, patient_split, published_fractions, rarest_label
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


def test_published_fractions_round_as_the_code_that_draws_them() -> None:
    train = np.arange(100, 258)  # 15.8 rows are 10%, 1.58 are 1%
    rounded = published_fractions(300, train)
    cut = published_fractions(300, train, rounded_down=True)
    assert [(rounded <= f).sum() for f in (0.01, 0.1, 1)] == [2, 16, 158]
    assert [(cut <= f).sum() for f in (0.01, 0.1, 1)] == [1, 15, 158]
    assert np.isnan(rounded[:100]).all()


def test_rows_in_several_parts_have_them_joined() -> None:
    split = in_parts(4, train=np.array([0, 1]), test=np.array([1, 2]))
    assert split.tolist() == ["train", "train+test", "test", ""]


def test_the_rarest_present_label_is_the_stratum() -> None:
    labels = np.array([[1, 0, 0], [1, 1, 0], [1, 0, np.nan], [0, 0, 0], [1, 1, 1]])
    assert rarest_label(labels).tolist() == [1, 2, 1, 0, 3]


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_shares_that_leave_nothing_are_refused(share: float) -> None:
    with pytest.raises(ManifestError, match="split fractions valid"):
        patient_split(np.arange(10), np.zeros(10), valid=share, test=0.2, seed=0)
