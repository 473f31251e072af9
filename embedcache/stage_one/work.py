"""Until every shard counts: what is free is encoded, what other extractors have in hand is waited for."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from embedcache.encoders.base import Encoder, device_of
from embedcache.progress import Progress
from embedcache.stage_one.engine import hand_out
from embedcache.stage_one.phases import Phases, pace
from embedcache.stage_one.pipeline import Pipeline, ShardDone
from embedcache.stage_one.samples import Samples
from embedcache.store import commit, layout
from embedcache.store.catalogue import Catalogue, PlannedShard
from embedcache.store.claims import Claims
from embedcache.workers.chosen import Workers

_POLL_S = 0.2  # between looks at shards that other extractors have in hand
_LOOK_EVERY_S = 0.5  # at what workers published
_PATIENCE_S = 60.0  # at least, and three times what a shard takes here: so long may others' shards make no progress


def run_all(
    work: Sequence[PlannedShard], samples: Samples, encoder: Encoder, catalogue: Catalogue, workers: Workers
) -> tuple[list[ShardDone], Phases]:
    """Encodes what nobody else has in hand, then what others dropped, until every shard counts."""
    done: list[ShardDone] = []
    phases, started = Phases(), time.monotonic()
    patience = _Patience()
    with Claims(catalogue.path) as claims:
        if work and claims.claim(work[0].number) and not claims.keep_others_out:
            first = int.from_bytes(os.urandom(4), "big") % len(work)  # so that others are likely to begin elsewhere
            work = [*work[first:], *work[:first]]
        while left := [shard for shard in work if not catalogue.has_shard(shard.number)]:
            polite = patience.lasts(len(left))
            free = [shard for shard in left if claims.is_free(shard.number)] if polite else left[:1]
            if not free:
                time.sleep(_POLL_S)
                continue
            total = sum(len(shard.ids) for shard in left)
            unit = "image" if samples.modality == "image" else "report"
            with Progress(f"encoding into {catalogue.path}", total=total, unit=unit) as progress:
                if workers.are_here(device_of(encoder)):
                    with Pipeline(
                        samples, encoder, catalogue, n_threads=workers.n_threads, on_ids=progress.advance
                    ) as pipeline:
                        newly = pipeline.run(free, claims if polite else None)
                        phases += pipeline.clock.read()
                else:
                    newly = []
                    with _Watch(catalogue, left, progress) as watch:
                        for delivery in hand_out(workers, samples, encoder, catalogue, free, polite=polite):
                            newly += delivery.done
                            phases += delivery.phases
                            watch.waited = phases.waited
                            warn_of_mixing(catalogue, delivery.notes)
                    commit.sweep(catalogue.path)  # what workers that died left behind
            done += newly
            patience.shard_s = phases.worker_s / max(len(done), 1)
    return done, replace(phases, run_s=time.monotonic() - started)


def warn_of_mixing(catalogue: Catalogue, now: Mapping[str, Any]) -> None:
    """Versions and device kind are recorded, not keyed: rows made with others may differ in their last bits."""
    then = catalogue.document["encoder"].get("notes", {})
    changed = [f"{name} {then[name]} -> {now[name]}" for name in now if then.get(name, now[name]) != now[name]]
    if changed:
        warnings.warn(
            f"{catalogue.path}: begun with other versions or another device ({', '.join(changed)}); new rows may "
            "differ from old ones in their last bits",
            stacklevel=3,
        )


class _Patience:
    """How long others' shards may make no progress before they are done here too.

    Attributes:
        shard_s: what a shard took here.
    """

    def __init__(self) -> None:
        self.shard_s = 0.0
        self._n_left, self._last_progress = -1, 0.0

    def lasts(self, n_left: int) -> bool:
        now = time.monotonic()
        if n_left != self._n_left:
            self._n_left, self._last_progress = n_left, now
        return now - self._last_progress < max(_PATIENCE_S, 3 * self.shard_s)


class _Watch:
    """Tells of shards as they come to count, whoever publishes them. A context manager.

    Attributes:
        waited: share of the time in which the workers' encoders had nothing to do, as far as they have told.
    """

    def __init__(self, catalogue: Catalogue, shards: Sequence[PlannedShard], progress: Progress) -> None:
        self._catalogue, self._left, self._progress = catalogue, list(shards), progress
        self._n_failed = 0
        self.waited: float | None = None
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def _look(self) -> None:
        published = [shard for shard in self._left if self._catalogue.has_shard(shard.number)]
        self._left = [shard for shard in self._left if shard not in published]
        for shard in published:
            document = commit.read_document(self._catalogue.path / layout.shard_doc_name(shard.number))
            self._n_failed += document["n_failed"]
        if published:
            self._progress.advance(sum(len(s.ids) for s in published), pace(self.waited, self._n_failed))

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_EVERY_S):
            self._look()

    def __enter__(self) -> _Watch:
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watcher.join()
        self._look()
