"""Losses: the paper's weighted contrastive loss and SigLIP's, and the mask losses of the paper's segmentation.

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
    _check_square(logits_per_text)
    # the targets are symmetric, so both directions lose the same similarities of pairs that belong together
    own = _own_similarities(logits_per_text, texts, texts)
    over_rows, over_columns = logits_per_text.logsumexp(dim=1).mean(), logits_per_text.logsumexp(dim=0).mean()
    return image_weight * over_rows + (1 - image_weight) * over_columns - own.mean()


def siglip_loss(logits_per_text: Tensor, *, texts: Tensor | None = None) -> Tensor:
    """A yes or no for each text with each image, summed over images and averaged over texts.

    Source: *Sigmoid loss for language image pre-training* (Zhai et al. 2023); open_clip's where all texts differ,
    whose code knows no further positives. With `texts`, equal texts are positives of each other.

    Args:
        logits_per_text: scaled similarities with their bias, (b, b).
        texts: as of `contrastive_loss`.

    Returns:
        The loss, a scalar.
    """
    _check_square(logits_per_text)
    return _siglip_of_texts(logits_per_text, texts, texts).mean()


def contrastive_share(
    per_text: Tensor, per_image: Tensor, own_texts: Tensor, all_texts: Tensor, *, image_weight: float
) -> Tensor:
    """What m of b pairs add to `contrastive_loss` over all b; the shares of all processes sum to it.

    Args:
        per_text: similarities of m texts with all images, (m, b).
        per_image: similarities of m images with all texts, (m, b).
        own_texts: codes of the m texts, (m,).
        all_texts: codes of all texts, (b,).
    """
    over_rows = per_text.logsumexp(dim=1) - _own_similarities(per_text, own_texts, all_texts)
    over_columns = per_image.logsumexp(dim=1) - _own_similarities(per_image, own_texts, all_texts)
    return (image_weight * over_rows + (1 - image_weight) * over_columns).sum() / len(all_texts)


def siglip_share(per_text: Tensor, own_texts: Tensor, all_texts: Tensor) -> Tensor:
    """What m of b texts add to `siglip_loss` over all b; arguments as of `contrastive_share`."""
    return _siglip_of_texts(per_text, own_texts, all_texts).sum() / len(all_texts)


def _check_square(logits: Tensor) -> None:
    if logits.ndim != 2 or logits.shape[0] != logits.shape[1]:
        raise ValueError(f"logits_per_text has shape {tuple(logits.shape)}, expected (b, b)")


def _own_similarities(logits: Tensor, own: Tensor | None, other: Tensor | None) -> Tensor:
    """For each row the mean over its positives, (m,)."""
    if own is None or other is None:
        return logits.diagonal()
    equal = (own[:, None] == other[None, :]).to(logits.dtype)
    return (equal * logits).sum(dim=1) / equal.sum(dim=1)


def _siglip_of_texts(logits: Tensor, own: Tensor | None, other: Tensor | None) -> Tensor:
    if own is None or other is None:
        own = other = torch.arange(len(logits), device=logits.device)
    sign = 2 * (own[:, None] == other[None, :]).to(logits.dtype) - 1
    return -F.logsigmoid(sign * logits).sum(dim=1)


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
