"""Answers for new images as a plain table: calibrated probabilities, and a mark where a label is called present."""

from __future__ import annotations

from typing import TYPE_CHECKING

from embedcache.report.plain_table import in_columns

if TYPE_CHECKING:
    import pandas as pd

_PRESENT, _RAW = ".present", ".raw"


def answer_text(answers: pd.DataFrame) -> str:
    """One line for each file; `*` where the probability reaches its label's threshold."""
    names = [str(name) for name in answers]
    shown = [name for name in names if not name.endswith((_PRESENT, _RAW))]
    columns = []
    for name in shown:
        cells = ["" if value is None or value != value else _cell(value) for value in answers[name]]
        if f"{name}{_PRESENT}" in names:
            present = answers[f"{name}{_PRESENT}"].fillna(False).tolist()
            cells = [f"{cell} *" if there else cell for cell, there in zip(cells, present, strict=True)]
        columns.append([name, *cells])
    marks = ["* reaches the threshold chosen in training"] if any(name.endswith(_PRESENT) for name in names) else []
    return "\n".join([*in_columns(list(zip(*columns, strict=True))), *marks])


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
