"""The score by which settings and encoders are compared, and how: on the same units, patients and runs."""

from __future__ import annotations

import numpy as np

from embedcache.metrics.intervals import PatientDraws
from embedcache.metrics.paired import PairedDifference, compare_aurocs, paired_bootstrap
from embedcache.stage_two.probe_config import Protocol
from embedcache.stage_two.scoring import MACRO, Said, Scored
from embedcache.stage_two.targets import Target

Headline = tuple[str, str]


def headline(target: Target, protocol: Protocol) -> Headline:
    """The metric, and the class or `macro`, by which settings are compared; the paper's of COVIDx is accuracy."""
    if target.task == "multi-class" or (target.task == "binary" and protocol == "paper-covidx"):
        return "accuracy", ""
    return "auroc", "" if target.task == "binary" else MACRO


def compared(
    a: tuple[Said, Scored],
    b: tuple[Said, Scored],
    values: np.ndarray,
    target: Target,
    draws: PatientDraws,
    by: Headline,
    *,
    n_turns: int = 0,
    left_out: np.ndarray | None = None,
) -> PairedDifference:
    """How much a exceeds b: by DeLong where it holds (one run, one unit a patient, and nothing blank), else by draws.

    Args:
        values: labels of the units, (u, t).
        draws: of their patients, under which both were scored.
        n_turns: Adaptors that the runs took in turn, see `Sampled.by_turn`.
        left_out: how much a exceeds b where groups of training patients are left out, see `paired_bootstrap`.
    """
    (first, scored), (second, other) = a, b
    of_a, of_b = scored.of(*by), other.of(*by)
    of_auroc = by[0] == "auroc" and target.task == "binary"
    if of_auroc and len(of_a.value) == len(of_b.value) == 1 and not np.isnan(values).any():
        p, q = (told.probabilities[0, :, 0] for told in (first, second))
        return compare_aurocs(values[:, 0].astype(np.int64), p, q, draws=draws, left_out=left_out)
    return paired_bootstrap(of_a.by_turn(n_turns), of_b.by_turn(n_turns), left_out=left_out)
