"""Scores of a head's answers, under every draw of patients at once.

Shape notation: u units, s seeds, c outputs, k draws, m scores, t columns of labels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from embedcache.metrics.classification import Calls, Ranking, ratio, totals, youden_threshold
from embedcache.metrics.intervals import PatientDraws, Sampled, bootstrap
from embedcache.stage_two.answers import Answer
from embedcache.stage_two.label_budget import LEAST
from embedcache.stage_two.probe_config import Pool, ProbeConfig
from embedcache.stage_two.samples import Samples, Units, largest_labels
from embedcache.stage_two.targets import Target

RANKED = ("auroc", "average_precision")
CALLED = ("sensitivity", "specificity", "f1", "accuracy", "balanced_accuracy")  # at the threshold
OVERALL = ("accuracy", "balanced_accuracy", "f1")  # of the likeliest class
MACRO = "macro"


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
        places = [self.names.index((metric, target.classes[k])) for k in np.flatnonzero(among)]
        if not places:
            return Sampled(*(np.full(part.shape[:-1], np.nan) for part in (self.sampled.value, self.sampled.samples)))
        return Sampled(*(part[..., places].mean(axis=-1) for part in (self.sampled.value, self.sampled.samples)))


@dataclass(frozen=True, eq=False)
class ChosenOn:
    """The units that thresholds and calibration of one run were chosen on: labels (v, t), probabilities (v, c)."""

    values: np.ndarray
    probabilities: np.ndarray

    @classmethod
    def of(cls, answer: Answer, samples: Samples, target: Target, pool: Pool) -> ChosenOn:
        """Pools what an answer was chosen on into units."""
        units = samples.units(answer.chosen_on, target, "the samples to choose by")
        values = largest_labels(answer.chosen_labels, units.index)  # of a control they are not the samples' own
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
    sides, scorable = target.one_vs_rest(values), learnt & target.both_sides(values)
    single = target.n_outputs == 1
    names = [(m, "" if single else name) for name in target.classes for m in (*RANKED, *CALLED)]
    parts = [
        class_scores(np.where(scorable[k], sides[:, k], np.nan), p, answered.thresholds[:, k])
        for k, p in enumerate(np.moveaxis(answered.probabilities, 2, 0))
    ]
    if target.task == "multi-class":
        names += [(m, "") for m in OVERALL]
        parts.append(_overall(values[:, 0], answered.probabilities, scorable))
    found = Scored(
        tuple(names),
        bootstrap(lambda weights: np.concatenate([part(weights) for part in parts], axis=2), draws),
        scorable,
    )
    return found if single else _with_macro(found, target)


def _with_macro(scored: Scored, target: Target) -> Scored:
    """With the mean over scorable outputs of each of their scores."""
    metrics = (*RANKED, *CALLED)
    means = [scored.macro(metric, target, scored.scorable) for metric in metrics]
    value, samples = (
        np.concatenate([part, np.stack(of_means, axis=-1)], axis=-1)
        for part, of_means in (
            (scored.sampled.value, [m.value for m in means]),
            (scored.sampled.samples, [m.samples for m in means]),
        )
    )
    return Scored((*scored.names, *((m, MACRO) for m in metrics)), Sampled(value, samples), scored.scorable)


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

    def scores(weights: np.ndarray) -> np.ndarray:
        weights = weights if everything else np.ascontiguousarray(weights[:, known])
        calls = Calls.of(y, called, weights)
        ranked = [np.stack([getattr(r, metric)(weights) for r in rankings], axis=1) for metric in RANKED]
        return np.stack([*ranked, *(getattr(calls, metric) for metric in CALLED)], axis=2)

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
        accuracy = ratio(hits.sum(axis=2), of_class.sum(axis=2))
        recall, f1 = ratio(hits, of_class), ratio(2 * hits, guesses + of_class)
        return np.stack([accuracy, _mean(recall[..., scorable]), _mean(f1[..., scorable])], axis=2)

    return scores


def _mean(scores: np.ndarray) -> np.ndarray:
    """Mean over the last axis, of what is defined there; NaN where nothing is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.asarray(np.nanmean(scores, axis=-1))
