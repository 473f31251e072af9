"""Settings as YAML and JSON hold them."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any


def plain(config: Any) -> Any:
    """A dataclass of settings as plain values; None where there is none."""
    return None if config is None else json.loads(json.dumps(asdict(config)))
