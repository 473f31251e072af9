"""Processes that take work: of this machine one for each device, of dask or of ray those that there are."""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError
from typing import Any, Literal, Protocol

from embedcache.errors import WorkerError
from embedcache.workers.chosen import Backend, Workers

_LOOK_EVERY_S = 1.0  # for the parent of a local worker
CONNECT_S = 30
_DASK_IS_GONE = "the dask scheduler is gone, or gave its work up; run the same command again once it is back"


class Work(Protocol):
    """What a process is asked to do; small, and made to be sent."""

    def on(self, device: str) -> Work:
        """The same, to be done on a device of this machine."""
        ...

    def anywhere(self) -> Work:
        """The same for a worker of a cluster, whose GPUs have numbers of their own."""
        ...

    def carry_out(self) -> Any:
        """Does it, in the worker; what it gives is sent back."""
        ...


class Lost(Exception):
    """The process that had some work died.

    Args:
        begun: whether it was at work on this; else another was before it.
    """

    def __init__(self, what: str, *, begun: bool = True) -> None:
        super().__init__(what)
        self.begun = begun


class Pool(Protocol):
    """Processes that take work. What `submit` gives stands for work that is under way."""

    @property
    def n_workers(self) -> int:
        """How many there are by now."""
        ...

    @property
    def neighbours(self) -> int:
        """Most of them on one machine."""
        ...

    def submit(self, work: Work) -> Any: ...

    def ended(self, under_way: Collection[Any], timeout_s: float) -> Collection[Any]:
        """Work that came to an end; none after `timeout_s`."""
        ...

    def delivery(self, ended: Any) -> Any:
        """What became of it; what its code raised is raised.

        Raises:
            Lost: its process died.
        """
        ...


class _Local:
    """One process for each device, made anew if it dies."""

    def __init__(self, devices: Sequence[str]) -> None:
        from joblib.externals.loky import ProcessPoolExecutor

        self._make = lambda: ProcessPoolExecutor(1, timeout=None, initializer=_attend, initargs=(os.getpid(),))
        self._devices = devices
        self._executors = [self._make() for _ in devices]
        self._places: dict[Any, tuple[int, Any]] = {}  # of all work under way, the oldest first: device, executor
        self._in_hand: Any = None  # what the process that died last was at work on
        self.n_workers = self.neighbours = len(devices)

    @classmethod
    @contextlib.contextmanager
    def open(cls, workers: Workers, device: str, on_any: bool) -> Iterator[_Local]:
        pool = cls(workers.devices(device))
        try:
            yield pool
        finally:
            with _without_interrupts():
                for wait in (False, True):  # first all of them are told
                    for executor in pool._executors:
                        executor.shutdown(wait=wait, kill_workers=True)  # they hold memory

    def submit(self, work: Work) -> Any:
        load = Counter(place for place, _ in self._places.values())
        place = min(range(self.n_workers), key=lambda k: load[k])
        work = work.on(self._devices[place])
        try:
            future = self._executors[place].submit(_carried_out, work)
        except BrokenExecutor:  # it died with nothing to do
            self._executors[place] = self._make()
            future = self._executors[place].submit(_carried_out, work)
        self._places[future] = place, self._executors[place]
        return future

    def ended(self, under_way: Collection[Any], timeout_s: float) -> Collection[Any]:
        from joblib.externals.loky import FIRST_COMPLETED, wait

        return wait(under_way, timeout_s, FIRST_COMPLETED).done

    def delivery(self, ended: Any) -> Any:
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        place, executor = self._places[ended]
        try:
            return ended.result()
        except BrokenExecutor as error:
            if not isinstance(error, TerminatedWorkerError):
                raise WorkerError(f"a worker could not take its work ({error})") from error
            if self._executors[place] is executor:
                self._executors[place] = self._make()
                self._in_hand = next(future for future, at in self._places.items() if at == (place, executor))
            raise Lost(type(error).__name__, begun=ended is self._in_hand) from error
        finally:
            del self._places[ended]


class _Dask:
    """The workers of a dask cluster, those that join later included."""

    def __init__(self, client: Any) -> None:
        self._client = client

    @classmethod
    @contextlib.contextmanager
    def open(cls, workers: Workers, device: str, on_any: bool) -> Iterator[_Dask]:
        distributed = _library("distributed", extra="dask")
        with contextlib.ExitStack() as stack:
            cluster: Any = workers.address
            if cluster is None:
                n = len(workers.devices(device))
                cluster = stack.enter_context(
                    distributed.LocalCluster(n_workers=n, threads_per_worker=1, dashboard_address=None)
                )
            try:
                client = stack.enter_context(distributed.Client(cluster, set_as_default=False, timeout=CONNECT_S))
            except (OSError, ValueError) as error:
                raise WorkerError(
                    f"no dask scheduler at {workers.address} ({type(error).__name__}: {error}); expected an address "
                    "such as tcp://head:8786, which 'dask scheduler' prints when it starts"
                ) from error
            yield cls(client)

    @property
    def n_workers(self) -> int:
        return len(self._addresses())

    @property
    def neighbours(self) -> int:
        hosts = Counter(address.rpartition(":")[0] for address in self._addresses())
        return max(hosts.values(), default=1)

    def _addresses(self) -> Collection[str]:
        try:
            return self._client.ncores()
        except OSError as error:
            raise WorkerError(_DASK_IS_GONE) from error

    def submit(self, work: Work) -> Any:
        return self._client.submit(_carried_out, work.anywhere(), pure=False)

    def ended(self, under_way: Collection[Any], timeout_s: float) -> Collection[Any]:
        from distributed import wait

        try:
            with self._client.as_current():
                return wait(list(under_way), timeout=timeout_s, return_when="FIRST_COMPLETED").done
        except TimeoutError:
            return ()
        except CancelledError:
            return [future for future in under_way if future.cancelled()]

    def delivery(self, ended: Any) -> Any:
        from distributed.scheduler import KilledWorker

        try:
            return ended.result()
        except KilledWorker as error:
            raise Lost(f"KilledWorker ({error})") from error
        except CancelledError as error:
            raise WorkerError(_DASK_IS_GONE) from error


