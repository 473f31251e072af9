"""Probes: what frozen embeddings, with and without an Adaptor, tell of a label, beside the controls that say why.

Shape notation: r joined rows of a manifest, n samples, u units scored, d embedding width, c outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from embedcache.data.labelmap import LabelMap
from embedcache.data.manifest import Manifest
from embedcache.device import full_precision, pick_device
from embedcache.errors import FingerprintMismatchError, ManifestError, SettingsError
from embedcache.metrics.intervals import PatientDraws
from embedcache.progress import Progress
from embedcache.stage_two.adaptor import Adaptor, adaptor_digest, encoded_images, read_adaptors
from embedcache.stage_two.answers import Answer, answers
from embedcache.stage_two.calibrating import Calibrator
from embedcache.stage_two.controls import metadata_features, shuffled, told_by_text
from embedcache.stage_two.inputs import scale_of, standardised
from embedcache.stage_two.kept import KeptHead, Source
from embedcache.stage_two.label_budget import Budget, budgets, without_groups
from embedcache.stage_two.leaks import leak_words, overlap_warnings
from embedcache.stage_two.probe_config import ProbeConfig
from embedcache.stage_two.probe_tables import EXTERNAL, INTERNAL, HeldOut, ProbeResult, Tables
from embedcache.stage_two.samples import Samples
from embedcache.stage_two.score_rows import Row
from embedcache.stage_two.scoring import ChosenOn, Said, Scored, said, score
from embedcache.stage_two.targets import Target
from embedcache.stage_two.tensors import Join, join, opened, resident
from embedcache.store.store import Store


def probe(
    manifest: Manifest,
    image_store: Store | str | Path,
    *,
    label: str,
    run_dir: str | Path | None = None,
    text_store: Store | str | Path | None = None,
    random_store: Store | str | Path | None = None,
    test_manifest: Manifest | None = None,
    test_store: Store | str | Path | None = None,
    labelmap: LabelMap | str | Path | None = None,
    config: ProbeConfig | None = None,
) -> ProbeResult:
    """Fits heads on the training split's embeddings and scores them on the test split.

    Settings, thresholds and calibration are chosen on validation labels, or on folds of the training labels, never on
    test labels; features are standardised by training rows.

    Args:
        label: name of a label of the manifest, or of a set of labels.
        run_dir: a run of `train`: its Adaptor is applied; without it the embeddings are probed as they are.
        text_store: for the control `text-as-label`, which is left out without it.
        random_store: of the same images through an encoder of random weights, for the control `random-encoder`.
        test_manifest, test_store: another dataset to score the same heads on, through the same encoder: its split
            `test`, or all of it where it has no splits.
        labelmap: how that dataset's labels read as this one's.

    Raises:
        ManifestError: no such label, or a split without both classes.
        FingerprintMismatchError: the Adaptor, or the other dataset's store, is of another encoder.
    """
    config = config or ProbeConfig()
    if test_manifest is None and (test_store is not None or labelmap is not None):
        raise SettingsError("a test store, or a label map, and no test manifest that it belongs to; name it as well")
    with full_precision:
        work = _Probe(manifest, opened(image_store), label, run_dir, config)
        if random_store is not None:
            work.random_store = opened(random_store)
        if text_store is not None:
            work.text_store = opened(text_store)
        if test_manifest is not None:
            work.add_external(test_manifest, test_store, labelmap)
        return work.result()


@dataclass(frozen=True, eq=False)
class _Setting:
    """What a result, or a control of it, learns from; made when its turn comes.

    Args:
        control: its name, blank for the result itself.
        features: of the samples of all test sets that it is scored on: one for all runs, or one for each Adaptor, on
            which runs learn in turn.
        budgets: labels.
        n_tests: how many of the test sets it is scored on.
    """

    control: str
    features: Callable[[], Sequence[Tensor]]
    budgets: Callable[[], Sequence[Budget]]
    n_tests: int


class _Probe:
    """One call of `probe`."""

    def __init__(
        self, manifest: Manifest, store: Store, label: str, run_dir: str | Path | None, config: ProbeConfig
    ) -> None:
        self.config, self.manifest, self.store, self.label = config, manifest, store, label
        self.device = pick_device(config.device)
        self.adaptors = [] if run_dir is None else _adaptors_for(store, run_dir)
        self.random_store: Store | None = None
        self.text_store: Store | None = None
        if config.as_published and not (self.adaptors and self.adaptors[0].config["kind"] == "attention"):
            raise SettingsError("as_published is a way to apply the paper's Adaptor: name the run directory of one")
        self.target = Target.of(manifest, label)
        if config.prevalence is not None and self.target.task != "binary":
            raise SettingsError(
                f"prevalence {config.prevalence:g} is of one label, and {label!r} has several; leave it out"
            )
        self.join = join(manifest, store)
        self.samples = Samples.of(manifest, self.join.rows, self.target, config)
        self.budgets = budgets(manifest, self.samples, self.target, config)
        self.train = self.samples.in_split("train")
        test = self.samples.in_split("test")
        self.asked = [test[self.target.known(self.samples.values[test])]]
        self.tests = [self._test_set(INTERNAL, self.samples, self.asked[0], manifest)]
        self.raw = [resident(store, self.join.image_rows, self.device)]
        self.sets = [self.samples]
        self.tables = Tables(self.target, config)
        self.kept: dict[str, KeptHead] = {}
        self.warnings = [leak_words(manifest, store, run_dir, self.tests[0].units.frame["id"])]
        self._say_left_out(manifest, self.join)

    def add_external(
        self, manifest: Manifest, store: Store | str | Path | None, labelmap: LabelMap | str | Path | None
    ) -> None:
        """Another dataset to be scored on."""
        if store is None:
            raise SettingsError(f"{manifest.name}: a test manifest and no store of its images; name it as test_store")
        store = opened(store)
        if store.encoder_fingerprint != self.store.encoder_fingerprint:
            raise FingerprintMismatchError(
                f"{store.path}: of another encoder ({store.encoder_fingerprint[:12]}...) than {self.store.path} "
                f"({self.store.encoder_fingerprint[:12]}...); extract {manifest.name} with the same one"
            )
        if labelmap is not None:
            manifest = (labelmap if isinstance(labelmap, LabelMap) else LabelMap.read(labelmap)).apply(manifest)
        self.warnings += overlap_warnings(self.manifest, manifest, self.store, store)
        manifest = self.target.completed(manifest)
        joined = join(manifest, store)
        self._say_left_out(manifest, joined)
        has_splits = bool(manifest.in_split("test").any())
        samples = Samples.of(manifest, joined.rows, self.target, self.config, splits=has_splits)
        test = samples.in_split("test")
        chosen = test[self.target.known(samples.values[test])]
        if not len(chosen):
            raise ManifestError(f"{manifest.name}: no test row has label {self.label!r}; name a label map, or another")
        self.asked.append(len(self.samples) + chosen)
        self.tests.append(self._test_set(EXTERNAL, samples, chosen, manifest))
        self.raw.append(resident(store, joined.image_rows, self.device))
        self.sets.append(samples)

    def result(self) -> ProbeResult:
        """Fits and scores everything."""
        settings = self._settings()
        of_result: dict[object, tuple[Said, Scored]] = {}
        with Progress(f"probing {self.label}", total=len(settings) * len(self.config.heads), unit="probe") as progress:
            for setting in settings:
                features, some = setting.features(), setting.budgets()
                for head in self.config.heads:
                    self._score(setting, features, some, head, of_result)
                    if not setting.control and self.config.n_left_out:
                        self._leave_out(features, some, head)
                    progress.advance()
        warning = "; ".join(filter(None, self.warnings))
        return self.tables.result(n_failed=self.join.n_failed, warning=warning, kept=self.kept)

    def _say_left_out(self, manifest: Manifest, joined: Join) -> None:
        if joined.n_failed:
            self.tables.note(f"{manifest.name}: {joined.n_failed} images left out, as stage one could not read them")

    def _test_set(self, name: str, samples: Samples, chosen: np.ndarray, manifest: Manifest) -> HeldOut:
        units = samples.units(chosen, self.target, manifest.name)
        return HeldOut(name, units, PatientDraws(units.groups, self.config.n_draws, seed=0))

    def _settings(self) -> list[_Setting]:
        """The result, then each control that is asked for and whose needs are met."""
        everywhere, n_runs = len(self.tests), 1 + max(budget.seed for budget in self.budgets)

        def own() -> Sequence[Budget]:
            return self.budgets

        @cache
        def result() -> Sequence[Tensor]:
            return [self._of_samples(self._adapted_by(adaptor)) for adaptor in self.adaptors[:n_runs]] or raw()

        def raw() -> Sequence[Tensor]:
            return [self._of_samples(self.raw)]

        controls = []
        if self.adaptors:
            controls.append(_Setting("no-adaptor", raw, own, everywhere))
            controls.append(
                _Setting(
                    "untrained-adaptor",
                    lambda: [
                        self._of_samples(self._adapted_by(adaptor.untrained(k)))
                        for k, adaptor in enumerate(self.adaptors[:n_runs])
                    ],
                    own,
                    everywhere,
                )
            )
        if self.random_store is not None:
            controls.append(_Setting("random-encoder", lambda: [self._of_random_encoder()], own, 1))
        controls.append(
            _Setting("shuffled-labels", result, lambda: [shuffled(budget) for budget in self.budgets], everywhere)
        )
        metadata = metadata_features(pd.concat([s.frame for s in self.sets], ignore_index=True), self.train)
        if metadata is not None:
            of_metadata = torch.from_numpy(metadata)
            controls.append(_Setting("metadata-only", lambda: [of_metadata.to(self.device)], own, everywhere))
        texts = self._texts()
        if texts:
            controls.append(_Setting("text-as-label", raw, lambda: self._told_by(texts), everywhere))
        chosen = [setting for setting in controls if setting.control in self.config.controls]
        if self.config.as_published:
            chosen.append(_Setting("as-published", result, own, everywhere))
        return [_Setting("", result, own, everywhere), *chosen]

    def _of_samples(self, rows: Sequence[Tensor]) -> Tensor:
        return torch.cat([samples.features(x) for samples, x in zip(self.sets, rows, strict=True)])

    @torch.inference_mode()
    def _adapted_by(self, adaptor: Adaptor) -> list[Tensor]:
        """An Adaptor's output for every joined row of each set, computed once, (r, p)."""
        adaptor = adaptor.to(self.device).eval()
        return [encoded_images(adaptor, x).clone() for x in self.raw]

    def _of_random_encoder(self) -> Tensor:
        assert self.random_store is not None
        joined = join(self.manifest, self.random_store)
        if not np.array_equal(joined.rows, self.join.rows):
            raise ManifestError(
                f"{self.random_store.path}: holds other images than {self.store.path}; extract both of one manifest"
            )
        return self.samples.features(resident(self.random_store, joined.image_rows, self.device))

    def _texts(self) -> dict[int, int]:
        """The row of the text store that tells of each training sample, where one does."""
        if self.text_store is None or "text-as-label" not in self.config.controls:
            return {}
        pairs = join(self.manifest, self.store, self.text_store, allow_missing=True)
        assert pairs.text_rows is not None  # a text store was given
        row_of = dict(zip(self.manifest.frame["id"].to_numpy()[pairs.rows], pairs.text_rows.tolist(), strict=True))
        ids = self.samples.frame["id"].to_numpy()
        found = {s: row_of[ids[s]] for s in self.train.tolist() if ids[s] in row_of}
        if len(found) < len(self.train):
            without = len(self.train) - len(found)
            self.tables.note(f"text-as-label: {without} of {len(self.train)} training samples have no text there")
        return found if len(set(found.values())) > 1 else {}

    def _told_by(self, texts: Mapping[int, int]) -> list[Budget]:
        assert self.text_store is not None  # texts come from there
        used = np.unique(np.fromiter(texts.values(), np.int64))
        x = standardised(resident(self.text_store, used, "cpu"), np.arange(len(used))).numpy()
        at = dict(zip(texts, np.searchsorted(used, np.fromiter(texts.values(), np.int64)).tolist(), strict=True))
        weight = self.config.class_weight
        return [told_by_text(budget, self.samples, at, x, self.target, weight) for budget in self.budgets]

    def _score(
        self,
        setting: _Setting,
        features: Sequence[Tensor],
        some: Sequence[Budget],
        head: str,
        of_result: dict[object, tuple[Said, Scored]],
    ) -> None:
        """All budgets of one setting and head."""
        asked = np.concatenate(self.asked[: setting.n_tests])
        if setting.control == "as-published":  # what an image's features are depends on the labels that are used
            found = [self._answers([self._across_batches(features, b)], head, [b], asked)[0] for b in some]
        else:
            found = self._answers(features, head, some, asked)
        ends = np.cumsum([len(a) for a in self.asked[: setting.n_tests]])[:-1]
        for amount, members in groupby(zip(some, found, strict=True), key=lambda pair: pair[0].amount):
            runs = list(members)
            chosen = [ChosenOn.of(a, self.samples, self.target, self.config.pool) for _, a in runs]
            parts = [np.split(a.logits, ends) for _, a in runs]
            own = [self._own(b) for b, _ in runs]
            names = self._names(setting.control, head, own)
            learnt = np.all([self.target.both_sides(b.labels) for b in own], axis=0)
            scored: list[Scored] = []
            for k, test in enumerate(self.tests[: setting.n_tests]):
                of_test = [replace(a, logits=part[k]) for (_, a), part in zip(runs, parts, strict=True)]
                told = said(of_test, chosen, test.units, self.target, self.config)
                scored.append(score(told, test.units.values, self.target, test.draws, learnt=learnt))
                self.tables.add_scores(names | {"n_test": test.n_known}, test, scored[-1], own, len(features))
                key = (test.name, head, amount)
                if not setting.control:
                    of_result[key] = told, scored[-1]
                    self.tables.add_details(names, test, told, chosen, runs, scored[-1].scorable)
                    if k == 0 and amount == self.tables.most:
                        self._keep(head, features[0], runs[0], chosen[0], told)
                elif setting.control != "as-published":
                    self.tables.add_gains(names, test, of_result[key], (told, scored[-1]), len(self.adaptors))
            if len(scored) > 1:
                self.tables.add_difference(names, *scored, n_turns=len(features))

    def _leave_out(self, features: Sequence[Tensor], some: Sequence[Budget], head: str) -> None:
        """Scores the first run without each group of its training patients, where other runs have the same."""
        for _, members in groupby(some, key=lambda budget: budget.amount):
            runs = list(members)
            if not all(np.array_equal(np.sort(runs[0].rows), np.sort(other.rows)) for other in runs):
                continue
            without = without_groups(runs[0], self.samples.groups, self.config.n_left_out or 0)
            asked = np.concatenate(self.asked)
            ends = np.cumsum([len(a) for a in self.asked])[:-1]
            for group, (budget, answer) in enumerate(
                zip(without, self._answers(features, head, without, asked), strict=True)
            ):
                chosen = ChosenOn.of(answer, self.samples, self.target, self.config.pool)
                names = self._names("", head, [budget])
                for test, part in zip(self.tests, np.split(answer.logits, ends), strict=True):
                    told = said([replace(answer, logits=part)], [chosen], test.units, self.target, self.config)
                    once = PatientDraws(test.units.groups, 1, seed=0)  # the value alone is wanted
                    learnt = self.target.both_sides(budget.labels)
                    if (self.target.both_sides(runs[0].labels) & ~learnt).any():
                        continue  # without this group a class is gone, and another score would be compared
                    scored = score(told, test.units.values, self.target, once, learnt=learnt)
                    self.tables.add_left_out(names, test, group, scored)

    def _keep(self, head: str, features: Tensor, run: tuple[Budget, Answer], chosen: ChosenOn, told: Said) -> None:
        """Keeps the first run of a head for new images; not of nearest neighbours, nor of views side by side."""
        budget, answer = run
        if not answer.state or self.config.views == "frontal+lateral":
            return
        dim, target, mean, deviation = features.shape[1], self.target, torch.zeros(()), torch.ones(())
        if self.config.standardise:
            mean, deviation = scale_of(features, self.train)
        self.kept[head] = KeptHead(
            head,
            target,
            self.config.unit,
            self.config.pool,
            self.config.views,
            len(budget.rows),
            tuple(told.thresholds[0].tolist()),
            tuple(Calibrator.fitted("platt", chosen, k, target) for k in range(target.n_outputs)),
            self._source,
            {**answer.state, "feature_mean": mean.expand(dim).cpu(), "feature_deviation": deviation.expand(dim).cpu()},
        )

    @cached_property
    def _source(self) -> Source:
        return Source.of(self.store, adaptor_digest(self.adaptors[0] if self.adaptors else None))

    def _answers(
        self, features: Sequence[Tensor], head: str, some: Sequence[Budget], asked: np.ndarray
    ) -> list[Answer]:
        """Of each budget, learnt on the features whose turn its seed is."""
        found: dict[int, Answer] = {}
        for turn, x in enumerate(features):
            mine = [k for k, budget in enumerate(some) if budget.seed % len(features) == turn]
            if mine:
                x = standardised(x, self.train) if self.config.standardise and head != "knn" else x
                of_mine = answers(head, x, [some[k] for k in mine], asked, target=self.target, config=self.config)
                found.update(zip(mine, of_mine, strict=True))
        return [found[k] for k in range(len(some))]

    @torch.inference_mode()
    def _across_batches(self, features: Sequence[Tensor], budget: Budget) -> Tensor:
        """The Adaptor's outputs as the published code has them: each image attends to those of its batch."""
        turn = budget.seed % len(features)
        raw, size = self._of_samples(self.raw), self.config.head.batch_size
        of_train = np.random.default_rng(budget.seed).permutation(budget.rows)
        found = features[turn].clone()
        for rows in (of_train, budget.valid, *self.asked):
            for part in torch.from_numpy(rows).to(found.device).split(size):
                if len(part):
                    found[part] = self.adaptors[turn].encode_image(raw[part].unsqueeze(0)).squeeze(0)
        return found

    def _names(self, control: str, head: str, some: Sequence[Budget]) -> Row:
        return {
            "control": control,
            "head": head,
            "fraction": some[0].fraction,
            "shots": some[0].shots,
            "n_train": max(len(b.rows) for b in some),
            "n_valid": max(len(b.valid) for b in some),
            "n_seeds": len(some),
            "choice": "+".join(sorted({b.choice for b in some})),
        }

    def _own(self, budget: Budget) -> Budget:
        """The budget with its own labels: under a control they are others, and may be more."""
        return next(b for b in self.budgets if (b.amount, b.seed) == (budget.amount, budget.seed))


def _adaptors_for(store: Store, run_dir: str | Path) -> list[Adaptor]:
    adaptors = read_adaptors(run_dir)
    for adaptor in adaptors:
        adaptor.check_encoder(store, run_dir)
    if adaptors[0].encoders["image"].get("features") == "tokens":
        raise SettingsError(f"{run_dir}: its Adaptor was trained on tokens, a probe reads embeddings: train on those")
    return adaptors
