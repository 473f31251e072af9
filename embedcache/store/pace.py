"""How fast a store's rows were computed on this machine: a note beside the shards, no part of the format."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

from embedcache.errors import OutputError
from embedcache.output import write_text

PACE_NAME = ".pace"


@dataclass(frozen=True)
class Pace:
    """Rows, and the seconds that they took, over all extractions of this machine."""

    n: int
    seconds: float

    @property
    def seconds_per_1000(self) -> float:
        return 1000 * self.seconds / self.n


def add_pace(store: Path, n: int, seconds: float) -> None:
    """Counts rows that were just computed; where that cannot be written, nobody will know."""
    if not n:
        return
    before = read_pace(store)
    total = Pace(n + (before.n if before else 0), seconds + (before.seconds if before else 0.0))
    with contextlib.suppress(OutputError):
        write_text(store / PACE_NAME, json.dumps(vars(total)), mode=0o600)


def read_pace(store: Path) -> Pace | None:
    """What was counted; None where nothing was, or nothing readable."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        said = json.loads((store / PACE_NAME).read_text("utf-8"))
        pace = Pace(int(said["n"]), float(said["seconds"]))
        return pace if pace.n > 0 else None
    return None
