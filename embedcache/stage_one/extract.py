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
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.data.manifest import Manifest
from embedcache.data.radiograph import read_regular
from embedcache.data.reports import ReportPolicy, changed_reports, text_units
from embedcache.encoders.base import Encoder, Prepared
from embedcache.errors import EmbedCacheError, InputError, ManifestError, some_ids
from embedcache.fingerprint import input_digest
from embedcache.progress import Progress
from embedcache.stage_one.plan import next_plan, work_for
from embedcache.stage_one.prepare import Job, in_order
from embedcache.stage_one.rows import Outcome, RowsInMaking, layout_for, rows_in_a_shard
from embedcache.store import commit, layout
from embedcache.store.catalogue import Catalogue, PlannedShard, open_or_create, publish_plan
from embedcache.store.claims import Claims
from embedcache.store.shard import Failure, ShardImage, ShardRows
from embedcache.store.store import Store, open_store

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
        truncated: how many tokens did not fit into the encoder's `max_length`, of each text that this call encoded.
        seconds: wall time of the call.
    """

    store: Path
    n_asked: int
    n_embedded: int
    n_failed: int
    n_present: int
    failures: list[Failure]
    truncated: dict[str, int]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "store": str(self.store)}


def extract(
    manifest: Manifest,
    encoder: Encoder,
    store_dir: str | Path,
    *,
    tokens: bool = False,
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
        tokens: store the tokens beside the embeddings: the cells of the encoder's token grid, or those of each text.
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
    texts = _texts(manifest, encoder)
    samples = _samples(manifest, encoder, texts)
    document = layout.store_document(
        encoder=encoder.record.to_json(),
        encoder_fingerprint=encoder.fingerprint,
        modality=encoder.modality,
        store_layout=layout_for(encoder, store_dtype=store_dtype, tokens=tokens),
    )
    catalogue = open_or_create(path, document)
    commit.sweep(path)
    _warn_of_mixing(catalogue, encoder)
    before = open_store(path)
    present = set(before.ids)
    if encoder.modality == "text" or check_inputs:
        _check_inputs(before, manifest, texts)
    again = {f.id for f in before.failures} & set(samples) if retry_failed else set()
    shard_rows = min(shard_rows, rows_in_a_shard(encoder, catalogue.layout))
    catalogue = _published_plan(catalogue, list(samples), again, shard_rows, batch_size)
    truncated: dict[str, int] = {}
    with Claims(path) as claims:
        _run_all(work_for(catalogue, samples), samples, encoder, catalogue, claims, n_threads, truncated)
    after = open_store(path)
    if texts:
        _check_inputs(after, manifest, texts)  # another extractor may have had other texts under these ids
    return _account(after, list(samples), present, truncated, time.monotonic() - started)


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


def _texts(manifest: Manifest, encoder: Encoder) -> dict[str, str]:
    """What a text encoder is given, by the id of its row: whole reports, or their sentences; nothing for images."""
    if encoder.modality == "image":
        return {}
    return text_units(manifest.reports(), getattr(encoder, "report_policy", ReportPolicy(unit="report")))


def _samples(manifest: Manifest, encoder: Encoder, texts: Mapping[str, str]) -> Mapping[str, Job]:
    """How to prepare each id: one for each image, or one for each distinct report id or sentence."""
    if encoder.modality == "text":
        return {i: _text_job(encoder, text) for i, text in texts.items()}
    return {
        i: _image_job(encoder, manifest, image)
        for i, image in zip(manifest.frame["id"], manifest.frame["image"], strict=True)
    }


def _text_job(encoder: Encoder, text: str) -> Job:
    return lambda: encoder.prepare(text)


def _image_job(encoder: Encoder, manifest: Manifest, image: str) -> Job:
    return lambda: encoder.prepare(manifest.path(image))


def _check_inputs(store: Store, manifest: Manifest, texts: Mapping[str, str]) -> None:
    """Refuses inputs that changed under their id since they were encoded."""
    encoded = dict(zip(store.ids, store.input_digests, strict=True))
    if texts:
        changed = changed_reports(texts.items(), encoded)
    else:
        images = zip(manifest.frame["id"], manifest.frame["image"], strict=True)
        changed = [i for i, image in images if i in encoded and not _same_image(manifest, image, encoded[i])]
    if changed:
        raise ManifestError(
            f"{store.path}: {len(changed)} {'text' if texts else 'image'} inputs are not what was encoded under their "
            f"id: {some_ids(changed)}; give changed inputs new ids, or extract into another --store"
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
    truncated: dict[str, int],
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
        n_done = _run(left, samples, encoder, catalogue, claims if patient else None, n_threads, truncated)
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
    truncated: dict[str, int],
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
    encode = _encode_images if unit == "image" else _encode_texts
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
                making = RowsInMaking(shard.ids, catalogue.layout)
                outcomes = encode(shard, chain([first], stream), encoder, making, progress)
                of_texts = {i: o for i, o in zip(shard.ids, outcomes, strict=True) if isinstance(o, Prepared)}
                truncated |= {i: text.n_truncated for i, text in of_texts.items() if text.n_truncated}
                rows = making.finish([o.digest if isinstance(o, Prepared) else o for o in outcomes])
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
    shard: PlannedShard, stream: Iterator[Outcome], encoder: Encoder, making: RowsInMaking, progress: Progress
) -> list[Outcome]:
    """Encodes batches as they arrive; gives what became of each row's input, its pixels left out."""
    outcomes: list[Outcome] = []
    for start in range(0, len(shard.ids), shard.batch_size):
        batch = [next(stream) for _ in shard.ids[start : start + shard.batch_size]]
        good = [p for p in batch if isinstance(p, Prepared)]
        if good:
            # a neighbour stands in for a failed row, so that the others' bits do not depend on the failure
            inputs = [p if isinstance(p, Prepared) else good[0] for p in batch]
            encoded = encoder.encode(inputs, tokens=making.wants_tokens)
            making.put(encoded, [[start + k] for k in range(len(batch))])
        outcomes += [replace(p, inputs=None) if isinstance(p, Prepared) else p for p in batch]
        progress.advance(len(batch))
    return outcomes


def _encode_texts(
    shard: PlannedShard, stream: Iterator[Outcome], encoder: Encoder, making: RowsInMaking, progress: Progress
) -> list[Outcome]:
    """As `_encode_images`; each distinct text once, texts of like length together."""
    outcomes = [next(stream) for _ in shard.ids]
    rows: dict[bytes, list[int]] = {}
    distinct: dict[bytes, Prepared] = {}
    for k, p in enumerate(outcomes):
        if isinstance(p, Prepared):
            rows.setdefault(p.digest, []).append(k)
            distinct[p.digest] = p
    by_length = sorted(distinct.values(), key=lambda p: (p.n_tokens, p.digest))
    for start in range(0, len(by_length), shard.batch_size):
        batch = by_length[start : start + shard.batch_size]
        making.put(encoder.encode(batch, tokens=making.wants_tokens), [rows[p.digest] for p in batch])
    progress.advance(len(outcomes))
    return outcomes


def _commit(number: int, rows: ShardRows, catalogue: Catalogue) -> None:
    if catalogue.has_shard(number):
        return  # another extractor was faster
    image = ShardImage(rows, catalogue.document)
    commit.publish_shard(catalogue.path, number, image, image.facts)


def _account(
    store: Store, ids: Sequence[str], present: set[str], truncated: dict[str, int], seconds: float
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
        seconds=seconds,
    )
