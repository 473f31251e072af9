"""Several processes that train one Adaptor: each has a part of every batch, the loss is over all of it.

Started by `torchrun --nproc-per-node N -m embedcache train ...`. Shape notation: b pairs of this process, p of all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from embedcache.device import count_gpus, pick_device
from embedcache.errors import SettingsError


@dataclass(frozen=True)
class Share:
    """Which part of each batch a process has: part `rank` of `of`, each as large as the next, give or take one."""

    rank: int = 0
    of: int = 1

    def bounds(self, n: int) -> tuple[int, int]:
        """First and last + 1 of n pairs."""
        return n * self.rank // self.of, n * (self.rank + 1) // self.of


class Group:
    """The processes of a run; of one alone, nothing here costs anything."""

    def __init__(self, rank: int = 0, size: int = 1, device: str = "cpu") -> None:
        self.rank, self.size, self.device = rank, size, device

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        """Which part of each batch this process has."""
        return Share(self.rank, self.size)

    def gathered(self, x: Tensor, n: int) -> Tensor:
        """The rows of all processes, (p, ...), in order; a gradient reaches the process that each row came from.

        Args:
            x: this process's rows, (b, ...).
            n: p.
        """
        return x if self.size == 1 else _Gather.apply(x, n, self)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sums each tensor over all processes, in place and in one message."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])

    def told(self, value: Any) -> Any:
        """What the first process knows, in all of them."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined_group(device: str) -> Iterator[Group]:
    """The processes that torchrun started, or this one alone; leaves torch's group as it was found.

    Args:
        device: `auto`, for several processes on GPUs each its own; `cpu`; or for one process the name of a GPU.

    Raises:
        SettingsError: several processes on one GPU.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield Group(device=pick_device(device))
        return
    own = _own_device(device)
    if own != "cpu":
        torch.cuda.set_device(own)
    begun_here = not dist.is_initialized()
    if begun_here:
        on_gpu = own != "cpu"
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=torch.device(own) if on_gpu else None)
    try:
        yield Group(dist.get_rank(), dist.get_world_size(), own)
    finally:
        if begun_here:
            dist.destroy_process_group()


def _own_device(device: str) -> str:
    """The device of this process among several."""
    n_gpus = count_gpus()
    if device == "cpu" or (device == "auto" and not n_gpus):
        return "cpu"
    if device != "auto":
        raise SettingsError(f"device {device!r} for several processes, expected auto (each its own GPU) or cpu")
    if processes_here() > n_gpus:
        raise SettingsError(
            f"{processes_here()} processes for {n_gpus} GPUs; start torchrun with --nproc-per-node {n_gpus}"
        )
    return f"cuda:{os.environ['LOCAL_RANK']}"


def processes_here() -> int:
    """How many processes torchrun started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this process is the one that speaks, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


class _Gather(torch.autograd.Function):
    """All processes' rows; backwards, the gradients that all processes have for one's own rows, summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int, group: Group) -> Tensor:
        bounds = [Share(rank, group.size).bounds(n) for rank in range(group.size)]
        most = max(high - low for low, high in bounds)
        padded = x.new_zeros(most, *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in bounds]
        dist.all_gather(parts, padded)
        ctx.own = slice(*bounds[group.rank])
        return torch.cat([part[: high - low] for part, (low, high) in zip(parts, bounds, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        return gradient[ctx.own], None, None
