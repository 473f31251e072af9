"""Retrieval through an Adaptor: image to report and back, over distinct texts, beside chance.

Shape notation: n pairs of the split, m distinct texts, p width of the shared space, q queries of a direction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from embedcache.data.manifest import Manifest
from embedcache.device import full_precision, pick_device
from embedcache.errors import ManifestError, SettingsError, TrainingError, some_ids
from embedcache.metrics.intervals import PatientDraws, Sampled, bootstrap, over_patients_and_seeds
from embedcache.metrics.retrieval import (
    chance_recall_at,
    mean_of,
    precision_at,
    ranks_in_one_order,
    recall_at,
    weighted_medians,
)
from embedcache.output import write_tables
from embedcache.stage_two.adaptor import Adaptor, read_adaptors
from embedcache.stage_two.alignment import embed_pairs, unfit_pairs
from embedcache.stage_two.config import TrainConfig
from embedcache.stage_two.feed import Feed, fits
from embedcache.stage_two.leaks import leak_words
from embedcache.stage_two.pairs import pairs_of_split
from embedcache.stage_two.ranks import Found, FoundPairs, find_pairs, find_scored_pairs
from embedcache.stage_two.retrieve_config import RetrieveConfig
from embedcache.stage_two.sentence_scores import sentence_scores
from embedcache.stage_two.targets import Target
from embedcache.stage_two.tensors import join, opened
from embedcache.store.store import Store

_KEPT = 10  # best matches that are written down for each query


@dataclass(frozen=True, eq=False)
class RetrievalResult:
    """What queries found. Every interval holds 95% over patients and over the run's seeds.

    Args:
        scores: a row per control (`""` is the result; `untrained-adaptor`; `by-sentences` is the result with texts
            scored sentence by sentence), direction (`image_to_report`,
            `report_to_image`), metric (`recall@k`; `median_rank` of the first match, from 1; `precision@k` of a label:
            the share of the best k that have it, over queries that have it) and `label`: `value`, `low`, `high`,
            `chance` (of a random order), `one_order` (of the best order that is the same for every query, such as
            the commonest text first; undefined for precision), `n_queries`, `n_candidates`.
        matches: of the result, a row per query and rank up to 10: `direction`, `query`, `rank`, `match`,
            `is_own`, and `first_own`, the rank of its own first match. Texts go by the id of their first report.
        first_own: of each of the run's Adaptors, a row per query: `seed` (from 0), `direction`, `query`, `first_own`.
        warning: one line where the manifest's splits share patients or files; blank where they do not.
        notes: what is to be known of these scores.
    """

    scores: pd.DataFrame
    matches: pd.DataFrame
    first_own: pd.DataFrame
    warning: str
    notes: tuple[str, ...] = ()

    def write(self, folder: str | Path) -> None:
        """Writes `scores.csv`, `matches.parquet` and `first_own.parquet`.

        Raises:
            OutputError: they cannot be written there.
        """
        tables = {"scores.csv": self.scores, "matches.parquet": self.matches, "first_own.parquet": self.first_own}
        write_tables(Path(folder), tables)


def retrieve(
    manifest: Manifest,
    image_store: Store | str | Path,
    text_store: Store | str | Path,
    run_dir: str | Path,
    *,
    sentence_store: Store | str | Path | None = None,
    labels: Sequence[str] = (),
    config: RetrieveConfig | None = None,
) -> RetrievalResult:
    """Ranks distinct texts for each image, and images for each distinct text, by cosine in the shared space.

    Args:
        run_dir: a run of `train`.
        sentence_store: the sentences of the same reports through the same encoder: texts are scored by them too, each
            sentence by the token of the image that is most like it; needs a store of images with tokens.
        labels: binary ones, or sets of them, whose precision is wanted.

    Raises:
        ManifestError: fewer than two pairs in the split, or no such label.
        FingerprintMismatchError: the Adaptor is of other encoders.
        SettingsError: an Adaptor in which each image attends to its own report, so that pairs give themselves away.
    """
    config = config or RetrieveConfig()
    images, texts, device = opened(image_store), opened(text_store), pick_device(config.device)
    adaptors = read_adaptors(run_dir)
    for each, store in product(adaptors, (images, texts)):
        each.check_encoder(store, run_dir)
    adaptor = adaptors[0]
    if adaptor.config["attention"] == "cross-modal":
        raise SettingsError(
            f"{run_dir}: its Adaptor has cross-modal attention, in which an image's vector depends on its own report: "
            "each would find itself; train one with attention 'self'"
        )
    joined = join(manifest, images, texts)
    features = {modality: encoder.get("features", "embeddings") for modality, encoder in adaptor.encoders.items()}
    of_pairs = TrainConfig(image=features["image"], text=features["text"])  # type: ignore[arg-type]  # as it was trained
    pairs = pairs_of_split(manifest, images, texts, joined, config.split, of_pairs)
    if len(np.unique(pairs.texts)) < 2:
        raise ManifestError(
            f"{manifest.name}: {len(pairs)} pairs with {len(np.unique(pairs.texts))} distinct texts in split "
            f"{config.split!r}, expected at least two texts to choose from"
        )
    rows = joined.rows[manifest.in_split(config.split)[joined.rows]]
    groups, targets = manifest.groups()[rows], [Target.of(manifest, label) for label in labels]
    values = {
        name: column
        for target in targets
        for name, column in zip(target.classes, target.one_vs_rest(target.values(manifest)[rows]).T, strict=True)
    }
    if len(values) < sum(len(target.classes) for target in targets):
        raise SettingsError(f"labels {', '.join(labels)}: one stands there twice, or in two sets; name each once")
    kept = max((_KEPT, *config.at)) if labels else _KEPT
    with full_precision:
        feed = Feed(pairs, device, resident=fits([pairs], device))
        settings = {"": adaptors}
        if config.controls:
            settings["untrained-adaptor"] = [each.untrained(seed) for seed, each in enumerate(adaptors)]
        runs = {name: [_found(each.to(device), feed, kept) for each in made] for name, made in settings.items()}
        report_ids, first = manifest.frame["report_id"].to_numpy()[rows], runs[""][0].first
        if sentence_store is not None:
            sentences, image_rows = opened(sentence_store), pairs.image.rows[pairs.image.index[:, 0]]
            told = report_ids[first].tolist()
            runs["by-sentences"] = [
                find_scored_pairs(
                    sentence_scores(each.eval(), images, image_rows, manifest, texts, sentences, told),
                    pairs.texts,
                    k=kept,
                )
                for each in adaptors
            ]
        tables = [_Scoring(found, groups, values, config).table(name) for name, found in runs.items()]
        matches = _matches(runs[""][0], pairs.ids, report_ids[first])
        first_own = [_first_own(found, seed, pairs.ids, report_ids[first]) for seed, found in enumerate(runs[""])]
    notes = [f"{manifest.name}: {joined.n_failed} pairs of all splits left out, as stage one could not read them"]
    return RetrievalResult(
        pd.concat(tables, ignore_index=True),
        matches,
        pd.concat(first_own, ignore_index=True),
        leak_words(manifest, images, run_dir, pairs.ids if config.split == "test" else ()),
        tuple(notes if joined.n_failed else ()),
    )


@torch.inference_mode()
def _found(adaptor: Adaptor, feed: Feed, kept: int) -> FoundPairs:
    """What an Adaptor's images and texts find of each other.

    Args:
        kept: best matches of each query.

    Raises:
        TrainingError: vectors that are not finite; names their images.
    """
    image, text = embed_pairs(adaptor, feed)
    bad = unfit_pairs(image, text)
    if bad.any():
        raise TrainingError(
            f"the Adaptor gives pairs vectors that are not finite: {some_ids(feed.pairs.ids[bad])}; train it again "
            "with a lower lr, or check the stores with 'embedcache verify'"
        )
    return find_pairs(image, text, feed.pairs.texts, k=kept)


class _Scoring:
    """Scores of what was found in the space of each seed."""

    def __init__(
        self, runs: Sequence[FoundPairs], groups: np.ndarray, values: dict[str, np.ndarray], config: RetrieveConfig
    ) -> None:
        first = runs[0]
        self._text_of, self._values, self._config = first.text_of, values, config
        counts, ones = np.bincount(first.text_of), np.ones(len(groups), np.int64)
        self._directions = {
            "image_to_report": ([found.to_text for found in runs], ones, counts, groups),
            "report_to_image": ([found.to_image for found in runs], counts, ones, groups[first.first]),
        }

    def table(self, control: str) -> pd.DataFrame:
        """Rows of `RetrievalResult.scores`."""
        rows: list[dict[str, object]] = []
        for direction, (runs, n_matches, n_asking, groups) in self._directions.items():
            draws, n_candidates = PatientDraws(groups, self._config.n_draws, seed=0), len(n_asking)
            of_runs = [self._scores(direction, found, n_matches, n_asking, draws) for found in runs]
            for same in zip(*of_runs, strict=True):  # a metric of each run
                names = {"control": control, "direction": direction, **same[0][0]}
                interval = over_patients_and_seeds(Sampled.of_runs([sampled for _, sampled in same]), seed=0)
                bounds = (1, n_candidates) if names["metric"] == "median_rank" else (0, 1)
                rows.append(names | asdict(interval.within(*bounds)) | {"n_candidates": n_candidates})
        return pd.DataFrame(rows)

    def _scores(
        self, direction: str, found: Found, n_matches: np.ndarray, n_asking: np.ndarray, draws: PatientDraws
    ) -> Iterator[tuple[dict[str, object], Sampled]]:
        """Each metric, with what chance gives, and its values.

        Args:
            n_matches: candidates that match each query, (q,).
            n_asking: queries that each candidate matches, (candidates,).
        """
        n_candidates, n_queries = len(n_asking), len(found.ranks)
        # of images that share a text only the first serves its query
        in_one_order = ranks_in_one_order(n_asking if direction == "image_to_report" else np.ones(n_queries, np.int64))
        for k in self._config.at:
            hits = bootstrap(mean_of((found.ranks <= k).astype(np.float64)), draws)
            chance, fixed = chance_recall_at(n_matches, n_candidates, k), recall_at(in_one_order, k)
            yield _named(f"recall@{k}", "", chance, fixed, n_queries), hits
        median = bootstrap(lambda weights: weighted_medians(found.ranks, weights), draws)
        chance = (n_candidates + 1) / 2 if (n_matches == 1).all() else math.nan
        yield _named("median_rank", "", chance, float(np.median(in_one_order)), n_queries), median
        for label, of_images in self._values.items():
            of_texts = pd.Series(of_images).groupby(self._text_of).mean().to_numpy()
            queries, candidates = (of_images, of_texts) if direction == "image_to_report" else (of_texts, of_images)
            asking = queries == 1
            if not asking.any() or np.isnan(candidates).all():
                continue
            for k in self._config.at:
                if k > found.top.shape[1]:
                    continue
                precision = np.where(asking, precision_at(candidates, found.top[:, :k]), np.nan)
                chance = float(np.nanmean(candidates))
                named = _named(f"precision@{k}", label, chance, math.nan, int(asking.sum()))
                yield named, bootstrap(mean_of(precision), draws)


def _named(metric: str, label: str, chance: float, one_order: float, n_queries: int) -> dict[str, object]:
    return {"metric": metric, "label": label, "chance": chance, "one_order": one_order, "n_queries": n_queries}


def _first_own(pairs: FoundPairs, seed: int, images: np.ndarray, texts: np.ndarray) -> pd.DataFrame:
    """Rows of `RetrievalResult.first_own`; see `_matches`."""
    parts = [
        pd.DataFrame({"seed": seed, "direction": direction, "query": queries, "first_own": found.ranks})
        for direction, found, queries in (
            ("image_to_report", pairs.to_text, images),
            ("report_to_image", pairs.to_image, texts),
        )
    ]
    return pd.concat(parts, ignore_index=True)


def _matches(pairs: FoundPairs, images: np.ndarray, texts: np.ndarray) -> pd.DataFrame:
    """Rows of `RetrievalResult.matches`.

    Args:
        images: ids, (n,).
        texts: ids, (m,).
    """
    numbers = np.arange(len(texts))
    parts = []
    for direction, found, queries, candidates, own, codes in (
        ("image_to_report", pairs.to_text, images, texts, pairs.text_of, numbers),
        ("report_to_image", pairs.to_image, texts, images, numbers, pairs.text_of),
    ):
        top = found.top[:, :_KEPT]
        q, k = top.shape
        parts.append(
            pd.DataFrame(
                {
                    "direction": direction,
                    "query": np.repeat(queries, k),
                    "rank": np.tile(np.arange(1, k + 1), q),
                    "match": candidates[top].ravel(),
                    "is_own": (codes[top] == own[:, None]).ravel(),
                    "first_own": np.repeat(found.ranks, k),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)
