"""What is done with a pair of encoders, each as a function that a worker can call by the names of files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from embedcache.data.manifest import Manifest
from embedcache.stage_two.adaptor import count_parameters
from embedcache.stage_two.config import TrainConfig
from embedcache.stage_two.probe import probe
from embedcache.stage_two.probe_config import ProbeConfig
from embedcache.stage_two.probe_tables import ProbeResult
from embedcache.stage_two.retrieve import RetrievalResult, retrieve
from embedcache.stage_two.retrieve_config import RetrieveConfig
from embedcache.stage_two.segment import segment
from embedcache.stage_two.segment_config import SegmentConfig
from embedcache.stage_two.segment_tables import SegmentResult
from embedcache.stage_two.train import train
from embedcache.stage_two.zeroshot import ZeroShotConfig, ZeroShotResult, zero_shot


def train_pair(*, data: Path, image: Path, text: Path, folder: Path, config: TrainConfig, device: str) -> Sequence[str]:
    """Trains the pair's Adaptor into its folder."""
    trained = train(_manifest(data), image, text, folder, config=replace(config, device=device))
    best = trained.history[trained.best_epoch]
    said = (
        f"Adaptor of {count_parameters(trained.adaptor):,} parameters on {trained.n_train} pairs, best epoch "
        f"{trained.best_epoch + 1} of {len(trained.history)} (validation loss {best['valid_loss']:.3f})"
    )
    more = f"; trained from {config.n_seeds} seeds, this is the first" if len(config.trainings) > 1 else ""
    return [said + more, *filter(None, [trained.warning])]


def probe_pair(
    *,
    data: Path,
    image: Path,
    text: Path | None,
    random: Path | None,
    adaptor: Path | None,
    label: str,
    folder: Path,
    config: ProbeConfig,
    device: str,
) -> Sequence[str]:
    """Scores one label."""
    result = probe(
        _manifest(data),
        image,
        label=label,
        run_dir=adaptor,
        text_store=text,
        random_store=random,
        config=replace(config, device=device),
    )
    return _written(result, folder)


def segment_pair(
    *,
    data: Path,
    image: Path,
    random: Path | None,
    adaptor: Path | None,
    folder: Path,
    config: SegmentConfig,
    device: str,
) -> Sequence[str]:
    """Learns masks."""
    result = segment(
        _manifest(data), image, run_dir=adaptor, random_store=random, config=replace(config, device=device)
    )
    return _written(result, folder)


def retrieve_pair(
    *,
    data: Path,
    image: Path,
    text: Path,
    adaptor: Path,
    labels: Sequence[str],
    folder: Path,
    config: RetrieveConfig,
    device: str,
) -> Sequence[str]:
    """Finds reports for images, and back."""
    result = retrieve(_manifest(data), image, text, adaptor, labels=labels, config=replace(config, device=device))
    return _written(result, folder)


def zero_shot_pair(
    *,
    data: Path,
    image: Path,
    prompt_store: Path,
    adaptor: Path,
    prompts: str,
    labels: Sequence[str],
    folder: Path,
    config: ZeroShotConfig,
    device: str,
) -> Sequence[str]:
    """Scores labels by prompts."""
    result = zero_shot(
        _manifest(data),
        image,
        prompt_store,
        adaptor,
        prompts=prompts,
        labels=labels,
        config=replace(config, device=device),
    )
    return _written(result, folder)


def _manifest(path: Path) -> Manifest:
    """A manifest as the run keeps it; one that was read stays in memory, since a worker does several steps."""
    return _read(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _read(path: Path, changed_ns: int) -> Manifest:
    return Manifest.read(path)


def _written(result: ProbeResult | SegmentResult | RetrievalResult | ZeroShotResult, folder: Path) -> list[str]:
    """Writes what a step gave; gives what is to be said of it."""
    result.write(folder)
    return [*result.notes, *([f"warning: {result.warning}"] if result.warning else [])]
