"""Whom a score holds for: by sex, age, view and site, and how far the groups lie apart.

Shape notation: u units, s seeds, k draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pandas as pd

from embedcache.metrics.intervals import PatientDraws, Sampled, bootstrap, over_patients
from embedcache.stage_two.scoring import CALLED, RANKED, Said, class_scores
from embedcache.stage_two.targets import Target

AGES = ((0, 40, "<40"), (40, 60, "40-60"), (60, 80, "60-80"), (80, np.inf, ">=80"))
LEAST_POSITIVES = 20
_MOST_GROUPS = 20  # of an attribute: one of more is a name
_SHOWN = ("auroc", "sensitivity", "specificity", "underdiagnosis")
_HEALTHY = ("no finding", "normal", "healthy")  # labels whose false presence is the missed disease


def subgroup_rows(
    answered: Said, frame: pd.DataFrame, values: np.ndarray, target: Target, draws: PatientDraws
) -> Iterator[dict[str, object]]:
    """Scores within each group, at the thresholds of all; then the two groups of an attribute that differ the most.

    The under-diagnosis rate is the share of the ill who are called well (Seyyed-Kalantari et al. 2021): of positives
    called absent, or of negatives of a label such as `No Finding` called present. A group of fewer than 20 positives
    is counted and not scored. What a unit of several images has is that of the first.

    Args:
        frame: the manifest's table of the units.
        values: labels of the units, (u, t).
    """
    sides = target.one_vs_rest(values)
    for k, class_name in enumerate(target.classes):
        y = sides[:, k]
        for attribute, groups in _attributes(frame).items():
            scored: dict[str, Sampled] = {}
            for group, members in groups.items():
                known = members & ~np.isnan(y)
                n_positive = int((y[known] == 1).sum())
                row: dict[str, object] = {
                    "class": class_name if target.n_outputs > 1 else "",
                    "attribute": attribute,
                    "group": group,
                    "n": int(known.sum()),
                    "n_positive": n_positive,
                    "suppressed": n_positive < LEAST_POSITIVES,
                }
                if n_positive >= LEAST_POSITIVES:
                    of_group = np.where(known, y, np.nan)
                    score = class_scores(of_group, answered.probabilities[..., k], answered.thresholds[:, k])
                    scored[group] = _shown(bootstrap(score, draws), class_name)
                    for j, name in enumerate(_SHOWN):
                        found = over_patients(scored[group][..., j])
                        row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
                yield row
            if len(scored) > 1:
                yield _largest_gap(scored, {"class": row["class"], "attribute": attribute})


def _shown(found: Sampled, class_name: str) -> Sampled:
    """Of `class_scores`, those that subgroups show: value (s, 4), samples (k, s, 4)."""
    names = [*RANKED, *CALLED]
    ranked, sensitivity, specificity = (names.index(name) for name in _SHOWN[:3])
    caught = specificity if class_name.lower() in _HEALTHY else sensitivity
    value, samples = (
        np.stack([a[..., ranked], a[..., sensitivity], a[..., specificity], 1 - a[..., caught]], axis=-1)
        for a in (found.value, found.samples)
    )
    return Sampled(value, samples)


def _largest_gap(scored: dict[str, Sampled], row: dict[str, object]) -> dict[str, object]:
    """The two groups whose AUROCs lie furthest apart, and how far all scores do.

    Intervals are simultaneous over all pairs of groups, as the largest of many gaps is large by chance: they reach as
    far as the largest deviation of any pair's gap does in 95% of draws.
    """
    means = {
        group: Sampled(s.value.mean(axis=0), s.samples.mean(axis=1)) for group, s in scored.items()
    }  # (4,), (k, 4)
    pairs = list(combinations(means, 2))
    gaps = {pair: means[pair[0]].value - means[pair[1]].value for pair in pairs}  # (4,) each
    known = [pair for pair in pairs if not np.isnan(gaps[pair][0])]
    if not known:
        return row | {"group": "largest gap (undefined)", "suppressed": False}
    high, low = max(known, key=lambda pair: abs(gaps[pair][0]))
    deviations = np.stack([np.abs(means[a].samples - means[b].samples - gaps[a, b]) for a, b in known])  # (pairs, k, 4)
    reach = np.nanpercentile(np.nanmax(deviations, axis=0), 95, axis=0)
    sign = 1.0 if gaps[high, low][0] >= 0 else -1.0
    first, second = (high, low) if sign > 0 else (low, high)
    for j, name in enumerate(_SHOWN):
        gap = float(sign * gaps[high, low][j])
        row |= {name: gap, f"{name}_low": gap - float(reach[j]), f"{name}_high": gap + float(reach[j])}
    return row | {"group": f"largest gap: {first} - {second}", "suppressed": False}


def _attributes(frame: pd.DataFrame) -> dict[str, dict[str, np.ndarray]]:
    """For each attribute its groups, each a mask (u,); rows where it is blank are in none."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name in ("sex", "view", "site"):
        values = frame[name].to_numpy(object) if name in frame else np.empty(0, object)
        groups = sorted(set(values) - {""})
        if 0 < len(groups) <= _MOST_GROUPS:
            found[name] = {group: values == group for group in groups}
    if "age" in frame:
        age = pd.to_numeric(frame["age"], errors="coerce").to_numpy(np.float64)
        groups_of_age = {name: (age >= low) & (age < high) for low, high, name in AGES}
        if any(mask.any() for mask in groups_of_age.values()):
            found["age"] = {name: mask for name, mask in groups_of_age.items() if mask.any()}
    if "sex" in found and "age" in found:
        found["sex x age"] = {
            f"{sex}, {age}": mask
            for sex, of_sex in found["sex"].items()
            for age, of_age in found["age"].items()
            for mask in [of_sex & of_age]
            if mask.any()
        }
    return found
