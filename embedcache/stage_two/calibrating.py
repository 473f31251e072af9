"""Whether probabilities mean what they say, before and after calibration on other units.

Shape notation: s seeds, u units, c outputs, v units to choose by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from embedcache.metrics.calibration import (
    CalibrationLine,
    brier,
    ece,
    fit_platt,
    fit_temperature,
    logit,
    sigmoid,
    to_prevalence,
)
from embedcache.metrics.intervals import PatientDraws, bootstrap, over_patients
from embedcache.stage_two.scoring import ChosenOn, Said
from embedcache.stage_two.targets import Target

Method = Literal["none", "temperature", "platt"]
_SCORES = ("brier", "slope", "intercept")


@dataclass(frozen=True)
class Calibrator:
    """Mends the logit of one output: slope x logit + intercept.

    Args:
        method: `none` where too few units were there to fit it.
        prevalence: share of positives among those that it was fitted on; NaN without any.
    """

    method: Method
    slope: float
    intercept: float
    prevalence: float

    @classmethod
    def fitted(cls, method: Method, chosen: ChosenOn, k: int, target: Target) -> Calibrator:
        """On the units of a run that neither trained it nor are tested."""
        usable = chosen.usable(k, target)
        if method == "none" or usable is None:
            return cls("none", 1.0, 0.0, np.nan)
        y, z = usable[0], logit(usable[1])
        slope, intercept = (1 / fit_temperature(y, z), 0.0) if method == "temperature" else fit_platt(y, z)
        return cls(method, slope, intercept, float(y.mean()))

    def __call__(self, p: np.ndarray) -> np.ndarray:
        """Probabilities, mended."""
        return sigmoid(self.slope * logit(p) + self.intercept) if self.method != "none" else p

    def at(self, p: np.ndarray, prevalence: float) -> np.ndarray:
        """Probabilities, mended, where the label has another prevalence; NaN where none was fitted."""
        if np.isnan(self.prevalence):
            return np.full(p.shape, np.nan)
        return to_prevalence(self(p), self.prevalence, prevalence)


def calibration_rows(
    answered: Said, chosen: Sequence[ChosenOn], values: np.ndarray, target: Target, draws: PatientDraws
) -> Iterator[dict[str, object]]:
    """For each output and method: Brier score, ECE (15 bins of equal mass), calibration slope and intercept.

    Intervals are over patients. A method that could not be fitted in every run is left out.

    Args:
        chosen: of each seed.
        values: labels of the units, (u, t).
    """
    sides = target.one_vs_rest(values)
    for k, class_name in enumerate(target.classes):
        known = ~np.isnan(sides[:, k])
        y = sides[known, k].astype(np.int64)
        methods: tuple[Method, ...] = ("none", "temperature", "platt")
        for method in methods:
            fitted = [Calibrator.fitted(method, of_seed, k, target) for of_seed in chosen]
            if any(c.method != method for c in fitted):
                continue
            p = np.stack([c(answered.probabilities[s, known, k]) for s, c in enumerate(fitted)])
            found = bootstrap(_scores(y, p, known), draws)
            row: dict[str, object] = {
                "class": class_name if target.n_outputs > 1 else "",
                "method": method,
                "fitted_slope": float(np.mean([c.slope for c in fitted])),
                "fitted_intercept": float(np.mean([c.intercept for c in fitted])),
            }
            # of a draw it is larger than of the whole set, so that its percentiles would be off
            row["ece"] = float(np.mean([ece(y, of_seed)[0] for of_seed in p]))
            for j, name in enumerate(_SCORES):
                interval = over_patients(found[..., j])
                row |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
            yield row


def _scores(y: np.ndarray, p: np.ndarray, known: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """As a function of weights (k, u): (k, s, 3) in the order of `_SCORES`."""
    lines = [CalibrationLine.of(y, logit(of_seed)) for of_seed in p]

    def scores(weights: np.ndarray) -> np.ndarray:
        weights = np.ascontiguousarray(weights[:, known])
        return np.stack(
            [
                np.column_stack([brier(y, q, weights), line.slope_and_intercept(weights)])
                for q, line in zip(p, lines, strict=True)
            ],
            axis=1,
        )

    return scores
