"""Frontal or lateral: what the names of projections in the official tables say.

They come as `PA`, `AP`, `AP SUPINE`, `AP_horizontal`, `Frontal`, `POSTEROANTERIOR`, `LL`, `L`, `LATERAL` and more.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

_FRONTAL = r"^(?:PA|AP)(?:\W|_|$)|FRONTAL|ANTEROPOSTERIOR|POSTEROANTERIOR|POSTERO-ANTERIOR|ANTERO-POSTERIOR"
_LATERAL = r"^(?:L|LL|RL|LLAT|RLAT)(?:\W|_|$)|LATERAL"


def is_frontal(views: pd.Series) -> np.ndarray:
    """Which rows show the chest from the front or the back, (n,) bool; a blank view is neither."""
    return _named(views, _FRONTAL)


def is_lateral(views: pd.Series) -> np.ndarray:
    """Which rows show it from a side, (n,) bool."""
    return _named(views, _LATERAL) & ~is_frontal(views)


def _named(views: pd.Series, pattern: str) -> np.ndarray:
    known = pd.Series(views.unique(), dtype=object)
    fits = known[known.astype(str).str.upper().str.contains(pattern)]
    return views.isin(fits).to_numpy()
