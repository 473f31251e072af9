from __future__ import annotations

import numpy as np
import pytest

from embedcache.data.reports import changed_reports, clean_report, report_digest
from embedcache.errors import InputError


def test_white_space_is_folded_and_nothing_else_changes() -> None:
    assert clean_report("  A 3.2 cm\n\tnodule; Überprüfung.\r\n") == "A 3.2 cm nodule; Überprüfung."


@pytest.mark.parametrize(
    ("text", "reason"), [("", "empty-report"), (" \n\t", "empty-report"), ("a\0b", "nul"), ("\ud800", "not-unicode")]
)
def test_unusable_reports(text: str, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        clean_report(text)
    assert caught.value.reason == reason


def test_changed_reports_are_found_by_content() -> None:
    encoded = {i: np.frombuffer(report_digest(t), np.uint8) for i, t in {"a": "one", "b": "two", "c": "x"}.items()}
    encoded["unknown"] = np.zeros(16, np.uint8)
    reports = {"a": "one ", "b": "two!", "c": "", "unknown": "anything", "new": "not encoded"}
    assert changed_reports(reports.items(), encoded) == ["b", "c"]
