"""Calibration of a head's answers, fitted on other units than it is told of."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from embedcache.metrics.calibration import sigmoid
from embedcache.metrics.intervals import PatientDraws
from embedcache.stage_two.calibrating import Calibrator, calibration_rows
from embedcache.stage_two.scoring import ChosenOn, Said
from embedcache.stage_two.targets import Target

BINARY = Target("y", "binary", ("y",), ("y",))


def made(n: int, seed: int, prevalence_logit: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n, 1), and probabilities three times too sure (1, n, 1)."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=n) + prevalence_logit
    return (rng.random(n) < sigmoid(z)).astype(float)[:, None], sigmoid(3 * z)[None, :, None]


def table(n_chosen: int) -> pd.DataFrame:
    y, p = made(2000, 0)
    chosen_y, chosen_p = made(n_chosen, 1)
    draws = PatientDraws(np.arange(2000), 200, seed=0)
    found = calibration_rows(Said(p, np.full((1, 1), 0.5)), [ChosenOn(chosen_y, chosen_p[0])], y, BINARY, draws)
    return pd.DataFrame(found).set_index("method")


def test_what_was_too_sure_is_mended() -> None:
    found = table(2000)
    assert found.loc["none", "slope"] == pytest.approx(1 / 3, abs=0.05)
    for method in ("temperature", "platt"):
        assert found.loc[method, "slope_low"] < 1 < found.loc[method, "slope_high"]
        assert found.loc[method, "brier"] < found.loc["none", "brier"]
        assert found.loc[method, "ece"] < found.loc["none", "ece"] / 2
    assert found.loc["temperature", "fitted_slope"] == pytest.approx(1 / 3, abs=0.05)
    assert found.loc["none", "intercept_low"] < 0 < found.loc["none", "intercept_high"]


def test_too_few_to_fit_on_leave_probabilities_as_they_are() -> None:
    assert table(4).index.tolist() == ["none"]


def test_probabilities_for_another_prevalence() -> None:
    y, p = made(4000, 2)
    mended = Calibrator.fitted("platt", ChosenOn(y, p[0]), 0, BINARY)
    assert mended.prevalence == y.mean()
    rare_y, rare_p = made(4000, 3)
    keep = (rare_y[:, 0] == 0) | (np.random.default_rng(4).random(4000) < 0.1)  # nine of ten ill ones stay away
    at_home = mended.at(rare_p[0, keep, 0], float(rare_y[keep].mean()))
    assert at_home.mean() == pytest.approx(rare_y[keep].mean(), abs=0.02)
    assert mended(rare_p[0, keep, 0]).mean() > 2 * rare_y[keep].mean()
    unfitted = Calibrator.fitted("platt", ChosenOn(y[:3], p[0, :3]), 0, BINARY)
    assert np.isnan(unfitted.at(p[0, :, 0], 0.1)).all()
