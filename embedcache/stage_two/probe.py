"""Probes: what frozen embeddings, with and without an Adaptor, tell of a label, beside the controls that say why.

Shape notation: n manifest rows with an embedding, d embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from embedcache.data.audit import leak_warning
from embedcache.data.manifest import Manifest
from embedcache.data.splits import label_subset
from embedcache.device import pick_device
from embedcache.errors import ManifestError, SettingsError
from embedcache.metrics.classification import accuracy, auroc, average_precision
from embedcache.metrics.intervals import Interval, bootstrap, patient_draws
from embedcache.progress import Progress
from embedcache.settings import STRICT, check
from embedcache.stage_two.adaptor import Adaptor, read_adaptor
from embedcache.stage_two.heads import HEADS, HeadConfig, fit_predict
from embedcache.stage_two.tensors import Join, input_digests, join, opened, resident
from embedcache.store.store import Store

CONTROLS = ("no-adaptor", "untrained-adaptor", "shuffled-labels", "text-as-label")
_CHUNK = 4096


@dataclass(frozen=True)
class ProbeConfig:
    """What is probed and how often.

    Args:
        heads: `linear`, `mlp`.
        fractions: shares of the training labels, at least two labels of each class.
        subsets: which labels a fraction is: `drawn` for each seed, stratified by the label; or the `manifest`'s own
            column `fraction`, the same for each seed (under a `paper` split, what the published code draws).
        n_seeds: runs with other label draws, head weights and batch orders.
        n_draws: bootstrap draws.
        controls: which controls stand beside the result, of `CONTROLS`.
    """

    heads: tuple[str, ...] = HEADS
    fractions: tuple[Annotated[float, Gt(0), Le(1)], ...] = (0.01, 0.1, 1.0)
    subsets: Literal["drawn", "manifest"] = "drawn"
    n_seeds: Annotated[int, Ge(1)] = 3
    n_draws: Annotated[int, Ge(1)] = 2000
    controls: tuple[str, ...] = CONTROLS
    head: HeadConfig = field(default_factory=HeadConfig)
    device: str = "auto"

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check(self)
        for name, known in (("heads", HEADS), ("controls", CONTROLS)):
            unknown = [value for value in getattr(self, name) if value not in known]
            if unknown:
                raise ValueError(f"unknown {name} {', '.join(unknown)}; expected some of {', '.join(known)}")
        if not self.heads or not self.fractions or not all(0 < fraction <= 1 for fraction in self.fractions):
            raise ValueError("expected at least one head, and fractions above 0 and at most 1")


@dataclass(frozen=True)
class ProbeResult:
    """Scores of one label on one store.

    Args:
        scores: a row per control (`""` is the result itself), head, fraction, metric and class, with `value`, `low`,
            `high` (95%, over patients and seeds), `n_train`, `n_valid` and `n_test` labels, `n_seeds`.
        n_failed: manifest rows left out because stage one recorded a failure.
        warning: one line where the manifest's splits share patients, studies or files; blank where they do not.
    """

    scores: pd.DataFrame
    label: str
    n_failed: int
    warning: str


@dataclass(frozen=True)
class _Task:
    """One label over the joined rows: classes (n,) float64 with NaN for blank, and where to train and test.

    `of_fraction` holds the training rows of the fractions that the manifest fixes.
    """

    labels: np.ndarray
    train: np.ndarray
    test: np.ndarray
    n_classes: int
    draws: np.ndarray
    of_fraction: dict[float, np.ndarray]

    def labelled(self, fraction: float, seed: int) -> np.ndarray:
        """Training rows whose labels a fraction may use."""
        if fraction in self.of_fraction:
            return self.of_fraction[fraction]
        return self.train[label_subset(self.labels[self.train], fraction, seed=seed)]


@dataclass(frozen=True)
class _Told:
    """Training rows that have a text, (m,) ascending, and their standardised text embeddings, (m, d_text)."""

    rows: np.ndarray
    features: Tensor


def probe(
    manifest: Manifest,
    image_store: Store | str | Path,
    *,
    label: str,
    run_dir: str | Path | None = None,
    text_store: Store | str | Path | None = None,
    config: ProbeConfig | None = None,
) -> ProbeResult:
    """Fits heads on the training split's embeddings and scores them on the test split.

    Features are standardised with the mean and deviation of all training rows. Nothing is chosen on validation or
    test labels, so `n_valid` is 0.

    Args:
        label: name of the manifest's label set.
        run_dir: a run of `train`: its Adaptor is applied; without it the embeddings are probed as they are.
        text_store: needed for the control `text-as-label`, which is left out without it.

    Raises:
        ManifestError: no such label, or a split without both classes.
        FingerprintMismatchError: the Adaptor was trained on another encoder's embeddings.
    """
    config = config or ProbeConfig()
    image_store = opened(image_store)
    device = pick_device(config.device)
    adaptor = _adaptor_for(image_store, run_dir)
    texts = opened(text_store) if text_store is not None and "text-as-label" in config.controls else None
    joined = join(manifest, image_store)
    task = _task(manifest, joined.rows, label, config)
    raw = resident(image_store, joined.image_rows, device)
    settings = {"": raw} if adaptor is None else {"": _adapted(adaptor, raw), "no-adaptor": raw}
    if adaptor is not None and "untrained-adaptor" in config.controls:
        settings["untrained-adaptor"] = _adapted(adaptor.untrained(), raw)
    if "shuffled-labels" in config.controls:
        settings["shuffled-labels"] = settings[""]
    told = None
    if texts is not None:
        settings["text-as-label"] = raw
        told = _texts_of_training_rows(manifest, image_store, texts, joined, task, device)
    rows: list[dict[str, object]] = []
    n_fits = len(settings) * len(config.heads) * len(config.fractions)
    with Progress(f"probing {label}", total=n_fits, unit="probe") as progress:
        for control, features in settings.items():
            if control and control not in config.controls:
                continue
            x = _standardised(features, task.train)
            for head in config.heads:
                for fraction in config.fractions:
                    rows += _scores(control, head, fraction, x, told, task, config)
                    progress.advance()
    warning = leak_warning(manifest, input_digests(image_store))
    return ProbeResult(pd.DataFrame(rows), label, joined.n_failed, warning)


def _adaptor_for(store: Store, run_dir: str | Path | None) -> Adaptor | None:
    if run_dir is None:
        return None
    adaptor = read_adaptor(run_dir)
    adaptor.check_encoder(store, run_dir)
    if adaptor.encoders["image"].get("features") == "tokens":
        raise SettingsError(f"{run_dir}: its Adaptor was trained on tokens, a probe reads embeddings: train on those")
    return adaptor


def _task(manifest: Manifest, rows: np.ndarray, label: str, config: ProbeConfig) -> _Task:
    labels = manifest.label(label)[rows]
    known = ~np.isnan(labels)
    train = np.flatnonzero(manifest.in_split("train")[rows])
    test = np.flatnonzero(manifest.in_split("test")[rows] & known)
    for split, chosen in (("train", train[known[train]]), ("test", test)):
        classes = np.unique(labels[chosen])
        if len(classes) < 2:
            raise ManifestError(
                f"{manifest.name}: label {label!r} has classes {classes.tolist()} in split {split!r}, expected at "
                "least two; choose another label or other splits, or try failed inputs again with "
                "'embedcache extract --retry-failed'"
            )
    return _Task(
        labels,
        train,
        test,
        n_classes=int(labels[known].max()) + 1,
        draws=patient_draws(manifest.groups()[rows[test]], config.n_draws, seed=0),
        of_fraction=_of_fractions(manifest, rows, train[known[train]], label, config),
    )


def _of_fractions(
    manifest: Manifest, rows: np.ndarray, train: np.ndarray, label: str, config: ProbeConfig
) -> dict[float, np.ndarray]:
    if config.subsets == "drawn":
        return {}
    found = {f: train[manifest.in_fraction(f)[rows[train]]] for f in config.fractions}
    for fraction, chosen in found.items():
        if len(np.unique(manifest.label(label)[rows[chosen]])) < 2:
            raise ManifestError(
                f"{manifest.name}: its column 'fraction' gives {fraction:g} of the labels {len(chosen)} rows of label "
                f"{label!r} and not two classes; use subsets 'drawn'"
            )
    return found


def _scores(
    control: str,
    head: str,
    fraction: float,
    x: Tensor,
    told: _Told | None,
    task: _Task,
    config: ProbeConfig,
) -> Iterator[dict[str, object]]:
    """One control, head and fraction over all seeds: a row for each metric and class."""
    probabilities, n_train = [], 0
    for seed in range(config.n_seeds):
        chosen = task.labelled(fraction, seed)
        y = task.labels[chosen].astype(np.int64)
        n_train = len(chosen)
        if control == "shuffled-labels":
            y = np.random.default_rng(seed).permutation(y)
        if control == "text-as-label":
            assert told is not None  # the control runs only with a text store
            chosen, y = _labels_from_text(chosen, y, told, task, config, seed)
        fitted = fit_predict(
            head,
            x[chosen],
            torch.from_numpy(y).to(x.device),
            x[task.test],
            n_classes=task.n_classes,
            config=config.head,
            seed=seed,
        )
        probabilities.append(fitted.numpy())
    counts = {"n_train": n_train, "n_valid": 0, "n_test": len(task.test), "n_seeds": config.n_seeds}
    for metric, class_name, interval in _metrics(task, probabilities):
        yield {
            "control": control, "head": head, "fraction": fraction, "metric": metric, "class": class_name,
            **asdict(interval), **counts,
        }  # fmt: skip


def _texts_of_training_rows(
    manifest: Manifest, image_store: Store, texts: Store, joined: Join, task: _Task, device: str
) -> _Told:
    pairs = join(manifest, image_store, texts)
    assert pairs.text_rows is not None  # a text store was given
    positions = np.searchsorted(joined.rows, pairs.rows)  # both ascend, and every pair is among the images
    in_train = np.isin(positions, task.train)
    features = resident(texts, pairs.text_rows[in_train], device)
    return _Told(positions[in_train], _standardised(features, np.arange(len(features))))


def _labels_from_text(
    chosen: np.ndarray, y: np.ndarray, told: _Told, task: _Task, config: ProbeConfig, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Every training row that has a text, labelled by a linear head that learnt from the chosen rows' texts."""
    true = dict(zip(chosen.tolist(), y.tolist(), strict=True))
    known = np.flatnonzero(np.isin(told.rows, chosen))
    guessed = fit_predict(
        "linear",
        told.features[known],
        torch.tensor([true[row] for row in told.rows[known].tolist()]).to(told.features.device),
        told.features,
        n_classes=task.n_classes,
        config=config.head,
        seed=seed,
    )
    labels = guessed.argmax(dim=1).numpy()
    return told.rows, np.array([true.get(row, guess) for row, guess in zip(told.rows.tolist(), labels, strict=True)])


