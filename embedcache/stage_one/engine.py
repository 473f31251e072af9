"""Where shards of work run: in this process, in one process for each GPU, on dask workers, or on ray.

Engines only hand out work. A shard counts once its document is published, whoever wrote it and however often it was
tried, so that workers may join, die, or do a shard that another has done.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from embedcache.device import count_gpus
from embedcache.encoders.base import Encoder
from embedcache.encoders.load import Loading
from embedcache.errors import DeviceError, WorkerError
from embedcache.stage_one.phases import Phases
from embedcache.stage_one.pipeline import Pipeline, ShardDone, batched
from embedcache.stage_one.samples import Samples
from embedcache.store.catalogue import Catalogue, PlannedShard
from embedcache.store.claims import Claims

Backend = Literal["local", "dask", "ray"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

_MOST_SHARDS = 8  # in one task: the pipeline of a worker runs empty between tasks
_TASKS_EACH = 4  # at least so many for each worker, so that none waits long for the last
_AHEAD = "8 * n_jobs"  # tasks handed out before the first is done: workers that join later find some
_LOOK_EVERY_S = 0.5
_CONNECT_S = 30


@dataclass(frozen=True)
class Workers:
    """What is to do the work.

    Args:
        backend: `local`: this process, or several on this machine. `dask`, `ray`: the workers of a cluster, which see
            the same files.
        address: of the cluster's scheduler; by default dask and ray start workers on this machine.
        n: processes; by default one for each GPU of a local encoder on a GPU, else one.
        n_threads: preparing threads of each; by default the cores of the machine, shared out.
    """

    backend: Backend = "local"
    address: str | None = None
    n: int | None = None
    n_threads: int | None = None

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"backend {self.backend!r}, expected one of {', '.join(BACKENDS)}")
        if self.backend == "local" and self.address is not None:
            raise ValueError(f"address {self.address!r}: the backend local has none, choose dask or ray with it")
        for name, value in (("workers", self.n), ("n_threads", self.n_threads)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")

    def devices(self, encoder: Encoder) -> list[str]:
        """A device for each local process."""
        device = getattr(encoder, "device", "cpu")
        n_gpus = count_gpus() if device == "cuda" else 0
        n = self.n or max(n_gpus, 1)
        if device != "cuda":
            return [device] * n
        if n > n_gpus:
            raise DeviceError(f"{n} workers for {n_gpus} GPUs, expected at most one for each")
        return [f"cuda:{k}" for k in range(n)] if n > 1 else [device]


@dataclass(frozen=True)
class Order:
    """All that a worker process needs to encode some shards.

    Args:
        encoder: the encoder itself, or how it is loaded.
        polite: whether shards that another process works on are left to it.
        parent: the process on whose death a local worker stops, between shards.
    """

    store: Path
    samples: Samples
    encoder: Encoder | Loading
    shards: Sequence[PlannedShard]
    n_threads: int | None
    polite: bool
    parent: int | None = None


@dataclass(frozen=True)
class Delivery:
    """What a worker made of an order.

    Args:
        notes: of the worker's encoder: versions, device kind.
    """

    done: list[ShardDone]
    phases: Phases
    notes: dict[str, Any] = field(default_factory=dict)


def carry_out(order: Order) -> Delivery:
    """Encodes the shards of an order; runs in a worker process."""
    encoder = order.encoder.load() if isinstance(order.encoder, Loading) else order.encoder
    catalogue = Catalogue.read(order.store)

    def is_wanted() -> bool:
        return order.parent is None or os.getppid() == order.parent

    with (
        Claims(order.store) as claims,
        Pipeline(order.samples, encoder, catalogue, n_threads=order.n_threads, is_wanted=is_wanted) as pipeline,
    ):
        done = pipeline.run(order.shards, claims if order.polite else None)
        if not is_wanted():
            os._exit(1)  # nobody waits for an answer, and an idle worker would keep the encoder's memory
        return Delivery(done, pipeline.clock.read(), dict(encoder.record.notes))


def hand_out(
    workers: Workers, devices: Sequence[str], samples: Samples, encoder: Encoder, catalogue: Catalogue,
    shards: Sequence[PlannedShard], *, polite: bool,
) -> Iterator[Delivery]:  # fmt: skip
    """Has shards encoded by other processes; deliveries come as they are ready.

    Args:
        devices: one for each local process.

    Raises:
        WorkerError: the cluster cannot be reached, or workers die over and over. What was published is kept.
    """
    if workers.backend == "local":
        yield from _locally(workers, devices, samples, encoder, catalogue, shards, polite)
        return
    cluster = _dask if workers.backend == "dask" else _ray
    with cluster(workers, encoder) as n_workers:
        each = min(max(len(shards) // (n_workers * _TASKS_EACH), 1), _MOST_SHARDS)
        n_threads = workers.n_threads or (None if workers.address else _share(workers.n or 1))
        orders = (
            Order(catalogue.path.resolve(), samples.of_shards(run), encoder, run, n_threads, polite)
            for run in batched(shards, each)
        )
        if workers.backend == "dask":
            yield from _parallel(orders, n_jobs=-1, pre_dispatch=_AHEAD)
        else:  # joblib has nothing of ray before the last task is done
            yield from _parallel(orders, n_jobs=n_workers, pre_dispatch="all", as_ready=False)


def _locally(
    workers: Workers, devices: Sequence[str], samples: Samples, encoder: Encoder, catalogue: Catalogue,
    shards: Sequence[PlannedShard], polite: bool,
) -> Iterator[Delivery]:  # fmt: skip
    """Each process goes through all shards, its own share first, and leaves out what another has claimed."""
    from joblib import parallel_config
    from joblib.externals.loky import get_reusable_executor

    n, origin = len(devices), getattr(encoder, "origin", None)
    orders = [
        Order(
            catalogue.path.resolve(),
            samples,
            origin.on(device) if isinstance(origin, Loading) else encoder,
            [*shards[k::n], *(shard for j in range(1, n) for shard in shards[(k + j) % n :: n])],
            workers.n_threads or _share(n),
            polite,
            os.getpid(),
        )
        for k, device in enumerate(devices)
    ]
    try:
        with parallel_config(backend="loky"):
            deliveries = _parallel(orders, n_jobs=n, pre_dispatch="all")
        yield from deliveries
    finally:
        get_reusable_executor().shutdown(wait=True, kill_workers=True)  # they hold the encoder's memory


def _parallel(orders: Iterable[Order], *, as_ready: bool = True, **settings: Any) -> Iterator[Delivery]:
    from joblib import Parallel, delayed

    work = Parallel(batch_size=1, return_as="generator_unordered" if as_ready else "list", **settings)
    return iter(work(delayed(carry_out)(order) for order in orders))


@contextlib.contextmanager
def _dask(workers: Workers, encoder: Encoder) -> Iterator[int]:
    """joblib's tasks go to a dask cluster; gives the number of its workers."""
    try:
        from distributed import Client, LocalCluster
        from distributed.scheduler import KilledWorker
    except ImportError as error:
        raise WorkerError("the backend dask needs dask.distributed; run 'pip install embedcache[dask]'") from error
    from joblib import parallel_config

    with contextlib.ExitStack() as stack:
        cluster: Any = workers.address
        if cluster is None:
            cluster = stack.enter_context(
                LocalCluster(n_workers=workers.n or 1, threads_per_worker=1, dashboard_address=None)
            )
        try:
            client = stack.enter_context(Client(cluster, set_as_default=False, timeout=_CONNECT_S))
        except (OSError, ValueError) as error:
            raise WorkerError(f"no dask scheduler at {workers.address} ({type(error).__name__}: {error})") from error
        try:
            with parallel_config(backend="dask", client=client, wait_for_workers_timeout=_CONNECT_S):
                yield max(len(client.scheduler_info()["workers"]), 1)
        except KilledWorker as error:
            raise WorkerError(f"dask: {error}") from error


