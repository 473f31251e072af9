"""Extraction: every sample of a manifest through a frozen encoder once, into a store."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from embedcache.data.manifest import Manifest
from embedcache.data.radiograph import read_regular
from embedcache.data.reports import changed_reports
from embedcache.data.views import ViewPolicy
from embedcache.encoders.base import Encoder
from embedcache.errors import EmbedCacheError, InputError, ManifestError, StoreNotFoundError, WorkerError, some_ids
from embedcache.fingerprint import input_digest
from embedcache.progress import Progress
from embedcache.stage_one.engine import Backend, Workers, hand_out, watching
from embedcache.stage_one.estimate import Estimate, bytes_on_disk, check_room, estimate, fitting_batch, mean_tokens
from embedcache.stage_one.phases import Phases
from embedcache.stage_one.pipeline import Pipeline, ShardDone
from embedcache.stage_one.plan import Part, ids_of, next_plan, work_for
from embedcache.stage_one.rows import layout_for, rows_in_a_shard
from embedcache.stage_one.samples import Samples
from embedcache.store import commit, layout
from embedcache.store.catalogue import (
    Catalogue,
    Plan,
    PlannedShard,
    check_fingerprint,
    open_or_create,
    publish_plan,
)
from embedcache.store.claims import Claims
from embedcache.store.shard import Failure
from embedcache.store.store import Store, open_store

_POLL_S = 0.2  # between looks at shards that other extractors have in hand
_PATIENCE_S = 60.0  # at least, and three times the slowest shard here: so long may others' shards make no progress
_MOST_LOSSES = 3  # rounds in which a worker died and no shard came to count


@dataclass(frozen=True)
class ExtractReport:
    """What became of every id asked for: `n_asked == n_embedded + n_failed + n_present`.

    Args:
        n_embedded: in the store now and not before: encoded by this call, or by another on the same store beside it.
        n_failed: without a row, failures of earlier calls included.
        n_present: in the store before.
        failures: id, reason and message of each failed id.
        truncated: how many tokens did not fit into the encoder's `max_length`, of each text that this call encoded.
        reduced: batch size of each shard that this call encoded with less than the plan's, since memory ran out.
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
        ManifestError: a report, or with `check_inputs` an image, is not what was encoded under its id.
        FingerprintMismatchError: the store holds another encoder's values.
        StoreWriteError: the store cannot be written, or the disk cannot hold it.
        WorkerError: the backend's workers cannot be reached, or die over and over.
    """
    asked = _Asked(tokens, store_dtype, shard_rows, batch_size, views, view_policy)
    asked.check()
    hands = Workers(backend, address, workers, n_threads)
    chosen = None if part is None else Part(*part)
    started, path = time.monotonic(), Path(store_dir)
    samples = Samples.of(manifest, encoder, views, view_policy)
    catalogue = open_or_create(path, asked.document(encoder))
    commit.sweep(path)
    _warn_of_mixing(catalogue, encoder.record.notes)
    before = open_store(path)
    present = set(before.ids)
    if samples.modality == "text" or check_inputs:
        _check_inputs(before, samples)
    again = {f.id for f in before.failures} & set(samples.inputs) if retry_failed else set()
    catalogue = _published_plan(catalogue, samples, encoder, again, asked)
    ids = list(samples.inputs) if chosen is None else ids_of(catalogue, list(samples.inputs), chosen)
    work = work_for(catalogue, samples.inputs, chosen)
    planned_s = time.monotonic() - started
    done, phases = _run_all(work, samples, encoder, catalogue, hands)
    after = open_store(path)
    if samples.modality == "text":
        _check_inputs(after, samples)  # another extractor may have had other texts under these ids
    reduced = {d.number: d.batch_size for d, s in _planned(done, work) if d.batch_size != s.batch_size}
    truncated = {i: n for d in done for i, n in d.truncated.items()}
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
    part: tuple[int, int] | None = None,
    retry_failed: bool = False,
) -> Estimate:
    """What `extract` with the same arguments would do and take, by a probe of some seconds; it writes nothing.

    Raises:
        InputError: of the samples probed none can be used.
    """
    asked = _Asked(tokens, store_dtype, shard_rows, batch_size, views, view_policy)
    asked.check()
    path, samples = Path(store_dir), Samples.of(manifest, encoder, views, view_policy)
    present, again = set[str](), set[str]()
    try:
        catalogue = Catalogue.read(path)
        before = open_store(path)
    except StoreNotFoundError:
        catalogue = Catalogue(path, asked.document(encoder), {}, 0)
    else:
        check_fingerprint(
            catalogue.document["fingerprint"], asked.document(encoder)["fingerprint"], path / layout.STORE_NAME
        )
        present = set(before.ids)
        again = {f.id for f in before.failures} & set(samples.inputs) if retry_failed else set()
    plan = _next_plan(catalogue, samples, encoder, again, asked)
    work = work_for(catalogue, samples.inputs) + ([] if plan is None else list(plan.shards()))
    work = [shard for shard in work if part is None or shard.number in Part(*part)]
    return estimate(
        path,
        samples,
        encoder,
        catalogue.layout,
        n_asked=len(samples),
        n_present=len(present & set(samples.inputs)),
        ids=[i for shard in work for i in shard.ids],
        n_shards=len(work),
        shard_ids=max((len(shard.ids) for shard in work), default=0),
        batch_size=max((shard.batch_size for shard in work), default=0),
    )


@dataclass(frozen=True)
class _Asked:
    """What a caller asks of the store; see `extract`."""

    tokens: bool
    store_dtype: str
    shard_rows: int
    batch_size: int | Literal["auto"]
    views: int
    view_policy: ViewPolicy | None

    def check(self) -> None:
        wrong = {"shard_rows": self.shard_rows, "views": self.views}
        if self.batch_size != "auto":
            wrong["batch_size"] = self.batch_size
        for name, value in wrong.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected at least 1")
        if self.views == 1 and self.view_policy is not None:
            raise ValueError("view_policy was given, but views is 1: there is no view to draw")
        if self.views > self.shard_rows:
            raise ValueError(f"views is {self.views}, expected at most shard_rows ({self.shard_rows})")
        if self.store_dtype not in layout.STORED_DTYPES:
            raise ValueError(f"store_dtype {self.store_dtype!r}, expected one of {', '.join(layout.STORED_DTYPES)}")

    def document(self, encoder: Encoder) -> dict[str, Any]:
        """The store's own document."""
        return layout.store_document(
            encoder=encoder.record.to_json(),
            encoder_fingerprint=encoder.fingerprint,
            modality=encoder.modality,
            store_layout=layout_for(
                encoder,
                store_dtype=self.store_dtype,
                tokens=self.tokens,
                views=self.views,
                view_policy=self.view_policy,
            ),
        )


