"""Pre-training an Adaptor on cached pairs: resident tensors, gathered by index.

Shape notation: n pairs, b batch size.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import yaml
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from embedcache.data.manifest import Manifest
from embedcache.device import pick_device
from embedcache.errors import JoinError, TrainingError, some_ids
from embedcache.progress import Progress
from embedcache.settings import STRICT, check
from embedcache.stage_two.adaptor import Adaptor
from embedcache.stage_two.losses import contrastive_loss
from embedcache.stage_two.tensors import epoch_batches, join, opened, resident, text_codes
from embedcache.store.store import Store


@dataclass(frozen=True)
class TrainConfig:
    """How an Adaptor is pre-trained; the defaults are the paper's.

    Args:
        warmup: share of all steps in which the learning rate rises linearly; then it falls linearly to 0.
        patience: epochs without a lower validation loss after which training stops.
        image_weight: see `contrastive_loss`.
    """

    epochs: Annotated[int, Ge(1)] = 50
    batch_size: Annotated[int, Ge(2)] = 1024
    lr: Annotated[float, Gt(0)] = 2e-5
    weight_decay: Annotated[float, Ge(0)] = 0.01
    warmup: Annotated[float, Ge(0), Lt(1)] = 0.02
    patience: Annotated[int, Ge(1)] = 10
    image_weight: Annotated[float, Ge(0), Le(1)] = 0.75
    projection_dim: Annotated[int, Ge(1)] = 768
    n_layers: Annotated[int, Ge(1)] = 2
    n_heads: Annotated[int, Ge(1)] = 12
    ff_dim: Annotated[int, Ge(1)] = 2048
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.1
    seed: int = 0
    device: str = "auto"

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check(self)
        if self.projection_dim % self.n_heads:
            raise ValueError(f"projection_dim ({self.projection_dim}) must be divisible by n_heads ({self.n_heads})")


@dataclass(frozen=True)
class TrainResult:
    """A trained Adaptor, in evaluation mode with its best weights, and how it came about.

    Args:
        history: one entry an epoch: `epoch`, `train_loss`, `valid_loss`, `lr`, `seconds`.
        n_failed: manifest rows left out because stage one recorded a failure.
    """

    adaptor: Adaptor
    run_dir: Path
    best_epoch: int
    history: list[dict[str, float]]
    n_train: int
    n_valid: int
    n_failed: int

    def to_json(self) -> dict[str, object]:
        """All but the Adaptor, JSON-ready."""
        counts = {"n_train": self.n_train, "n_valid": self.n_valid, "n_failed": self.n_failed}
        history = [_without_nan(entry) for entry in self.history]
        return {"run_dir": str(self.run_dir), "best_epoch": self.best_epoch, **counts, "history": history}


@dataclass(frozen=True)
class _Pairs:
    """Resident pairs of one split: image (n, d_image), text (n, d_text), a code for each text (n,)."""

    image: Tensor
    text: Tensor
    codes: Tensor
    ids: np.ndarray
    report_ids: np.ndarray


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
    report once. Without at least two `valid` rows the last epoch's weights are kept.

    Args:
        run_dir: gets `config.yaml`, `metrics.jsonl`, `adaptor.safetensors` and `adaptor.json`.

    Raises:
        JoinError, MissingIdsError: images and reports that do not belong together.
        TrainingError: a loss that is not finite; the message names ids of the batch.
    """
    config, run_dir = config or TrainConfig(), Path(run_dir)
    image_store, text_store = opened(image_store), opened(text_store)
    device = pick_device(config.device)
    splits, n_failed = _resident_splits(manifest, image_store, text_store, device)
    pairs, valid = splits["train"], splits["valid"]
    if len(pairs.image) < 2:
        raise JoinError(
            f"{manifest.name}: {len(pairs.image)} training pairs, expected at least 2: "
            f"{int(manifest.in_split('train').sum())} rows have the split 'train', and {n_failed} rows were left out "
            "because stage one recorded a failure (embedcache extract --retry-failed tries those again)"
        )
    if len(np.unique(pairs.report_ids)) < 2:
        raise JoinError(f"{manifest.name}: all training rows share one report_id, so there is nothing to contrast")
    run_dir.mkdir(parents=True, exist_ok=True)
    resolved = {"train": asdict(config), "stores": _described(image_store, text_store)}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False), "utf-8")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        adaptor = _new_adaptor(image_store, text_store, config).to(device)
        adaptor.notes = {"image": image_store.encoder_fingerprint, "text": text_store.encoder_fingerprint}
        history, best_epoch = _fit(adaptor, pairs, valid, config, run_dir)
    adaptor.save_pretrained(run_dir)
    return TrainResult(adaptor.eval(), run_dir, best_epoch, history, len(pairs.image), len(valid.image), n_failed)


def _new_adaptor(image_store: Store, text_store: Store, config: TrainConfig) -> Adaptor:
    return Adaptor(
        image_store.layout.dim,
        text_store.layout.dim,
        projection_dim=config.projection_dim,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        ff_dim=config.ff_dim,
        dropout=config.dropout,
    )


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


