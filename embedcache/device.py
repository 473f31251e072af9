"""Where tensors are computed."""

from __future__ import annotations


def pick_device(device: str) -> str:
    """`auto` is the first GPU if there is one, else the CPU; any other name is taken as it is."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
