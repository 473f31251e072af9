"""Tables for a page: what each cell says, and by what its column is sorted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from embedcache.report.plain_table import interval
from embedcache.resources import in_bytes


@dataclass(frozen=True)
class Cell:
    """What a cell says; sorted by a number where it has one, NaN last, and by its words otherwise."""

    text: str
    number: float | None = None

    @property
    def sort(self) -> str:
        """The number as text, blank where it is undefined."""
        return "" if self.number is None or not math.isfinite(self.number) else repr(self.number)


@dataclass(frozen=True)
class Head:
    """A column's heading; numbers stand right."""

    name: str
    is_number: bool


@dataclass(frozen=True)
class Table:
    """Rows as a reader sees them; the first cell of each names it."""

    caption: str
    heads: tuple[Head, ...]
    rows: tuple[tuple[Cell, ...], ...]


def table_of(heads: Sequence[str], rows: Iterable[Sequence[object]], *, caption: str) -> Table:
    """Cells, texts and numbers as a table; a column that is blank throughout is left out.

    Args:
        rows: as long as the headings each.
    """
    cells = [tuple(cell_of(value) for value in row) for row in rows]
    kept = [k for k in range(len(heads)) if any(row[k].text for row in cells)]
    numeric = [any(row[k].number is not None for row in cells) for k in kept]
    return Table(
        caption,
        tuple(Head(heads[k], is_number) for k, is_number in zip(kept, numeric, strict=True)),
        tuple(tuple(row[k] for k in kept) for row in cells),
    )


def cell_of(value: object) -> Cell:
    """A cell as its type asks: counts in thousands, other numbers to three places, blank for None and NaN."""
    if isinstance(value, Cell):
        return value
    if value is None or value is pd.NA:
        return Cell("")
    if isinstance(value, (bool, np.bool_)):
        return Cell("yes" if value else "no")
    if isinstance(value, (int, np.integer)):
        return Cell(f"{value:,}", float(value))
    if isinstance(value, (float, np.floating)):
        return number(float(value))
    return Cell(str(value))


def number(value: float, *, places: int = 3, sign: bool = False) -> Cell:
    """A number to so many places; blank for NaN."""
    if value != value:
        return Cell("", value)
    return Cell(f"{value:{'+' if sign else ''}.{places}f}", float(value))


def count(value: float) -> Cell:
    """A whole number; blank for NaN."""
    return Cell("" if value != value else f"{value:,.0f}", float(value))


def interval_cell(value: float, low: float, high: float) -> Cell:
    """A value with its interval, sorted by the value."""
    return Cell(interval(value, low, high), float(value))


def bytes_cell(value: float) -> Cell:
    """A size in the unit that suits it; blank for NaN."""
    return Cell("" if value != value else in_bytes(int(value)), float(value))
