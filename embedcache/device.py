"""Where tensors are computed, and by how many threads."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from embedcache.errors import DeviceError

if TYPE_CHECKING:
    import torch

_OUT_OF_MEMORY = (  # of the host, of pinned memory, of the libraries' own work space; torch has no class for these
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


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


def count_cores() -> int:
    """How many cores this process may use: affinity, cgroups and LOKY_MAX_CPU_COUNT may leave it fewer."""
    from joblib import cpu_count

    return int(cpu_count())


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


_default_cores = threading.Lock()


def use_one_core() -> None:
    """From now on torch uses one core for one operation of this thread, and of no other."""
    if "torch" not in sys.modules:
        return
    import torch

    with _default_cores, ThreadPoolExecutor(1) as fresh:
        n = fresh.submit(torch.get_num_threads).result()  # what a new thread gets
        torch.set_num_threads(1)
        fresh.submit(torch.set_num_threads, n).result()


class _FullPrecision(contextlib.AbstractContextManager[None]):
    """Within it, float32 means float32, whatever this process allowed before: no TF32, no bfloat16 in its place.

    The settings are the process's: of several that are open at once the first sets and the last restores them.
    """

    def __init__(self) -> None:
        self._lock, self._n_open = threading.Lock(), 0
        self._before: list[tuple[Any, str]] = []

    def __enter__(self) -> None:
        with self._lock:
            self._n_open += 1
            if self._n_open == 1 and "torch" in sys.modules:
                import torch

                of: Any = torch.backends
                kinds = (of.cuda.matmul, of.cudnn.conv, of.cudnn.rnn, of.mkldnn.matmul, of.mkldnn.conv, of.mkldnn.rnn)
                self._before = [(kind, kind.fp32_precision) for kind in kinds]
                for kind in kinds:
                    kind.fp32_precision = "ieee"

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._n_open -= 1
            if self._n_open == 0:
                for kind, precision in self._before:
                    kind.fp32_precision = precision
                self._before = []


full_precision = _FullPrecision()


def on_device(device: str) -> contextlib.AbstractContextManager[Any]:
    """Within it, what a GPU is asked for without naming one goes to this one."""
    if device == "cpu":
        return contextlib.nullcontext()
    import torch

    return torch.cuda.device(device)


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

    said = isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    return isinstance(error, torch.OutOfMemoryError) or said


def release_memory(device: str) -> None:
    """Gives back what torch keeps of a GPU's memory for later."""
    if device != "cpu":
        import torch

        torch.cuda.empty_cache()
