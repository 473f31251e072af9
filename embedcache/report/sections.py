"""Parts of the page of a run: what they hold, and the tables they are made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from embedcache.report.contents import TEXT_COLUMNS, MaskExample, RetrievalExample
from embedcache.report.html_table import Table
from embedcache.report.plain_table import pair_name, row_pairs


@dataclass(frozen=True)
class Plot:
    """A plot as SVG of our own making, with what it shows in words and, where no table stands beside it, in numbers."""

    svg: str
    caption: str
    table: Table | None = None


@dataclass(frozen=True)
class Section:
    """A part of the page, with parts of its own.

    Args:
        id: by which links find it; blank for one within another.
        folded: tables that a reader opens.
        words: a paragraph each.
        commands: lines that a reader may copy.
    """

    title: str
    id: str = ""
    words: Sequence[str] = ()
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    folded: Sequence[Table] = ()
    found: Sequence[RetrievalExample] = ()
    masks: Sequence[MaskExample] = ()
    commands: Sequence[str] = ()
    parts: Sequence[Section] = ()


def cleaned(tables: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Tables with text in every column of text, blank for None and NaN, and without those that have no rows.

    The column `data` stays where there is more than one dataset.
    """
    kept = {name: _with_words(table) for name, table in tables.items() if len(table)}
    datasets = {name for table in kept.values() if "data" in table for name in table["data"]}
    if len(datasets) > 1:
        return kept
    return {name: table.drop(columns="data", errors="ignore") for name, table in kept.items()}


def by_task(table: pd.DataFrame, *more: str) -> Iterator[tuple[str, tuple[str, ...], pd.DataFrame]]:
    """The rows of each task with its name, and with their values in the other columns that set them apart."""
    columns = [name for name in ("data", "label", "class", "test") if name in table]
    for key, some in table.groupby([*columns, *more], sort=False):
        of = dict(zip(columns, map(str, key), strict=False))
        yield task_name(**of), tuple(str(part) for part in key[len(columns) :]), some


def task_name(data: str = "", label: str = "", test: str = "internal", **of: str) -> str:
    """A label, its class, the dataset and the test set as one name."""
    names = [label, of.get("class", "")]
    names.append({"internal": "", "difference": "internal - external"}.get(test, test))
    name = ", ".join(part for part in names if part)
    return f"{data}: {name}" if data and name else data or name


def named(table: pd.DataFrame) -> pd.DataFrame:
    """With a column `pair` in words, and results before their controls."""
    named = table.assign(pair=[pair_name(*pair) for pair in row_pairs(table)])
    return named.sort_values("control", key=lambda names: names != "", kind="stable") if "control" in named else named


def _with_words(table: pd.DataFrame) -> pd.DataFrame:
    changed = {name: ["" if pd.isna(v) else str(v) for v in table[name]] for name in TEXT_COLUMNS if name in table}
    words = {name: pd.Series(values, index=table.index, dtype=object) for name, values in changed.items()}
    if "headline" in table:
        words["headline"] = table["headline"].astype(str).str.lower() == "true"
    return table.assign(**words)
