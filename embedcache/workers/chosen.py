"""What is to do the work: processes here or a cluster, on which devices, with how many threads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from embedcache.device import count_gpus
from embedcache.errors import DeviceError, SettingsError

Backend = Literal["local", "dask", "ray"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


@dataclass(frozen=True)
class Workers:
    """What is to do the work.

    Args:
        backend: `local`: this process, or several on this machine. `dask`, `ray`: the workers of a cluster, which see
            the same files.
        address: of the cluster's scheduler; by default dask and ray start workers on this machine.
        n: processes; by default one for each GPU where the work is on a GPU, else one. Of a running cluster all
            workers are used, and `n` is none of ours.
        n_threads: preparing threads of each; by default the cores of its machine, shared out.

    Raises:
        SettingsError: they make no sense together.
    """

    backend: Backend = "local"
    address: str | None = None
    n: int | None = None
    n_threads: int | None = None

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise SettingsError(f"backend {self.backend!r}, expected one of {', '.join(BACKENDS)}")
        if self.backend == "local" and self.address is not None:
            raise SettingsError(f"address {self.address!r}: the backend local has none, choose dask or ray with it")
        if self.address is not None and self.n is not None:
            raise SettingsError(f"workers is {self.n}: a running cluster has its own workers, leave it out")
        for name, value in (("workers", self.n), ("n_threads", self.n_threads)):
            if value is not None and value < 1:
                raise SettingsError(f"{name} is {value}, expected at least 1")

    def devices(self, device: str) -> list[str]:
        """The device of each process that is started on this machine.

        Args:
            device: that the work is meant for.

        Raises:
            DeviceError: more processes than GPUs.
        """
        if device == "cpu":
            return [device] * (self.n or 1)
        if self.backend != "local":
            if (self.n or 1) > 1:
                raise DeviceError(
                    f"{self.n} workers of {self.backend} for a GPU: the backend local takes one for each GPU of this "
                    "machine; a cluster's own workers are started with a GPU each (CUDA_VISIBLE_DEVICES), then give "
                    "its --address"
                )
            return [device]
        n_gpus = count_gpus() if device == "cuda" else 1
        n = self.n or n_gpus
        if n > n_gpus:
            raise DeviceError(f"{n} workers for {n_gpus} GPUs, expected at most one for each")
        return [f"cuda:{k}" for k in range(n)] if n > 1 else [device]

    def are_here(self, device: str) -> bool:
        """Whether this process does the work itself."""
        return self.backend == "local" and len(self.devices(device)) == 1
