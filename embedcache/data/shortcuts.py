"""What metadata alone tells of a label: a score that an encoder has to beat before it has seen anything.

DeGrave et al. 2021 ("AI for radiographic COVID-19 detection selects shortcuts over signal") show what is at stake.
Shape notation: n rows of a manifest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from embedcache.data.manifest import Manifest
from embedcache.metrics.classification import accuracy, auroc

_COLUMNS = ("view", "sex", "age", "site", "source")
_DECADE = 10
MOST_CLASSES = 1000  # of a label: more are no classes
_MOST_VALUES = 100  # a column of more values is a name, not a property


@dataclass(frozen=True)
class Shortcut:
    """How well one column of metadata alone predicts a label on the test split.

    Each value (of age, each decade) is given the share of each class among the training rows that have it.

    Args:
        metric: `auroc` of a binary label; `accuracy` of a multi-class one.
        value: on the test rows.
        chance: what guessing without the column scores: 0.5, or the accuracy of the commonest class.
        n_test: test rows that have the label.
    """

    label: str
    column: str
    metric: Literal["auroc", "accuracy"]
    value: float
    chance: float
    n_test: int

    @property
    def strength(self) -> float:
        """How far above chance."""
        return self.value - self.chance


def shortcuts(manifest: Manifest) -> list[Shortcut]:
    """Every column's score on every label, the strongest first; none where a split or a second value is lacking."""
    train, test = manifest.in_split("train"), manifest.in_split("test")
    found = [
        scored
        for label in manifest.labels
        for column, values in _columns(manifest.frame)
        if (scored := _score(manifest, label, column, values, train, test)) is not None
    ]
    return sorted(found, key=lambda s: -s.strength)


def _columns(frame: pd.DataFrame) -> Iterator[tuple[str, np.ndarray]]:
    """A code for each row's value, (n,) int64; blank is a value too."""
    for column in _COLUMNS:
        if column in frame:
            values = frame[column]
            if column == "age":
                values = pd.to_numeric(values, errors="coerce") // _DECADE
            codes, known = pd.factorize(values.where(values != "", None), use_na_sentinel=False)
            if 1 < len(known) <= _MOST_VALUES:
                yield column, codes


def _score(
    manifest: Manifest, label: str, column: str, codes: np.ndarray, train: np.ndarray, test: np.ndarray
) -> Shortcut | None:
    labels = manifest.label(label)
    known = ~np.isnan(labels)
    fit, held = train & known, test & known
    classes = np.unique(labels[fit]).astype(np.int64)
    if len(classes) < 2 or classes.max() >= MOST_CLASSES or len(np.unique(labels[held])) < 2:
        return None
    n_classes = classes.max() + 1
    counts = np.zeros((codes.max() + 1, n_classes))
    np.add.at(counts, (codes[fit], labels[fit].astype(np.int64)), 1)
    prior = counts.sum(axis=0) / counts.sum()
    shares = (counts + prior) / (counts.sum(axis=1, keepdims=True) + 1)  # a value that training lacks has the prior
    truth, guesses = labels[held].astype(np.int64), shares[codes[held]]
    if n_classes == 2:
        value = float(auroc(truth, guesses[:, 1])[0])
        # the test rows have one value, or values that the training rows lack: one guess for all ranks nothing
        return None if math.isnan(value) else Shortcut(label, column, "auroc", value, 0.5, len(truth))
    right = float(accuracy(truth, guesses.argmax(axis=1))[0])
    return Shortcut(label, column, "accuracy", right, float((truth == prior.argmax()).mean()), len(truth))
