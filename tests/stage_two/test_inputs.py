"""Normalisation of inputs against numpy and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_numbers import close
from sklearn.preprocessing import StandardScaler

from embedcache.stage_two.inputs import InputNorm


@pytest.fixture
def rows() -> torch.Tensor:
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(6, 6))
    return torch.from_numpy(rng.normal(size=(500, 6)) @ mixing * [1, 2, 3, 1, 1, 10] + 1000).float()


def fitted(kind: str, rows: torch.Tensor) -> InputNorm:
    norm = InputNorm(kind, 6)
    norm.fit(rows.split(77))
    return norm


def test_none_and_l2_need_no_fitting(rows: torch.Tensor) -> None:
    assert torch.equal(fitted("none", rows)(rows), rows)
    close(fitted("l2", rows)(rows).norm(dim=1), torch.ones(500))
    assert not list(InputNorm("none", 6).state_dict())


def test_zscore_is_scikit_learns(rows: torch.Tensor) -> None:
    expected = StandardScaler().fit_transform(rows.double().numpy())
    torch.testing.assert_close(fitted("zscore", rows)(rows), torch.from_numpy(expected).float(), atol=1e-3, rtol=1e-3)


def test_whitened_rows_are_uncorrelated_and_turned_least(rows: torch.Tensor) -> None:
    white = fitted("whiten", rows)(rows)
    torch.testing.assert_close(torch.cov(white.T, correction=0), torch.eye(6), atol=2e-3, rtol=0)
    torch.testing.assert_close(white.mean(0), torch.zeros(6), atol=2e-3, rtol=0)
    matrix = fitted("whiten", rows).matrix
    close(matrix, matrix.T)  # the symmetric root is the nearest to no change


@pytest.mark.parametrize("constant", [0.0, 7.0])
def test_a_constant_dimension_stays_small_on_rows_where_it_is_not(rows: torch.Tensor, constant: float) -> None:
    rows = rows.clone()
    rows[:, 2] = constant
    fresh = rows[:5].clone()
    fresh[:, 2] += 0.01
    expected = StandardScaler().fit(rows.double().numpy()).transform(fresh.double().numpy())
    torch.testing.assert_close(fitted("zscore", rows)(fresh), torch.from_numpy(expected).float(), atol=1e-3, rtol=1e-3)
    assert torch.isfinite(fitted("whiten", rows)(fresh)).all()


def test_tokens_are_normalised_like_rows(rows: torch.Tensor) -> None:
    norm = fitted("whiten", rows)
    close(norm(rows.view(100, 5, 6)).view(500, 6), norm(rows))


def test_nothing_to_fit_on_is_said() -> None:
    with pytest.raises(ValueError, match="no rows to fit"):
        InputNorm("zscore", 3).fit([])
