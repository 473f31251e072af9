"""Pairs of one split: which rows of both stores they are, by id.

Shape notation: n pairs, v views, m rows of a store that they use.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from embedcache.data.manifest import Manifest
from embedcache.errors import JoinError
from embedcache.stage_two.config import TrainConfig
from embedcache.stage_two.tensors import Join, text_codes, width
from embedcache.store.store import Store


@dataclass(frozen=True)
class Side:
    """What the pairs of a split use of one store.

    Args:
        features: `embeddings` or `tokens`.
        rows: row numbers in the store, each once and ascending, (m,).
        index: for each pair and view its place in `rows`, (n, v).
    """

    store: Store
    features: str
    rows: np.ndarray
    index: np.ndarray

    @property
    def n_views(self) -> int:
        return self.index.shape[1]


@dataclass(frozen=True)
class Pairs:
    """The pairs of a split.

    Args:
        ids: of the images, (n,).
        codes: equal where pairs are positives of each other, (n,) int64.
        texts: equal where reports have the same text, (n,) int64.
        reports: equal where pairs share a report, from 0, (n,) int64.
    """

    ids: np.ndarray
    image: Side
    text: Side
    codes: np.ndarray
    texts: np.ndarray
    reports: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def digest(self) -> str:
        """A fingerprint of who is paired with whom, and of what both were made from."""
        digest = hashlib.sha256("\0".join(self.ids.tolist()).encode("utf-8", "surrogatepass"))
        digest.update(self.codes.tobytes())
        for side in (self.image, self.text):
            digest.update(side.index.tobytes())
            digest.update(side.store.input_digests[side.rows].tobytes())
        return digest.hexdigest()


def pairs_of_split(
    manifest: Manifest, image_store: Store, text_store: Store, joined: Join, split: str, config: TrainConfig
) -> Pairs:
    """The joined rows of a split; of the validation split always the samples as they are, no further views."""
    rows = joined.rows[manifest.in_split(split)[joined.rows]]
    ids = manifest.frame["id"].to_numpy()[rows]
    report_ids = manifest.frame["report_id"].to_numpy()[rows]
    all_views = config.views == "all" and split == "train"
    texts = text_codes(manifest, rows, text_store)
    reports = np.unique(report_ids, return_inverse=True)[1]
    codes = {"text_digest": texts, "report_id": reports, "row": np.arange(len(rows))}[config.positives]
    return Pairs(
        ids,
        _side(image_store, ids, config.image, all_views),
        _side(text_store, report_ids, config.text, all_views),
        codes.astype(np.int64),
        texts,
        reports,
    )


def check_enough(pairs: Pairs, manifest: Manifest, joined: Join, config: TrainConfig) -> None:
    """Refuses what has nothing to contrast.

    Raises:
        JoinError: fewer than two pairs, or all of one report or text.
    """
    if len(pairs) < 2:
        raise JoinError(
            f"{manifest.name}: {len(pairs)} training pairs, expected at least 2: "
            f"{int(manifest.in_split('train').sum())} rows have the split 'train', and {joined.n_failed} rows were "
            "left out because stage one recorded a failure (embedcache extract --retry-failed tries those again), "
            f"{len(joined.missing)} because a store lacks them"
        )
    if config.report_once and len(np.unique(pairs.reports)) < 2:
        raise JoinError(f"{manifest.name}: all training rows share one report_id, so there is nothing to contrast")
    if len(np.unique(pairs.codes)) < 2:
        raise JoinError(
            f"{manifest.name}: all {len(pairs)} training rows are positives of each other under positives "
            f"{config.positives!r}, so there is nothing to contrast"
        )


def _side(store: Store, ids: np.ndarray, features: str, all_views: bool) -> Side:
    width(store, features)  # whether it has such
    first = store.rows(ids.tolist())
    views = [first]
    if all_views and len(store):
        for view in range(1, int(store.views.max()) + 1):
            found = store.find(ids.tolist(), view)
            views.append(np.where(found < 0, first, found))
    rows, index = np.unique(np.stack(views, axis=1), return_inverse=True)
    return Side(store, features, rows, index.reshape(len(ids), len(views)))
