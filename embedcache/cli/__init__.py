"""The command line: each command parses, calls one library function, prints."""

from __future__ import annotations

from embedcache.cli import (  # noqa: F401  # they put their commands into the group
    comparing,
    doctor,
    encoders,
    extracting,
    manifests,
    predicting,
    probing,
    recipes,
    retrieving,
    segmenting,
    stores,
    training,
)
from embedcache.cli.base import main

__all__ = ["main"]
