"""Pre-training Adaptors on cached pairs: what is joined, what is resident, what trains together, what a run leaves.

Shape notation: n pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml

from embedcache.data.manifest import Manifest
from embedcache.errors import RunStateError, SettingsError
from embedcache.fingerprint import fingerprint
from embedcache.output import write_text, write_whole
from embedcache.stage_two.adaptor import Adaptor
from embedcache.stage_two.batches import Planner
from embedcache.stage_two.config import OF_THE_MACHINE, RUN_CONFIG, TrainConfig
from embedcache.stage_two.distributed import Group, joined_group
from embedcache.stage_two.feed import Feed, fits
from embedcache.stage_two.fit import Course, Entry, fit, without_nan
from embedcache.stage_two.journal import Journal, event_writer, wandb_library
from embedcache.stage_two.leaks import write_trained_on
from embedcache.stage_two.pairs import Pairs, check_enough, pairs_of_split
from embedcache.stage_two.tensors import Join, join, opened
from embedcache.store.store import Store

_OWN = ("lr", "weight_decay", "n_seeds", "seed")  # in these, models that train together may differ
_SHORTCUT = (
    "attention is cross-modal: in training each image was embedded with its own report at hand, so losses and recalls "
    "are no measure of what it tells of an image alone"
)
_OF_DATA = ("positives", "image", "text", "views", "data", "order", "report_once")


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
        run_dir: gets `config.yaml`, `metrics.jsonl`, `metrics.csv`, `adaptor.safetensors` (best) with its
            `config.json`, `last.safetensors` and `checkpoint.safetensors`; with `config.n_seeds` also `seeds/<k>` with
            those of each further seed, which scores of the run are then taken over. The result is the first's.

    Raises:
        JoinError, MissingIdsError: images and reports that do not belong together.
        RunStateError: the directory holds a run of other settings, stores or pairs.
        TrainingError: a loss that is not finite; the message names ids of the batch.
    """
    return _train(manifest, image_store, text_store, Path(run_dir), (config or TrainConfig()).trainings)[""]


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
        SettingsError: several models in several processes, or one that is to have several seeds; else as `train`.
    """
    if not configs or not all(name not in ("", ".", "..") and Path(name).name == name for name in configs):
        raise SettingsError(f"names of runs {list(configs)}, expected at least one, each fit for a directory")
    if any(len(config.trainings) > 1 for config in configs.values()):
        raise SettingsError(
            "n_seeds is of one run whose scores are over several trainings; several runs have a seed each"
        )
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
        if len(set(values)) < len(values):
            raise SettingsError(f"{name} has a value twice: {', '.join(map(str, values))}")
        combined = {}
        for before, of in configs.items():
            for value in values:
                run = f"{before}{',' if before else ''}{name}={value}"
                try:
                    combined[run] = replace(of, **{name: value})
                except ValueError as error:
                    raise SettingsError(f"{run}: {error}") from error
        configs = combined
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
    config = next(iter(configs.values()))
    joined = join(manifest, *stores, allow_missing=all(of.allow_missing for of in configs.values()))
    results = {}
    with joined_group(config.device) as group:
        if group.size > 1 and len(configs) > 1:
            raise SettingsError(
                f"{len(configs)} runs in {group.size} processes: start several runs without torchrun; on one GPU they "
                "train together"
            )
        groups, data, of_data = _of_one_shape(configs), None, ""
        for members in groups:
            config = next(iter(members.values()))
            key = fingerprint([getattr(config, name) for name in _OF_DATA])
            if data is None or key != of_data:
                data = None  # not two at once
                data, of_data = _data(manifest, stores, joined, config, group), key
            courses = _train_group(data, stores, run_dir, members, group, alone=len(groups) == 1)
            for run, course in courses.items():
                results[run] = TrainResult(
                    course.adaptor,
                    course.run_dir,
                    course.best_epoch,
                    course.history,
                    len(data.train.pairs),
                    len(data.valid.pairs),
                    joined.n_failed,
                    joined.missing,
                )
    return {name: results[name] for name in configs}


@dataclass(frozen=True)
class _Data:
    """The pairs of both splits, as they are fed."""

    train: Feed
    valid: Feed


def _of_one_shape(configs: Mapping[str, TrainConfig]) -> list[dict[str, TrainConfig]]:
    """Configs that differ in learning rate, weight decay and seed alone, group by group."""
    groups: dict[str, dict[str, TrainConfig]] = {}
    for name, config in configs.items():
        settings = asdict(config)
        own = _OWN if config.order == "shuffled" else _OWN[:-1]  # by shards, another seed has batches of other sizes
        key = fingerprint({field: value for field, value in settings.items() if field not in own})
        groups.setdefault(key, {})[name] = config
    return list(groups.values())


def _data(manifest: Manifest, stores: tuple[Store, Store], joined: Join, config: TrainConfig, group: Group) -> _Data:
    pairs = {split: pairs_of_split(manifest, *stores, joined, split, config) for split in ("train", "valid")}
    check_enough(pairs["train"], manifest, joined, config)
    resident = config.data == "resident"
    if config.data == "auto" and config.order == "shuffled":
        resident = fits(list(pairs.values()), group.device)
    return _Data(
        Feed(pairs["train"], group.device, resident=resident, share=group.share),
        Feed(pairs["valid"], group.device, resident=resident),
    )


def _train_group(
    data: _Data,
    stores: tuple[Store, Store],
    run_dir: Path,
    configs: Mapping[str, TrainConfig],
    group: Group,
    *,
    alone: bool,
) -> dict[str, Course]:
    """Trains models of one shape and leaves a run directory for each.

    Args:
        alone: whether no models of other shapes share the directory.
    """
    config, planner = next(iter(configs.values())), _planner(data.train.pairs, next(iter(configs.values())))
    smallest = int(np.diff(planner.plan(seed=config.seed, epoch=0).starts).min(initial=config.batch_size))
    if group.size > smallest:
        raise SettingsError(f"{group.size} processes for a batch of {smallest} pairs, expected no more than its pairs")
    courses = {
        name: Course(adaptor, configs[name], run_dir / name)
        for name, adaptor in _new_adaptors(stores, configs, data.train).items()
    }
    identities = {name: _identity(of, stores, data) for name, of in configs.items()}
    if group.is_first:
        for name, course in courses.items():
            _begin(course, stores, identities[name])
            write_trained_on(course.run_dir, data.train.pairs)
    group.wait()
    identity = fingerprint(identities)
    journals = {name: Journal(course) for name, course in courses.items()}

    def begin() -> None:
        for journal in journals.values():
            journal.begin()

    def log(name: str, entry: Entry) -> None:
        journals[name].add(entry)

    try:
        fit(
            courses,
            data.train,
            data.valid,
            planner,
            group=group,
            checkpoint=run_dir / ("checkpoint.safetensors" if alone else f"checkpoint-{identity[:12]}.safetensors"),
            identity=identity,
            begin=begin,
            log=log,
        )
    finally:
        for journal in journals.values():
            journal.close()
    group.wait()
    return courses


def _planner(pairs: Pairs, config: TrainConfig) -> Planner:
    by_shards = config.order == "shards"
    return Planner(
        pairs.reports,
        (pairs.image.n_views, pairs.text.n_views),
        pairs.image.store.shards_of(pairs.image.rows[pairs.image.index[:, 0]]) if by_shards else None,
        config.batch_size,
        config.report_once,
        config.mixup,
    )


def _new_adaptors(stores: tuple[Store, Store], configs: Mapping[str, TrainConfig], feed: Feed) -> dict[str, Adaptor]:
    """Adaptors with weights from their seeds, all with the normalisation of inputs that the training rows have."""
    adaptors: dict[str, Adaptor] = {}
    for name, config in configs.items():
        with torch.random.fork_rng(devices=[feed.device] if feed.device != "cpu" else []):
            torch.manual_seed(config.seed)
            adaptor = Adaptor.of_config(*stores, config)
        adaptor = adaptor.to(feed.device)
        if adaptors:
            fitted = next(iter(adaptors.values()))
            adaptor.image_norm.load_state_dict(fitted.image_norm.state_dict())
            adaptor.text_norm.load_state_dict(fitted.text_norm.state_dict())
        else:
            _fit_norms(adaptor, feed)
        adaptors[name] = adaptor
    return adaptors


def _identity(config: TrainConfig, stores: tuple[Store, Store], data: _Data) -> str:
    """A fingerprint of all that determines a run."""
    return fingerprint(
        {
            "config": {k: v for k, v in asdict(config).items() if k not in OF_THE_MACHINE},
            "stores": [store.fingerprint for store in stores],
            "pairs": [data.train.pairs.digest(), data.valid.pairs.digest()],
        }
    )


def _begin(course: Course, stores: tuple[Store, Store], identity: str) -> None:
    """Makes a run's directory and writes its `config.yaml`; refuses the directory of another run.

    Raises:
        RunStateError: it holds another run.
        OutputError: it cannot be written.
    """
    path = course.run_dir / RUN_CONFIG
    if path.is_file() or (course.run_dir / "adaptor.safetensors").is_file():
        try:
            known = yaml.safe_load(path.read_text("utf-8"))["identity"]
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            known = None
        if known != identity:
            raise RunStateError(
                f"{course.run_dir}: holds a run of other settings, stores or pairs; name another run directory, or "
                "delete it"
            )
    described = {store.modality: _described(store) for store in stores}
    resolved = {"train": asdict(course.config), "stores": described, "identity": identity}
    write_text(path, yaml.safe_dump(resolved, sort_keys=False))
    if course.config.tensorboard:
        event_writer()  # whether it is there
    if course.config.wandb:
        wandb_library()


def _fit_norms(adaptor: Adaptor, feed: Feed) -> None:
    """Fits the normalisation of both inputs on the training pairs, each sample as it is."""
    for k, norm in enumerate((adaptor.image_norm, adaptor.text_norm)):
        sides = (chunk[k] for chunk in feed.chunks())
        norm.fit(rows.values if rows.mask is None else rows.values[rows.mask] for rows in sides)


def _described(store: Store) -> dict[str, str]:
    return {
        "path": str(store.path),
        "encoder": str(store.encoder.get("name", "external")),
        "fingerprint": store.fingerprint,
        "encoder_fingerprint": store.encoder_fingerprint,
    }
