"""Scores of a head's answers, under every draw of patients at once.

Shape notation: u units, s seeds, c outputs, k draws, m scores, t columns of labels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from embedcache.metrics.classification import Ranking, totals, youden_threshold
from embedcache.metrics.intervals import PatientDraws, Sampled, bootstrap
from embedcache.stage_two.answers import Answer
from embedcache.stage_two.label_budget import LEAST
from embedcache.stage_two.probe_config import Pool, ProbeConfig
from embedcache.stage_two.samples import Samples, Units
from embedcache.stage_two.targets import Target

RANKED = ("auroc", "average_precision")
CALLED = ("sensitivity", "specificity", "f1", "accuracy", "balanced_accuracy")  # at the threshold
OVERALL = ("accuracy", "balanced_accuracy", "f1")  # of the likeliest class
MACRO = "macro"
_LARGEST_LOGIT = 30.0


@dataclass(frozen=True, eq=False)
class Said:
    """What the runs of one head say of the units of a test set.

    Args:
        probabilities: (s, u, c).
        thresholds: at which each output is called present, chosen on other units, (s, c); 0.5 where these were too few.
    """

    probabilities: np.ndarray
    thresholds: np.ndarray


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores by name.

    Args:
        names: (metric, class) of each of m scores; the class is blank for a whole task, `macro` for a mean of classes.
        sampled: value (s, m), samples (k, s, m).
        scorable: which outputs have a score, (c,) bool.
    """

    names: tuple[tuple[str, str], ...]
    sampled: Sampled
    scorable: np.ndarray

    def of(self, metric: str, class_name: str) -> Sampled:
        """One score, value (s,) and samples (k, s)."""
        return self.sampled[..., self.names.index((metric, class_name))]

    def macro(self, metric: str, target: Target, among: np.ndarray) -> Sampled:
        """The mean over some outputs, (c,) bool; undefined without any."""
        chosen = [self.of(metric, target.classes[k]) for k in np.flatnonzero(among)]
        if not chosen:
            nothing = self.sampled[..., 0]
            return Sampled(np.full_like(nothing.value, np.nan), np.full_like(nothing.samples, np.nan))
        return Sampled(*(np.mean([getattr(c, part) for c in chosen], axis=0) for part in ("value", "samples")))


@dataclass(frozen=True, eq=False)
class ChosenOn:
    """The units that thresholds and calibration of one run were chosen on: labels (v, t), probabilities (v, c)."""

    values: np.ndarray
    probabilities: np.ndarray

    @classmethod
    def of(cls, answer: Answer, samples: Samples, target: Target, pool: Pool) -> ChosenOn:
        """Pools what an answer was chosen on into units."""
        units = samples.units(answer.chosen_on, target, "the samples to choose by")
        values = answer.chosen_labels  # those of a control may be others than the samples' own
        if len(units.keys) < len(values):
            values = pd.DataFrame(values).groupby(units.index).max().to_numpy()
        return cls(values, units.pooled(target.probabilities(answer.chosen_logits.astype(np.float64)), pool))

    def usable(self, k: int, target: Target) -> tuple[np.ndarray, np.ndarray] | None:
        """Labels and probabilities of one output, or None where either side has fewer than 5."""
        y = target.one_vs_rest(self.values)[:, k]
        known = ~np.isnan(y)
        if min((y == 1).sum(), (y == 0).sum()) < LEAST:
            return None
        return y[known].astype(np.int64), self.probabilities[known, k]


def said(
    answers: Sequence[Answer], chosen: Sequence[ChosenOn], units: Units, target: Target, config: ProbeConfig
) -> Said:
    """Probabilities of units, and thresholds: by Youden's J, or all 0.5.

    Args:
        answers: of each seed, their logits those of the samples of `units`.
        chosen: of each seed.
    """
    probabilities = [units.pooled(target.probabilities(a.logits.astype(np.float64)), config.pool) for a in answers]
    thresholds = np.full((len(answers), target.n_outputs), 0.5)
    for s, of_seed in enumerate(chosen if config.threshold == "youden" else ()):
        for k in range(target.n_outputs):
            usable = of_seed.usable(k, target)
            if usable is not None:
                thresholds[s, k] = youden_threshold(*usable)
    return Said(np.stack(probabilities), thresholds)


