"""Opens every store below a folder and prints what came of it; run under strace, which sees what libhdf5 opens."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

import embedcache
from embedcache.errors import EmbedCacheError


def outcome(store: Path) -> str:
    try:
        opened = embedcache.open_store(store)
        opened.embeddings.sum()
        _ = opened.ids, opened.failures, opened.tokens[:]
    except EmbedCacheError as error:
        return f"refused: {error}"
    except Exception as error:  # noqa: BLE001  # whatever it is, the test must hear of it
        return f"untyped: {type(error).__name__}: {error}"
    return "opened"


def mark(root: Path, name: str) -> None:
    """Leaves a line in the trace."""
    with contextlib.suppress(FileNotFoundError):
        os.open(root / name, os.O_RDONLY)


def main() -> None:
    root = Path(sys.argv[1])
    stores = sorted((p for p in root.iterdir() if p.is_dir()), key=lambda p: int(p.name))
    for store in stores:  # once before the marks, so that every module is loaded
        outcome(store)
    mark(root, "BEGIN")
    outcomes = [outcome(store) for store in stores]
    mark(root, "END")
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
