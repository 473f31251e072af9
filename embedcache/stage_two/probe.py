"""Probes: what frozen embeddings, with and without an Adaptor, tell of a label, beside the controls that say why.

Shape notation: d feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from embedcache.data.labelmap import LabelMap
from embedcache.data.manifest import Manifest
from embedcache.device import full_precision
from embedcache.errors import SettingsError
from embedcache.metrics.intervals import PatientDraws
from embedcache.progress import Progress
from embedcache.stage_two.adaptor import Adaptor, adaptor_digest, read_adaptors
from embedcache.stage_two.answers import Answer, answers
from embedcache.stage_two.calibrating import Calibrator
from embedcache.stage_two.inputs import scale_of, standardised
from embedcache.stage_two.kept import KeptHead, Source
from embedcache.stage_two.label_budget import Budget, without_groups
from embedcache.stage_two.leaks import leak_words
from embedcache.stage_two.probe_config import ProbeConfig
from embedcache.stage_two.probe_data import ProbeData
from embedcache.stage_two.probe_settings import Setting, settings_of
from embedcache.stage_two.probe_tables import ProbeResult, Tables
from embedcache.stage_two.score_rows import Row
from embedcache.stage_two.scoring import ChosenOn, Said, Scored, said, score
from embedcache.stage_two.tensors import opened
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
    if test_manifest is not None and test_store is None:
        raise SettingsError(f"{test_manifest.name}: a test manifest and no store of its images; name it as test_store")
    store = opened(image_store)
    elsewhere, random, text = (None if s is None else opened(s) for s in (test_store, random_store, text_store))
    adaptors = [] if run_dir is None else _adaptors_for(store, run_dir)
    if config.as_published and not (adaptors and adaptors[0].config["kind"] == "attention"):
        raise SettingsError("as_published is a way to apply the paper's Adaptor: name the run directory of one")
    with full_precision:
        data = ProbeData(manifest, store, label, config)
        leak = leak_words(manifest, store, run_dir, data.tests[0].units.frame["id"])
        if test_manifest is not None and elsewhere is not None:
            read = LabelMap.read(labelmap) if isinstance(labelmap, (str, Path)) else labelmap
            data.add_external(test_manifest, elsewhere, read)
        adaptors = adaptors[: 1 + max(budget.seed for budget in data.budgets)]
        work = _Probe(data, adaptors, settings_of(data, adaptors, random_store=random, text_store=text))
        return work.result("; ".join(filter(None, [leak, *data.warnings])))


class _Probe:
    """One call of `probe`: heads are fitted on each setting, and scored.

    Args:
        settings: the result first.
    """

    def __init__(self, data: ProbeData, adaptors: Sequence[Adaptor], settings: Sequence[Setting]) -> None:
        self.data, self.adaptors, self.settings, self.config = data, adaptors, settings, data.config
        self.tables = Tables(data.target, data.config)
        self.kept: dict[str, KeptHead] = {}
        self.of_result: dict[object, tuple[Said, Scored]] = {}

    def result(self, warning: str) -> ProbeResult:
        """Fits and scores everything."""
        for note in self.data.notes:
            self.tables.note(note)
        without = self._without_groups()
        n_fits = (len(self.settings) * len(self.data.budgets) + len(without)) * len(self.config.heads)
        with Progress(f"probing {self.data.target.name}", total=n_fits, unit="head") as progress:
            for setting in self.settings:
                some = setting.budgets()
                found = self._answers(setting, some, progress)
                for head in self.config.heads:
                    self._score(setting, some, head, found[head])
            if without:
                self._leave_out(without, self._answers(self.settings[0], [b for _, b in without], progress))
        return self.tables.result(n_failed=self.data.join.n_failed, warning=warning, kept=self.kept)

    def _answers(self, setting: Setting, some: Sequence[Budget], progress: Progress) -> dict[str, list[Answer]]:
        """What each head says of each budget, learnt on the features whose turn its seed is."""
        config, asked = self.config, np.concatenate(self.data.asked[: setting.n_tests])
        scales = config.standardise and any(head != "knn" for head in config.heads)
        found: dict[str, dict[int, Answer]] = {head: {} for head in config.heads}

        def learn(x: Tensor, mine: Sequence[int]) -> None:
            on_one_scale = standardised(x, self.data.train) if scales else x
            for head in config.heads:
                features, of_mine = x if head == "knn" else on_one_scale, [some[k] for k in mine]
                learnt = answers(head, features, of_mine, asked, target=self.data.target, config=config)
                found[head].update(zip(mine, learnt, strict=True))
                progress.advance(len(mine))

        def take(turn: int) -> None:
            """Its features are gone before the next ones are made."""
            mine = [k for k, budget in enumerate(some) if budget.seed % setting.n_turns == turn]
            x = setting.features(turn)
            if setting.of_budget is None:
                learn(x, mine)
            else:
                for k in mine:
                    learn(setting.of_budget(x, some[k]), [k])

        for turn in sorted({budget.seed % setting.n_turns for budget in some}):
            take(turn)
        return {head: [of_head[k] for k in range(len(some))] for head, of_head in found.items()}

    def _score(self, setting: Setting, some: Sequence[Budget], head: str, found: Sequence[Answer]) -> None:
        """All budgets of one setting and head."""
        data, tests = self.data, self.data.tests[: setting.n_tests]
        for amount, members in groupby(zip(some, found, strict=True), key=lambda pair: pair[0].amount):
            runs = list(members)
            chosen = [ChosenOn.of(a, data.sets[0], data.target, self.config.pool) for _, a in runs]
            parts = [self._by_test(a) for _, a in runs]
            own = [self._own(b) for b, _ in runs]
            names = self._names(setting.control, head, own)
            learnt = np.all([data.target.both_sides(b.labels) for b in own], axis=0)
            scored: list[Scored] = []
            for k, test in enumerate(tests):
                told = said([part[k] for part in parts], chosen, test.units, data.target, self.config)
                scored.append(score(told, test.units.values, data.target, test.draws, learnt=learnt))
                self.tables.add_scores(names | {"n_test": test.n_known}, test, scored[-1], own, setting.n_turns)
                key = (test.name, head, amount)
                if not setting.control:
                    self.of_result[key] = told, scored[-1]
                    self.tables.add_details(names, test, told, chosen, runs, scored[-1].scorable)
                    if k == 0 and amount == self.tables.most:
                        self._keep(head, runs[0], chosen[0], told)
                elif setting.control != "as-published":
                    self.tables.add_gains(names, test, self.of_result[key], (told, scored[-1]), len(self.adaptors))
            if len(scored) > 1:
                self.tables.add_difference(names, *scored, n_turns=setting.n_turns)

    def _by_test(self, answer: Answer) -> list[Answer]:
        """An answer for each test set that was asked."""
        ends = np.cumsum([len(asked) for asked in self.data.asked])[:-1]
        return [replace(answer, logits=part) for part in np.split(answer.logits, ends)]

    def _without_groups(self) -> list[tuple[int, Budget]]:
        """The first run's labels without each group of its training patients, where other runs have the same."""
        found: list[tuple[int, Budget]] = []
        for _, members in groupby(self.data.budgets if self.config.n_left_out else (), key=lambda b: b.amount):
            runs = list(members)
            if all(np.array_equal(np.sort(runs[0].rows), np.sort(other.rows)) for other in runs):
                found += enumerate(without_groups(runs[0], self.data.sets[0].groups, self.config.n_left_out or 0))
        return found

    def _leave_out(self, without: Sequence[tuple[int, Budget]], found: dict[str, list[Answer]]) -> None:
        """Scores what was learnt without each group."""
        data = self.data
        for head in self.config.heads:
            for (group, budget), answer in zip(without, found[head], strict=True):
                learnt = data.target.both_sides(budget.labels)
                if (data.target.both_sides(self._own(budget).labels) & ~learnt).any():
                    continue  # without this group a class is gone, and another score would be compared
                chosen = ChosenOn.of(answer, data.sets[0], data.target, self.config.pool)
                for test, part in zip(data.tests, self._by_test(answer), strict=True):
                    told = said([part], [chosen], test.units, data.target, self.config)
                    once = PatientDraws(test.units.groups, 1, seed=0)  # the value alone is wanted
                    scored = score(told, test.units.values, data.target, once, learnt=learnt)
                    self.tables.add_left_out(self._names("", head, [budget]), test, group, scored)

    def _keep(self, head: str, run: tuple[Budget, Answer], chosen: ChosenOn, told: Said) -> None:
        """Keeps the first run of a head for new images; not of nearest neighbours, nor of views side by side."""
        budget, answer = run
        if not answer.state or self.config.views == "frontal+lateral":
            return
        target, (mean, deviation) = self.data.target, self._scale
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
            {**answer.state, "feature_mean": mean.cpu(), "feature_deviation": deviation.cpu()},
        )

    @cached_property
    def _scale(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the features that the first run learns from, (d,) both."""
        features = self.settings[0].features(0)
        if self.config.standardise:
            return scale_of(features, self.data.train)
        return torch.zeros(features.shape[1]), torch.ones(features.shape[1])

    @cached_property
    def _source(self) -> Source:
        return Source.of(self.data.store, adaptor_digest(self.adaptors[0] if self.adaptors else None))

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
        return next(b for b in self.data.budgets if (b.amount, b.seed) == (budget.amount, budget.seed))


def _adaptors_for(store: Store, run_dir: str | Path) -> list[Adaptor]:
    adaptors = read_adaptors(run_dir)
    for adaptor in adaptors:
        adaptor.check_encoder(store, run_dir)
    if adaptors[0].encoders["image"].get("features") == "tokens":
        raise SettingsError(f"{run_dir}: its Adaptor was trained on tokens, a probe reads embeddings: train on those")
    return adaptors
