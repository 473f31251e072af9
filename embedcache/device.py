"""Where tensors are computed."""

from __future__ import annotations

from embedcache.errors import DeviceError


def pick_device(device: str) -> str:
    """`auto` is the first GPU if there is one, else the CPU; any other name is checked.

    Raises:
        DeviceError: no such device here.
    """
    import torch

    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if n_gpus else "cpu"
    known = ["cpu", *(["cuda"] if n_gpus else []), *(f"cuda:{k}" for k in range(n_gpus))]
    if device not in known:
        raise DeviceError(f"device {device!r}, expected auto or one of {', '.join(known)}")
    return device
