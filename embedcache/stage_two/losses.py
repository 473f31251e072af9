"""Losses of the paper: the weighted contrastive loss, and the mask losses of its segmentation.

Shape notation: b pairs in the batch, h and w the mask's size.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(logits_per_text: Tensor, *, image_weight: float = 0.75, texts: Tensor | None = None) -> Tensor:
    """Weighted cross-entropy over both directions of the similarity matrix.

    Source: the paper's contrastive objective; with `texts`, equal texts are positives of each other.

    Args:
        logits_per_text: scaled similarities, rows are texts and columns images, (b, b).
        image_weight: weight of the cross-entropy over rows; the rest goes to columns.
        texts: a code for each row's text, (b,) integer; rows with equal codes share their positives. Without it
            only the diagonal counts, which is the same where all texts differ.

    Returns:
        The loss, a scalar.
    """
    if logits_per_text.ndim != 2 or logits_per_text.shape[0] != logits_per_text.shape[1]:
        raise ValueError(f"logits_per_text has shape {tuple(logits_per_text.shape)}, expected (b, b)")
    if texts is None:
        targets = torch.arange(len(logits_per_text), device=logits_per_text.device)
    else:
        equal = (texts[:, None] == texts[None, :]).to(logits_per_text.dtype)
        targets = equal / equal.sum(dim=1, keepdim=True)  # an image's texts are those equal to its own: both ways
    over_rows = F.cross_entropy(logits_per_text, targets)
    over_columns = F.cross_entropy(logits_per_text.T, targets)
    return image_weight * over_rows + (1 - image_weight) * over_columns


def mask_loss(
    logits: Tensor, mask: Tensor, *, alpha: float = 10.0, dice: Literal["squared", "log"] = "squared"
) -> Tensor:
    """Focal loss plus a Dice term, as the paper's segmentation uses them.

    Source: the paper's code. `squared` is its modified form: the Dice term is taken on the logits themselves, its
    denominator holds their squares, and it is summed over the batch. `log` is minus the logarithm of the soft Dice
    of the whole batch.

    Args:
        logits: (b, 1, h, w).
        mask: 0 or 1, (b, 1, h, w).
        alpha: weight of the focal loss (gamma 2).

    Returns:
        The loss, a scalar.
    """
    if logits.shape != mask.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and mask {tuple(mask.shape)}, expected one shape")
    mask = mask.to(logits.dtype)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    miss = torch.exp(2 * F.logsigmoid(-logits * (2 * mask - 1)))  # (1 - p_true) squared
    focal = (miss * cross_entropy).mean()
    smooth = 1.0
    if dice == "squared":
        x, y = logits.flatten(1), mask.flatten(1)
        overlap = ((x * y).sum(1) + smooth) / ((x * x).sum(1) + (y * y).sum(1) + smooth)
        return alpha * focal + (1 - overlap).sum()
    if dice == "log":
        p = logits.sigmoid()
        overlap = (2 * (p * mask).sum() + smooth) / (p.sum() + mask.sum() + smooth)
        return alpha * focal - overlap.log()
    raise ValueError(f"dice={dice!r}, expected 'squared' or 'log'")
