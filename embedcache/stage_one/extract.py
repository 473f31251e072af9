"""Extraction: every sample of a manifest through a frozen encoder once, into a store."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from embedcache.data.image_files import read_regular
from embedcache.data.manifest import Manifest
from embedcache.data.reports import changed_reports
from embedcache.data.views import ViewPolicy
from embedcache.device import count_cores
from embedcache.encoders.base import Encoder, device_of
from embedcache.encoders.load import Loading
from embedcache.errors import EmbedCacheError, InputError, ManifestError, StoreNotFoundError, some_ids
from embedcache.fingerprint import input_digest
from embedcache.resources import check_room
from embedcache.stage_one.asked import Asked
from embedcache.stage_one.estimate import Estimate, bytes_on_disk, estimate, fitting_batch, mean_tokens
from embedcache.stage_one.phases import Phases
from embedcache.stage_one.plan import Part, ids_of, next_plan, work_for
from embedcache.stage_one.samples import Samples
from embedcache.stage_one.work import run_all, warn_of_mixing
from embedcache.store import commit, layout
from embedcache.store.catalogue import Catalogue, Plan, check_document, open_or_create, publish_plan
from embedcache.store.location import write_location
from embedcache.store.pace import add_pace
from embedcache.store.shard import Failure
from embedcache.store.store import Store, open_store
from embedcache.workers.chosen import Backend, Workers


@dataclass(frozen=True)
class ExtractReport:
    """What became of every id asked for: `n_asked == n_embedded + n_failed + n_present`.

    Args:
        n_embedded: in the store now and not before: encoded by this call, or by another on the same store beside it.
        n_failed: without a row, failures of earlier calls included.
        n_present: in the store before.
        failures: id, reason and message of each failed id.
        truncated: how many tokens did not fit into the encoder's `max_length`, of each text that this call encoded,
            but for what a worker had done that died.
        reduced: batch size of each shard of this call's work that was encoded with less than the plan's, since memory
            ran out.
        phases: where the time went, of the processes that this call started included.
        seconds: wall time of the call.
    """

    store: Path
    n_asked: int
    n_embedded: int
    n_failed: int
    n_present: int
    failures: list[Failure]
    truncated: dict[str, int]
    reduced: dict[int, int]
    phases: Phases
    seconds: float

    def to_json(self) -> dict[str, Any]:
        failures = [vars(failure) for failure in self.failures]
        return {**vars(self), "store": str(self.store), "failures": failures, "phases": self.phases.to_json()}


def extract(
    manifest: Manifest,
    encoder: Encoder,
    store_dir: str | Path,
    *,
    tokens: bool = False,
    store_dtype: str = "float16",
    shard_rows: int = 1024,
    batch_size: int | Literal["auto"] = 32,
    views: int = 1,
    view_policy: ViewPolicy | None = None,
    n_threads: int | None = None,
    backend: Backend = "local",
    address: str | None = None,
    workers: int | None = None,
    part: tuple[int, int] | None = None,
    retry_failed: bool = False,
    check_inputs: bool = False,
) -> ExtractReport:
    """Runs every image, or every distinct report, of a manifest through an encoder once.

    What the store holds is skipped; a stopped call is gone on with by calling it again, and ends in the same bytes,
    whatever threads, workers and backend do the work. A bad input costs its own row and is recorded.

    Args:
        tokens: store the tokens beside the embeddings: the cells of the encoder's token grid, or those of each text.
        store_dtype: `float16`, `float32`, `bfloat16`, or `int8` with a scale for each row.
        shard_rows: most rows in a shard.
        batch_size: samples encoded together; fixed by the plan once it is published. `auto`: the largest that fits into
            a GPU's memory. Where memory runs out all the same, the shard is done again with half.
        views: rows of each sample: the plain one, and views drawn by `view_policy`.
        n_threads: preparing threads of each process; by default one for each core.
        backend: `local`, `dask` or `ray`: where the work is done (see `Workers`).
        address: of a running dask scheduler or ray cluster.
        workers: processes; by default one for each GPU, else one.
        part: (i, n) does the i-th of n parts of the plan, i from 1, and leaves the rest to other calls.
        retry_failed: plan the ids anew that failed before.
        check_inputs: read every image in the store again and compare its digest; reports always are.

    Raises:
        ManifestError: a report, or with `check_inputs` an image, is not what was encoded under its id; or the images'
            root is not there.
        FingerprintMismatchError: the store holds another encoder's values.
        SettingsError: arguments that make no sense together.
        NoRoomError: the disk cannot hold it; nothing was written.
        StoreWriteError: the store cannot be written.
        WorkerError: the backend's workers cannot be reached, or die over and over.
    """
    asked = Asked(tokens, store_dtype, shard_rows, batch_size, views, view_policy, part, retry_failed)
    asked.check(encoder)
    hands = Workers(backend, address, workers, n_threads)
    hands.devices(device_of(encoder))
    chosen = None if part is None else Part(*part)
    started, path = time.monotonic(), Path(store_dir)
    samples = Samples.of(manifest, encoder, views, view_policy)
    catalogue, before = _begun(path, asked, encoder)
    if before is not None and (samples.modality == "text" or check_inputs):
        _check_inputs(before, samples)
    present = set(before.ids) if before else set[str]()
    again = _again(before, samples, asked)
    known = present | ({failure.id for failure in before.failures} - again if before else set())
    samples = samples.witnessed([i for i in samples.inputs if i not in known], present)
    catalogue = _published_plan(catalogue, samples, encoder, again, asked)
    commit.sweep(path)
    origin = getattr(encoder, "origin", None)
    if isinstance(origin, Loading) and encoder.record.loading["is_directory"]:
        write_location(path, origin.name)
    warn_of_mixing(catalogue, encoder.record.notes)
    ids = list(samples.inputs) if chosen is None else ids_of(catalogue, list(samples.inputs), chosen)
    work = work_for(catalogue, samples.inputs, chosen)
    planned_s = time.monotonic() - started
    done, phases = run_all(work, samples, encoder, catalogue, hands)
    after = open_store(path)
    if samples.modality == "text":
        _check_inputs(after, samples)  # another extractor may have had other texts under these ids
    written = {shard.number for shard in done}
    n_done = sum(len(shard.ids) for shard in work if shard.number in written)
    add_pace(path, n_done, time.monotonic() - started - planned_s)
    documents = Catalogue.read(path).shards
    reduced = {s.number: documents[s.number]["batch_size"] for s in work if "batch_size" in documents[s.number]}
    truncated = {i: n for shard in done for i, n in shard.truncated.items()}
    return _account(after, ids, present, truncated, reduced, replace(phases, plan_s=planned_s), started)


def plan_extraction(
    manifest: Manifest,
    encoder: Encoder,
    store_dir: str | Path,
    *,
    tokens: bool = False,
    store_dtype: str = "float16",
    shard_rows: int = 1024,
    batch_size: int | Literal["auto"] = 32,
    views: int = 1,
    view_policy: ViewPolicy | None = None,
    n_threads: int | None = None,
    backend: Backend = "local",
    address: str | None = None,
    workers: int | None = None,
    part: tuple[int, int] | None = None,
    retry_failed: bool = False,
) -> Estimate:
    """What `extract` with the same arguments would do and take, by a probe of some seconds; it writes nothing.

    Of a cluster with an address the figures are those of one worker like this process.

    Raises:
        InputError: of the samples probed none can be used.
        ManifestError, FingerprintMismatchError, SettingsError: as `extract`.
    """
    asked = Asked(tokens, store_dtype, shard_rows, batch_size, views, view_policy, part, retry_failed)
    asked.check(encoder)
    hands = Workers(backend, address, workers, n_threads)
    path, samples = Path(store_dir), Samples.of(manifest, encoder, views, view_policy)
    catalogue, before = _begun(path, asked, encoder)
    plan = _next_plan(catalogue, samples, encoder, _again(before, samples, asked), asked)
    work = work_for(catalogue, samples.inputs) + ([] if plan is None else list(plan.shards()))
    work = [shard for shard in work if part is None or shard.number in Part(*part)]
    present = set(before.ids) & set(samples.inputs) if before else set[str]()
    ids = [i for shard in work for i in shard.ids]
    return estimate(
        path,
        samples.witnessed(ids, present),
        encoder,
        catalogue.layout,
        n_asked=len(samples),
        n_present=len(present),
        ids=ids,
        n_shards=len(work),
        shard_ids=max((len(shard.ids) for shard in work), default=0),
        batch_size=max((shard.batch_size for shard in work), default=0),
        n_workers=len(hands.devices(device_of(encoder))),
        n_threads=n_threads,
    )


def _begun(path: Path, asked: Asked, encoder: Encoder) -> tuple[Catalogue, Store | None]:
    """The store that is there, else an empty one that is not on disk yet.

    Raises:
        FingerprintMismatchError: it holds other values than those asked for.
    """
    document = asked.document(encoder)
    try:
        catalogue = Catalogue.read(path)
    except StoreNotFoundError:
        return Catalogue(path, document, {}, 0), None
    check_document(catalogue.document, document, path / layout.STORE_NAME)
    return catalogue, open_store(path)


def _again(before: Store | None, samples: Samples, asked: Asked) -> set[str]:
    """Failures that are to be tried again."""
    if before is None or not asked.retry_failed:
        return set()
    return {failure.id for failure in before.failures} & set(samples.inputs)


def _check_inputs(store: Store, samples: Samples) -> None:
    """Refuses inputs that changed under their id since they were encoded."""
    encoded = dict(zip(store.ids, store.input_digests, strict=True))
    if samples.modality == "text":
        changed = changed_reports(samples.inputs.items(), encoded)
    else:
        stored = [i for i in samples.inputs if i in encoded]
        with ThreadPoolExecutor(count_cores()) as pool:  # hashing leaves the interpreter free
            same = pool.map(lambda i: _same_image(samples, i, encoded[i]), stored)
            changed = [i for i, is_same in zip(stored, same, strict=True) if not is_same]
    if changed:
        raise ManifestError(
            f"{store.path}: {len(changed)} {samples.modality} inputs are not what was encoded under their id: "
            f"{some_ids(changed)}; give changed inputs new ids, or extract into another --store"
        )


def _same_image(samples: Samples, sample_id: str, encoded: np.ndarray) -> bool:
    try:
        return input_digest(read_regular(samples.path(sample_id))) == encoded.tobytes()
    except InputError:
        return False


def _next_plan(catalogue: Catalogue, samples: Samples, encoder: Encoder, again: set[str], asked: Asked) -> Plan | None:
    plan = next_plan(
        catalogue,
        list(samples.inputs),
        again=again,
        groups=samples.groups,
        shard_ids=asked.ids_in_a_shard(encoder),
        batch_size=asked.batch_size if isinstance(asked.batch_size, int) else 1,
    )
    if plan is None or asked.batch_size != "auto":
        return plan
    return replace(plan, batch_size=fitting_batch(samples, plan.ids, encoder, tokens=asked.tokens))


def _published_plan(
    catalogue: Catalogue, samples: Samples, encoder: Encoder, again: set[str], asked: Asked
) -> Catalogue:
    """The catalogue once every id asked for is planned, by this process or by another.

    Raises:
        NoRoomError: the disk cannot hold what is planned and not done.
    """
    while True:
        plan = _next_plan(catalogue, samples, encoder, again, asked)
        to_do = [i for shard in work_for(catalogue, samples.inputs) for i in shard.ids] + list(plan.ids if plan else ())
        n_tokens = mean_tokens(samples, to_do, encoder) if asked.tokens else 0.0
        check_room({catalogue.path: bytes_on_disk(catalogue.layout, len(to_do) * asked.views, n_tokens)})
        on_disk = open_or_create(catalogue.path, asked.document(encoder))
        if plan is None:
            return on_disk
        if publish_plan(catalogue.path, len(catalogue.plans), plan):
            return Catalogue.read(catalogue.path)
        catalogue = Catalogue.read(catalogue.path)


def _account(
    store: Store,
    ids: Sequence[str],
    present: set[str],
    truncated: dict[str, int],
    reduced: dict[int, int],
    phases: Phases,
    started: float,
) -> ExtractReport:
    """Proves from the store itself that every id asked for was handled."""
    embedded, failed = set(store.ids), {f.id: f for f in store.failures}
    asked = set(ids)
    unaccounted = asked - embedded - set(failed)
    if unaccounted:
        raise EmbedCacheError(
            f"{store.path}: {len(unaccounted)} of {len(ids)} ids are neither embedded nor recorded as failed; "
            "this is a fault of embedcache, the rows that are there are sound"
        )
    return ExtractReport(
        store=store.path,
        n_asked=len(asked),
        n_embedded=len((asked & embedded) - present),
        n_failed=len(asked & set(failed)),
        n_present=len(asked & present),
        failures=[failed[i] for i in ids if i in failed],
        truncated=truncated,
        reduced=reduced,
        phases=phases,
        seconds=time.monotonic() - started,
    )
