"""Plain-text tables: aligned columns, intervals, p-values, and which encoders a row is of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

_WHERE = ("image", "text")
_HEADINGS = {"image": "image encoder", "text": "text encoder", "control": "setting"}
_METRICS = {"auroc": "AUROC", "iou": "IoU", "dice": "Dice", "dice_on_positives": "Dice on positives", "f1": "F1"}


def places(table: pd.DataFrame) -> list[str]:
    """Which columns say of which encoders a row is."""
    return [column for column in _WHERE if column in table]


def head_row(table: pd.DataFrame, *columns: str) -> list[str]:
    """Those columns and others as headings."""
    return [_HEADINGS.get(column, column) for column in (*places(table), *columns)]


def pair_name(image: str, text: str = "") -> str:
    """Both encoders of a pair; embeddings that no text encoder met have the image encoder's name alone."""
    return f"{image} + {text}" if text else image


def row_pairs(table: pd.DataFrame) -> list[tuple[str, str]]:
    """The image and the text encoder of each row; the latter blank where there is none."""
    texts = table["text"] if "text" in table else [""] * len(table)
    return list(zip(table["image"], texts, strict=True))


def metric_words(metric: str) -> str:
    """A metric's name as people write it."""
    return _METRICS.get(metric, plain_words(metric))


def plain_words(name: str) -> str:
    """A name in code as words; whatever else stays as it is."""
    return name.replace("_", " ") if name.replace("@", "").isidentifier() else name


def interval(value: float | None, low: float | None, high: float | None) -> str:
    """A value with its interval, or that it is undefined."""
    if value is None or value != value:
        return "undefined"
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def gain_words(value: float, low: float, high: float, p_value: float) -> str:
    """A difference with its interval and p-value."""
    return f"{difference(value, low, high)} {p_words(p_value)}"


def difference(value: float, low: float, high: float) -> str:
    """A difference with its interval, signs and all."""
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def p_words(p_value: float) -> str:
    """A p-value in words, with as many digits as say on which side of 0.05 it lies, two at least."""
    if p_value != p_value:
        return "undefined"
    digits = 2
    while p_value != 0.05 and round(p_value, digits) == 0.05:
        digits += 1
    return "p < 0.01" if p_value < 0.01 else f"p = {p_value:.{digits}f}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width; a column that is blank throughout is left out."""
    kept = filled_columns(rows)
    return "\n".join(in_columns([[row[k] for k in kept] for row in rows]))


def filled_columns(rows: Sequence[Sequence[str]]) -> list[int]:
    """Which columns are not blank throughout, below their heads."""
    return [k for k in range(len(rows[0])) if any(row[k] for row in rows[1:])]


def in_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def counted(counts: pd.Series) -> str:
    """One count, or the least and the most where they differ, as under failed inputs."""
    low, high = counts.min(), counts.max()
    return f"{low:.0f}" if low == high else f"{low:.0f}-{high:.0f}"
