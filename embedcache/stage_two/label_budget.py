"""How many labels a run may use, validation labels included: a claim about few labels must not choose by many.

Shape notation: n samples, t columns of labels, c outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from embedcache.data.manifest import Manifest
from embedcache.data.splits import label_subset, rarest_label
from embedcache.errors import ManifestError
from embedcache.stage_two.probe_config import ProbeConfig
from embedcache.stage_two.samples import Samples
from embedcache.stage_two.targets import Target

N_FOLDS = 5
LEAST = 5  # of either side: fewer choose nothing, no setting and no threshold


@dataclass(frozen=True, eq=False)
class Budget:
    """Labels of one run: what it learns from, and what it may choose by.

    Args:
        fraction: of the training labels; NaN for shots.
        shots: labels of each class; 0 for a fraction.
        seed: of the draw, and of what is trained on it.
        rows: training samples, (n,).
        labels: (n, t), NaN where blank.
        choice: how settings are chosen: on `valid` samples, on held-out `folds` of the training samples, or not at all,
            so that they are `fixed`.
        valid: validation samples, (v,); empty but for `valid`.
        valid_labels: (v, t).
        folds: number of the fold of each training sample, (n,); empty but for `folds`.
    """

    fraction: float
    shots: int
    seed: int
    rows: np.ndarray
    labels: np.ndarray
    choice: Literal["valid", "folds", "fixed"]
    valid: np.ndarray
    valid_labels: np.ndarray
    folds: np.ndarray

    @property
    def amount(self) -> tuple[float, int]:
        """What runs have in common that differ in their seed alone; -1 stands for no fraction."""
        return (-1.0 if np.isnan(self.fraction) else self.fraction, self.shots)


def without_groups(budget: Budget, groups: np.ndarray, n: int) -> list[Budget]:
    """The budget without each of n groups of its patients in turn; fewer where it has not as many patients.

    Args:
        groups: the patient of each sample.
    """
    patients, index = np.unique(groups[budget.rows].astype(str), return_inverse=True)
    n = min(n, len(patients))
    group = (np.random.default_rng(0).permutation(len(patients)) % n)[index]
    found = []
    for k in range(n):
        keep = group != k
        folds = budget.folds[keep] if len(budget.folds) else budget.folds
        found.append(replace(budget, rows=budget.rows[keep], labels=budget.labels[keep], folds=folds))
    return found


def budgets(manifest: Manifest, samples: Samples, target: Target, config: ProbeConfig) -> list[Budget]:
    """A budget for each fraction and seed, then for each number of shots and draw.

    Validation labels are the `matched` share of the validation split, or all of it. Where they are fewer than 5 of
    either side, 5-fold cross-validation within the training labels takes their place, patients in one fold each; where
    these are too few too, settings are fixed.

    Raises:
        ManifestError: a training or test split without two classes, or a subset of the manifest's without.
    """
    for split in ("train", "test"):
        _check_two_classes(samples.values[samples.in_split(split)], target, f"split {split!r}", manifest.name)
    found = [
        _chosen(samples, target, config, fraction, 0, seed, rows)
        for fraction in config.fractions
        for seed in range(config.n_seeds)
        for rows in [_fraction(manifest, samples, target, config, fraction, seed)]
    ]
    return found + [
        _chosen(samples, target, config, np.nan, shots, seed, _shots(samples, target, shots, seed))
        for shots in config.shots
        for seed in range(config.n_shot_draws)
    ]


def grouped_folds(samples: Samples, rows: np.ndarray, labels: np.ndarray, target: Target, seed: int) -> np.ndarray:
    """The fold of each sample, from 0, (n,) int64: patients whole, classes in like shares."""
    from sklearn.model_selection import StratifiedGroupKFold

    strata = _strata(labels, target)
    if np.unique(strata, return_counts=True)[1].max() < N_FOLDS:  # many rare labels: none can be shared out
        strata = np.zeros(len(rows))
    splitter = StratifiedGroupKFold(N_FOLDS, shuffle=True, random_state=seed)
    fold = np.empty(len(rows), np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class with fewer patients than folds
        for k, (_, held) in enumerate(splitter.split(rows, strata, samples.groups[rows])):
            fold[held] = k
    return fold


def _fraction(
    manifest: Manifest, samples: Samples, target: Target, config: ProbeConfig, fraction: float, seed: int
) -> np.ndarray:
    train = _known(samples, "train", target)
    if config.subsets == "drawn":
        return train[label_subset(_strata(samples.values[train], target), fraction, seed=seed)]
    of_fraction = set(manifest.frame["id"][manifest.in_fraction(fraction)])
    rows = train[samples.frame["id"].iloc[train].isin(of_fraction).to_numpy()]
    what = f"the {len(rows)} rows that its column 'fraction' gives to {fraction:g} of the labels"
    _check_two_classes(samples.values[rows], target, what, manifest.name)
    return rows


def _shots(samples: Samples, target: Target, shots: int, seed: int) -> np.ndarray:
    train = _known(samples, "train", target)
    strata, rng = _strata(samples.values[train], target), np.random.default_rng((shots, seed))
    drawn: Iterator[np.ndarray] = (rng.permutation(np.flatnonzero(strata == s))[:shots] for s in np.unique(strata))
    return train[np.sort(np.concatenate(list(drawn)))]


def _chosen(
    samples: Samples, target: Target, config: ProbeConfig, fraction: float, shots: int, seed: int, rows: np.ndarray
) -> Budget:
    labels, nothing = samples.values[rows], np.empty(0, np.int64)
    valid, choice, folds = nothing, "fixed", nothing
    if not shots:
        valid = _known(samples, "valid", target)
        if config.valid_labels == "matched" and len(valid):
            strata = _strata(samples.values[valid], target)
            valid = valid[label_subset(strata, fraction, seed=seed, min_per_class=0)]
        if _enough(samples.values[valid], np.arange(len(valid)), target):
            choice = "valid"
        elif _enough(labels, samples.groups[rows], target):
            choice, folds = "folds", grouped_folds(samples, rows, labels, target, seed)
    valid = valid if choice == "valid" else nothing
    return Budget(fraction, shots, seed, rows, labels, choice, valid, samples.values[valid], folds)  # type: ignore[arg-type]


def _known(samples: Samples, split: str, target: Target) -> np.ndarray:
    rows = samples.in_split(split)
    return rows[target.known(samples.values[rows])]


def _strata(values: np.ndarray, target: Target) -> np.ndarray:
    return rarest_label(values).astype(np.float64) if target.task == "multi-label" else values[:, 0]


def _enough(values: np.ndarray, groups: np.ndarray, target: Target) -> bool:
    """Whether some output has enough groups on either side to choose by."""
    sides = target.one_vs_rest(values)
    return any(
        all(len(set(groups[sides[:, k] == side].tolist())) >= LEAST for side in (0, 1)) for k in range(sides.shape[1])
    )


def _check_two_classes(values: np.ndarray, target: Target, where: str, dataset: str) -> None:
    if not len(values):
        raise ManifestError(
            f"{dataset}: nothing in {where}; a probe learns from the split 'train' and is scored on 'test': make "
            "splits in the column 'split', or by 'data.split' of a recipe"
        )
    if not target.both_sides(values).any():
        classes = [f"{value:g}" for value in np.unique(values[~np.isnan(values)])]
        raise ManifestError(
            f"{dataset}: label {target.name!r} has classes {', '.join(classes) or 'none'} in {where}, expected at "
            "least two; choose another label or other splits, or try failed inputs again with 'embedcache extract "
            "--retry-failed'"
        )
