"""What heads say of an image, as columns of a table.

Shape notation: c outputs of a head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from embedcache.errors import SettingsError
from embedcache.report.answer_text import PRESENT, RAW
from embedcache.stage_two.kept import KeptHead

Row = dict[str, object]
FILE, MASK, AREA, FAILURE = "file", "mask", "mask.area", "failure"


def columns(heads: Collection[KeptHead], where: Path) -> dict[str, str]:
    """Name and pandas' dtype of every column, masks included.

    Args:
        where: the run, for the message.

    Raises:
        SettingsError: two columns would have one name.
    """
    named = [(FILE, "object")]
    for head in heads:
        if head.target.task == "multi-class":
            named.append((head.target.name, "object"))
        for name in output_names(head):
            named += [(name, "float64"), (name + RAW, "float64")]
            if head.target.task != "multi-class":
                named.append((name + PRESENT, "boolean"))
    named += [(MASK, "object"), (AREA, "float64"), (FAILURE, "object")]
    twice = [name for name, n in Counter(name for name, _ in named).items() if n > 1]
    if twice:
        raise SettingsError(
            f"{where}: two columns of answers would be called {twice[0]!r}; take the folder of one label out of "
            "probes, or name the label otherwise and probe again"
        )
    return dict(named)


def answer_row(head: KeptHead, raw: np.ndarray, calibrated: np.ndarray) -> Row:
    """What a head says of one image.

    Args:
        raw, calibrated: probabilities, (c,) each.
    """
    target, row = head.target, Row()
    if target.task == "multi-class":
        row[target.name] = target.classes[int(raw.argmax())]
    for k, name in enumerate(output_names(head)):
        row[name], row[name + RAW] = float(calibrated[k]), float(raw[k])
        if target.task != "multi-class":
            row[name + PRESENT] = bool(raw[k] >= head.thresholds[k])
    return row


def output_names(head: KeptHead) -> list[str]:
    """The column of each output: the label's name, or with that of the class behind it."""
    target = head.target
    return [target.name if target.task == "binary" else f"{target.name}.{name}" for name in target.classes]


def known_of(head: KeptHead) -> Iterator[str]:
    """What is to be known of a head's answers."""
    target = head.target
    yield f"{target.name}: head {head.name}, fitted on {head.n_train} labels"
    lacking = [name for name, c in zip(target.classes, head.calibrators, strict=True) if c.method == "none"]
    if lacking:
        which = "" if len(lacking) == target.n_outputs else f" for {', '.join(lacking)}"
        yield f"{target.name}: not calibrated{which}, as too few labels were left to do it by"
    if head.unit != "image":
        fitted = "the head" if head.pool == "embedding_mean" else "thresholds and calibration"
        yield f"{target.name}: {fitted} fitted on each {head.unit} as a whole, and each image is answered by itself"
    if head.views != "all":
        yield f"{target.name}: fitted on {head.views} images alone; answers for others mean nothing"
