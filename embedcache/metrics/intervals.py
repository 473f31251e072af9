"""Bootstrap intervals that resample patients, not images.

Shape notation: n rows, g patients, k draws, s seeds. Intervals hold 95% and lie between percentiles of the draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import EllipsisType

import numpy as np

_DRAWS_AT_ONCE = 100  # bounds memory: a score may widen its weights
_MOST_COUNT = np.iinfo(np.uint8).max
_LEAST_DEFINED = 0.5  # share of draws: of fewer, percentiles say nothing

# 97.5th percentiles of Student's t with 1, 2, .. degrees of freedom, the last of 30 and more; of 0 degrees, nothing
_T_975 = (
    0.0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip

Score = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval; NaN where undefined."""

    value: float
    low: float
    high: float

    def within(self, least: float, most: float) -> Interval:
        """That ends where values do: what a few seeds allow for does not."""
        return Interval(self.value, max(self.low, least), min(self.high, most))


@dataclass(frozen=True, eq=False)
class Sampled:
    """A score of all rows, and the same score of each draw.

    Args:
        value: (...).
        samples: (k, ...), NaN where a draw has no score.
    """

    value: np.ndarray
    samples: np.ndarray

    @classmethod
    def of_runs(cls, runs: Sequence[Sampled]) -> Sampled:
        """A score of several runs on the same draws: value (s, ...), samples (k, s, ...)."""
        return cls(np.stack([run.value for run in runs]), np.stack([run.samples for run in runs], axis=1))

    def __getitem__(self, index: int | slice | EllipsisType | tuple[int | slice | EllipsisType, ...]) -> Sampled:
        """One of several scores, as `value[index]` would give it."""
        at = index if isinstance(index, tuple) else (index,)
        return Sampled(np.asarray(self.value[at]), self.samples[(slice(None), *at)])

    @property
    def by_seed(self) -> Sampled:
        """With an axis of seeds, value (s,) and samples (k, s), also where there was one run and no such axis."""
        if self.value.ndim > 1:
            raise ValueError(
                f"scores of shape {self.value.shape}, expected one score, or one for each seed; choose one"
            )
        return Sampled(self.value.reshape(-1), self.samples.reshape(len(self.samples), -1))

    def by_turn(self, n: int) -> Sampled:
        """Averaged over seeds that share one of n things, which they took in turn: they are no independent runs.

        Value (s, ...) to (n, ...), samples (k, s, ...) to (k, n, ...). Where all share one, or none does, each stays.
        """
        each = self if self.value.ndim > 1 else self.by_seed
        if n < 2 or n >= len(each.value):
            return each
        turns = [slice(turn, None, n) for turn in range(n)]
        value = np.stack([each.value[turn].mean(axis=0) for turn in turns])
        return Sampled(value, np.stack([each.samples[:, turn].mean(axis=1) for turn in turns], axis=1))

    @property
    def mean(self) -> Sampled:
        """Averaged over seeds: value () and samples (k,)."""
        each = self.by_seed
        with np.errstate(invalid="ignore"):  # draws that send two runs to either infinity have no mean
            return Sampled(each.value.mean(axis=0), each.samples.mean(axis=1))


class PatientDraws:
    """Patients drawn with replacement, as many as there are; each brings all of its rows.

    Args:
        groups: the patient of each row, (n,).
        n_draws: how often all patients are drawn.
        seed: the same groups and seed give the same draws.

    Attributes:
        counts: how often each patient is drawn, (k, g) uint8.
    """

    def __init__(self, groups: np.ndarray, n_draws: int, *, seed: int) -> None:
        if not len(groups) or n_draws < 1:
            raise ValueError(f"{len(groups)} rows and {n_draws} draws, expected at least one of each")
        patients, self._row_patient = np.unique(groups, return_inverse=True)
        self.counts = np.empty((n_draws, len(patients)), np.uint8)
        rng = np.random.default_rng(seed)
        for row in self.counts:
            count = np.bincount(rng.integers(0, len(patients), len(patients)), minlength=len(patients))
            if count.max() > _MOST_COUNT:
                raise OverflowError(f"a patient was drawn {count.max()} times, at most {_MOST_COUNT} can be kept")
            row[:] = count

    @property
    def n_draws(self) -> int:
        return len(self.counts)

    @property
    def n_patients(self) -> int:
        return self.counts.shape[1]

    @property
    def n_rows(self) -> int:
        return len(self._row_patient)

    def parts(self) -> Iterator[np.ndarray]:
        """How often each row counts, (at most 100, n) uint8, draw after draw."""
        for start in range(0, self.n_draws, _DRAWS_AT_ONCE):
            yield self.counts[start : start + _DRAWS_AT_ONCE].take(self._row_patient, axis=1)


