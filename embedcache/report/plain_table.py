"""Plain-text tables: aligned columns, intervals, p-values, and which encoders a row is of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

_WHERE = ("image", "text")
_HEADINGS = {"image": "image encoder", "text": "text encoder", "control": "setting"}


def places(table: pd.DataFrame) -> list[str]:
    """Which columns say of which encoders a row is."""
    return [column for column in _WHERE if column in table]


def head_row(table: pd.DataFrame, *columns: str) -> list[str]:
    """Those columns and others as headings."""
    return [_HEADINGS.get(column, column) for column in (*places(table), *columns)]


def interval(value: float | None, low: float | None, high: float | None) -> str:
    """A value with its interval, or that it is undefined."""
    if value is None or value != value:
        return "undefined"
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def gain_words(value: float, low: float, high: float, p_value: float) -> str:
    """A difference with its interval and p-value."""
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}] {p_words(p_value)}"


def p_words(p_value: float) -> str:
    """A p-value in words."""
    return "undefined" if p_value != p_value else "p < 0.01" if p_value < 0.01 else f"p = {p_value:.2f}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width; a column that is blank throughout is left out."""
    kept = [k for k in range(len(rows[0])) if any(row[k] for row in rows[1:])]
    return "\n".join(in_columns([[row[k] for k in kept] for row in rows]))


def in_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def counted(counts: pd.Series) -> str:
    """One count, or the least and the most where they differ, as under failed inputs."""
    low, high = counts.min(), counts.max()
    return f"{low:.0f}" if low == high else f"{low:.0f}-{high:.0f}"
