"""What heads say of images, as rows of a table.

Shape notation: b images, c outputs of a head.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from embedcache.stage_two.kept import KeptHead

Row = dict[str, object]
Said = tuple[np.ndarray, np.ndarray]  # as of `chain`, on the host
FAILURE = "failure"


def answer_rows(heads: Collection[KeptHead], said: Sequence[Said], n: int) -> list[Row]:
    """A row for each of n images, of what every head says."""
    columns: dict[str, Sequence[object]] = {}
    for head, (raw, calibrated) in zip(heads, said, strict=True):
        target = head.target
        if target.task == "multi-class":
            columns[target.name] = [target.classes[k] for k in raw.argmax(axis=1)]
        for k, name in enumerate(_names(head)):
            columns[name] = calibrated[:, k].tolist()
            columns[f"{name}.raw"] = raw[:, k].tolist()
            if target.task != "multi-class":
                columns[f"{name}.present"] = (raw[:, k] >= head.thresholds[k]).tolist()
    return [{name: values[k] for name, values in columns.items()} for k in range(n)]


def table(files: Sequence[Path], rows: Sequence[Row], heads: Collection[KeptHead], *, with_masks: bool) -> pd.DataFrame:
    """All of them, with columns that do not depend on which files could be read."""
    frame = pd.DataFrame({"file": [str(file) for file in files]})
    for name, kind in _columns(heads, with_masks=with_masks):
        values = [row.get(name, "" if name == FAILURE else None) for row in rows]
        frame[name] = pd.Series(values, dtype=kind)
    return frame


def known_of(head: KeptHead) -> Iterator[str]:
    """What is to be known of a head's answers."""
    target = head.target
    lacking = [name for name, c in zip(target.classes, head.calibrators, strict=True) if c.method == "none"]
    if lacking:
        which = "" if len(lacking) == target.n_outputs else f" for {', '.join(lacking)}"
        yield f"{target.name}: not calibrated{which}, as too few labels were left to do it by"
    if head.unit != "image":
        yield f"{target.name}: thresholds and calibration are of a {head.unit}, and each image is answered by itself"


def _columns(heads: Collection[KeptHead], *, with_masks: bool) -> Iterator[tuple[str, str]]:
    """Name and dtype of every column behind the file's."""
    for head in heads:
        if head.target.task == "multi-class":
            yield head.target.name, "object"
        for name in _names(head):
            yield name, "float64"
            yield f"{name}.raw", "float64"
            if head.target.task != "multi-class":
                yield f"{name}.present", "boolean"
    if with_masks:
        yield from (("mask", "object"), ("mask.area", "float64"))
    yield FAILURE, "object"


def _names(head: KeptHead) -> list[str]:
    """The column of each output."""
    target = head.target
    return [target.name if target.task == "binary" else f"{target.name}.{name}" for name in target.classes]
