"""All tables of a run as plain text."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pandas as pd

from embedcache.report.mask_text import mask_text
from embedcache.report.retrieval_text import retrieval_text, zero_shot_text
from embedcache.report.score_text import probe_text

_KINDS: dict[str, Callable[..., str]] = {
    "mask_": mask_text,
    "retrieval_": retrieval_text,
    "zeroshot_": zero_shot_text,
}


def run_text(tables: Mapping[str, pd.DataFrame]) -> str:
    """Of probes, then of masks, retrieval and prompts.

    Args:
        tables: by name; what is not of a probe has its kind before it.
    """
    of_probes = {name: table for name, table in tables.items() if not name.startswith(tuple(_KINDS))}
    parts = [probe_text(**of_probes)] if of_probes else []
    for kind, text_of in _KINDS.items():
        some = {name.removeprefix(kind): table for name, table in tables.items() if name.startswith(kind)}
        if some:
            parts.append(text_of(**some))
    return "\n\n".join(parts)
