"""Controls: what a score would be without the thing that is said to have made it.

Shape notation: n samples, f features of metadata, t columns of labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd

from embedcache.metrics.classification import youden_threshold
from embedcache.stage_two.label_budget import Budget, grouped_folds
from embedcache.stage_two.logistic import fit_logistic
from embedcache.stage_two.samples import Samples
from embedcache.stage_two.targets import Target

_METADATA = ("view", "sex", "source")
_MOST_VALUES = 50  # of a column: one of more is a name
_TEXT_STRENGTH = 0.1  # of the regression from texts to labels


def metadata_features(frame: pd.DataFrame, train: np.ndarray) -> np.ndarray | None:
    """View, sex and source as one column for each value, and age with a mark where it is blank, (n, f).

    Values, the mean age and the need of a mark are those of training rows; another value is all zeros. None where there
    is nothing to tell.

    Args:
        train: numbers of the training rows.
    """
    columns = []
    for name in _METADATA:
        values = frame[name].to_numpy(object) if name in frame else np.full(len(frame), "", object)
        known = sorted(set(values[train]))
        if 1 < len(known) <= _MOST_VALUES:
            columns += [values == value for value in known]
    age = pd.to_numeric(frame["age"], errors="coerce").to_numpy(np.float64) if "age" in frame else np.full(1, np.nan)
    of_train = age[train] if len(age) == len(frame) else age
    if np.unique(of_train[~np.isnan(of_train)]).size > 1:
        columns.append(np.where(np.isnan(age), np.nanmean(of_train), age))
        if np.isnan(of_train).any():
            columns.append(np.isnan(age))
    return np.stack(columns, axis=1).astype(np.float32) if columns else None


def shuffled(budget: Budget) -> Budget:
    """The same labels, in training and validation, each under another sample."""
    rng = np.random.default_rng(budget.seed)
    return replace(budget, labels=rng.permutation(budget.labels), valid_labels=rng.permutation(budget.valid_labels))


def told_by_text(
    budget: Budget, samples: Samples, texts: Mapping[int, int], text_x: np.ndarray, target: Target, class_weight: str
) -> Budget:
    """Every training sample that has a text, labelled by what the budget's labels say of texts.

    A logistic regression learns from the texts of the budget's samples; theirs keep their own labels. A label is told
    present above the logit that parts the budget's own texts best, so that a rare one is not told absent of all. What
    the images gain by it is supervision that came with the texts, whatever aligned them. Without a text among the
    budget's samples nothing is told.

    Args:
        texts: for a training sample, the row of `text_x` that holds its text's embedding.
        text_x: on a common scale, (rows, d_text).
    """
    has_text = np.array([row in texts for row in budget.rows.tolist()], bool)
    if not has_text.any():
        return budget
    told, learnt = np.array(sorted(texts), np.int64), budget.rows[has_text]
    others = told[~np.isin(told, budget.rows)]
    text_rows = np.array([texts[row] for row in [*learnt.tolist(), *others.tolist()]], np.int64)
    (fitted,) = fit_logistic(
        text_x[text_rows[: len(learnt)]],
        budget.labels[has_text],
        target=target,
        strengths=[_TEXT_STRENGTH],
        class_weight=class_weight,
    )
    logits = fitted(text_x[text_rows])
    own, of_others = logits[: len(learnt)], logits[len(learnt) :]
    if target.task == "multi-class":
        guessed = of_others.argmax(axis=1)[:, None].astype(np.float64)
    else:
        columns = zip(budget.labels[has_text].T, own.T, of_others.T, strict=True)
        guessed = np.stack([_told(y, z, others_z) for y, z, others_z in columns], axis=1)
    rows, labels = np.concatenate([budget.rows, others]), np.concatenate([budget.labels, guessed])
    folds = grouped_folds(samples, rows, labels, target, budget.seed) if budget.choice == "folds" else budget.folds
    return replace(budget, rows=rows, labels=labels, folds=folds)


def _told(labels: np.ndarray, own: np.ndarray, others: np.ndarray) -> np.ndarray:
    """1 where a logit of others (m,) is above the threshold that parts labels (n,) by their own logits (n,), else 0."""
    known = ~np.isnan(labels)
    threshold = youden_threshold(labels[known], own[known])
    return (others >= (0.0 if np.isnan(threshold) else threshold)).astype(np.float64)
