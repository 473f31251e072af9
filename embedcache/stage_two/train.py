"""Pre-training Adaptors on cached pairs: what is joined, what is resident, what trains together, what a run leaves.

Shape notation: n pairs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml

from embedcache.data.manifest import Manifest
from embedcache.device import pick_device
from embedcache.errors import SettingsError
from embedcache.fingerprint import fingerprint
from embedcache.output import write_text, write_whole
from embedcache.stage_two.adaptor import Adaptor
from embedcache.stage_two.batches import Planner
from embedcache.stage_two.config import TrainConfig
from embedcache.stage_two.distributed import Group, device_of_process, joined_group
from embedcache.stage_two.feed import Feed, fits
from embedcache.stage_two.fit import Course, Entry, fit, without_nan
from embedcache.stage_two.pairs import check_enough, pairs_of_split
from embedcache.stage_two.tensors import Join, join, opened
from embedcache.store.store import Store

_CHUNK = 4096
_OWN = ("lr", "weight_decay", "seed")  # in these, models that train together may differ
_SHORTCUT = (
    "attention is cross-modal: in training each image was embedded with its own report at hand, so losses and recalls "
    "are no measure of what it tells of an image alone"
)
_OF_THE_MACHINE = ("device", "data", "capture", "checkpoint_s", "tensorboard")  # these change no result


@dataclass(frozen=True)
class TrainResult:
    """A trained Adaptor, in evaluation mode with its best weights, and how it came about.

    Args:
        history: one entry an epoch: `epoch`, `train_loss`, `valid_loss`, the measures of `alignment` on the
            validation split, `lr` and `logit_scale` at its end, `pairs_per_s` of training, `seconds` in all.
        n_failed: manifest rows left out because stage one recorded a failure.
        missing: ids of manifest rows left out because a store does not account for them (`allow_missing`).
    """

    adaptor: Adaptor
    run_dir: Path
    best_epoch: int
    history: list[Entry]
    n_train: int
    n_valid: int
    n_failed: int
    missing: tuple[str, ...] = ()

    @property
    def warning(self) -> str:
        """One line where what was learnt may be a shortcut; blank else."""
        return _SHORTCUT if self.adaptor.config["attention"] == "cross-modal" else ""

    @property
    def best(self) -> Entry:
        """The entry of the best epoch."""
        return self.history[self.best_epoch]

    def to_json(self) -> dict[str, object]:
        """All but the Adaptor, JSON-ready."""
        counts = {"n_train": self.n_train, "n_valid": self.n_valid, "n_failed": self.n_failed}
        history = [without_nan(entry) for entry in self.history]
        left_out = {**counts, "missing": list(self.missing)}
        return {"run_dir": str(self.run_dir), "best_epoch": self.best_epoch, **left_out, "history": history}


def train(
    manifest: Manifest,
    image_store: Store | str | Path,
    text_store: Store | str | Path,
    run_dir: str | Path,
    *,
    config: TrainConfig | None = None,
) -> TrainResult:
    """Trains an Adaptor on the `train` split, stopping by the loss on `valid`.

    Source: *Freeze the backbones*, arXiv 2401.01179; equal texts are positives of each other, and a batch holds a
    report once. Without at least two `valid` rows the last epoch's weights are kept. A run that was stopped goes on
    from its checkpoint to the same weights; one that is finished is read and not run again.

    Args:
        run_dir: gets `config.yaml`, `metrics.jsonl`, `adaptor.safetensors` (best) with its `config.json`,
            `last.safetensors` and `checkpoint.safetensors`.

    Raises:
        JoinError, MissingIdsError: images and reports that do not belong together.
        RunStateError: the directory holds a run of other settings, stores or pairs.
        TrainingError: a loss that is not finite; the message names ids of the batch.
    """
    return _train(manifest, image_store, text_store, Path(run_dir), {"": config or TrainConfig()})[""]


def train_many(
    manifest: Manifest,
    image_store: Store | str | Path,
    text_store: Store | str | Path,
    run_dir: str | Path,
    *,
    configs: Mapping[str, TrainConfig],
) -> dict[str, TrainResult]:
    """Trains several Adaptors on the same pairs; those of one shape together, batched where that is faster.

    Each comes out as `train` would train it alone; with dropout, from other random masks.

    Args:
        run_dir: gets a run directory for each by its name, and `runs.csv`, which compares them.
        configs: by name; see `grid`.

    Raises:
        SettingsError: several models in several processes; else as `train`.
    """
    if not configs or not all(name and Path(name).name == name for name in configs):
        raise SettingsError(f"names of runs {list(configs)}, expected at least one, each fit for a directory")
    results = _train(manifest, image_store, text_store, Path(run_dir), dict(configs))
    table = runs_table(configs, results)
    write_whole(Path(run_dir) / "runs.csv", lambda path: table.to_csv(path, index=False))
    return results


def grid(config: TrainConfig, axes: Mapping[str, Sequence[Any]], *, n_seeds: int = 1) -> dict[str, TrainConfig]:
    """Every combination of some fields' values, each with seeds from the config's own on.

    Args:
        axes: values by field, such as `{"lr": [1e-4, 3e-4], "n_layers": [1, 2]}`.

    Returns:
        Configs by name, such as `lr=0.0001,n_layers=1,seed=0`.
    """
    configs = {"": config}
    seeds = {"seed": range(config.seed, config.seed + n_seeds)} if n_seeds > 1 else {}
    for name, values in {**axes, **seeds}.items():
        if not hasattr(config, name):
            raise SettingsError(f"{name!r} is no field of training, expected some of {', '.join(asdict(config))}")
        configs = {
            f"{before}{',' if before else ''}{name}={value}": replace(of, **{name: value})
            for before, of in configs.items()
            for value in values
        }
    return configs


def runs_table(configs: Mapping[str, TrainConfig], results: Mapping[str, TrainResult]) -> pd.DataFrame:
    """What differs between runs, and where each ended: a row for each, by validation loss."""
    settings = {name: asdict(config) for name, config in configs.items()}
    differing = [key for key in asdict(TrainConfig()) if len({str(of[key]) for of in settings.values()}) > 1]
    rows = []
    for name, result in results.items():
        shown = {k: v for k, v in result.best.items() if k.endswith(("recall@1", "recall@10", "median_rank"))}
        rows.append(
            {
                "run": name,
                **{key: settings[name][key] for key in differing},
                "best_epoch": result.best_epoch + 1,
                "epochs": len(result.history),
                "train_loss": result.best["train_loss"],
                "valid_loss": result.best["valid_loss"],
                **shown,
            }
        )
    return pd.DataFrame(rows).sort_values("valid_loss", kind="stable", ignore_index=True)


def _train(
    manifest: Manifest,
    image_store: Store | str | Path,
    text_store: Store | str | Path,
    run_dir: Path,
    configs: dict[str, TrainConfig],
) -> dict[str, TrainResult]:
    stores = opened(image_store), opened(text_store)
    allow_missing = all(config.allow_missing for config in configs.values())
    joined = join(manifest, *stores, allow_missing=allow_missing)
    results = {}
    with joined_group() as group:
        if group.size > 1 and len(configs) > 1:
            raise SettingsError(
                f"{len(configs)} runs in {group.size} processes: start several runs without torchrun; on one GPU they "
                "train together"
            )
        groups = _of_one_shape(configs)
        for k, members in enumerate(groups):
            data = _data(manifest, stores, joined, next(iter(members.values())), group)
            name = "checkpoint.safetensors" if len(groups) == 1 else f"checkpoint-{k}.safetensors"
            courses = _train_group(data, stores, run_dir, members, group, run_dir / name)
            for run, course in courses.items():
                results[run] = TrainResult(
                    course.adaptor,
                    course.run_dir,
                    course.best_epoch,
                    course.history,
                    len(data["train"].pairs),
                    len(data["valid"].pairs),
                    joined.n_failed,
                    joined.missing,
                )
    return {name: results[name] for name in configs}


def _of_one_shape(configs: Mapping[str, TrainConfig]) -> list[dict[str, TrainConfig]]:
    """Configs that differ in learning rate, weight decay and seed alone, group by group."""
    groups: dict[str, dict[str, TrainConfig]] = {}
    for name, config in configs.items():
        settings = asdict(config)
        own = _OWN if config.order == "shuffled" else _OWN[:-1]  # by shards, another seed has batches of other sizes
        key = fingerprint({field: value for field, value in settings.items() if field not in own})
        groups.setdefault(key, {})[name] = config
    return list(groups.values())


def _data(
    manifest: Manifest, stores: tuple[Store, Store], joined: Join, config: TrainConfig, group: Group
) -> dict[str, Feed]:
    device = pick_device(device_of_process(config.device))
    pairs = {split: pairs_of_split(manifest, *stores, joined, split, config) for split in ("train", "valid")}
    check_enough(pairs["train"], manifest, joined, config)
    if group.size > config.batch_size:
        raise SettingsError(f"{group.size} processes for batches of {config.batch_size}, expected no more than pairs")
    resident = config.data == "resident"
    if config.data == "auto" and config.order == "shuffled":
        resident, _ = fits(list(pairs.values()), device)
    return {
        "train": Feed(pairs["train"], device, resident=resident, share=group.share),
        "valid": Feed(pairs["valid"], device, resident=resident),
    }


def _train_group(
    data: Mapping[str, Feed],
    stores: tuple[Store, Store],
    run_dir: Path,
    configs: Mapping[str, TrainConfig],
    group: Group,
    checkpoint: Path,
) -> dict[str, Course]:
    """Trains models of one shape and leaves a run directory for each."""
    feed, valid = data["train"], data["valid"]
    config, pairs = next(iter(configs.values())), feed.pairs
    identity = fingerprint(
        {
            "configs": {
                name: {k: v for k, v in asdict(of).items() if k not in _OF_THE_MACHINE} for name, of in configs.items()
            },
            "stores": [store.fingerprint for store in stores],
            "pairs": [pairs.digest(), valid.pairs.digest()],
        }
    )
    courses = {}
    norms: Adaptor | None = None
    for name, of in configs.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(of.seed)
            adaptor = Adaptor.of_config(*stores, of)
        adaptor = adaptor.to(feed.device)
        if norms is None:
            _fit_norms(adaptor, feed)
            norms = adaptor
        else:
            adaptor.image_norm.load_state_dict(norms.image_norm.state_dict())
            adaptor.text_norm.load_state_dict(norms.text_norm.state_dict())
        courses[name] = Course(adaptor, of, run_dir / name)
    planner = Planner(
        pairs.reports,
        (pairs.image.n_views, pairs.text.n_views),
        pairs.image.store.shards_of(pairs.image.rows[pairs.image.index[:, 0]]) if config.order == "shards" else None,
        config.batch_size,
        config.report_once,
        config.mixup,
    )
    journals = {name: _Journal(course, stores) for name, course in courses.items()}

    def log(name: str, entry: Entry) -> None:
        journals[name].add(entry)

    try:
        fit(courses, feed, valid, planner, group=group, checkpoint=checkpoint, identity=identity, log=log)
    finally:
        for journal in journals.values():
            journal.close()
    group.wait()
    return courses


def _fit_norms(adaptor: Adaptor, feed: Feed) -> None:
    """Fits the normalisation of both inputs on the training pairs, each sample as it is."""
    for k, norm in enumerate((adaptor.image_norm, adaptor.text_norm)):
        sides = ((image, text)[k] for _, image, text in feed.chunks(_CHUNK))
        norm.fit(rows.values if rows.mask is None else rows.values[rows.mask] for rows in sides)


class _Journal:
    """Writes what a run says of itself; the directory is made with its first entry."""

    def __init__(self, course: Course, stores: tuple[Store, Store]) -> None:
        self._course, self._stores = course, stores
        self._lines: Any = None
        self._events: Any = None

    def add(self, entry: Entry) -> None:
        """One more line of `metrics.jsonl`, and of TensorBoard's event files where these are asked for."""
        if self._lines is None:
            self._begin()
        self._lines.write(json.dumps(without_nan(entry)) + "\n")
        self._lines.flush()
        if self._events is not None:
            for name, value in entry.items():
                self._events.add_scalar(name.replace("@", "_at_"), value, int(entry["epoch"]))

    def close(self) -> None:
        """Closes the files."""
        for file in (self._lines, self._events):
            if file is not None:
                file.close()

    def _begin(self) -> None:
        run_dir = self._course.run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        resolved = {"train": asdict(self._course.config), "stores": _described(*self._stores)}
        write_text(run_dir / "config.yaml", yaml.safe_dump(resolved, sort_keys=False))
        self._lines = (run_dir / "metrics.jsonl").open("w", encoding="utf-8")
        if self._course.config.tensorboard:
            self._events = _tensorboard()(str(run_dir / "tensorboard"))


def _tensorboard() -> Callable[[str], Any]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise SettingsError("tensorboard is not installed; run pip install 'embedcache[tensorboard]'") from error
    return SummaryWriter


def _described(image_store: Store, text_store: Store) -> dict[str, dict[str, str]]:
    return {
        store.modality: {
            "path": str(store.path),
            "encoder": str(store.encoder.get("name", "external")),
            "fingerprint": store.fingerprint,
            "encoder_fingerprint": store.encoder_fingerprint,
        }
        for store in (image_store, text_store)
    }
