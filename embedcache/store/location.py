"""Where a store's encoder was found on this machine: a note beside the shards, no part of the format.

The record in `store.json` travels with the store and holds no path. This file is of one machine, is there only where
the encoder came from a directory, and is believed by nobody: what lies there is compared with the fingerprint.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from embedcache.errors import OutputError
from embedcache.output import write_text

LOCATION_NAME = ".encoder"


def write_location(store: Path, source: str) -> None:
    """Notes where the encoder is, such as `hf:` and a directory; where that cannot be written, a user will be asked."""
    if read_location(store) != source:
        with contextlib.suppress(OutputError):
            write_text(store / LOCATION_NAME, source + "\n", mode=0o600)


def read_location(store: Path) -> str:
    """What was noted last; blank where nothing was, or nothing readable."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return (store / LOCATION_NAME).read_text("utf-8").strip()
    return ""
