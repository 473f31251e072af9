"""Sample ids: any text that every part of the house can hold byte for byte."""

from __future__ import annotations

from collections.abc import Iterable


def unusable_ids(ids: Iterable[str]) -> list[tuple[int, str]]:
    """Position and fault of each id that is empty, holds NUL (HDF5 would cut it off) or is not valid Unicode."""
    faults = []
    for k, sample_id in enumerate(ids):
        if not sample_id:
            faults.append((k, "is empty"))
        elif "\0" in sample_id:
            faults.append((k, "holds a NUL character"))
        elif not _is_unicode(sample_id):
            faults.append((k, "is not valid Unicode"))
    return faults


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
