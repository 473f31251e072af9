"""Extraction: plan, prepare in threads, encode, and commit shards in the background.

Shape notation: n rows of a shard, d embedding width.
"""

from __future__ import annotations

import os
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.data.manifest import Manifest
from embedcache.data.radiograph import read_regular
from embedcache.data.reports import changed_reports
from embedcache.encoders.base import Encoder, Prepared
from embedcache.errors import EmbedCacheError, InputError, ManifestError, some_ids
from embedcache.fingerprint import input_digest
from embedcache.progress import Progress
from embedcache.stage_one.plan import next_plan, work_for
from embedcache.stage_one.prepare import Job, in_order
from embedcache.store import commit, layout
from embedcache.store.catalogue import Catalogue, PlannedShard, open_or_create, publish_plan
from embedcache.store.claims import Claims
from embedcache.store.layout import Layout
from embedcache.store.shard import Failure, ShardImage, ShardRows
from embedcache.store.store import Store, open_store
from embedcache.store.values import from_stored, to_stored

_UNWRITTEN_SHARDS = 2  # encoded but not yet on disk; bounds memory
_POLL_S = 0.2  # between looks at shards that other extractors have in hand
_PATIENCE_S = 60.0  # at least, and three times the slowest shard here: so long may others' shards make no progress


@dataclass(frozen=True)
class ExtractReport:
    """What became of every id asked for: `n_asked == n_embedded + n_failed + n_present`.

    Args:
        n_embedded: in the store now and not before: encoded by this call, or by another on the same store beside it.
        n_failed: without a row, failures of earlier calls included.
        n_present: in the store before.
        failures: id, reason and message of each failed id.
        seconds: wall time of the call.
    """

    store: Path
    n_asked: int
    n_embedded: int
    n_failed: int
    n_present: int
    failures: list[Failure]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "store": str(self.store)}


