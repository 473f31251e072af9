"""Labels: sets of them and the task they make, and the uncertain ones of report labellers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from embedcache.errors import ManifestError, SettingsError

LABEL_PREFIX = "label."
Task = Literal["binary", "multi-label", "multi-class"]
Uncertain = Literal["zeros", "ones", "ignore", "paper"]

# Irvin et al. 2019, and the five findings that the paper's code keeps; what it does not name counts as absent
_PAPER_ONES = ("Atelectasis", "Edema", "Pleural Effusion")

CHEXPERT_LABELS = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)


@dataclass(frozen=True)
class LabelSet:
    """Label columns that make one task.

    Args:
        name: of the set.
        task: `binary` (one column of 0 and 1), `multi-label` (several of them), `multi-class` (one column of classes).
        labels: names of its columns, without their prefix.
        classes: names of the classes 0, 1, ... of a multi-class label, where they have any.
    """

    name: str
    task: Task
    labels: tuple[str, ...]
    classes: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> LabelSet:
        return cls(said["name"], said["task"], tuple(said["labels"]), tuple(said["classes"]))


def resolve_uncertain(table: pd.DataFrame, findings: Sequence[str], policy: str) -> dict[str, pd.Series]:
    """Labels 1, 0, -1 (uncertain) and blank (not mentioned) of a report labeller as 1, 0 and blank.

    What a report does not mention is taken for absent, as the labellers' users do. A row without any label stays blank.

    Args:
        table: `label.<finding>` of each finding, float with NaN for blank.
        policy: `zeros` and `ones` count uncertain as absent or present, `ignore` leaves it blank (U-Zeros, U-Ones and
            U-Ignore of Irvin et al. 2019); `paper` is the map that the paper's code inherits: present for atelectasis,
            edema and pleural effusion, else absent, and rows without any label are absent throughout.

    Returns:
        The columns `label.<finding>`.

    Raises:
        SettingsError: no such policy.
        ManifestError: another value.
    """
    if policy not in get_args(Uncertain):
        raise SettingsError(f"uncertain labels {policy!r}, expected one of {', '.join(get_args(Uncertain))}")
    columns = {finding: LABEL_PREFIX + finding for finding in findings}
    for finding, column in columns.items():
        odd = ~table[column].isin([1, 0, -1]) & table[column].notna()
        if odd.any():
            raise ManifestError(f"label {finding!r} is {table[column][odd].iloc[0]:g}, expected 1, 0, -1 or blank")
    unlabelled = table[list(columns.values())].isna().all(axis=1) & (policy != "paper")
    resolved = {}
    for finding, column in columns.items():
        stands_for = {"zeros": 0.0, "ones": 1.0, "ignore": np.nan, "paper": float(finding in _PAPER_ONES)}[policy]
        values = table[column]
        resolved[column] = values.fillna(0.0).where(values != -1, stands_for).mask(unlabelled)
    return resolved
