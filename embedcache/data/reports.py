"""Reports: free text to what a tokenizer is given."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np

from embedcache.errors import InputError
from embedcache.fingerprint import input_digest

_SPACE = re.compile(r"\s+")


def clean_report(text: str) -> str:
    """A report's text with runs of white space folded to one space.

    Raises:
        InputError: nothing to read, a NUL, or text that is not valid Unicode.
    """
    if "\0" in text:
        raise InputError("nul", "the report holds a NUL character")
    folded = _SPACE.sub(" ", text).strip()
    if not folded:
        raise InputError("empty-report", "the report is empty")
    try:
        folded.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError("not-unicode", "the report holds a lone surrogate, it is not valid Unicode") from error
    return folded


def report_digest(text: str) -> bytes:
    """The digest that stage one keeps beside a report's row, (16 bytes); of the cleaned text.

    Raises:
        InputError: as `clean_report`.
    """
    return input_digest(clean_report(text).encode("utf-8"))


def changed_reports(reports: Iterable[tuple[str, str]], encoded: Mapping[str, np.ndarray]) -> list[str]:
    """Report ids whose text is not what was encoded under them.

    Args:
        reports: report id and text; ids that were not encoded are passed over.
        encoded: the digest kept beside each encoded report, (16,) uint8; all zero means unknown, and passes.
    """
    changed = []
    for report_id, text in reports:
        if report_id in encoded and encoded[report_id].any():
            try:
                same = report_digest(text) == encoded[report_id].tobytes()
            except InputError:
                same = False
            if not same:
                changed.append(report_id)
    return changed
