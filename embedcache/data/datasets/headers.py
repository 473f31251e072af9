"""View, sex and age from the headers of DICOM files, for datasets whose tables do not give them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd

from embedcache.data.datasets.layout import Asked, Option
from embedcache.data.files import in_threads

HEADERS = Option("headers", "Read view, sex and age from the DICOM headers: a small read of every file.", "flag")

_TAGS = {"view": "ViewPosition", "sex": "PatientSex", "age": "PatientAge"}
_AGE = re.compile(r"0*(\d+)([YMWD]?)")
_YEARS = {"": 1.0, "Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}


def with_headers(frame: pd.DataFrame, root: Path, asked: Asked, notes: list[str]) -> pd.DataFrame:
    """The table with `view`, `sex` and `age` from the DICOM files' headers, where that is asked for.

    A file that cannot be read leaves its row blank, and is counted in the notes.
    """
    if not asked.options.get("headers"):
        return frame
    found = in_threads(lambda image: _header(root / image), frame["image"].tolist())
    unread = sum(header is None for header in found)
    if unread:
        notes.append(f"{unread:,} files have no DICOM header that could be read")
    read = pd.DataFrame([header or dict.fromkeys(_TAGS, "") for header in found], index=frame.index)
    read["age"] = read["age"].map(age_in_years)
    for name in _TAGS:  # what a table has said already stands
        said = frame[name] if name in frame else pd.Series(np.nan if name == "age" else "", frame.index)
        frame = frame.assign(**{name: said.where(said.notna() & (said != ""), read[name])})
    return frame


def age_in_years(text: str) -> float:
    """An age such as `58`, `058Y` or `006M` in years; NaN where it is none, or beyond a human's."""
    match = _AGE.fullmatch(text.strip())
    years = float(match[1]) * _YEARS[match[2]] if match else float("nan")
    return years if years <= 120 else float("nan")


def _header(path: Path) -> dict[str, str] | None:
    import pydicom

    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_TAGS.values()))
        return {ours: str(header.get(theirs, "") or "").strip() for ours, theirs in _TAGS.items()}
    except Exception:  # noqa: BLE001  # pydicom raises many kinds over a damaged file; it costs its row's header only
        return None
