"""All tables of a run as plain text."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from embedcache.report.mask_text import mask_text
from embedcache.report.score_text import probe_text


def run_text(tables: Mapping[str, pd.DataFrame]) -> str:
    """Of probes, then of masks.

    Args:
        tables: by name, those of masks with `mask_` before it.
    """
    probes = {name: table for name, table in tables.items() if not name.startswith("mask_")}
    masks = {name.removeprefix("mask_"): table for name, table in tables.items() if name.startswith("mask_")}
    return "\n\n".join([probe_text(**probes), *([mask_text(**masks)] if masks else [])])
