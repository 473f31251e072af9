"""The page of a run: one HTML file with its verdicts, plots, tables and what made them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from embedcache.report import more_sections, score_sections
from embedcache.report.contents import Contents
from embedcache.report.html_table import table_of
from embedcache.report.page import render
from embedcache.report.sections import Section, cleaned


def run_page(contents: Contents) -> str:
    """The page as text, the same for the same contents.

    Parts for which there is nothing are left out. What strangers wrote stays words: nothing of it is markup.
    """
    return render("run.html.j2", run=contents, sections=list(_sections(contents)))


def _sections(contents: Contents) -> Iterator[Section]:
    tables = cleaned(contents.tables)
    others = {"differences": contents.differences, "encoders": contents.encoders, "curves": contents.curves}
    more = {name: cleaned({name: table}).get(name, table) for name, table in others.items()}
    return chain(
        score_sections.overview(tables),
        score_sections.scores(tables),
        score_sections.efficiency(tables),
        score_sections.differences(more["differences"]),
        score_sections.gains(tables),
        more_sections.masks(tables),
        more_sections.retrieval(tables),
        more_sections.zero_shot(tables),
        score_sections.subgroups(tables),
        score_sections.calibration(tables),
        more_sections.encoders(more["encoders"]),
        more_sections.maps(contents.maps),
        more_sections.training(more["curves"]),
        more_sections.examples(contents.retrieval, contents.masks, has_images=contents.has_images),
        _facts(contents),
    )


def _facts(contents: Contents) -> Iterator[Section]:
    if contents.audit:
        table = table_of(["fact", "found"], contents.audit, caption="audit of the splits")
        yield Section("Audit of the data", "audit", tables=[table])
    if contents.provenance or contents.commands:
        tables = [table_of(["what", "value"], contents.provenance, caption="what made these numbers")]
        again = [Section("To repeat it", commands=contents.commands)] if contents.commands else []
        yield Section("Provenance", "provenance", tables=tables if contents.provenance else [], parts=again)
