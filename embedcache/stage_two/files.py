"""Tensors in files, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from embedcache.output import write_whole


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, and its metadata.

    Raises:
        SafetensorError: a file that holds no tensors.
    """
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118  # no dictionary


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes tensors in the place of what stood there.

    Raises:
        OutputError: the file cannot be written; what stood there stays.
    """
    ready = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(ready, temporary, metadata)
        except SafetensorError as error:  # a full disk, among others
            raise OSError(0, str(error)) from error

    write_whole(path, write)
