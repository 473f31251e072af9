"""What a probe learns from and scores: images, or studies or patients made of them.

Shape notation: r joined rows (images with features), n samples, u units, t columns of labels, d feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from embedcache.data.manifest import SPLITS, Manifest
from embedcache.data.projections import is_frontal, is_lateral
from embedcache.errors import ManifestError, some_ids
from embedcache.stage_two.probe_config import Pool, ProbeConfig, Unit
from embedcache.stage_two.targets import Target


@dataclass(frozen=True, eq=False)
class Samples:
    """One for each image; or for each study or patient whose images' features are averaged. A row in two splits is two.

    Args:
        frame: the manifest's table for the first image of each sample, n rows.
        split: of each, (n,) object.
        groups: the patient of each, (n,) object.
        keys: name of the unit that each is scored in, (n,) object.
        values: labels, (n, t); of a unit a label is present where one of its images has it.
        parts: for each kind of view that is put side by side, joined rows and the sample of each, (e,) int64 both.
    """

    frame: pd.DataFrame
    split: np.ndarray
    groups: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    parts: tuple[tuple[np.ndarray, np.ndarray], ...]

    @classmethod
    def of(
        cls, manifest: Manifest, rows: np.ndarray, target: Target, config: ProbeConfig, *, splits: bool = True
    ) -> Samples:
        """Samples of the joined rows of a manifest.

        Args:
            rows: positions in the manifest's frame, (r,).
            splits: without them all rows are one set, called `test`.

        Raises:
            ManifestError: views that are asked for and not there, or a unit with two classes.
        """
        frame = manifest.frame.iloc[rows].reset_index(drop=True)
        kinds = [np.ones(len(frame), bool)]
        if config.views != "all":
            kinds = [is_frontal(frame["view"]), is_lateral(frame["view"])][: 1 if config.views == "frontal" else 2]
            if not kinds[0].any():
                raise ManifestError(
                    f"{manifest.name}: no view is a frontal one (found {some_ids(frame['view'].unique())}); "
                    "fill the column 'view', or probe views 'all'"
                )
        groups, usable = manifest.groups()[rows], np.logical_or.reduce(kinds)
        keys = _keys(frame, groups, config.unit)
        values = target.values(manifest)[rows]
        places = [(s, np.flatnonzero(manifest.in_split(s)[rows] & usable)) for s in SPLITS]
        row = np.concatenate([p for _, p in places]) if splits else np.flatnonzero(usable)
        split = np.repeat([s for s, _ in places], [len(p) for _, p in places]) if splits else np.full(len(row), "test")
        split = split.astype(object)
        if config.unit == "image" or config.pool != "embedding_mean":
            sample, first = np.arange(len(row)), np.arange(len(row))
            values = values[row]
        else:
            sample, first = _grouped(split + "\0" + keys[row])
            values = _united(values[row], sample, keys[row][first], target, manifest.name)
        parts = tuple((row[kind[row]], sample[kind[row]]) for kind in kinds)
        at = row[first]
        return cls(frame.iloc[at].reset_index(drop=True), split[first], groups[at], keys[at], values, parts)

    def __len__(self) -> int:
        return len(self.split)

    def in_split(self, split: str) -> np.ndarray:
        """Numbers of the samples of a split."""
        return np.flatnonzero(self.split == split)

    def features(self, x: Tensor) -> Tensor:
        """Features of joined rows (r, d) to those of samples: (n, d), or (n, 2 d + 2) for views side by side.

        Of views side by side each has its mask behind, 1 where the sample has such an image; else all is 0.
        """
        means = [_mean(x, rows, sample, len(self)) for rows, sample in self.parts]
        return means[0][0] if len(means) == 1 else torch.cat([block for pair in means for block in pair], dim=1)

    def units(self, chosen: np.ndarray, target: Target, name: str) -> Units:
        """What some samples, numbers (m,), are scored as."""
        index, first = _grouped(self.keys[chosen])
        values = _united(self.values[chosen], index, self.keys[chosen][first], target, name)
        at = chosen[first]
        return Units(self.frame.iloc[at].reset_index(drop=True), self.groups[at], self.keys[at], values, index)


@dataclass(frozen=True, eq=False)
class Units:
    """What is scored.

    Args:
        frame: the manifest's table for the first image of each, u rows.
        groups: the patient of each, (u,).
        keys: its name, (u,).
        values: labels, (u, t).
        index: the unit of each of m samples, (m,).
    """

    frame: pd.DataFrame
    groups: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    index: np.ndarray

    def pooled(self, probabilities: np.ndarray, pool: Pool) -> np.ndarray:
        """Probabilities of samples (m, c) to those of units (u, c)."""
        if len(self.keys) == len(self.index):  # a unit is a sample
            return probabilities
        of_units = pd.DataFrame(probabilities).groupby(self.index)
        return np.asarray(of_units.max() if pool == "prob_max" else of_units.mean())


def _keys(frame: pd.DataFrame, groups: np.ndarray, unit: Unit) -> np.ndarray:
    """The unit of each row: its id, its study, else `id:` and its id, which is no study's by chance, or its patient."""
    image = frame["id"].to_numpy(object)
    if unit == "image":
        return image
    if unit == "patient":
        return groups
    study = frame["study"].to_numpy(object)
    return np.where(study == "", "id:" + image, study)


def _grouped(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of each key, (m,), and where each number comes first; in order of first appearance."""
    codes, _ = pd.factorize(keys)
    _, first = np.unique(codes, return_index=True)
    return codes, first


def largest_labels(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Labels of samples (m, t) to those of their units (u, t): the largest, NaN where all are blank.

    Args:
        index: the unit of each sample, from 0, (m,).
    """
    return np.asarray(pd.DataFrame(values).groupby(index).max())


def _united(values: np.ndarray, index: np.ndarray, names: Sequence[str], target: Target, dataset: str) -> np.ndarray:
    """As `largest_labels`.

    Raises:
        ManifestError: images of one unit have two classes.
    """
    largest = largest_labels(values, index)
    if target.task == "multi-class":
        there = ~np.isnan(values[:, 0])
        odd = index[there][values[there, 0] != largest[index[there], 0]]
        if len(odd):
            raise ManifestError(
                f"{dataset}: the images of {names[odd[0]]!r} have two classes of {target.name!r}; probe unit 'image'"
            )
    return largest


def _mean(x: Tensor, rows: np.ndarray, sample: np.ndarray, n: int) -> tuple[Tensor, Tensor]:
    """Mean features of each sample, (n, d), and whether it has any, (n, 1)."""
    index, taken = (torch.from_numpy(a).to(x.device) for a in (sample, rows))
    if len(rows) == n and bool((sample == np.arange(n)).all()):
        return x[taken], x.new_ones(n, 1)
    sums = x.new_zeros(n, x.shape[1]).index_add_(0, index, x[taken])
    counts = x.new_zeros(n, 1).index_add_(0, index, x.new_ones(len(rows), 1))
    return sums / counts.clamp_min(1), counts.clamp_max(1)
