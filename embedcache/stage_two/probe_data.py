"""What a probe reads: labels, samples and embeddings of the dataset that heads learn from, and of others to score on.

Shape notation: r joined rows of a manifest, n samples, d embedding width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from embedcache.data.labelmap import LabelMap
from embedcache.data.manifest import Manifest
from embedcache.device import pick_device
from embedcache.errors import FingerprintMismatchError, ManifestError, SettingsError
from embedcache.metrics.intervals import PatientDraws
from embedcache.stage_two.label_budget import budgets
from embedcache.stage_two.leaks import overlap_warnings
from embedcache.stage_two.probe_config import ProbeConfig
from embedcache.stage_two.probe_tables import EXTERNAL, INTERNAL, HeldOut
from embedcache.stage_two.samples import Samples
from embedcache.stage_two.targets import Target
from embedcache.stage_two.tensors import Join, join, resident
from embedcache.store.store import Store


class ProbeData:
    """A dataset's samples; those of another one are numbered after them.

    Attributes:
        store: of the embeddings that heads learn from.
        config: how they are probed.
        target: the label.
        device: where features lie.
        join: rows of the manifest that have an embedding.
        budgets: labels that heads learn from.
        train: numbers of the training samples.
        sets: samples of each dataset.
        embeddings: of the joined rows of each, on the device, (r, d).
        tests: what is scored of each.
        asked: the numbers of the samples of each test.
        notes, warnings: what is to be known of scores on them.

    Raises:
        ManifestError: no such label, or a split without both classes.
        SettingsError: a prevalence, and a label of several classes.
    """

    def __init__(self, manifest: Manifest, store: Store, label: str, config: ProbeConfig) -> None:
        self._manifest, self.store, self.config = manifest, store, config
        self.target = Target.of(manifest, label)
        if config.prevalence is not None and self.target.task != "binary":
            raise SettingsError(
                f"prevalence {config.prevalence:g} is of one label, and {label!r} has several; leave it out"
            )
        self.device = pick_device(config.device)
        self.join = join(manifest, store)
        samples = Samples.of(manifest, self.join.rows, self.target, config)
        self.budgets = budgets(manifest, samples, self.target, config)
        self.train = samples.in_split("train")
        self.sets: list[Samples] = []
        self.embeddings: list[Tensor] = []
        self.tests: list[HeldOut] = []
        self.asked: list[np.ndarray] = []
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self._add(INTERNAL, manifest, store, self.join, samples)

    def add_external(self, manifest: Manifest, store: Store, labelmap: LabelMap | None) -> None:
        """Another dataset to be scored on: its split `test`, or all of it where it has no splits.

        Args:
            labelmap: how its labels read as this one's.

        Raises:
            FingerprintMismatchError: its store is of another encoder.
            ManifestError: it has no such label.
        """
        if store.encoder_fingerprint != self.store.encoder_fingerprint:
            raise FingerprintMismatchError(
                f"{store.path}: of another encoder ({store.encoder_fingerprint[:12]}...) than {self.store.path} "
                f"({self.store.encoder_fingerprint[:12]}...); extract {manifest.name} with the same one"
            )
        if labelmap is not None:
            manifest = labelmap.apply(manifest)
        self.warnings += overlap_warnings(self._manifest, manifest, self.store, store)
        manifest = self.target.completed(manifest)
        joined = join(manifest, store)
        has_splits = bool(manifest.in_split("test").any())
        samples = Samples.of(manifest, joined.rows, self.target, self.config, splits=has_splits)
        self._add(EXTERNAL, manifest, store, joined, samples)

    def _add(self, name: str, manifest: Manifest, store: Store, joined: Join, samples: Samples) -> None:
        self.notes += joined.notes(manifest.name)
        test = samples.in_split("test")
        chosen = test[self.target.known(samples.values[test])]
        if not len(chosen):
            raise ManifestError(
                f"{manifest.name}: no test row has label {self.target.name!r}; name a label map, or another"
            )
        units = samples.units(chosen, self.target, manifest.name)
        self.tests.append(HeldOut(name, units, PatientDraws(units.groups, self.config.n_draws, seed=0)))
        self.asked.append(sum(len(s) for s in self.sets) + chosen)
        self.embeddings.append(resident(store, joined.image_rows, self.device))
        self.sets.append(samples)

    def of_samples(self, rows: list[Tensor]) -> Tensor:
        """Features of all samples, (n, d), of those of the joined rows of each set, (r, d) each."""
        return torch.cat([samples.features(x) for samples, x in zip(self.sets, rows, strict=True)])

    def of_other_store(self, store: Store) -> Tensor:
        """What another encoder gives of the images that heads learn from, (n, d).

        Raises:
            ManifestError: it holds other images.
        """
        joined = join(self._manifest, store)
        if not np.array_equal(joined.rows, self.join.rows):
            raise ManifestError(
                f"{store.path}: holds other images than {self.store.path}; extract both of one manifest"
            )
        return self.sets[0].features(resident(store, joined.image_rows, self.device))

    def texts(self, store: Store) -> dict[int, int]:
        """The row of a text store that tells of each training sample, where one does."""
        pairs = join(self._manifest, self.store, store, allow_missing=True)
        assert pairs.text_rows is not None  # a text store was given
        row_of = dict(zip(self._manifest.frame["id"].to_numpy()[pairs.rows], pairs.text_rows.tolist(), strict=True))
        ids = self.sets[0].frame["id"].to_numpy()
        return {s: row_of[ids[s]] for s in self.train.tolist() if ids[s] in row_of}