def _metrics(task: _Task, probabilities: list[np.ndarray]) -> Iterator[tuple[str, str, Interval]]:
    labels = task.labels[task.test].astype(np.int64)
    predicted = [p.argmax(axis=1) for p in probabilities]
    yield "accuracy", "", bootstrap(accuracy, labels, predicted, task.draws, seed=0)
    for c in [1] if task.n_classes == 2 else range(task.n_classes):
        name = "" if task.n_classes == 2 else str(c)
        one_vs_rest, scores = (labels == c).astype(np.int64), [p[:, c] for p in probabilities]
        yield "auroc", name, bootstrap(auroc, one_vs_rest, scores, task.draws, seed=0)
        yield "average_precision", name, bootstrap(average_precision, one_vs_rest, scores, task.draws, seed=0)


@torch.inference_mode()
def _adapted(adaptor: Adaptor, image: Tensor) -> Tensor:
    """The Adaptor's output for every row, computed once, (n, p)."""
    adaptor = adaptor.to(image.device).eval()
    return torch.cat([adaptor.encode_image(part) for part in image.split(_CHUNK)]).clone()


def _standardised(features: Tensor, train: np.ndarray) -> Tensor:
    deviation, mean = torch.std_mean(features[train], dim=0)
    return (features - mean) / deviation.clamp_min(1e-6)
