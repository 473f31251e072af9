"""The tables of a segmentation: scores of masks with intervals, gains over controls, what each image got.

Shape notation: s seeds, n test images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from embedcache.metrics.intervals import PatientDraws, Sampled, bootstrap
from embedcache.metrics.masks import NAMES, Overlap
from embedcache.metrics.paired import paired_bootstrap
from embedcache.output import write_tables
from embedcache.stage_two.kept import KeptDecoder, write_all
from embedcache.stage_two.score_rows import Row, adjust_p_values, interval_columns

TABLES = ("scores", "gains")
_GAINED = ("dice", "dice_on_positives")
_GAINS = (
    "control", "decoder", "fraction", "metric", "value", "low", "high", "p_value", "method", "p_holm",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class SegmentResult:
    """Scores of masks on one store. Every interval holds 95%.

    Args:
        scores: a row per control (`""` is the result itself), decoder, fraction and metric of `metrics.masks`: `value`,
            `low`, `high` (over patients and seeds), `patients_low`, `patients_high`, `seeds_low`, `seeds_high`,
            `n_train`, `n_train_positive`, `n_valid` (masks that the epoch was chosen by), `n_test`, `n_positive`
            (images with a mask), `n_seeds`, `choice` (`valid` or `fixed`).
        gains: how much the result exceeds each control in `dice` and `dice_on_positives`, on the same patients.
        images: of the result, a row per test image, decoder, fraction and seed: its Dice, IoU and pixels.
        n_failed: manifest rows left out because stage one recorded a failure.
        warning: one line where the manifest's splits share patients or files; blank where they do not.
        notes: what is to be known of these scores, a collapse among them.
        kept: the decoder of the first seed at the largest fraction, by name.
    """

    scores: pd.DataFrame
    gains: pd.DataFrame
    images: pd.DataFrame
    n_failed: int
    warning: str
    notes: tuple[str, ...] = ()
    kept: Mapping[str, KeptDecoder] = field(default_factory=dict)

    def write(self, folder: str | Path) -> None:
        """Writes `scores.csv`, `gains.csv`, `images.parquet` and the decoders, `decoder-<name>.safetensors`.

        Raises:
            OutputError: they cannot be written there.
        """
        folder = Path(folder)
        write_tables(folder, {f"{name}.csv": getattr(self, name) for name in TABLES} | {"images.parquet": self.images})
        write_all(folder, "decoder", self.kept)


@dataclass(frozen=True, eq=False)
class Judged:
    """What s runs of one setting, decoder and fraction predicted for the test images.

    Args:
        names: `control`, `decoder`, `fraction`.
        counts: `n_train` and so on, the columns of `scores`.
        seeds: of each run, (s,).
        n_turns: Adaptors that the runs took in turn, whose runs are averaged: they are no independent trainings.
    """

    names: Row
    counts: Row
    seeds: Sequence[int]
    overlap: Overlap
    n_turns: int = 0


class MaskTables:
    """Gathers the rows of a `SegmentResult`.

    Args:
        frame: the manifest's table of the test images, n rows.
        draws: of their patients.
    """

    def __init__(self, frame: pd.DataFrame, draws: PatientDraws) -> None:
        self._frame, self._draws = frame, draws
        self._scores: list[Row] = []
        self._gains: list[Row] = []
        self._images: list[pd.DataFrame] = []
        self._notes: list[str] = []
        self._results: dict[tuple[object, object], tuple[Sampled, int]] = {}

    def note(self, words: str) -> None:
        """Something to be known of these scores."""
        self._notes.append(words)

    def add(self, judged: Judged) -> None:
        """The scores of a setting; of a control also what the result has over it, which was added before."""
        sampled = bootstrap(judged.overlap.scores, self._draws)
        shown = sampled.by_turn(judged.n_turns)
        for j, metric in enumerate(NAMES):
            columns = interval_columns(shown[..., j])
            self._scores.append({**judged.names, "metric": metric, **columns, **judged.counts})
        control, key = judged.names["control"], (judged.names["decoder"], judged.names["fraction"])
        if control:
            self._add_gains(judged, *self._results[key], sampled)
        else:
            self._results[key] = sampled, judged.n_turns
            self._images += [self._of_images(judged, s) for s in range(len(judged.seeds))]
        self._say_collapse(judged, sampled)

    def result(self, *, n_failed: int, warning: str, kept: Mapping[str, KeptDecoder]) -> SegmentResult:
        """All of them."""
        adjust_p_values(self._gains, ("decoder", "fraction", "metric"))
        return SegmentResult(
            pd.DataFrame(self._scores),
            pd.DataFrame(self._gains, columns=list(_GAINS)),
            pd.concat(self._images, ignore_index=True),
            n_failed,
            warning,
            tuple(self._notes),
            kept,
        )

    def _add_gains(self, judged: Judged, result: Sampled, n_turns: int, control: Sampled) -> None:
        result, control = result.by_turn(n_turns), control.by_turn(n_turns)
        for metric in _GAINED:
            j = NAMES.index(metric)
            found = paired_bootstrap(result[..., j], control[..., j])
            self._gains.append({**judged.names, "metric": metric, **asdict(found)})

    def _of_images(self, judged: Judged, s: int) -> pd.DataFrame:
        overlap = judged.overlap
        return pd.DataFrame(
            {
                "id": self._frame["id"].to_numpy(object),
                "patient": self._frame["patient"].to_numpy(object),
                "dice": overlap.dice[s].astype(np.float32),
                "iou": overlap.iou[s].astype(np.float32),
                "predicted_pixels": overlap.predicted[s],
                "true_pixels": overlap.true,
                "decoder": judged.names["decoder"],
                "fraction": judged.names["fraction"],
                "seed": judged.seeds[s],
            }
        )

    def _say_collapse(self, judged: Judged, sampled: Sampled) -> None:
        silent = judged.overlap.says_nothing
        if not silent.any() or judged.names["control"] == "mean-mask":  # which is no model
            return
        who = f"{judged.names['control'] or 'result'}, {judged.names['decoder']} decoder"
        runs = "" if silent.all() and len(silent) == 1 else f" in {int(silent.sum())} of {len(silent)} runs"
        worth = float(sampled.value[0, NAMES.index("empty_mask_dice")])
        self.note(
            f"{who}, {judged.counts['n_train']} masks: predicts an empty mask for every image{runs}: it has collapsed, "
            f"and its Dice of {worth:.3f} is what an empty mask scores"
        )
