"""Splits that keep a patient on one side, the published ones that do not, and nested label fractions."""

from __future__ import annotations

import numpy as np

from embedcache.errors import ManifestError

FRACTIONS = (0.01, 0.1, 1.0)


def patient_split(groups: np.ndarray, strata: np.ndarray, *, valid: float, test: float, seed: int) -> np.ndarray:
    """Assigns each patient to one split, each stratum in the same proportions.

    Args:
        groups: the patient of each row, (n,).
        strata: a value per row to balance, such as a label, (n,); a patient counts with its largest.
        valid, test: fractions of the patients of each stratum.

    Returns:
        `train`, `valid` or `test` for each row, (n,) object.
    """
    if not (valid >= 0 and test >= 0 and valid + test < 1):
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


def rarest_label(labels: np.ndarray) -> np.ndarray:
    """A stratum for each row of a multi-label table: its rarest present label, the rarer the larger.

    Args:
        labels: 0, 1 or NaN, (n, k).

    Returns:
        (n,) int64; 0 where no label is present.
    """
    present = labels == 1
    rank = np.empty(labels.shape[1], np.int64)
    rank[np.argsort(-present.sum(axis=0), kind="stable")] = np.arange(1, labels.shape[1] + 1)
    return (present * rank).max(axis=1, initial=0)


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


def stratified_fractions(strata: np.ndarray, train: np.ndarray, *, seed: int) -> np.ndarray:
    """The least of `FRACTIONS` under which a training row is used, (n,), NaN elsewhere; stratified, so nested.

    Args:
        strata: class of each row, (n,).
        train: which rows are of the training split, (n,) bool.
    """
    smallest = np.full(len(strata), np.nan)
    rows = np.flatnonzero(train)
    for fraction in sorted(FRACTIONS, reverse=True):
        smallest[rows[label_subset(strata[rows].astype(np.float64), fraction, seed=seed)]] = fraction
    return smallest


def published_holdout(n: int, held_out: float | int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Train, valid and test rows, each in its order, as the code that the paper builds on draws them.

    That is scikit-learn's `train_test_split` twice with `random_state=0`: rows held out, then its halves, of which the
    first is test, the second valid. Its permutation is NumPy's, which is pinned for good.

    Args:
        held_out: share or number of the n rows that is held out.
    """
    train, rest = shuffled_halves(n, held_out)
    first, second = shuffled_halves(len(rest), 0.5)
    return train, rest[second], rest[first]


def shuffled_halves(n: int, second: float | int) -> tuple[np.ndarray, np.ndarray]:
    """Rows in the order in which scikit-learn's `train_test_split(random_state=0)` gives them.

    Args:
        second: share (rounded up) or number of rows of the second part, which the shuffled rows begin with.
    """
    order = np.random.RandomState(0).permutation(n)
    n_second = second if isinstance(second, int) else int(np.ceil(second * n))
    return order[n_second:], order[:n_second]


def in_parts(n: int, **parts: np.ndarray) -> np.ndarray:
    """The split of each of n rows, (n,) object, from the rows of each; a row in several has them joined by `+`."""
    split = np.full(n, "", object)
    for name, rows in parts.items():
        split[rows] = np.where(split[rows] == "", name, split[rows] + f"+{name}")
    return split


def published_fractions(
    n: int, train: np.ndarray, *, rounded_down: bool = False, state: np.random.RandomState | None = None
) -> np.ndarray:
    """The least of `FRACTIONS` under which each of n rows is used by the published code, (n,), NaN where none.

    Not stratified: pandas' `sample(frac, random_state=42)`, or `numpy.random.choice` after seed 42; a smaller fraction
    is the beginning of a larger one's permutation, so they are nested.

    Args:
        train: training rows in the order in which the published code lists them.
        rounded_down: whether a count is cut off (`int`) rather than rounded, as in its segmentation.
        state: NumPy's generator, where draws went before.
    """
    state = state or np.random.RandomState(42)
    order = state.permutation(len(train))
    smallest = np.full(n, np.nan)
    for fraction in sorted(FRACTIONS, reverse=True):
        n_used = fraction * len(train)
        smallest[train[order[: int(n_used) if rounded_down else round(n_used)]]] = fraction
    return smallest
