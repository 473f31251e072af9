"""Where tensors are computed, and by how many threads."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from embedcache.errors import DeviceError

if TYPE_CHECKING:
    import torch


def pick_device(device: str) -> str:
    """`auto` is the first GPU if there is one, else the CPU; any other name is checked.

    Raises:
        DeviceError: no such device here.
    """
    n_gpus = count_gpus()
    if device == "auto":
        return "cuda" if n_gpus else "cpu"
    known = ["cpu", *(["cuda"] if n_gpus else []), *(f"cuda:{k}" for k in range(n_gpus))]
    if device not in known:
        raise DeviceError(f"device {device!r}, expected auto or one of {', '.join(known)}")
    return device


def count_gpus() -> int:
    """How many GPUs this process sees."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def moved(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """A tensor on its device; to a GPU by way of pinned memory, without waiting for the copy."""
    return tensor if device == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def stacked(tensors: Sequence[torch.Tensor], device: str) -> torch.Tensor:
    """Tensors of one shape as one batch on its device, copied once on this side; to a GPU as `moved`."""
    import torch

    if device == "cpu":
        return torch.stack(list(tensors))
    batch = torch.empty((len(tensors), *tensors[0].shape), dtype=tensors[0].dtype, pin_memory=True)
    return torch.stack(list(tensors), out=batch).to(device, non_blocking=True)


def cores_of_thread() -> int:
    """How many cores torch uses for one operation of this thread; 1 where torch is not loaded."""
    if "torch" not in sys.modules:
        return 1
    import torch

    return torch.get_num_threads()


def use_cores(n: int) -> None:
    """From now on torch uses n cores for one operation of this thread, and of threads that are started later.

    Threads of one core each share the cores of a machine without waiting for each other within an operation.
    """
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(n)


def own_stream(device: str) -> None:
    """From now on what this thread does on the GPU runs beside what other threads do there."""
    import torch

    torch.cuda.set_stream(torch.cuda.Stream(device))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device, or the host for it, has no memory left."""
    if isinstance(error, MemoryError):
        return True
    if "torch" not in sys.modules:
        return False
    import torch

    host = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return isinstance(error, torch.OutOfMemoryError) or host


def release_memory(device: str) -> None:
    """Gives back what torch keeps of a GPU's memory for later."""
    if device != "cpu":
        import torch

        torch.cuda.empty_cache()
