"""Splits that keep a patient on one side, and nested label fractions."""

from __future__ import annotations

import numpy as np

from embedcache.errors import ManifestError


def patient_split(groups: np.ndarray, strata: np.ndarray, *, valid: float, test: float, seed: int) -> np.ndarray:
    """Assigns each patient to one split, each stratum in the same proportions.

    Args:
        groups: the patient of each row, (n,).
        strata: a value per row to balance, such as a label, (n,); a patient counts with its largest.
        valid, test: fractions of the patients of each stratum.

    Returns:
        `train`, `valid` or `test` for each row, (n,) object.
    """
    if min(valid, test) < 0 or valid + test >= 1:
        raise ManifestError(f"split fractions valid {valid} and test {test}, expected both >= 0 and a sum below 1")
    patients, row_patient = np.unique(groups, return_inverse=True)
    stratum = np.full(len(patients), -np.inf)
    np.maximum.at(stratum, row_patient, np.nan_to_num(strata.astype(np.float64), nan=-1.0))
    assigned = np.full(len(patients), "train", object)
    rng = np.random.default_rng(seed)
    for value in np.unique(stratum):
        members = rng.permutation(np.flatnonzero(stratum == value))
        n_test, n_valid = round(test * len(members)), round(valid * len(members))
        assigned[members[:n_test]] = "test"
        assigned[members[n_test : n_test + n_valid]] = "valid"
    return assigned[row_patient]


def label_subset(labels: np.ndarray, fraction: float, *, seed: int, min_per_class: int = 2) -> np.ndarray:
    """Rows whose labels a run may use: stratified, and nested (the rows of 1% are among those of 10%).

    Args:
        labels: class of each row, (n,), NaN where blank; blank rows are never chosen.
        fraction: of each class, in (0, 1].
        min_per_class: at least so many rows of each class, where there are as many.

    Returns:
        Row numbers in ascending order.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"label fraction {fraction}, expected a number in (0, 1]")
    rng = np.random.default_rng(seed)
    chosen = []
    for value in np.unique(labels[~np.isnan(labels)]):
        members = rng.permutation(np.flatnonzero(labels == value))
        chosen.append(members[: max(round(fraction * len(members)), min_per_class)])
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, np.int64)
