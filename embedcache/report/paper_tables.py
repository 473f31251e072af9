"""Grids as Markdown and as LaTeX; their texts may come from strangers' files, so everything is escaped."""

from __future__ import annotations

import re
import unicodedata

from embedcache.report.grid import Grid
from embedcache.report.plain_table import filled_columns

_NUMBERS = re.compile(r"[-+.,0-9\[\] ]+(p [=<] [0-9.]+)?")  # can mean nothing else, and is left readable
_BREAKS = {"Cc", "Cs", "Zl", "Zp"}  # Unicode's kinds of characters that end a line, or are none
_TURNS = {chr(k) for k in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}  # reorder what stands behind them
_MARKDOWN = {
    **{sign: f"\\{sign}" for sign in "\\`*_[]{}~$#!"},
    "&": "&amp;",
    "<": "&lt;",
    ">": "&gt;",
    "|": "&#124;",  # a backslash before it is read differently from place to place
}
_LATEX = {
    **{sign: f"\\{sign}" for sign in "{}$&#_%"},
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}


def escaped_markdown(text: str) -> str:
    """A text as Markdown shows it, on one line; numbers with their intervals as they are."""
    line = _one_line(text)
    if _NUMBERS.fullmatch(line):
        return line.replace("<", _MARKDOWN["<"])
    return "".join(_MARKDOWN.get(c, c) for c in line)


def escaped_latex(text: str) -> str:
    """A text as LaTeX sets it, on one line; the minus of numbers as a minus."""
    line = _one_line(text)
    if _NUMBERS.fullmatch(line):
        return line.replace("-", "$-$").replace("<", "$<$")
    return "".join(_LATEX.get(c, c) for c in line)


def markdown_table(grid: Grid, number: int) -> str:
    """A grid with its caption; rows of results are bold.

    Args:
        number: of the table.
    """
    kept = filled_columns(grid.rows)
    lines = []
    for k, row in enumerate(grid.rows):
        cells = [escaped_markdown(row[column]) for column in kept]
        if k - 1 in grid.results:
            cells = [f"**{cell}**" if cell else "" for cell in cells]
        lines.append(f"| {' | '.join(cells)} |")
    rule = " | ".join(":---" for _ in kept)
    return f"**Table {number}.** {escaped_markdown(grid.caption)}\n\n{lines[0]}\n| {rule} |\n" + "\n".join(lines[1:])


def latex_table(grid: Grid, number: int) -> str:
    """A grid as a `table` with rules of booktabs; rows of results are bold.

    Args:
        number: in its label.
    """
    kept = filled_columns(grid.rows)
    n_names = sum(column < grid.n_names for column in kept)
    lines = []
    for k, row in enumerate(grid.rows):
        cells = [escaped_latex(row[column]) for column in kept]
        if k - 1 in grid.results:
            cells = [rf"\textbf{{{cell}}}" if cell else "" for cell in cells]
        if cells and cells[0].startswith(("[", "*")):
            cells[0] = "{}" + cells[0]  # the end of the line before would take it for an argument
        lines.append(rf"{' & '.join(cells)} \\")
    return "\n".join(
        (
            r"\begin{table}",
            r"\centering",
            r"\footnotesize",
            rf"\caption{{{escaped_latex(grid.caption)}}}",
            rf"\label{{tab:embedcache-{number}}}",
            rf"\begin{{tabular}}{{{'l' * n_names}{'c' * (len(kept) - n_names)}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        )
    )


def _one_line(text: str) -> str:
    """A text without characters that end a line, reorder it, or are none."""
    plain = "".join(" " if unicodedata.category(c) in _BREAKS else "" if c in _TURNS else c for c in text)
    return " ".join(plain.split())
