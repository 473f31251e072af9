"""What a run says of itself, epoch by epoch: `metrics.jsonl` and `metrics.csv`; TensorBoard and W&B where asked for."""

from __future__ import annotations

import csv
import importlib
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from embedcache.errors import SettingsError
from embedcache.stage_two.config import SEEDS, TrainConfig
from embedcache.stage_two.fit import Course, Entry, without_nan

_NUMBERS_ALONE = {  # of all that W&B would send: no code, no git, no output, nothing of the machine
    "save_code": False,
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "console": "off",
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
}


class Journal:
    """Writes what a run says of itself, epoch by epoch.

    A run that goes on says all of its epochs again, so that its files end as those of a run that nobody stopped; at
    W&B it is a new run of the same name.
    """

    def __init__(self, course: Course) -> None:
        self._course = course
        self._lines: Any = None
        self._table: Any = None
        self._rows: Any = None
        self._events: Any = None
        self._run: Any = None

    def begin(self) -> None:
        """Begins the run at W&B, where this is asked for and the run is not finished; before training.

        Raises:
            SettingsError: it cannot be begun; says how to go on.
        """
        if self._course.config.wandb and not self._course.stopped:
            self._run = _begun(self._course.config, self._course.run_dir)

    def add(self, entry: Entry) -> None:
        """One more line of `metrics.jsonl` and `metrics.csv`, and of TensorBoard and W&B where these are asked for."""
        if self._lines is None:
            self._lines = (self._course.run_dir / "metrics.jsonl").open("w", encoding="utf-8")
            self._table = (self._course.run_dir / "metrics.csv").open("w", encoding="utf-8", newline="")
            self._rows = csv.DictWriter(self._table, list(entry), lineterminator="\n")
            self._rows.writeheader()
            if self._course.config.tensorboard and not self._course.stopped:
                self._events = event_writer()(str(self._course.run_dir / "tensorboard"))
        known = without_nan(entry)
        self._lines.write(json.dumps(known) + "\n")
        self._lines.flush()
        self._rows.writerow(known)
        self._table.flush()
        if self._events is not None:
            for name, value in entry.items():
                self._events.add_scalar(name.replace("@", "_at_"), value, int(entry["epoch"]))
        if self._run is not None:
            self._to_wandb(lambda: self._run.log(dict(entry), step=int(entry["epoch"])))

    def close(self) -> None:
        """Closes the files, and ends the run at W&B: as failed where training raised."""
        for file in (self._lines, self._table, self._events):
            if file is not None:
                file.close()
        if self._run is not None:
            failed = int(sys.exc_info()[0] is not None)
            self._to_wandb(lambda: self._run.finish(exit_code=failed))
            self._run = None

    def _to_wandb(self, call: Callable[[], object]) -> None:
        """Tells W&B; the first failure is warned of, and from then on it is told nothing."""
        try:
            call()
        except Exception as error:  # noqa: BLE001  # whatever a service fails with costs its own log, and no training
            self._run = None
            warnings.warn(
                f"{self._course.run_dir}: W&B failed ({_said(error)}) and is told nothing more; training goes on, "
                "and metrics.csv has every epoch",
                RuntimeWarning,
            )


def event_writer() -> Callable[[str], Any]:
    """What writes TensorBoard's event files into a folder.

    Raises:
        SettingsError: it is not installed; says how.
    """
    return _of_extra("torch.utils.tensorboard", "tensorboard").SummaryWriter


def wandb_library() -> Any:
    """The library of W&B.

    Raises:
        SettingsError: it is not installed; says how.
    """
    return _of_extra("wandb", "wandb")


def _of_extra(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SettingsError(f"{extra} is not installed; run pip install 'embedcache[{extra}]'") from error


def _begun(config: TrainConfig, run_dir: Path) -> Any:
    """A run at W&B, or below the run's directory where WANDB_MODE is `offline`."""
    wandb = wandb_library()
    known = wandb.Settings.model_fields  # those with an x are not in every version
    try:
        return wandb.init(
            project=config.wandb,
            name="/".join(run_dir.absolute().parts[-3 if run_dir.parent.name == SEEDS else -1 :]),
            config=asdict(config),
            dir=str(run_dir),
            reinit="create_new",  # several runs train together
            settings=wandb.Settings(**{name: value for name, value in _NUMBERS_ALONE.items() if name in known}),
        )
    except (wandb.errors.Error, OSError, ValueError) as error:
        raise SettingsError(
            f"W&B cannot begin a run in project {config.wandb!r} ({_said(error)}); nothing was trained: run 'wandb "
            "login', or set WANDB_MODE=offline and send it later with 'wandb sync'"
        ) from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
