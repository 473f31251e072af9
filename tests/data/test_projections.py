"""How the official tables call a view."""

from __future__ import annotations

import pandas as pd
import pytest

from embedcache.data.projections import is_frontal, is_lateral

FRONTAL = [
    "PA", "AP", "pa", "AP SUPINE", "AP ERECT", "AP AXIAL", "AP_horizontal", "AP-supine", "PA LLD", "AP RLD",
    "AP LATERAL DECUBITUS",
    "Frontal", "FRONTAL", "POSTEROANTERIOR", "ANTEROPOSTERIOR", "postero-anterior", "Antero-Posterior",
]  # fmt: skip
LATERAL = ["LL", "L", "LATERAL", "Lateral", "XTABLE LATERAL", "LL-erect", "RL", "LLAT", "l"]
NEITHER = ["", "LLD", "RLD", "LAO", "RAO", "LPO", "SWIMMERS", "COSTAL", "EXCLUDE", "UNK", "PAEDIATRIC", "APICAL"]


@pytest.mark.parametrize("view", FRONTAL)
def test_frontal_views(view: str) -> None:
    assert is_frontal(pd.Series([view])).tolist() == [True]
    assert is_lateral(pd.Series([view])).tolist() == [False]


@pytest.mark.parametrize("view", LATERAL)
def test_lateral_views(view: str) -> None:
    assert is_lateral(pd.Series([view])).tolist() == [True]
    assert is_frontal(pd.Series([view])).tolist() == [False]


@pytest.mark.parametrize("view", NEITHER)
def test_other_views_are_neither(view: str) -> None:
    assert not is_frontal(pd.Series([view])).any()
    assert not is_lateral(pd.Series([view])).any()


def test_each_row_is_told_by_itself() -> None:
    views = pd.Series(["PA", "", "LL", "PA", "AP"], index=[7, 7, 3, 2, 1])  # whatever its index
    assert is_frontal(views).tolist() == [True, False, False, True, True]
    assert is_lateral(views).tolist() == [False, False, True, False, False]
    assert is_frontal(views[:0]).tolist() == []