def score(answered: Said, values: np.ndarray, target: Target, draws: PatientDraws, *, learnt: np.ndarray) -> Scored:
    """All scores of a task, for each seed, of all units and of each draw.

    An output has a score where its label is both present and absent, in training and among the units: what a head says
    of a class that it never saw is not a number by accident. The macro mean is over those.

    Args:
        values: labels of the units, (u, t).
        draws: of the patients of the units.
        learnt: outputs whose training labels held both, (c,) bool.
    """
    sides = target.one_vs_rest(values)
    scorable = learnt & (sides == 0).any(axis=0) & (sides == 1).any(axis=0)
    single = target.n_outputs == 1
    names = [(m, "" if single else name) for name in target.classes for m in (*RANKED, *CALLED)]
    parts = [
        class_scores(np.where(scorable[k], sides[:, k], np.nan), p, answered.thresholds[:, k])
        for k, p in enumerate(np.moveaxis(answered.probabilities, 2, 0))
    ]
    if not single:
        names += [(m, MACRO) for m in (*RANKED, *CALLED)]
    overall = None
    if target.task == "multi-class":
        names += [(m, "") for m in OVERALL]
        overall = _overall(values[:, 0], answered.probabilities, scorable)

    def all_scores(weights: np.ndarray) -> np.ndarray:
        of_classes = [part(weights) for part in parts]
        found = list(of_classes)
        if not single:
            some = [of_class for of_class, there in zip(of_classes, scorable, strict=True) if there]
            found.append(np.mean(some, axis=0) if some else np.full_like(of_classes[0], np.nan))
        return np.concatenate([*found, *([] if overall is None else [overall(weights)])], axis=2)

    return Scored(tuple(names), bootstrap(all_scores, draws), scorable)


def class_scores(y: np.ndarray, p: np.ndarray, thresholds: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Scores of one output as a function of weights (k, u), giving (k, s, 7) in the order of `RANKED` and `CALLED`.

    Args:
        y: 0, 1 or NaN, (u,).
        p: (s, u).
        thresholds: (s,).
    """
    known = ~np.isnan(y)
    if not known.any():
        return lambda weights: np.full((len(weights), len(p), len(RANKED) + len(CALLED)), np.nan)
    everything = bool(known.all())
    y, p = y[known], p[:, known]
    rankings = [Ranking.of(y, of_seed) for of_seed in p]
    called = p >= thresholds[:, None]
    columns = [*(called & (y == 1)), *(called & (y == 0)), y == 1, y == 0]
    s = len(p)

    def scores(weights: np.ndarray) -> np.ndarray:
        weights = weights if everything else np.ascontiguousarray(weights[:, known])
        sums = totals(weights, *columns)
        hits, false_alarms, positive, negative = sums[:, :s], sums[:, s : 2 * s], sums[:, [-2]], sums[:, [-1]]
        with np.errstate(invalid="ignore"):  # nothing of a kind: undefined
            sensitivity, specificity = hits / positive, 1 - false_alarms / negative
            f1 = 2 * hits / (hits + false_alarms + positive)
            accuracy = (hits + negative - false_alarms) / (positive + negative)
        auroc = np.stack([r.auroc(weights) for r in rankings], axis=1)
        precision = np.stack([r.average_precision(weights) for r in rankings], axis=1)
        balanced = (sensitivity + specificity) / 2
        return np.stack([auroc, precision, sensitivity, specificity, f1, accuracy, balanced], axis=2)

    return scores


def _overall(y: np.ndarray, p: np.ndarray, scorable: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Scores of the likeliest class of each unit, as a function of weights: (k, s, 3) in the order of `OVERALL`.

    Accuracy is over all units; balanced accuracy and F1 are means over scorable classes that a draw holds.
    """
    known = ~np.isnan(y)
    y, likeliest = y[known], p[:, known].argmax(axis=2)  # (u,), (s, u)
    s, c = p.shape[0], p.shape[2]
    right = [(likeliest[seed] == k) & (y == k) for seed in range(s) for k in range(c)]
    guessed = [likeliest[seed] == k for seed in range(s) for k in range(c)]
    there = [y == k for k in range(c)]

    def scores(weights: np.ndarray) -> np.ndarray:
        sums = totals(np.ascontiguousarray(weights[:, known]), *right, *guessed, *there)
        hits, guesses = (part.reshape(len(weights), s, c) for part in np.split(sums[:, : 2 * s * c], 2, axis=1))
        of_class = sums[:, None, 2 * s * c :]
        with np.errstate(invalid="ignore"):
            accuracy = hits.sum(axis=2) / of_class.sum(axis=2)
            recall, f1 = hits / of_class, 2 * hits / (guesses + of_class)
        return np.stack([accuracy, _mean(recall[..., scorable]), _mean(f1[..., scorable])], axis=2)

    return scores


def _mean(scores: np.ndarray) -> np.ndarray:
    """Mean over the last axis, of what is defined there; NaN where nothing is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.asarray(np.nanmean(scores, axis=-1))


def logit(p: np.ndarray) -> np.ndarray:
    """Log odds, kept within 30 of 0."""
    with np.errstate(divide="ignore"):
        return np.clip(np.log(p) - np.log1p(-p), -_LARGEST_LOGIT, _LARGEST_LOGIT)
