"""Answers for new images as lines: a table for people, and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence

from embedcache.report.plain_table import in_columns

PRESENT, RAW = ".present", ".raw"  # what the columns of a label end in


def answer_text(rows: Sequence[Mapping[str, object]], names: Sequence[str]) -> str:
    """One line for each file; `*` where the probability reaches its label's threshold.

    Args:
        names: of the columns; raw probabilities are not shown.
    """
    shown = [name for name in names if not name.endswith((PRESENT, RAW))]
    lines = [[_cell(row.get(name)) + (" *" if row.get(name + PRESENT) else "") for name in shown] for row in rows]
    marks = ["* reaches the threshold chosen in training"] if any(name.endswith(PRESENT) for name in names) else []
    return "\n".join([*in_columns([shown, *lines]), *marks])


def csv_line(cells: Iterable[object]) -> str:
    """A line of CSV; a blank cell for None."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(["" if cell is None else cell for cell in cells])
    return line.getvalue()


def _cell(value: object) -> str:
    """A file's name that is not UTF-8 is shown with its bytes escaped."""
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value).encode("utf-8", "backslashreplace").decode()