def bootstrap(score: Score, draws: PatientDraws) -> Sampled:
    """Scores all rows, and each draw.

    Args:
        score: takes weights (k, n), gives (k, ...); such as `Ranking.auroc`.
    """
    value = score(np.ones((1, draws.n_rows), np.uint8))[0]
    return Sampled(np.asarray(value), np.concatenate([score(part) for part in draws.parts()]))


def over_patients(sampled: Sampled) -> Interval:
    """The mean over seeds, and what another set of patients would change; value (s,) or ()."""
    mean = sampled.mean
    return percentiles(float(mean.value), mean.samples)


def over_seeds(sampled: Sampled) -> Interval:
    """The mean over seeds, and what other training runs would change on the same patients; value (s,) or ().

    Student's interval of a mean: a few runs say little of how far runs spread, which resampling them would hide. One
    seed gives an interval of no width.
    """
    values = sampled.by_seed.value
    mean, reach = float(values.mean()), _T_975[min(len(values) - 1, len(_T_975) - 1)] * _seed_error(values)
    return Interval(mean, mean - reach, mean + reach)


def over_patients_and_seeds(sampled: Sampled, *, seed: int) -> Interval:
    """The mean over seeds, and what other patients and other training runs would change; value (s,) or ().

    Each draw resamples the patients, and moves the mean by a draw of Student's t times its error over seeds.
    """
    return percentiles(float(sampled.mean.value), with_seeds(sampled, seed=seed))


def with_seeds(sampled: Sampled, *, seed: int) -> np.ndarray:
    """Draws of the mean over seeds in which other training runs were drawn too, (k,)."""
    values, samples = sampled.by_seed.value, sampled.mean.samples
    if len(values) < 2:
        return samples
    return samples + np.random.default_rng(seed).standard_t(len(values) - 1, len(samples)) * _seed_error(values)


def difference(a: Sampled, b: Sampled) -> Interval:
    """How much a's score exceeds b's on other patients, such as internal and external ones; the runs are the same.

    Args:
        a: value (s,) or ().
        b: as many draws of other patients, and the same seeds. `paired_bootstrap` compares on the same patients.
    """
    if len(a.samples) != len(b.samples):
        raise ValueError(f"{len(a.samples)} and {len(b.samples)} draws, expected as many of each")
    # draws of the same seed choose alike places in both sets: shifted by one they are independent
    apart = Sampled(a.by_seed.value - b.by_seed.value, a.by_seed.samples - np.roll(b.by_seed.samples, 1, axis=0))
    return over_patients_and_seeds(apart, seed=0)


def percentiles(value: float, samples: np.ndarray) -> Interval:
    """The interval around a value that the draws (k,) give; draws without a score are left out.

    It is NaN where the value is, and where most draws have no score.
    """
    defined = samples[~np.isnan(samples)]
    if math.isnan(value) or len(defined) < _LEAST_DEFINED * len(samples):
        return Interval(value, math.nan, math.nan)
    low, high = np.percentile(defined, [2.5, 97.5])
    return Interval(value, float(low), float(high))


def _seed_error(values: np.ndarray) -> float:
    """Standard error of the mean of values (s,); 0 of one."""
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
