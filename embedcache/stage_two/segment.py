"""Segmentation from cached tokens: what masks a decoder makes of them, beside the controls that say why.

Shape notation: n samples (images with tokens and a mask), v views, b samples of a batch, H and W pixels of a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path

import numpy as np
import torch

from embedcache.data.frames import frame_steps, places_alike
from embedcache.data.manifest import SPLITS, Manifest
from embedcache.data.splits import label_subset
from embedcache.device import full_precision, pick_device, release_memory
from embedcache.errors import ManifestError, SettingsError
from embedcache.metrics.intervals import PatientDraws
from embedcache.metrics.masks import Overlap
from embedcache.progress import Progress
from embedcache.stage_two.adaptor import Adaptor, adaptor_digest, read_adaptors
from embedcache.stage_two.decoder_fit import DecoderFit, overlap_with
from embedcache.stage_two.decoders import make_decoder
from embedcache.stage_two.kept import KeptDecoder, Source
from embedcache.stage_two.leaks import leak_words
from embedcache.stage_two.mask_targets import has_mask, read_targets
from embedcache.stage_two.score_rows import Row
from embedcache.stage_two.segment_config import SegmentConfig
from embedcache.stage_two.segment_tables import Judged, MaskTables, SegmentResult
from embedcache.stage_two.tensors import join, opened
from embedcache.stage_two.token_feed import TokenFeed, token_grid
from embedcache.store.store import Store

_LEAST_POSITIVES = 5  # of validation: fewer choose no epoch
_LEVELS = np.linspace(0.05, 0.95, 19)


def segment(
    manifest: Manifest,
    image_store: Store | str | Path,
    *,
    run_dir: str | Path | None = None,
    random_store: Store | str | Path | None = None,
    config: SegmentConfig | None = None,
) -> SegmentResult:
    """Fits decoders on the training split's tokens and scores their masks on the test split.

    Masks are learnt and scored in the frame that the encoder saw. The epoch is chosen on validation masks, never on
    test masks.

    Args:
        run_dir: a run of `train`: its Adaptor is applied to the tokens of each image; without it the tokens are taken
            as they are.
        random_store: of the same images through an encoder of random weights, for the control `random-encoder`.

    Raises:
        ManifestError: no masks, masks that cannot be read, or a split without any.
        SettingsError: a store without tokens, or a transform under which no mask can be placed.
        FingerprintMismatchError: the Adaptor is of another encoder.
    """
    with full_precision:
        work = _Segmentation(manifest, opened(image_store), run_dir, config or SegmentConfig())
        if random_store is not None:
            work.add_random(opened(random_store))
        return work.result()


@dataclass(frozen=True, eq=False)
class _Budget:
    """Samples of one run: masks to learn from, and masks to choose the epoch by."""

    fraction: float
    seed: int
    rows: np.ndarray
    valid: np.ndarray


class _Segmentation:
    """One call of `segment`."""

    def __init__(self, manifest: Manifest, store: Store, run_dir: str | Path | None, config: SegmentConfig) -> None:
        self.config, self.manifest, self.store = config, manifest, store
        self.device = pick_device(config.device)
        self._check_decoders(store)
        self.adaptors = [] if run_dir is None else read_adaptors(run_dir)
        for adaptor in self.adaptors:
            adaptor.check_encoder(store, run_dir)
            if adaptor.config["attention"] == "cross-modal":
                raise SettingsError(
                    f"{run_dir}: its Adaptor has cross-modal attention, and an image alone has no text to attend to; "
                    "train one with attention 'self'"
                )
        self.random_store: Store | None = None
        joined = join(manifest, store)
        known = has_mask(manifest)[joined.rows]
        self.rows = joined.rows[known]
        split = {name: np.flatnonzero(manifest.in_split(name)[self.rows]) for name in SPLITS}
        for name in ("train", "test"):
            if not len(split[name]):
                raise ManifestError(
                    f"{manifest.name}: no image of split {name!r} has tokens and a mask; a decoder learns from the "
                    "split 'train' and is scored on 'test'"
                )
        self.train, self.valid, self.test = (split[name] for name in SPLITS)
        self.ids = manifest.frame["id"].to_numpy()[self.rows]
        n_views = int(store.views.max()) + 1 if config.views == "all" and len(store) else 1
        self.targets = read_targets(manifest, self.rows, store, (config.size, config.size), n_views=n_views)
        self.tables = MaskTables(
            manifest.frame.iloc[self.rows[self.test]].reset_index(drop=True),
            PatientDraws(manifest.groups()[self.rows[self.test]], config.n_draws, seed=0),
        )
        self.n_failed, self.kept = joined.n_failed, dict[str, KeptDecoder]()
        self.warning = leak_words(manifest, store, run_dir, self.ids[self.test])
        for note in joined.notes(manifest.name):
            self.tables.note(note)
        if not known.all():
            self.tables.note(f"{manifest.name}: {int((~known).sum())} images left out, as their mask is not known")
        if self.adaptors and self.adaptors[0].encoders["image"].get("features") != "tokens":
            self.tables.note(
                "the Adaptor was trained on embeddings, as the paper's: of its attention over tokens, queries and keys "
                "are as they were drawn"
            )
        if self.targets.lost.any():
            self.tables.note(
                f"{manifest.name}: {int(self.targets.lost.sum())} masks ({int(self.targets.lost[self.test].sum())} of "
                "them on test) lie outside what the encoder saw, or are smaller than half a pixel, and count as empty"
            )
        if config.views == "all" and n_views == 1:
            self.tables.note(f"{store.path}: holds one view of each image, so that none is augmented")
        if not (self.targets.areas[self.test, 0] > 0).any():
            self.tables.note(f"{manifest.name}: no test image has a mask, so that nothing is known of positives")

    def add_random(self, store: Store) -> None:
        """A store of the same images, for the control `random-encoder`."""
        if not places_alike(frame_steps(store.encoder), frame_steps(self.store.encoder)):
            raise ManifestError(
                f"{store.path}: its encoder crops images otherwise than that of {self.store.path}, so that masks do "
                "not lie alike; extract both under one transform"
            )
        self._check_decoders(store)
        self._rows_of(store)
        self.random_store = store

    def result(self) -> SegmentResult:
        """Fits and scores everything."""
        config, settings = self.config, self._settings()
        budgets = [[self._budget(f, seed) for seed in range(config.n_seeds)] for f in config.fractions]
        n_runs = len(settings) * len(config.decoders) * len(config.fractions) * config.n_seeds
        with Progress("segmenting", total=n_runs, unit="run") as progress:
            for control, feeds in settings:
                overlaps: dict[tuple[str, float, int], Overlap] = {}
                for turn, make_feed in enumerate(feeds[: config.n_seeds]):
                    feed = make_feed()
                    for decoder, runs in product(config.decoders, budgets):
                        for budget in runs[turn :: len(feeds)]:
                            key = decoder, budget.fraction, budget.seed
                            overlaps[key] = self._run(control, feed, decoder, budget)
                            progress.advance()
                    del feed  # the maps of the next one need its room
                    release_memory(self.device)
                for decoder, runs in product(config.decoders, budgets):
                    of_runs = [overlaps[decoder, budget.fraction, budget.seed] for budget in runs]
                    self._judge(control, decoder, runs, of_runs, len(feeds))
        if "mean-mask" in config.controls:
            for runs in budgets:
                of_runs = [self._mean_mask(budget) for budget in runs]
                for decoder in config.decoders:
                    self._judge("mean-mask", decoder, runs, of_runs, 0)
        return self.tables.result(n_failed=self.n_failed, warning=self.warning, kept=self.kept)

    def _check_decoders(self, store: Store) -> None:
        """Whether a store's tokens suit the decoders, before anything long begins."""
        with torch.device("meta"):
            for decoder in self.config.decoders:
                make_decoder(decoder, 1, token_grid(store), (self.config.size, self.config.size))

    def _settings(self) -> list[tuple[str, list[Callable[[], TokenFeed]]]]:
        """The result, then each control that is asked for and whose needs are met.

        Each has a feed for all runs, or one for each Adaptor, on which runs learn in turn; made in its turn.
        """
        adaptors, asked = self.adaptors, self.config.controls
        raw: Callable[[], TokenFeed] = partial(self._feed, self.store, None)
        found: list[tuple[str, list[Callable[[], TokenFeed]]]]
        found = [("", [partial(self._feed, self.store, adaptor) for adaptor in adaptors] or [raw])]
        if adaptors and "no-adaptor" in asked:
            found.append(("no-adaptor", [raw]))
        if adaptors and "untrained-adaptor" in asked:
            drawn = [adaptor.untrained(k) for k, adaptor in enumerate(adaptors)]
            found.append(("untrained-adaptor", [partial(self._feed, self.store, adaptor) for adaptor in drawn]))
        if self.random_store is not None and "random-encoder" in asked:
            found.append(("random-encoder", [partial(self._feed, self.random_store, None)]))
        return found

    def _feed(self, store: Store, adaptor: Adaptor | None) -> TokenFeed:
        """Feature maps of all samples, in the views that masks are there for."""
        return TokenFeed(store, self._rows_of(store), adaptor, self.device, data=self.config.data)

    def _rows_of(self, store: Store) -> np.ndarray:
        """Rows of all samples in each view, (n, v)."""
        ids = self.ids.tolist()
        return np.stack([store.rows(ids, view) for view in range(self.targets.place.shape[1])], axis=1)

    def _budget(self, fraction: float, seed: int) -> _Budget:
        positive = (self.targets.areas[:, 0] > 0).astype(np.float64)
        if self.config.subsets == "manifest":
            chosen = self.manifest.in_fraction(fraction)[self.rows[self.train]]
            rows = self.train[chosen]
        else:
            rows = self.train[label_subset(positive[self.train], fraction, seed=seed)]
        if not len(rows):
            raise ManifestError(
                f"{self.manifest.name}: its column 'fraction' gives no training mask to {fraction:g} of the masks; "
                "use subsets 'drawn'"
            )
        valid = self.valid
        if self.config.valid_labels == "matched" and len(valid):
            valid = valid[label_subset(positive[valid], fraction, seed=seed, min_per_class=0)]
        enough = positive[valid].sum() >= _LEAST_POSITIVES
        return _Budget(fraction, seed, rows, valid if enough else valid[:0])

    def _run(self, control: str, feed: TokenFeed, decoder: str, budget: _Budget) -> Overlap:
        fit = DecoderFit(decoder, feed, self.targets, self.config, seed=budget.seed)
        fit.train(budget.rows, budget.valid)
        if not control and budget.seed == 0 and budget.fraction == max(self.config.fractions):
            self.kept[decoder] = fit.kept(self._source)
        return fit.overlap(self.test)

    @cached_property
    def _source(self) -> Source:
        return Source.of(self.store, adaptor_digest(self.adaptors[0] if self.adaptors else None))

    def _mean_mask(self, budget: _Budget) -> Overlap:
        """One mask for every image: the mean of the training masks that are not empty, where it exceeds the level that
        is best on these. What a place alone is worth; an empty mask's worth stands beside it anyway.
        """
        positive = budget.rows[self.targets.areas[budget.rows, 0] > 0]
        if not len(positive):
            return overlap_with(np.zeros((1, *self.targets.size), bool), self.targets, self.test)
        candidates = self.targets.mean(positive) > _LEVELS[:, None, None]
        best = int(overlap_with(candidates, self.targets, positive).dice.mean(axis=1).argmax())
        return overlap_with(candidates[best : best + 1], self.targets, self.test)

    def _judge(self, control: str, decoder: str, runs: list[_Budget], overlaps: list[Overlap], n_turns: int) -> None:
        positive = self.targets.areas[:, 0] > 0
        counts: Row = {
            "n_train": max(len(b.rows) for b in runs),
            "n_train_positive": max(int(positive[b.rows].sum()) for b in runs),
            "n_valid": max(len(b.valid) for b in runs),
            "n_test": len(self.test),
            "n_positive": int(positive[self.test].sum()),
            "n_seeds": len(runs),
            "choice": "valid" if all(len(b.valid) for b in runs) else "fixed",
        }
        together = Overlap(
            np.concatenate([o.both for o in overlaps]),
            np.concatenate([o.predicted for o in overlaps]),
            overlaps[0].true,
        )
        names: Row = {"control": control, "decoder": decoder, "fraction": runs[0].fraction}
        self.tables.add(Judged(names, counts, [b.seed for b in runs], together, n_turns))
