"""Small manifests, targets and stores for the tests of stage two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from embedcache import Manifest
from embedcache.data.labels import LabelSet
from embedcache.data.manifest import About
from embedcache.stage_two.targets import Target
from embedcache.store.store import Store

BINARY = Target("y", "binary", ("y",), ("y",))
BOTH = Target("both", "multi-label", ("a", "b"), ("a", "b"))
KIND = Target("kind", "multi-class", ("kind",), ("no", "yes", "maybe"))
SETS = (LabelSet("both", "multi-label", ("a", "b")), LabelSet("kind", "multi-class", ("kind",), KIND.classes))
TARGETS = [BINARY, BOTH, KIND]


@dataclass(frozen=True)
class World:
    """A dataset, its stores, and the image embeddings as they were made, (n, d)."""

    manifest: Manifest
    image: Store
    text: Store
    values: np.ndarray


def manifest(columns: Mapping[str, Sequence[object] | np.ndarray], *sets: LabelSet) -> Manifest:
    """Rows i0, i1, ... with these columns."""
    ids = [f"i{k}" for k in range(len(next(iter(columns.values()))))]
    return Manifest(pd.DataFrame({"id": ids, "image": ids, **columns}), name="made", root=".", about=About(sets))


def blanked(values: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Some of the labels (n, t) taken away."""
    return np.where(rng.random(values.shape) < share, np.nan, values)


def told_labels(target: Target, x: np.ndarray, rng: np.random.Generator, *, blank: float = 0.0) -> np.ndarray:
    """Labels that features (n, d) tell amid noise, (n, t); some blank, and some known of each column."""
    scores = x[:, : target.n_outputs] + rng.normal(size=(len(x), target.n_outputs))
    values = scores.argmax(axis=1)[:, None] if target.task == "multi-class" else scores > 0
    return blanked(values.astype(np.float64), blank, rng)
