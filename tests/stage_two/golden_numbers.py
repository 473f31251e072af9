"""Numbers that the paper's own code computed, and how near ours must be."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"


def golden_numbers(n_layers: int) -> dict[str, Tensor]:
    """All numbers of the reference Adaptor with 1 or 2 layers."""
    return load_file(GOLDEN / f"adaptor_{n_layers}layer.safetensors")


def part(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in golden.items() if name.startswith(prefix)}


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
