"""Checkpoints of a run: one file, whole or not there, from which training goes on to the same bits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from embedcache.errors import RunStateError
from embedcache.stage_two.files import read_tensors, write_tensors

_VERSION = 1


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], said: Mapping[str, Any], *, identity: str) -> None:
    """Writes the state of a run in the place of the one before.

    Args:
        said: the rest of the state, JSON-ready.
        identity: a fingerprint of all that determines the run.
    """
    state = json.dumps({"version": _VERSION, "identity": identity, **said})
    write_tensors(path, tensors, {"state": state})


def read_checkpoint(path: Path, *, identity: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The state that a run was left in; None where it left none.

    Raises:
        RunStateError: the state of another run, or a file that is none.
    """
    if not path.is_file():
        return None
    try:
        tensors, metadata = read_tensors(path)
        said = json.loads(metadata["state"])
        version = said["version"]
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise RunStateError(
            f"{path}: cannot be read as a checkpoint ({type(error).__name__}); delete it to start the run again"
        ) from error
    if version != _VERSION:
        raise RunStateError(f"{path}: version {version!r}, expected {_VERSION}; delete it to start the run again")
    if said["identity"] != identity:
        raise RunStateError(
            f"{path.parent}: holds a run of other settings, stores or pairs; name another run directory, or delete it"
        )
    return tensors, said
