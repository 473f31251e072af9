"""Who is in a batch with whom: one epoch, planned on the host from its seed.

Shape notation: n pairs of the training split, m of them in an epoch, s batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

_WINDOW_BATCHES = 16  # shards are read in full until they hold this many batches


@dataclass(frozen=True)
class Plan:
    """One epoch of one model.

    Args:
        pairs: positions in the n pairs, batch after batch, (m,).
        starts: where each batch begins in `pairs`, and m, (s + 1,).
        image_views, text_views: which stored view of each pair is used, (m,).
        partners: for latent mixup, where in `pairs` the other pair of a mixture stands, (m,); None without.
        shares: for latent mixup, how much of each batch's mixtures is the pair's own, (s,).
        windows: the number of the first batch of each window, whose rows are read together, and s.
    """

    pairs: np.ndarray
    starts: np.ndarray
    image_views: np.ndarray
    text_views: np.ndarray
    partners: np.ndarray | None
    shares: np.ndarray
    windows: np.ndarray

    @property
    def n_batches(self) -> int:
        return len(self.starts) - 1


@dataclass(frozen=True)
class Planner:
    """Plans epochs; the same seed and epoch give the same plan.

    Args:
        reports: a number for each pair's report, from 0, (n,).
        n_views: how many views of image and text there are to choose from.
        shards: for an order by shards, the shard of each pair's image, (n,); else None.
        batch_size, report_once, mixup: see `TrainConfig`.
    """

    reports: np.ndarray
    n_views: tuple[int, int]
    shards: np.ndarray | None
    batch_size: int
    report_once: bool
    mixup: float

    def n_batches(self) -> int:
        """Batches in an epoch, whatever its seed where the order is shuffled."""
        return self.plan(seed=0, epoch=0).n_batches

    def plan(self, *, seed: int, epoch: int) -> Plan:
        """One epoch."""
        rng = np.random.default_rng([abs(seed), int(seed < 0), epoch])
        batches: list[np.ndarray] = []
        windows = []
        for window in self._windows(rng):
            windows.append(len(batches))
            of_report = self.reports[window] if self.report_once else None
            batches += [window[batch] for batch in deal(len(window), of_report, self.batch_size, rng)]
        pairs = np.concatenate(batches) if batches else np.empty(0, np.int64)
        starts = np.cumsum([0, *map(len, batches)])
        if self.shards is None:  # each batch by itself
            windows = list(range(len(batches)))
        partners, shares = None, np.ones(len(batches), np.float32)
        if self.mixup:
            partners = np.concatenate([a + rng.permutation(b - a) for a, b in pairwise(starts.tolist())])
            shares = rng.beta(self.mixup, self.mixup, len(batches)).astype(np.float32)
        image_views, text_views = (rng.integers(0, n, len(pairs)) for n in self.n_views)
        return Plan(pairs, starts, image_views, text_views, partners, shares, np.array([*windows, len(batches)]))

    def _windows(self, rng: np.random.Generator) -> Sequence[np.ndarray]:
        """Positions that are shuffled among themselves: all, or those of a few shards drawn at random."""
        if self.shards is None:
            return [np.arange(len(self.reports))]
        by_shard = np.argsort(self.shards, kind="stable")
        _, starts = np.unique(self.shards[by_shard], return_index=True)
        groups = np.split(by_shard, starts[1:])
        windows: list[np.ndarray] = []
        filling: list[np.ndarray] = []
        n_filling = 0
        for k in rng.permutation(len(groups)):
            filling.append(groups[k])
            n_filling += len(groups[k])
            if n_filling >= _WINDOW_BATCHES * self.batch_size:
                windows.append(np.concatenate(filling))
                filling, n_filling = [], 0
        if filling:
            windows.append(np.concatenate(filling))
        return windows


def deal(n: int, reports: np.ndarray | None, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Deals n pairs out to batches of equal size, give or take one, and at most `batch_size`.

    Args:
        reports: the report of each pair, (n,) int; a batch holds each once, as far as that leaves two pairs to it.
            None: any may meet any.

    Returns:
        Positions; a batch of one pair, which has nothing to contrast with, is left out.
    """
    if n == 0:
        return []
    order, n_batches = rng.permutation(n), math.ceil(n / batch_size)
    if reports is not None:
        # like cards sorted by report, so that the pairs of one lie in hands that follow each other
        counts = np.bincount(reports)
        place = rng.permutation(len(counts))[reports]
        order = order[np.argsort(place[order], kind="stable")]
        n_batches = max(n_batches, int(counts.max()))
    n_larger = n % n_batches  # these come first, so that sizes follow from n alone
    hands = [*rng.permutation(n_larger), *(n_larger + rng.permutation(n_batches - n_larger))]
    batches = [order[k::n_batches] for k in hands]
    return [batch for batch in batches if len(batch) > 1]
