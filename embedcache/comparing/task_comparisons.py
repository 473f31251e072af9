"""The comparisons that a dataset allows, task by task, from what the pairs' runs have left.

Shape notation: u units, s seeds, c outputs, t columns of labels, k draws.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from embedcache.comparing.study import Pair, Study, Task, read_table
from embedcache.errors import RunStateError
from embedcache.metrics.intervals import PatientDraws, Sampled, bootstrap
from embedcache.metrics.masks import NAMES as MASK_METRICS
from embedcache.metrics.masks import Overlap
from embedcache.metrics.paired import PairedDifference, compare_aurocs, paired_bootstrap
from embedcache.metrics.retrieval import mean_of
from embedcache.stage_two.comparisons import compared, headline
from embedcache.stage_two.heads import TRAINED
from embedcache.stage_two.kept import mask_folder, probe_folder
from embedcache.stage_two.probe_tables import LEFT_OUT_NAME
from embedcache.stage_two.scoring import Said, Scored, score
from embedcache.stage_two.targets import Target

LEAST_DRAWS = 2000
_MOST_COUNTS = 1e9  # draws times patients: bounds memory
_ENOUGH = 0.4  # of the draws asked for, a hundred for each comparison: fewer give no adjusted p-value of 0.05


Pairs = tuple[Pair, Pair]


class Outcome(NamedTuple):
    """What a comparison gives.

    Args:
        n_units: images, studies, patients or queries that it is of.
        n_runs: trainings that each side answers with, from as many seeds; 0 where nothing in them is drawn by chance.
    """

    difference: PairedDifference
    n_units: int
    n_runs: int = 0


class _Amount(NamedTuple):
    """Runs of a probe that differ in their seed alone; a fraction below 0 stands for none."""

    test: str
    head: str
    fraction: float
    shots: int

    @property
    def words(self) -> str:
        of = f"{100 * self.fraction:.3g}% of the labels" if self.fraction >= 0 else f"{self.shots} labels a class"
        return f"{self.head}, {of}" + ("" if self.test == "internal" else f", {self.test}")


@dataclass(frozen=True)
class Compared:
    """One comparison that is to be made.

    Args:
        names: columns of its row.
        make: from a number of draws.
    """

    names: dict[str, object]
    pairs: Pairs
    make: Callable[[int], Outcome]


def comparisons(study: Study, task: Task) -> Iterator[Compared]:
    """All that are to be made on one dataset, between pairs that differ in one encoder."""
    pairs = [(a, b) for a, b in combinations(study.pairs, 2) if (a.image == b.image) != (a.text == b.text)]
    if not pairs:
        return
    for label in task.labels:
        yield from _of_probes(study, task, label, pairs)
    if task.segment is not None:
        yield from _of_masks(study, task, pairs)
    if task.retrieve is not None:
        yield from _of_retrieval(study, task, [(a, b) for a, b in pairs if a.text in task.texts])
    if task.zeroshot is not None:
        yield from _of_prompts(study, task, [(a, b) for a, b in pairs if a.text])


def _of_probes(study: Study, task: Task, label: str, pairs: Sequence[Pairs]) -> Iterator[Compared]:
    target = Target.of(task.manifest, label)
    by = headline(target, task.probe.protocol)

    @cache
    def answers(pair: Pair) -> dict[_Amount, _Answers]:
        path = study.run_dir / probe_folder(study.folder(task, pair), label) / "predictions.parquet"
        table = pd.read_parquet(path)
        by_amount = table.assign(fraction=table["fraction"].fillna(-1)).groupby(
            list(_Amount._fields), sort=False, observed=True
        )
        return {_Amount(*amount): _Answers.of(part, target, path) for amount, part in by_amount}

    @cache
    def draws_of(amount: _Amount, n_draws: int) -> PatientDraws:
        return _draws(answers(pairs[0][0])[amount].groups, n_draws)

    @cache
    def scored(pair: Pair, amount: _Amount, n_draws: int) -> Scored:
        of = answers(pair)[amount]
        return score(of.said, of.values, target, draws_of(amount, n_draws), learnt=of.scorable)

    @cache
    def left_out(pair: Pair, amount: _Amount) -> pd.Series | None:
        path = study.run_dir / probe_folder(study.folder(task, pair), label) / LEFT_OUT_NAME
        if not path.is_file():
            return None
        table = read_table(path).fillna({"fraction": -1})
        mine = table[(table[list(_Amount._fields)] == list(amount)).all(axis=1)]
        return mine.set_index("group")["value"].dropna()

    def make(a: Pair, b: Pair, amount: _Amount, n_draws: int) -> Outcome:
        without = [left_out(pair, amount) for pair in (a, b)]
        less = None
        if without[0] is not None and without[1] is not None:  # the groups are the same, as the patients are
            less = (without[0] - without[1]).dropna().to_numpy()
            less = less if len(less) > 1 else None
        of_a, of_b = (answers(pair)[amount] for pair in (a, b))
        of_a.check_same(of_b)
        first, second = ((of.said, scored(pair, amount, n_draws)) for of, pair in ((of_a, a), (of_b, b)))
        found = compared(
            first,
            second,
            of_a.values,
            target,
            draws_of(amount, n_draws),
            by,
            n_turns=study.n_adaptors(a),
            left_out=less,
        )
        n_runs = min(len(of.said.probabilities) for of in (of_a, of_b))
        is_drawn = amount.head in TRAINED or less is None  # else the head is the only one that these labels give
        return Outcome(found, len(of_a.values), _trainings(study, a, n_runs) if is_drawn or a.text else 0)

    for amount in answers(pairs[0][0]):
        metric = " ".join(filter(None, by))
        names = _names(task, "probe", amount.words, metric, label=label, head=amount.head, test=amount.test)
        names |= {"fraction": amount.fraction if amount.fraction >= 0 else np.nan, "shots": amount.shots}
        yield from (Compared(names, (a, b), partial(make, a, b, amount)) for a, b in pairs)


@dataclass(frozen=True, eq=False)
class _Answers:
    """What the runs of one head say of a test set, as a probe wrote it.

    Args:
        path: of the file.
        ids: of the units, (u,).
        groups: their patients, (u,).
        values: labels, (u, t).
        scorable: outputs that have a score, (c,) bool.
    """

    path: Path
    ids: np.ndarray
    groups: np.ndarray
    values: np.ndarray
    scorable: np.ndarray
    said: Said

    @classmethod
    def of(cls, table: pd.DataFrame, target: Target, path: Path) -> _Answers:
        c, s = target.n_outputs, table["seed"].nunique()
        u = len(table) // (s * c)
        if len(table) != s * u * c:
            raise RunStateError(f"{path}: {len(table)} rows for {s} runs and {c} outputs; run the probe again")
        first = table.iloc[: u * c : c]
        sides = table["label"].to_numpy(np.float64)[: u * c].reshape(u, c)
        values = sides
        if target.task == "multi-class":
            known = ~np.isnan(sides).any(axis=1)
            values = np.where(known, np.nan_to_num(sides).argmax(axis=1), np.nan)[:, None]
        shape = (s, u, c)
        return cls(
            path,
            first["id"].to_numpy(object),
            first["group"].to_numpy(object),
            values,
            table["scorable"].to_numpy(bool)[:c],
            Said(
                table["probability"].to_numpy(np.float64).reshape(shape),
                table["threshold"].to_numpy(np.float64).reshape(shape)[:, 0],
            ),
        )

    def check_same(self, other: _Answers) -> None:
        """Refuses answers about other units, or other labels of them.

        Raises:
            RunStateError: they differ.
        """
        if not np.array_equal(self.ids, other.ids) or not np.array_equal(self.values, other.values, equal_nan=True):
            raise RunStateError(
                f"{self.path} and {other.path}: not of the same images and labels; run both of one manifest"
            )


def _of_masks(study: Study, task: Task, pairs: Sequence[Pairs]) -> Iterator[Compared]:
    groups = dict(zip(task.manifest.frame["id"], task.manifest.groups(), strict=True))

    @cache
    def images(pair: Pair) -> dict[tuple[str, float], pd.DataFrame]:
        path = study.run_dir / mask_folder(study.folder(task, pair)) / "images.parquet"
        return {
            (str(d), float(f)): part
            for (d, f), part in pd.read_parquet(path).groupby(["decoder", "fraction"], sort=False)
        }

    @cache
    def sampled(pair: Pair, key: tuple[str, float], n_draws: int) -> Sampled:
        table = images(pair)[key]
        ids = table["id"][table["seed"] == table["seed"].iloc[0]]
        shape = (-1, len(ids))
        dice, predicted, true = (
            table[name].to_numpy(np.float64).reshape(shape) for name in ("dice", "predicted_pixels", "true_pixels")
        )
        both = np.where(predicted + true > 0, np.rint(dice * (predicted + true) / 2), 0)
        overlap = Overlap(both.astype(np.int64), predicted.astype(np.int64), true[0].astype(np.int64))
        each = bootstrap(overlap.scores, _draws(ids.map(groups).to_numpy(object), n_draws))
        return each.by_turn(study.n_adaptors(pair))

    def make(a: Pair, b: Pair, key: tuple[str, float], metric: str, n_draws: int) -> Outcome:
        j = MASK_METRICS.index(metric)
        sides = [sampled(pair, key, n_draws)[..., j] for pair in (a, b)]
        n_runs = min(len(side.value) for side in sides)
        return Outcome(paired_bootstrap(*sides), images(a)[key]["id"].nunique(), _trainings(study, a, n_runs))

    for (decoder, fraction), metric in product(images(pairs[0][0]), ("dice", "dice_on_positives")):
        setting = f"{decoder} decoder, {100 * fraction:.3g}% of the masks"
        names = _names(task, "masks", setting, metric.replace("_", " "), head=decoder) | {"fraction": fraction}
        key = decoder, fraction
        yield from (Compared(names, (a, b), partial(make, a, b, key, metric)) for a, b in pairs)


def _of_retrieval(study: Study, task: Task, pairs: Sequence[Pairs]) -> Iterator[Compared]:
    frame, groups = task.manifest.frame, task.manifest.groups()
    group_of = {
        "image_to_report": dict(zip(frame["id"], groups, strict=True)),
        "report_to_image": dict(zip(frame["report_id"][::-1], groups[::-1], strict=True)),
    }
    k = max(task.retrieve.at) if task.retrieve is not None else 0

    @cache
    def hits(pair: Pair, direction: str) -> pd.DataFrame:
        found = pd.read_parquet(study.run_dir / study.folder(task, pair) / "retrieval" / "first_own.parquet")
        asked = found[found["direction"] == direction]
        return asked.assign(hit=asked["first_own"] <= k).pivot(index="query", columns="seed", values="hit")

    def make(a: Pair, b: Pair, direction: str, n_draws: int) -> Outcome:
        # texts may be equal to one encoder
        first, second = hits(a, direction).align(hits(b, direction), join="inner", axis=0)
        draws = _draws(first.index.map(group_of[direction]).to_numpy(object), n_draws)
        sides = [
            Sampled.of_runs([bootstrap(mean_of(of_seed), draws) for of_seed in side.to_numpy(np.float64).T])
            for side in (first, second)
        ]
        return Outcome(paired_bootstrap(*sides), len(first), study.n_adaptors(a))

    for direction in group_of:
        names = _names(task, "retrieval", direction.replace("_", " "), f"recall@{k}")
        yield from (Compared(names, (a, b), partial(make, a, b, direction)) for a, b in pairs)


def _of_prompts(study: Study, task: Task, pairs: Sequence[Pairs]) -> Iterator[Compared]:
    groups = dict(zip(task.manifest.frame["id"], task.manifest.groups(), strict=True))

    @cache
    def said(pair: Pair) -> dict[str, pd.DataFrame]:
        found = pd.read_parquet(study.run_dir / study.folder(task, pair) / "zeroshot" / "predictions.parquet")
        by_label = found.dropna(subset="truth").groupby("label", sort=False, observed=True)
        return {label: of.set_index(["id", "truth", "seed"])["probability"].unstack() for label, of in by_label}

    def make(a: Pair, b: Pair, label: str, n_draws: int) -> Outcome:
        first = said(a)[label]
        second = said(b)[label].loc[first.index]
        ids, truth = first.index.get_level_values("id"), first.index.get_level_values("truth").to_numpy(np.int64)
        draws = _draws(ids.map(groups).to_numpy(object), n_draws)
        p, q = (side.to_numpy(np.float64).T for side in (first, second))
        return Outcome(compare_aurocs(truth, p, q, draws=draws), len(first), study.n_adaptors(a))

    for label in said(pairs[0][0]) if pairs else ():
        names = _names(task, "zero-shot", "prompts", "auroc", label=label)
        yield from (Compared(names, (a, b), partial(make, a, b, label)) for a, b in pairs)


def _trainings(study: Study, pair: Pair, n_runs: int) -> int:
    """How many independent trainings are among runs on a pair: those that share an Adaptor are one."""
    return min(n_runs, study.n_adaptors(pair)) if pair.text else n_runs


def _names(
    task: Task, kind: str, setting: str, metric: str, *, label: str = "", head: str = "", test: str = "internal"
) -> dict[str, object]:
    named = {"data": task.name, "task": kind, "label": label, "setting": setting, "metric": metric}
    return {**named, "head": head, "fraction": np.nan, "shots": 0, "test": test}


def _draws(groups: np.ndarray, n_draws: int) -> PatientDraws:
    n_patients = len(np.unique(groups))
    n = max(min(n_draws, int(_MOST_COUNTS / n_patients)), LEAST_DRAWS)
    if n < _ENOUGH * n_draws:
        warnings.warn(
            f"{n} draws of {n_patients} patients are too few to call a difference real among so many comparisons; "
            "compare fewer encoders, labels or fractions at once"
        )
    return PatientDraws(groups, n, seed=0)
