"""Fitting a decoder to masks, and counting where its masks meet the true ones.

Shape notation: n samples, b samples of a batch, c channels, g x g' the token grid, H and W pixels of a mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from embedcache.device import moved
from embedcache.errors import TrainingError
from embedcache.metrics.masks import Overlap
from embedcache.stage_two.decoders import make_decoder
from embedcache.stage_two.feed import ahead
from embedcache.stage_two.kept import KeptDecoder, Source
from embedcache.stage_two.losses import mask_loss
from embedcache.stage_two.mask_targets import MaskTargets
from embedcache.stage_two.segment_config import SegmentConfig
from embedcache.stage_two.token_feed import TokenFeed

_PIXELS_AT_ONCE = 2**20  # of masks, where nothing is learnt


class DecoderFit:
    """One decoder on its way.

    Args:
        name: of the decoder.
        seed: of its weights, the order of samples, views and flips.
    """

    def __init__(self, name: str, feed: TokenFeed, targets: MaskTargets, config: SegmentConfig, *, seed: int) -> None:
        self._name, self._feed, self._targets, self._config = name, feed, targets, config
        self._device, self._rng = feed.device, np.random.default_rng(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            decoder = make_decoder(name, feed.dim, feed.grid, targets.size)
        self._decoder = decoder.to(memory_format=torch.channels_last).to(feed.device)  # as tokens lie

    def train(self, rows: np.ndarray, valid: np.ndarray) -> list[float]:
        """Learns from some samples, and keeps the weights of the epoch that is best on others.

        The learning rate falls by a cosine from epoch to epoch, as in the paper's code.

        Args:
            rows: (n,).
            valid: (v,); none trains to the end.

        Returns:
            What the epoch was chosen by, after each: the validation loss, or 1 - Dice; nothing without validation.

        Raises:
            TrainingError: a validation loss, or weights, that are not finite.
        """
        config, decoder = self._config, self._decoder
        n_epochs = config.n_epochs(len(rows))
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_epochs, eta_min=1e-8)
        missed = self._loss if config.choose_by == "loss" else lambda rows: 1 - float(self.overlap(rows).dice.mean())
        best, losses = None, list[float]()
        for _ in range(n_epochs):
            self._epoch(rows, optimizer)
            schedule.step()
            if not len(valid):
                continue
            losses.append(missed(valid))
            if not np.isfinite(losses[-1]):
                raise TrainingError(f"the loss of the {self._name} decoder became {losses[-1]}; lower lr ({config.lr})")
            best_epoch = int(np.argmin(losses))
            if best_epoch == len(losses) - 1:
                best = {name: value.clone() for name, value in decoder.state_dict().items()}
            elif config.patience and len(losses) - 1 - best_epoch >= config.patience:
                break
        if best is not None:
            decoder.load_state_dict(best)
        if not all(bool(value.isfinite().all()) for value in decoder.state_dict().values()):
            raise TrainingError(f"the {self._name} decoder has weights that are not finite; lower lr ({config.lr})")
        return losses

    @torch.no_grad()
    def overlap(self, rows: np.ndarray) -> Overlap:
        """Where its masks of some samples meet the true ones, one run."""
        both, predicted = [], []
        level = float(np.log(self._config.threshold / (1 - self._config.threshold)))
        for logits, mask in self._evaluated(rows):
            there = logits[:, 0] > level
            both.append((there & mask.bool()).sum(dim=(1, 2)))
            predicted.append(there.sum(dim=(1, 2)))
        met, said = (torch.cat(parts).cpu().numpy()[None] for parts in (both, predicted))
        return Overlap(met, said, self._targets.areas[rows, 0])

    def kept(self, source: Source) -> KeptDecoder:
        """The decoder, to be kept with what its tokens come from."""
        state = {name: value.detach().cpu().clone() for name, value in self._decoder.state_dict().items()}
        return KeptDecoder(
            self._name,
            self._feed.dim,
            self._feed.grid,
            self._targets.size,
            self._config.threshold,
            source,
            state,
        )

    def _epoch(self, rows: np.ndarray, optimizer: torch.optim.Optimizer) -> None:
        config, order = self._config, self._rng.permutation(rows)
        views = self._rng.integers(0, self._targets.place.shape[1], len(order))
        mirrored = self._rng.random(len(order)) < 0.5 if config.flips else np.zeros(len(order), bool)
        starts = range(0, len(order), config.batch_size)
        parts = [slice(start, start + config.batch_size) for start in starts]
        self._decoder.train()
        batches = self._batches([(order[p], views[p]) for p in parts])
        for part, (features, mask) in zip(parts, batches, strict=True):
            if mirrored[part].any():
                turned = torch.from_numpy(mirrored[part]).to(features.device)
                features[turned], mask[turned] = features[turned].flip(-1), mask[turned].flip(-1)
            loss = mask_loss(self._logits(features), mask.unsqueeze(1), alpha=config.alpha, dice=config.loss)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def _loss(self, rows: np.ndarray) -> float:
        """Mean over batches, which are always the same, by their sizes."""
        sums = [
            mask_loss(logits, mask.unsqueeze(1), alpha=self._config.alpha, dice=self._config.loss).double() * len(mask)
            for logits, mask in self._evaluated(rows)
        ]
        return float(torch.stack(sums).sum() / len(rows))

    def _evaluated(self, rows: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits (b, 1, H, W) and masks (b, H, W) of the plain views."""
        self._decoder.eval()
        size = max(_PIXELS_AT_ONCE // (self._targets.size[0] * self._targets.size[1]), 1)
        parts = np.split(rows, range(size, len(rows), size))
        for features, mask in self._batches([(part, np.zeros(len(part), np.int64)) for part in parts]):
            yield self._logits(features), mask

    def _logits(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, torch.bfloat16, enabled=self._config.precision == "bfloat16"):
            logits: Tensor = self._decoder(features)
        return logits.float()

    def _batches(self, chosen: Sequence[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Feature maps (b, c, g, g') and masks (b, H, W) uint8 on the device; masks are unpacked a batch ahead."""
        masks = ahead(self._targets.take(samples, views) for samples, views in chosen)
        for features, mask in zip(self._feed.batches(chosen), masks, strict=True):
            yield features, moved(mask, self._device)


def overlap_with(masks: np.ndarray, targets: MaskTargets, rows: np.ndarray) -> Overlap:
    """Where each of s masks (s, H, W) bool, the same for every image, meets the true ones, as s runs."""
    flat = masks.reshape(len(masks), -1).astype(np.float32)
    parts = np.split(rows, range(256, len(rows), 256))
    both = [flat @ targets.take(part).numpy().reshape(len(part), -1).astype(np.float32).T for part in parts]
    predicted = np.repeat(masks.sum(axis=(1, 2))[:, None], len(rows), axis=1)
    return Overlap(np.concatenate(both, axis=1).astype(np.int64), predicted, targets.areas[rows, 0])
