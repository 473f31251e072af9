"""The tables of a probe: scores with intervals, gains over controls, calibration, subgroups, predictions.

Shape notation: u units, c outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from embedcache.metrics.intervals import PatientDraws, difference
from embedcache.output import write_tables
from embedcache.stage_two.answers import Answer
from embedcache.stage_two.calibrating import Calibrator, calibration_rows
from embedcache.stage_two.comparisons import compared, headline
from embedcache.stage_two.kept import KeptHead, write_all
from embedcache.stage_two.label_budget import Budget
from embedcache.stage_two.probe_config import ProbeConfig, Unit
from embedcache.stage_two.samples import Units
from embedcache.stage_two.score_rows import Row, adjust_p_values, interval_columns
from embedcache.stage_two.scoring import MACRO, ChosenOn, Said, Scored
from embedcache.stage_two.subgroups import subgroup_rows
from embedcache.stage_two.targets import Target

INTERNAL, EXTERNAL, DIFFERENCE = "internal", "external", "difference"
TABLES = ("scores", "gains", "calibration", "subgroups")
LEFT_OUT_NAME = "left_out.csv"
_AMOUNT = ("head", "fraction", "shots", "n_train", "n_valid")
_EMPTY = {  # columns of a table without rows
    "scores": (),
    "gains": ("test", "control", *_AMOUNT, "metric", "class", "value", "low", "high", "p_value", "method", "p_holm"),
    "calibration": (*_AMOUNT, "test", "class", "method"),
    "subgroups": (*_AMOUNT, "test", "class", "attribute", "group", "n", "n_positive", "suppressed"),
}


@dataclass(frozen=True)
class ProbeResult:
    """Scores of one label, or set of labels, on one store.

    Every interval holds 95%. Rows name a `control` (`""` is the result itself), `head`, `fraction` (NaN for shots) and
    `shots` (0 for a fraction).

    Args:
        scores: a row per test set, control, head, fraction, metric and class: `value`, `low`, `high` (over patients and
            seeds), `patients_low`, `patients_high`, `seeds_low`, `seeds_high` (over either alone), `n_train`, `n_valid`
            (labels that settings were chosen by: of images, where these are pooled by probability), `n_test` and
            `n_positive` (units), `n_seeds`, `choice` (`valid`, `folds` or `fixed`), and `headline`, true for the metric
            that settings are compared by.
        gains: how much the result exceeds each control: `value`, `low`, `high`, `p_value` (paired; `method` says how),
            `p_holm` (adjusted for the number of controls).
        calibration: Brier score, ECE, slope and intercept of the result, before and after.
        subgroups: the result within sex, age, view and site, at the largest fraction or number of shots.
        predictions: of the result, a row per unit, class, head, fraction and seed; `group` is what intervals resample,
            `scorable` whether the class has a score.
        label: as asked for.
        n_failed: manifest rows left out because stage one recorded a failure.
        warning: one line where the manifest's splits share patients, studies or files; blank where they do not.
        notes: what is to be known of these scores.
        kept: by name each head that new images can be shown to: its first run at the largest amount of labels.
        left_out: where groups of training patients were left out in turn, a row per test set, head, fraction and group:
            the headline score of the first run without it.
    """

    scores: pd.DataFrame
    gains: pd.DataFrame
    calibration: pd.DataFrame
    subgroups: pd.DataFrame
    predictions: pd.DataFrame
    label: str
    n_failed: int
    warning: str
    notes: tuple[str, ...] = ()
    kept: Mapping[str, KeptHead] = field(default_factory=dict)
    left_out: pd.DataFrame = field(default_factory=pd.DataFrame)

    def write(self, folder: str | Path) -> None:
        """Writes `scores.csv`, `gains.csv`, `calibration.csv`, `subgroups.csv`, `predictions.parquet` and the heads,
        `head-<name>.safetensors`; where groups were left out also `left_out.csv`.

        Raises:
            OutputError: they cannot be written there.
        """
        tables = {f"{name}.csv": getattr(self, name) for name in TABLES}
        if len(self.left_out):
            tables[LEFT_OUT_NAME] = self.left_out
        else:
            (Path(folder) / LEFT_OUT_NAME).unlink(missing_ok=True)
        write_tables(Path(folder), tables | {"predictions.parquet": self.predictions})
        write_all(Path(folder), "head", self.kept)


@dataclass(frozen=True, eq=False)
class HeldOut:
    """What heads are scored on: units whose labels chose nothing, and draws of their patients."""

    name: str
    units: Units
    draws: PatientDraws

    @property
    def n_known(self) -> int:
        """Units that have any label."""
        return int((~np.isnan(self.units.values)).any(axis=1).sum())


class Tables:
    """Gathers the rows of a `ProbeResult`.

    Attributes:
        most: the largest amount of labels, as a budget has it.
    """

    def __init__(self, target: Target, config: ProbeConfig) -> None:
        self._target, self._config = target, config
        self._headline = headline(target, config.protocol)
        self.most = (max(config.fractions), 0) if config.fractions else (-1.0, max(config.shots))
        self._rows: dict[str, list[Row]] = {name: [] for name in TABLES}
        self._predicted: list[pd.DataFrame] = []
        self._left_out: list[Row] = []
        self._notes: list[str] = []

    def result(self, *, n_failed: int, warning: str, kept: Mapping[str, KeptHead]) -> ProbeResult:
        """All of them."""
        adjust_p_values(self._rows["gains"], ("test", "head", "fraction", "shots"))
        tables = {
            name: pd.DataFrame(rows) if rows else pd.DataFrame(columns=list(_EMPTY[name]))
            for name, rows in self._rows.items()
        }
        return ProbeResult(
            **tables,
            predictions=_compact(pd.concat(self._predicted, ignore_index=True)),
            label=self._target.name,
            n_failed=n_failed,
            warning=warning,
            notes=tuple(self._notes),
            kept=kept,
            left_out=pd.DataFrame(self._left_out),
        )

    def note(self, words: str) -> None:
        """Something to be known of these scores."""
        self._notes.append(words)

    def add_scores(self, names: Row, test: HeldOut, scored: Scored, own: Sequence[Budget], n_turns: int) -> None:
        """Every score of a head on a test set.

        Args:
            n_turns: Adaptors that its runs took in turn, whose runs are averaged: they are no independent trainings.
            own: budgets with their own labels: of a class, those are counted that are not blank.
        """
        counts = self._counts(test, own)
        sampled = scored.sampled.by_turn(n_turns)
        for j, (metric, class_name) in enumerate(scored.names):
            self._rows["scores"].append(
                {"test": test.name, **names, "metric": metric, "class": class_name}
                | interval_columns(sampled[..., j])
                | counts.get(class_name, {})
                | {"headline": self._is_headline(metric, class_name)}
            )

    def _is_headline(self, metric: str, class_name: str) -> bool:
        """Whether settings are compared by it, or by its mean."""
        return metric == self._headline[0] and (class_name == self._headline[1] or self._headline[1] == MACRO)

    def _counts(self, test: HeldOut, own: Sequence[Budget]) -> dict[str, Row]:
        """For each class, and for a binary task, labels that are known, and units that have it."""
        target = self._target
        tested = target.one_vs_rest(test.units.values)
        learnt, chosen = (
            np.max([(~np.isnan(target.one_vs_rest(part))).sum(axis=0) for part in parts], axis=0)
            for parts in ([b.labels for b in own], [b.valid_labels for b in own])
        )
        return {
            name if target.n_outputs > 1 else "": {
                "n_train": int(learnt[k]),
                "n_valid": int(chosen[k]),
                "n_test": int((~np.isnan(tested[:, k])).sum()),
                "n_positive": int((tested[:, k] == 1).sum()),
            }
            for k, name in enumerate(target.classes)
        }

    def add_difference(self, names: Row, internal: Scored, external: Scored, *, n_turns: int) -> None:
        """How much better a head is on its own dataset; macro means are over the classes that both can score.

        Args:
            n_turns: as of `add_scores`.
        """
        common = internal.scorable & external.scorable
        for metric, class_name in internal.names:
            if class_name == MACRO:
                a, b = (scored.macro(metric, self._target, common) for scored in (internal, external))
            else:
                a, b = (scored.of(metric, class_name) for scored in (internal, external))
            self._rows["scores"].append(
                {
                    "test": DIFFERENCE,
                    **names,
                    "metric": metric,
                    "class": class_name,
                    **asdict(difference(a.by_turn(n_turns), b.by_turn(n_turns))),
                }
                | {"headline": self._is_headline(metric, class_name)}
            )

    def add_details(
        self,
        names: Row,
        test: HeldOut,
        told: Said,
        chosen: Sequence[ChosenOn],
        runs: Sequence[tuple[Budget, Answer]],
        scorable: np.ndarray,
    ) -> None:
        """Calibration, subgroups and predictions of a head on a test set."""
        names = {k: names[k] for k in _AMOUNT} | {"test": test.name}
        values = test.units.values
        rows = calibration_rows(told, chosen, values, self._target, test.draws)
        self._rows["calibration"] += [names | row for row in rows]
        if runs[0][0].amount == self.most:
            rows = subgroup_rows(told, test.units.frame, values, self._target, test.draws)
            self._rows["subgroups"] += [names | row for row in rows]
        for s, (budget, answer) in enumerate(runs):
            flat = [k for k in range(self._target.n_outputs) if np.ptp(told.probabilities[s, :, k]) == 0]
            if flat:
                self.note(
                    f"{names['head']}, seed {budget.seed}, {len(budget.rows)} labels, {test.name}: says the same of "
                    f"every {self._config.unit} for {', '.join(self._target.classes[k] for k in flat)}"
                )
            self._predicted.append(self._predictions(names, test, told, chosen[s], s, budget, answer, scorable))

    def _predictions(
        self,
        names: Row,
        test: HeldOut,
        told: Said,
        chosen: ChosenOn,
        s: int,
        budget: Budget,
        answer: Answer,
        scorable: np.ndarray,
    ) -> pd.DataFrame:
        units, c = test.units, self._target.n_outputs
        p = told.probabilities[s]
        platt = [Calibrator.fitted("platt", chosen, k, self._target) for k in range(c)]
        table = {
            "id": np.repeat(_plain(units.keys, self._config.unit), c),
            "patient": np.repeat(units.frame["patient"].to_numpy(object), c),
            "group": np.repeat(units.groups, c),
            "class": np.tile(np.array(self._target.classes, object), len(units.keys)),
            "label": self._target.one_vs_rest(units.values).ravel(),
            "scorable": np.tile(scorable, len(units.keys)),
            "probability": p.ravel(),
            "threshold": np.tile(told.thresholds[s], len(units.keys)),
            "calibrated": np.stack([of(p[:, k]) for k, of in enumerate(platt)], axis=1).ravel(),
        }
        if self._config.prevalence is not None:
            at = [of.at(p[:, k], self._config.prevalence) for k, of in enumerate(platt)]
            table["at_prevalence"] = np.stack(at, axis=1).ravel()
        return pd.DataFrame(table).assign(**names, seed=budget.seed, setting=answer.setting)

    def add_left_out(self, names: Row, test: HeldOut, group: int, scored: Scored) -> None:
        """The score of a head that was fitted without a group of training patients."""
        kept = {name: names[name] for name in ("head", "fraction", "shots")}
        value = float(scored.of(*self._headline).value[0])
        self._left_out.append({"test": test.name, **kept, "group": group, "value": value})

    def add_gains(
        self, names: Row, test: HeldOut, result: tuple[Said, Scored], control: tuple[Said, Scored], n_turns: int
    ) -> None:
        """How much the result of a head exceeds a control.

        Args:
            n_turns: Adaptors that runs of the result took in turn.
        """
        metric, class_name = self._headline
        found = compared(result, control, test.units.values, self._target, test.draws, self._headline, n_turns=n_turns)
        kept = {"control": names["control"], **{k: names[k] for k in _AMOUNT}}
        self._rows["gains"].append({"test": test.name, **kept, "metric": metric, "class": class_name, **asdict(found)})


def _plain(keys: np.ndarray, unit: Unit) -> np.ndarray:
    """Names of units as the manifest has them."""
    known = {"image": (), "study": ("id",), "patient": ("patient", "study", "id")}[unit]
    return np.array([rest if kind in known and rest else key for key in keys for kind, _, rest in [key.partition(":")]])


def _compact(predictions: pd.DataFrame) -> pd.DataFrame:
    """Names once each, and in single precision what no score is made of."""
    kinds = dict.fromkeys(("id", "patient", "group", "class", "head", "test"), "category")
    numbers = ("label", "calibrated", "at_prevalence", "setting")
    return predictions.astype(kinds | {name: np.float32 for name in numbers if name in predictions})
