"""How an Adaptor is pre-trained: its settings, and the learning rate's schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from embedcache.settings import STRICT, check

Kind = Literal["attention", "mlp", "linear", "identity"]
Attention = Literal["self", "cross-modal"]
Normalise = Literal["none", "l2", "zscore", "whiten"]
Loss = Literal["clip", "siglip"]
Positives = Literal["text_digest", "report_id", "row"]
Features = Literal["embeddings", "tokens"]
OF_THE_MACHINE = ("device", "data", "capture", "checkpoint_s", "tensorboard", "wandb")  # these change no result

RUN_CONFIG = "config.yaml"  # of a run: how it is trained, and on what
SEEDS = "seeds"  # below a run: what other seeds gave

_SIGLIP_LOGIT_SCALE, _SIGLIP_LOGIT_BIAS = math.log(20.0), -10.0
_CLIP_LOGIT_SCALE = 2.6592  # log(1 / 0.07)


@dataclass(frozen=True)
class TrainConfig:
    """How an Adaptor is pre-trained; the defaults are the paper's.

    Args:
        batch_size: pairs in a batch, over all processes. Where a batch holds a report once, batches are of equal size
            and at most this large.
        schedule: after the warm-up, `linear` or `cosine` decay to 0.
        warmup: share of all steps in which the learning rate rises linearly.
        patience: epochs without a lower validation loss after which training stops.
        clip_norm: largest norm of the gradient over all parameters.
        loss: `clip`: `contrastive_loss`; `siglip`: `siglip_loss`, its scale and bias starting at 20 and -10.
        image_weight: see `contrastive_loss`.
        positives: which pairs of a batch belong together: those with equal texts, those of one report, or no others.
        report_once: a batch holds each report once, as images of one study share theirs.
        adaptor, projection_dim, n_layers, n_heads, ff_dim, dropout, attention, normalise: see `Adaptor`.
        image, text: what the Adaptor is trained on: pooled `embeddings`, or `tokens` where the store has them.
        views: `first`: each sample as it is; `all`: each epoch one of its stored views at random.
        mixup: alpha of latent mixup, pairs mixed in shares drawn from Beta(alpha, alpha); 0 for none.
        precision: of matrix products in the Adaptor; sums and the loss are always float32.
        data: `resident`: all rows on the device; `streamed`: read as they are needed; `auto`: resident if they fit.
        order: `shuffled`, or `shards`: a few shards at a time in full, for streams from slow disks.
        capture: on a GPU, record steps as CUDA graphs, so that the host queues one call for each.
        allow_missing: leave out, and count, rows of the manifest that a store does not account for.
        checkpoint_s: seconds between checkpoints; a killed run goes on from the last one.
        tensorboard: also write TensorBoard's event files into the run directory.
        wandb: project at W&B that is told of each epoch too; blank for none.
        seed: of weights and of the order of batches.
        n_seeds: trainings, each from the next seed, that scores are then taken over; by default as many as heads have
            runs, three at least, where encoders are compared, else one. The first is what new images are answered with.
    """

    epochs: Annotated[int, Ge(1)] = 50
    batch_size: Annotated[int, Ge(2)] = 1024
    lr: Annotated[float, Gt(0)] = 2e-5
    weight_decay: Annotated[float, Ge(0)] = 0.01
    schedule: Literal["linear", "cosine"] = "linear"
    warmup: Annotated[float, Ge(0), Lt(1)] = 0.02
    patience: Annotated[int, Ge(1)] = 10
    clip_norm: Annotated[float, Gt(0)] | None = None
    loss: Loss = "clip"
    image_weight: Annotated[float, Ge(0), Le(1)] = 0.75
    positives: Positives = "text_digest"
    report_once: bool = True
    adaptor: Kind = "attention"
    projection_dim: Annotated[int, Ge(1)] = 768
    n_layers: Annotated[int, Ge(1)] = 2
    n_heads: Annotated[int, Ge(1)] = 12
    ff_dim: Annotated[int, Ge(1)] = 2048
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.1
    attention: Attention = "self"
    normalise: Normalise = "none"
    image: Features = "embeddings"
    text: Features = "embeddings"
    views: Literal["first", "all"] = "first"
    mixup: Annotated[float, Ge(0)] = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    data: Literal["auto", "resident", "streamed"] = "auto"
    order: Literal["shuffled", "shards"] = "shuffled"
    capture: bool = True
    allow_missing: bool = False
    checkpoint_s: Annotated[float, Ge(0)] = 60.0
    tensorboard: bool = False
    wandb: str = ""
    seed: Annotated[int, Ge(-(2**63)), Lt(2**63)] = 0
    n_seeds: Annotated[int, Ge(1)] | None = None
    device: str = "auto"

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check(self)
        tokens = "tokens" in (self.image, self.text)
        if self.adaptor == "attention" and self.projection_dim % self.n_heads:
            raise ValueError(f"projection_dim ({self.projection_dim}) must be divisible by n_heads ({self.n_heads})")
        if tokens and self.adaptor != "attention":
            raise ValueError(
                f"adaptor {self.adaptor!r} with tokens, expected attention: the others have no use for them"
            )
        if self.attention == "cross-modal" and not tokens:
            raise ValueError("attention 'cross-modal' without tokens: over one token, attention is 1 whatever it asks")
        if tokens and self.mixup:
            raise ValueError("mixup with tokens, expected embeddings: tokens of two samples do not lie side by side")
        if self.order == "shards" and self.data == "resident":
            raise ValueError("order 'shards' with resident data, expected data 'streamed' or 'auto'")

    @property
    def trainings(self) -> dict[str, TrainConfig]:
        """Each single training, by the name of its folder below that of the run; the first is the run's own."""
        return {
            f"{SEEDS}/{k}" if k else "": replace(self, seed=self.seed + k, n_seeds=None) if k else self
            for k in range(self.n_seeds or 1)
        }

    @property
    def logit_scale(self) -> float:
        """The logarithm of the factor of all similarities, at the start."""
        return _SIGLIP_LOGIT_SCALE if self.loss == "siglip" else _CLIP_LOGIT_SCALE

    @property
    def logit_bias(self) -> float | None:
        """What is added to all similarities, at the start; None where the loss has no use for it."""
        return _SIGLIP_LOGIT_BIAS if self.loss == "siglip" else None


def schedule(kind: str, n_steps: int, n_warmup: int) -> Callable[[float], float]:
    """The learning rate's factor at a step: linear warm-up from 0 over `n_warmup` steps, then decay to 0.

    Args:
        kind: `linear` or `cosine` decay.
    """

    def factor(step: float) -> float:
        if step < n_warmup:
            return step / n_warmup
        left = max(n_steps - step, 0) / max(n_steps - n_warmup, 1)
        return left if kind == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)

    return factor