def extract(
    manifest: Manifest,
    encoder: Encoder,
    store_dir: str | Path,
    *,
    store_dtype: str = "float16",
    shard_rows: int = 1024,
    batch_size: int = 32,
    n_threads: int | None = None,
    retry_failed: bool = False,
    check_inputs: bool = False,
) -> ExtractReport:
    """Runs every image, or every distinct report, of a manifest through an encoder once.

    What the store holds is skipped; a stopped call is gone on with by calling it again, and ends in the same bytes.
    A bad input costs its own row and is recorded.

    Args:
        store_dtype: `float16`, `float32`, `bfloat16`, or `int8` with a scale for each row.
        shard_rows: most rows in a shard.
        batch_size: samples encoded together; fixed by the plan once it is published.
        n_threads: preparing threads; by default one for each core.
        retry_failed: plan the ids anew that failed before.
        check_inputs: read every image in the store again and compare its digest; reports always are.

    Raises:
        ManifestError: a report, or with `check_inputs` an image, is not what was encoded under its id.
        FingerprintMismatchError: the store holds another encoder's values.
        StoreWriteError: the store cannot be written.
    """
    for name, value in (("batch_size", batch_size), ("shard_rows", shard_rows), ("n_threads", n_threads or 1)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if store_dtype not in layout.STORED_DTYPES:
        raise ValueError(f"store_dtype {store_dtype!r}, expected one of {', '.join(layout.STORED_DTYPES)}")
    started, path = time.monotonic(), Path(store_dir)
    samples = _samples(manifest, encoder)
    document = layout.store_document(
        encoder=encoder.record.to_json(),
        encoder_fingerprint=encoder.fingerprint,
        modality=encoder.modality,
        store_layout=Layout(store_dtype, encoder.dim),
    )
    catalogue = open_or_create(path, document)
    commit.sweep(path)
    _warn_of_mixing(catalogue, encoder)
    before = open_store(path)
    present = set(before.ids)
    if encoder.modality == "text" or check_inputs:
        _check_inputs(before, manifest, encoder.modality)
    again = {f.id for f in before.failures} & set(samples) if retry_failed else set()
    catalogue = _published_plan(catalogue, list(samples), again, shard_rows, batch_size)
    with Claims(path) as claims:
        _run_all(work_for(catalogue, samples), samples, encoder, catalogue, claims, n_threads)
    after = open_store(path)
    if encoder.modality == "text":
        _check_inputs(after, manifest, encoder.modality)  # another extractor may have had other texts under these ids
    return _account(after, list(samples), present, time.monotonic() - started)


def _warn_of_mixing(catalogue: Catalogue, encoder: Encoder) -> None:
    """Versions and device kind are recorded, not keyed: rows made with others may differ in their last bits."""
    then, now = catalogue.document["encoder"].get("notes", {}), encoder.record.notes
    changed = [f"{name} {then[name]} -> {now[name]}" for name in now if then.get(name, now[name]) != now[name]]
    if changed:
        warnings.warn(
            f"{catalogue.path}: begun with other versions or another device ({', '.join(changed)}); new rows may "
            "differ from old ones in their last bits",
            stacklevel=3,
        )


def _samples(manifest: Manifest, encoder: Encoder) -> Mapping[str, Job]:
    """How to prepare each id: one for each image, or one for each distinct report id."""
    if encoder.modality == "text":
        return {i: _text_job(encoder, text) for i, text in manifest.reports().items()}
    return {
        i: _image_job(encoder, manifest, image)
        for i, image in zip(manifest.frame["id"], manifest.frame["image"], strict=True)
    }


def _text_job(encoder: Encoder, text: str) -> Job:
    return lambda: encoder.prepare(text)


def _image_job(encoder: Encoder, manifest: Manifest, image: str) -> Job:
    return lambda: encoder.prepare(manifest.path(image))


def _check_inputs(store: Store, manifest: Manifest, modality: str) -> None:
    """Refuses inputs that changed under their id since they were encoded."""
    encoded = dict(zip(store.ids, store.input_digests, strict=True))
    if modality == "text":
        changed = changed_reports(manifest.reports().items(), encoded)
    else:
        images = zip(manifest.frame["id"], manifest.frame["image"], strict=True)
        changed = [i for i, image in images if i in encoded and not _same_image(manifest, image, encoded[i])]
    if changed:
        raise ManifestError(
            f"{store.path}: {len(changed)} {modality} inputs are not what was encoded under their id: "
            f"{some_ids(changed)}; give changed inputs new ids, or extract into another --store"
        )


def _same_image(manifest: Manifest, image: str, encoded: np.ndarray) -> bool:
    try:
        return input_digest(read_regular(manifest.path(image))) == encoded.tobytes()
    except InputError:
        return False


def _published_plan(
    catalogue: Catalogue, ids: Sequence[str], again: set[str], shard_rows: int, batch_size: int
) -> Catalogue:
    """The catalogue once every id asked for is planned, by this process or by another."""
    while True:
        plan = next_plan(catalogue, ids, again=again, shard_rows=shard_rows, batch_size=batch_size)
        if plan is None:
            return catalogue
        if publish_plan(catalogue.path, len(catalogue.plans), plan):
            return Catalogue.read(catalogue.path)
        catalogue = Catalogue.read(catalogue.path)


def _run_all(
    work: Sequence[PlannedShard],
    samples: Mapping[str, Job],
    encoder: Encoder,
    catalogue: Catalogue,
    claims: Claims,
    n_threads: int | None,
) -> None:
    """Encodes what nobody else has in hand, then what others dropped, until every shard counts."""
    if work and claims.claim(work[0].number) and not claims.keep_others_out:
        first = int.from_bytes(os.urandom(4), "big") % len(work)  # so that others are likely to begin elsewhere
        work = [*work[first:], *work[:first]]
    n_left, last_progress, slowest_s = len(work) + 1, time.monotonic(), 0.0
    while left := [shard for shard in work if not catalogue.has_shard(shard.number)]:
        now = time.monotonic()
        if len(left) < n_left:
            n_left, last_progress = len(left), now
        patient = now - last_progress < max(_PATIENCE_S, 3 * slowest_s)
        n_done = _run(left, samples, encoder, catalogue, claims if patient else None, n_threads)
        if n_done:
            slowest_s = max(slowest_s, (time.monotonic() - now) / n_done)
        else:
            time.sleep(_POLL_S)


def _run(
    work: Sequence[PlannedShard],
    samples: Mapping[str, Job],
    encoder: Encoder,
    catalogue: Catalogue,
    claims: Claims | None,
    n_threads: int | None,
) -> int:
    """Encodes those shards that nobody else has claimed, all of them without `claims`; gives their number."""
    unit = "image" if encoder.modality == "image" else "report"
    ahead = 3 * max(shard.batch_size for shard in work)
    claimed: deque[PlannedShard] = deque()

    def jobs() -> Iterator[Job]:
        for shard in work:
            # asked again under the claim: whoever held it before may have published the shard
            if (claims is None or claims.claim(shard.number)) and not catalogue.has_shard(shard.number):
                claimed.append(shard)
                yield from (samples[i] for i in shard.ids)

    stream = in_order(jobs(), n_threads=n_threads, ahead=ahead)
    encode = _encode_images if encoder.modality == "image" else _encode_texts
    unwritten: deque[Future[None]] = deque()
    n_done = n_failed = 0
    total = sum(len(shard.ids) for shard in work)
    progress: Progress | None = None
    with ThreadPoolExecutor(1) as writer, ExitStack() as shown:
        try:
            for first in stream:  # the first outcome of a shard: by then it stands in `claimed`
                shard = claimed.popleft()
                if progress is None:  # nothing is shown while others have everything in hand
                    progress = shown.enter_context(Progress(f"encoding into {catalogue.path}", total=total, unit=unit))
                embeddings, outcomes = encode(shard, chain([first], stream), encoder, progress)
                rows = _shard_rows(shard, embeddings, outcomes, catalogue.layout)
                if len(unwritten) == _UNWRITTEN_SHARDS:
                    unwritten.popleft().result()
                unwritten.append(writer.submit(_commit, shard.number, rows, catalogue))
                n_done += 1
                n_failed += len(rows.failures)
                progress.advance(0, f"{n_failed} failed" if n_failed else "")
            for future in unwritten:
                future.result()
        finally:
            stream.close()
    return n_done


def _encode_images(
    shard: PlannedShard, stream: Iterator[Prepared | InputError], encoder: Encoder, progress: Progress
) -> tuple[np.ndarray, list[bytes | InputError]]:
    """Embeddings (n, d) and each row's input digest, or why it has none; batches as they arrive."""
    embeddings = np.zeros((len(shard.ids), encoder.dim), np.float32)
    outcomes: list[bytes | InputError] = []
    for start in range(0, len(shard.ids), shard.batch_size):
        batch = [next(stream) for _ in shard.ids[start : start + shard.batch_size]]
        good = [p for p in batch if isinstance(p, Prepared)]
        if good:
            # a neighbour stands in for a failed row, so that the others' bits do not depend on the failure
            inputs = [p if isinstance(p, Prepared) else good[0] for p in batch]
            embeddings[start : start + len(batch)] = encoder.encode(inputs).embeddings
        outcomes += [p.digest if isinstance(p, Prepared) else p for p in batch]
        progress.advance(len(batch))
    return embeddings, outcomes


def _encode_texts(
    shard: PlannedShard, stream: Iterator[Prepared | InputError], encoder: Encoder, progress: Progress
) -> tuple[np.ndarray, list[bytes | InputError]]:
    """As `_encode_images`; each distinct text once, texts of like length together."""
    rows = [next(stream) for _ in shard.ids]
    distinct = {p.digest: p for p in rows if isinstance(p, Prepared)}
    by_length = sorted(distinct.values(), key=lambda p: (p.n_tokens, p.digest))
    embedded: dict[bytes, np.ndarray] = {}
    for start in range(0, len(by_length), shard.batch_size):
        batch = by_length[start : start + shard.batch_size]
        values = encoder.encode(batch).embeddings
        embedded.update(zip((p.digest for p in batch), values, strict=True))
    embeddings = np.zeros((len(rows), encoder.dim), np.float32)
    for k, p in enumerate(rows):
        if isinstance(p, Prepared):
            embeddings[k] = embedded[p.digest]
    progress.advance(len(rows))
    return embeddings, [p.digest if isinstance(p, Prepared) else p for p in rows]


def _shard_rows(
    shard: PlannedShard, embeddings: np.ndarray, outcomes: Sequence[bytes | InputError], store_layout: Layout
) -> ShardRows:
    """The rows that are fit to keep; every other id becomes a failure."""
    codes, scales = to_stored(embeddings, store_layout.dtype)
    finite = np.isfinite(embeddings).all(axis=1)
    stored = from_stored(codes, store_layout.dtype, scales)
    stored_finite, stored_zero = np.isfinite(stored).all(axis=1), (stored == 0).all(axis=1)
    constant = embeddings.min(axis=1) == embeddings.max(axis=1)
    kept, digests, failures = [], [], []
    for k, (sample_id, outcome) in enumerate(zip(shard.ids, outcomes, strict=True)):
        if isinstance(outcome, InputError):
            failures.append(Failure(sample_id, outcome.reason, str(outcome)))
        elif not finite[k]:
            failures.append(Failure(sample_id, "not-finite", "the encoder gave NaN or infinity"))
        elif not stored_finite[k]:
            failures.append(Failure(sample_id, "overflow", f"the embedding overflows {store_layout.dtype}"))
        elif constant[k] and store_layout.dim > 1:
            failures.append(Failure(sample_id, "constant", "the encoder gave the same number throughout"))
        elif stored_zero[k]:
            failures.append(
                Failure(sample_id, "zero", f"every number of the embedding is zero as {store_layout.dtype}")
            )
        else:
            kept.append(k)
            digests.append(outcome)
    return ShardRows(
        ids=[shard.ids[k] for k in kept],
        views=np.zeros(len(kept), np.uint16),
        codes=codes[kept],
        input_digests=np.frombuffer(b"".join(digests), np.uint8),
        failures=failures,
        scales=None if scales is None else scales[kept],
    )


def _commit(number: int, rows: ShardRows, catalogue: Catalogue) -> None:
    if catalogue.has_shard(number):
        return  # another extractor was faster
    image = ShardImage(rows, catalogue.document)
    commit.publish_shard(catalogue.path, number, image, image.facts)


def _account(store: Store, ids: Sequence[str], present: set[str], seconds: float) -> ExtractReport:
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
        seconds=seconds,
    )