def _warn_of_mixing(catalogue: Catalogue, now: Mapping[str, Any]) -> None:
    """Versions and device kind are recorded, not keyed: rows made with others may differ in their last bits."""
    then = catalogue.document["encoder"].get("notes", {})
    changed = [f"{name} {then[name]} -> {now[name]}" for name in now if then.get(name, now[name]) != now[name]]
    if changed:
        warnings.warn(
            f"{catalogue.path}: begun with other versions or another device ({', '.join(changed)}); new rows may "
            "differ from old ones in their last bits",
            stacklevel=3,
        )


def _check_inputs(store: Store, samples: Samples) -> None:
    """Refuses inputs that changed under their id since they were encoded."""
    encoded = dict(zip(store.ids, store.input_digests, strict=True))
    if samples.modality == "text":
        changed = changed_reports(samples.inputs.items(), encoded)
    else:
        changed = [i for i in samples.inputs if i in encoded and not _same_image(samples, i, encoded[i])]
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


def _next_plan(catalogue: Catalogue, samples: Samples, encoder: Encoder, again: set[str], asked: _Asked) -> Plan | None:
    rows = min(asked.shard_rows, rows_in_a_shard(encoder, catalogue.layout))
    plan = next_plan(
        catalogue,
        list(samples.inputs),
        again=again,
        groups=samples.groups,
        shard_ids=max(rows // asked.views, 1),
        batch_size=asked.batch_size if isinstance(asked.batch_size, int) else 1,
    )
    if plan is None or asked.batch_size != "auto":
        return plan
    return replace(plan, batch_size=fitting_batch(samples, plan.ids, encoder, tokens=asked.tokens))


def _published_plan(
    catalogue: Catalogue, samples: Samples, encoder: Encoder, again: set[str], asked: _Asked
) -> Catalogue:
    """The catalogue once every id asked for is planned, by this process or by another.

    Raises:
        StoreWriteError: the disk cannot hold what is planned and not done.
    """
    while True:
        plan = _next_plan(catalogue, samples, encoder, again, asked)
        to_do = [i for shard in work_for(catalogue, samples.inputs) for i in shard.ids] + list(plan.ids if plan else ())
        n_tokens = mean_tokens(samples, to_do, encoder) if asked.tokens else 0.0
        check_room(catalogue.path, bytes_on_disk(catalogue.layout, len(to_do) * asked.views, n_tokens))
        if plan is None:
            return catalogue
        if publish_plan(catalogue.path, len(catalogue.plans), plan):
            return Catalogue.read(catalogue.path)
        catalogue = Catalogue.read(catalogue.path)


def _run_all(
    work: Sequence[PlannedShard], samples: Samples, encoder: Encoder, catalogue: Catalogue, hands: Workers
) -> tuple[list[ShardDone], Phases]:
    """Encodes what nobody else has in hand, then what others dropped, until every shard counts."""
    done: list[ShardDone] = []
    phases, unit = Phases(), "image" if samples.modality == "image" else "report"
    devices = hands.devices(encoder)
    with Claims(catalogue.path) as claims:
        if work and claims.claim(work[0].number) and not claims.keep_others_out:
            first = int.from_bytes(os.urandom(4), "big") % len(work)  # so that others are likely to begin elsewhere
            work = [*work[first:], *work[:first]]
        if hands.backend != "local" or len(devices) > 1:
            claims.close()  # the workers have claims of their own
        n_left, last_progress, slowest_s, n_losses = len(work) + 1, time.monotonic(), 0.0, 0
        while left := [shard for shard in work if not catalogue.has_shard(shard.number)]:
            now = time.monotonic()
            if len(left) < n_left:
                n_left, last_progress, n_losses = len(left), now, 0
            polite = now - last_progress < max(_PATIENCE_S, 3 * slowest_s)
            total = sum(len(shard.ids) for shard in left)
            with Progress(f"encoding into {catalogue.path}", total=total, unit=unit) as progress:
                if hands.backend == "local" and len(devices) == 1:
                    with Pipeline(
                        samples, encoder, catalogue, n_threads=hands.n_threads, on_ids=progress.advance
                    ) as pipeline:
                        newly = pipeline.run(left, claims if polite else None)
                        phases += pipeline.clock.read()
                else:
                    newly = []
                    try:
                        with watching(catalogue, left, progress.advance):
                            for delivery in hand_out(hands, devices, samples, encoder, catalogue, left, polite=polite):
                                newly += delivery.done
                                phases += delivery.phases
                                _warn_of_mixing(catalogue, delivery.notes)
                    except BrokenExecutor as error:  # a worker died: others go on with what is left
                        n_losses += 1
                        if n_losses == _MOST_LOSSES:
                            raise WorkerError(
                                f"{catalogue.path}: workers died {n_losses} times before a shard was done, the last "
                                f"with {type(error).__name__}; look for memory that runs out, or for a file that "
                                "breaks its decoder: --workers 1 --threads 1 shows where"
                            ) from error
                    commit.sweep(catalogue.path)  # what workers that died left behind
            if newly:
                slowest_s = max(slowest_s, (time.monotonic() - now) / len(newly))
            else:
                time.sleep(_POLL_S)
            done += newly
    return done, phases


def _planned(done: Sequence[ShardDone], work: Sequence[PlannedShard]) -> list[tuple[ShardDone, PlannedShard]]:
    by_number = {shard.number: shard for shard in work}
    return [(shard, by_number[shard.number]) for shard in done]


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