def _resident_splits(
    manifest: Manifest, image_store: Store, text_store: Store, device: str
) -> tuple[dict[str, _Pairs], int]:
    joined = join(manifest, image_store, text_store)
    assert joined.text_rows is not None  # a text store was given
    ids, report_ids = manifest.frame["id"].to_numpy(), manifest.frame["report_id"].to_numpy()
    codes = text_codes(manifest, joined.rows)
    splits = {}
    for split in ("train", "valid"):
        chosen = np.flatnonzero(manifest.in_split(split)[joined.rows])
        splits[split] = _Pairs(
            image=resident(image_store, joined.image_rows[chosen], device),
            text=resident(text_store, joined.text_rows[chosen], device),
            codes=torch.from_numpy(codes[chosen]).to(device),
            ids=ids[joined.rows[chosen]],
            report_ids=report_ids[joined.rows[chosen]],
        )
    return splits, joined.n_failed


def _fit(
    adaptor: Adaptor, pairs: _Pairs, valid: _Pairs, config: TrainConfig, run_dir: Path
) -> tuple[list[dict[str, float]], int]:
    """Trains in place and leaves the best weights in `adaptor`; gives the history and the best epoch."""
    rng = np.random.default_rng(config.seed)
    epochs = [epoch_batches(pairs.report_ids, config.batch_size, rng) for _ in range(config.epochs)]
    n_steps = sum(map(len, epochs))
    optimizer = torch.optim.AdamW(adaptor.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, linear_schedule(n_steps, round(config.warmup * n_steps)))
    best, best_epoch, history = math.inf, 0, []
    best_weights = {name: weight.clone() for name, weight in adaptor.state_dict().items()}
    with (
        (run_dir / "metrics.jsonl").open("w", encoding="utf-8") as log,
        Progress("training the Adaptor", total=config.epochs, unit="epoch") as progress,
    ):
        for epoch, batches in enumerate(epochs):
            started = time.monotonic()
            train_loss = _train_epoch(adaptor, pairs, batches, optimizer, schedule, config)
            valid_loss = _mean_loss(adaptor, valid, config)
            if len(valid.image) > 1:
                _check_finite("validation", valid_loss, valid.ids)
            entry: dict[str, float] = {
                "epoch": epoch,
                "train_loss": train_loss,
                "valid_loss": valid_loss,
                "lr": float(schedule.get_last_lr()[0]),
                "seconds": time.monotonic() - started,
            }
            history.append(entry)
            log.write(json.dumps(_without_nan(entry)) + "\n")
            progress.advance(note=f"loss {train_loss:.3f}, validation {valid_loss:.3f}")
            if valid_loss < best or math.isnan(valid_loss):
                best, best_epoch = valid_loss, epoch
                best_weights = {name: weight.clone() for name, weight in adaptor.state_dict().items()}
            elif epoch - best_epoch >= config.patience:
                break
    adaptor.load_state_dict(best_weights)
    return history, best_epoch


def _without_nan(entry: dict[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in entry.items()}


def _train_epoch(
    adaptor: Adaptor,
    pairs: _Pairs,
    batches: Sequence[np.ndarray],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    config: TrainConfig,
) -> float:
    adaptor.train()
    total = torch.zeros((), device=pairs.image.device)
    for batch in batches:
        index = torch.from_numpy(batch).to(pairs.image.device)
        loss = _loss(adaptor, pairs, index, config)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        total += loss.detach()  # read once an epoch: the device is not waited for
    mean = float(total) / len(batches)
    _check_finite("training", mean, pairs.ids[batches[0]])
    return mean


def _check_finite(which: str, loss: float, ids: np.ndarray) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"the {which} loss became {loss} in an epoch that began with {some_ids(ids)}; lower the learning rate, or "
            "check the stores with 'embedcache verify'"
        )


@torch.inference_mode()
def _mean_loss(adaptor: Adaptor, pairs: _Pairs, config: TrainConfig) -> float:
    """Loss over a split in a fixed order, each pair weighted alike; NaN below two pairs."""
    if len(pairs.image) < 2:
        return math.nan
    adaptor.eval()
    batches = torch.arange(len(pairs.image), device=pairs.image.device).split(config.batch_size)
    losses = [(float(_loss(adaptor, pairs, index, config)), len(index)) for index in batches if len(index) > 1]
    return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)


def _loss(adaptor: Adaptor, pairs: _Pairs, index: Tensor, config: TrainConfig) -> Tensor:
    output = adaptor(pairs.image[index], pairs.text[index])
    return contrastive_loss(output.logits_per_text, image_weight=config.image_weight, texts=pairs.codes[index])


def linear_schedule(n_steps: int, n_warmup: int) -> Callable[[int], float]:
    """Linear warm-up from 0 over `n_warmup` steps, then linear decay to 0: the learning rate's factor at a step."""

    def factor(step: int) -> float:
        if step < n_warmup:
            return step / n_warmup
        return max(n_steps - step, 0) / max(n_steps - n_warmup, 1)

    return factor