@contextlib.contextmanager
def _ray(workers: Workers, encoder: Encoder) -> Iterator[int]:
    """joblib's tasks go to a ray cluster; gives the number of its workers."""
    try:
        import ray
        from ray.util.joblib import register_ray
    except ImportError as error:
        raise WorkerError("the backend ray needs ray; run 'pip install embedcache[ray]'") from error
    from joblib import parallel_config

    register_ray()
    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():
            local = {} if workers.address else {"num_cpus": workers.n or 1, "include_dashboard": False}
            ray.init(address=workers.address, log_to_driver=False, **local)
            stack.callback(ray.shutdown)
        needs = {"num_gpus": 1} if getattr(encoder, "device", "cpu") != "cpu" else {"num_cpus": 1}
        n = workers.n or max(int(ray.cluster_resources().get("GPU" if "num_gpus" in needs else "CPU", 1)), 1)
        with parallel_config(backend="ray", n_jobs=n, ray_remote_args=needs):
            yield n


@contextlib.contextmanager
def watching(catalogue: Catalogue, shards: Sequence[PlannedShard], on_ids: Callable[[int], None]) -> Iterator[None]:
    """Tells of shards as they come to count, whoever publishes them."""
    ended, left = threading.Event(), list(shards)

    def look() -> None:
        nonlocal left
        published = [shard for shard in left if catalogue.has_shard(shard.number)]
        left = [shard for shard in left if shard not in published]
        if published:
            on_ids(sum(len(shard.ids) for shard in published))

    def watch() -> None:
        while not ended.wait(_LOOK_EVERY_S):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        look()


def _share(n: int) -> int:
    return max((os.cpu_count() or 1) // n, 1)
