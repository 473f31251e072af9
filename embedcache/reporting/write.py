"""Writing the report of a run: a page, tables for papers, and the methods as text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from embedcache.comparing.compare import Comparison
from embedcache.comparing.study_file import read_study
from embedcache.output import write_text
from embedcache.report.page import write_page
from embedcache.report.run_page import run_page
from embedcache.report.score_files import write_score_files
from embedcache.reporting.gather import audits_of, gathered
from embedcache.reporting.methods import methods_text

PAGE_NAME, METHODS_NAME = "report.html", "methods.md"


@dataclass(frozen=True)
class Report:
    """Files of a report.

    Args:
        page: one self-contained HTML file.
        methods: Markdown.
        tables: scores and differences as CSV, Markdown and LaTeX.
    """

    page: Path
    methods: Path
    tables: tuple[Path, ...]


def write_report(run_dir: str | Path, *, with_images: bool = False) -> Report:
    """Writes `report.html`, `methods.md` and tables into the directory of a finished run.

    Args:
        run_dir: of `embedcache run` or `embedcache compare`.
        with_images: show thumbnails of patients' images in the page; by default it shows none.

    Raises:
        RunNotFoundError: no finished run there.
        OutputError: the files cannot be written.
    """
    run_dir = Path(run_dir)
    study, comparison = read_study(run_dir), Comparison.read(run_dir)
    audits, page, methods = audits_of(study), run_dir / PAGE_NAME, run_dir / METHODS_NAME
    write_page(page, run_page(gathered(study, comparison, audits, with_images=with_images)))
    write_text(methods, methods_text(study, comparison, audits), mode=0o600)
    tables = write_score_files(run_dir, {**comparison.tables, "differences": comparison.differences})
    return Report(page, methods, tuple(tables))
