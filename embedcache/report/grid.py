"""Tables as cells of text: pivoted once, then written as plain text, Markdown or LaTeX."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from embedcache.report.plain_table import aligned

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Grid:
    """A table for people.

    Args:
        heading: what it shows, on how many, and what its intervals are, as plain text has it.
        caption: the same in sentences, as a paper has it.
        rows: cells; the first row names the columns.
        n_names: columns from the left that say what a row is of; the others hold numbers.
        results: rows of results, counted from 0 below the heads, where controls stand among them.
    """

    heading: str
    caption: str
    rows: Sequence[Sequence[str]]
    n_names: int
    results: frozenset[int] = frozenset()

    def plain(self) -> str:
        """As plain text."""
        return f"{self.heading}\n{aligned(self.rows)}"


def grid(
    heading: str, caption: str, rows: Sequence[Sequence[str]], n_names: int, *, controls: Sequence[str] = ()
) -> Grid:
    """A grid that knows its results.

    Args:
        controls: of each row below the heads; blank for a result. Without any, no row stands out.
    """
    results = frozenset(k for k, control in enumerate(controls) if not control)
    return Grid(heading, caption, rows, n_names, results if len(results) < len(controls) else frozenset())


def plain_text(grids: Iterable[Grid]) -> str:
    """Grids as plain text, a blank line between two; blank where there is none."""
    return "\n\n".join(grid.plain() for grid in grids)


def by_data(table: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """The rows of each dataset, what stands before a heading for it, and what within a caption; blank for only one."""
    if "data" not in table:
        yield "", "", table
        return
    for name, some in table.groupby("data", sort=False):
        yield f"{name}: ", f" on {name}", some