class _Ray:
    """The workers of a ray cluster: one for each GPU where the work uses one, else one for each core."""

    def __init__(self, ray: Any, resource: Literal["CPU", "GPU"]) -> None:
        self._ray, self._resource = ray, resource
        needs = {"num_gpus": 1, "num_cpus": 0} if resource == "GPU" else {"num_cpus": 1}
        self._carry_out = ray.remote(max_retries=0, max_calls=0, **needs)(_carried_out)

    @classmethod
    @contextlib.contextmanager
    def open(cls, workers: Workers, device: str, on_any: bool) -> Iterator[_Ray]:
        ray = _library("ray", extra="ray")
        with contextlib.ExitStack() as stack:
            on_gpu = device != "cpu"
            if not ray.is_initialized():
                n = len(workers.devices(device))
                local = {} if workers.address else {"num_cpus": n, "num_gpus": int(on_gpu), "include_dashboard": False}
                try:
                    with _keeping_handlers():
                        ray.init(address=workers.address, log_to_driver=False, **local)
                except (ConnectionError, ValueError, RuntimeError) as error:
                    raise WorkerError(
                        f"no ray cluster at {workers.address} ({type(error).__name__}: {error}); expected 'auto' on a "
                        "machine of the cluster, or ray://head:10001"
                    ) from error
                stack.callback(ray.shutdown)
            use_gpus = on_gpu or (on_any and ray.cluster_resources().get("GPU", 0) >= 1)
            yield cls(ray, "GPU" if use_gpus else "CPU")

    def _each(self) -> list[int]:
        """Workers of each machine."""
        nodes = [node["Resources"].get(self._resource, 0) for node in self._ray.nodes() if node["Alive"]]
        return [int(n) for n in nodes]

    @property
    def n_workers(self) -> int:
        return sum(self._each())

    @property
    def neighbours(self) -> int:
        return max([*self._each(), 1])

    def submit(self, work: Work) -> Any:
        return self._carry_out.remote(work.anywhere())

    def ended(self, under_way: Collection[Any], timeout_s: float) -> Collection[Any]:
        return self._ray.wait(list(under_way), num_returns=1, timeout=timeout_s)[0]

    def delivery(self, ended: Any) -> Any:
        from ray.exceptions import RayError, RayTaskError

        try:
            return self._ray.get(ended)
        except RayTaskError as error:
            raise error.cause from error
        except RayError as error:
            raise Lost(type(error).__name__) from error


_OPEN: dict[Backend, Callable[[Workers, str, bool], contextlib.AbstractContextManager[Pool]]] = {
    "local": _Local.open,
    "dask": _Dask.open,
    "ray": _Ray.open,
}


def open_pool(workers: Workers, device: str, *, on_any: bool) -> contextlib.AbstractContextManager[Pool]:
    """Starts workers, or reaches those of a running cluster; what was started ends with the context.

    Args:
        device: of this machine that the work is meant for.
        on_any: whether a worker of a cluster takes the best device that it has, as this machine may have no GPU.

    Raises:
        WorkerError: no cluster there.
    """
    return _OPEN[workers.backend](workers, device, on_any)


def _carried_out(work: Work) -> Any:
    """Does some work; runs in a worker process.

    Raises:
        WorkerError: instead of an exception that cannot be sent to another process.
    """
    try:
        return work.carry_out()
    except Exception as error:  # raised again as it is, if it can be sent
        try:
            pickle.loads(pickle.dumps(error))  # noqa: S301  # our own
        except Exception as unsent:  # noqa: BLE001  # whatever its class does when it is made again
            told = "".join(traceback.format_exception(error))
            raise WorkerError(f"{type(error).__name__} in a worker (it cannot be sent: {unsent}):\n{told}") from None
        raise


def _library(name: str, *, extra: str) -> Any:
    """A library that only an extra brings.

    Raises:
        WorkerError: it is not there.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise WorkerError(f"the backend {extra} needs {name}; run 'pip install embedcache[{extra}]'") from error


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C waits: half shut down, workers would go on to the end of their work."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _keeping_handlers() -> Iterator[None]:
    """Handlers of signals stay what they were, whatever a library makes of them."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def _attend(parent: int) -> None:
    """In a local worker: ends with its parent however that ends, and leaves Ctrl-C to it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_EVERY_S)
        os._exit(1)

    from joblib.externals.loky import process_executor
    from tqdm import tqdm

    # it would replace a worker that has 300 MB more than after its first work; what an encoder keeps is no leak
    process_executor._USE_PSUTIL = False
    tqdm.set_lock(threading.RLock())  # its own lock between processes is told as leaked where a worker is killed
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()
