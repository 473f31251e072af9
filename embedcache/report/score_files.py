"""The tables of a run as files: CSV for programs, Markdown and LaTeX for people."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pandas as pd

from embedcache.output import write_tables, write_text
from embedcache.report.grid import Grid, by_data, grid
from embedcache.report.mask_text import mask_gain_grids, mask_grids
from embedcache.report.paper_tables import latex_table, markdown_table
from embedcache.report.plain_table import difference, metric_words, p_words
from embedcache.report.retrieval_text import retrieval_grids, zero_shot_grids
from embedcache.report.score_text import calibration_grids, gain_grids, score_grids, subgroup_grids
from embedcache.report.sections import cleaned

MARKDOWN_NAME, LATEX_NAME = "tables.md", "tables.tex"
_LATEX_TOP = r"""% Needs \usepackage{booktabs} in the preamble; set wide tables with \resizebox, or in a landscape page.
% Names in other scripts than Latin need XeLaTeX or LuaLaTeX.
% \input{tables.tex} shows all of them.
"""


def write_score_files(folder: Path, tables: Mapping[str, pd.DataFrame]) -> list[Path]:
    """Writes each table as CSV, and all of them as `tables.md` and `tables.tex`, as a paper shows them.

    Args:
        tables: by name, as `Contents.tables` and `differences`; any may be absent or empty. One of another name is
            written as CSV alone.

    Returns:
        What was written.

    Raises:
        OutputError: the files cannot be written there.
    """
    files = {f"{name}.csv": table for name, table in tables.items()}
    write_tables(folder, files)
    grids = list(score_grids_of(tables))
    markdown = (markdown_table(grid, k) for k, grid in enumerate(grids, 1))
    latex = (latex_table(grid, k) for k, grid in enumerate(grids, 1))
    write_text(folder / MARKDOWN_NAME, _joined(markdown))
    write_text(folder / LATEX_NAME, _LATEX_TOP + "\n" + _joined(latex))
    return [folder / name for name in (*files, MARKDOWN_NAME, LATEX_NAME)]


def score_grids_of(tables: Mapping[str, pd.DataFrame]) -> Iterator[Grid]:
    """Every table of a run that people read, pivoted; of the scores those that settings are compared by."""
    told = cleaned(tables)
    for name, grids in _GRIDS.items():
        if name in told:
            yield from grids(told[name])


def difference_grids(differences: pd.DataFrame) -> Iterator[Grid]:
    """For each task and metric a row for each two that were compared."""
    for _, on, of_data in by_data(differences):
        for (task, label, metric), table in of_data.groupby(["task", "label", "metric"], sort=False):
            rows = [["setting", "a", "b", "a - b", "p, adjusted", "fairness", "really better"]]
            for r in table.to_dict("records"):
                names = [str(r[name]) for name in ("setting", "a", "b")]
                cells = ["undefined", "", "", ""]
                if r["value"] == r["value"] and r["p_adjusted"] == r["p_adjusted"]:
                    better = {"a": r["a"], "b": r["b"]}.get(r["verdict"], "not told apart")
                    found = difference(r["value"], r["low"], r["high"])
                    cells = [found, p_words(r["p_adjusted"]), str(r["fairness"]), str(better)]
                rows.append([*names, *cells])
            of = f"{metric_words(str(metric))}{f' of {label}' if label else ''}"
            how = ", ".join(dict.fromkeys(table["method"].astype(str)))
            yield grid(
                f"differences in {of} ({task})",
                f"Differences in {of}{on} ({task}) between two pairs of encoders, a less b, on the same patients. In "
                f"brackets: 95% interval ({how}). p adjusted for all comparisons of the run; one is "
                "called better at 0.05, but not where each side was trained once.",
                rows,
                3,
            )


_GRIDS: dict[str, Callable[[pd.DataFrame], Iterable[Grid]]] = {
    "scores": score_grids,
    "gains": gain_grids,
    "calibration": calibration_grids,
    "subgroups": subgroup_grids,
    "mask_scores": mask_grids,
    "mask_gains": mask_gain_grids,
    "retrieval_scores": retrieval_grids,
    "zeroshot_scores": zero_shot_grids,
    "differences": difference_grids,
}


def _joined(tables: Iterable[str]) -> str:
    return "\n\n".join(tables) + "\n"
