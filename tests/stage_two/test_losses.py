"""Losses against the paper's own code, torch's cross-entropy and open_clip."""

from __future__ import annotations

import math

import pytest
import torch
from golden_numbers import close
from torch import Tensor, nn

from embedcache.stage_two.losses import (
    contrastive_loss,
    contrastive_share,
    mask_loss,
    siglip_loss,
    siglip_share,
)


def test_mask_losses(golden: dict[str, Tensor]) -> None:
    logits, mask = golden["segloss.logits"], golden["segloss.mask"]
    close(mask_loss(logits, mask).reshape(1), golden["segloss.paper_modified_True"])
    close(mask_loss(logits, mask, dice="log").reshape(1), golden["segloss.paper_modified_False"])
    close(mask_loss(logits, mask, alpha=10.0, dice="log").reshape(1), golden["segloss.mixed_alpha10"])


def test_equal_texts_are_positives() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 4)
    plain = contrastive_loss(logits)
    torch.testing.assert_close(contrastive_loss(logits, texts=torch.tensor([3, 1, 0, 2])), plain)
    texts = torch.tensor([0, 1, 0, 2])
    target = torch.tensor([[0.5, 0, 0.5, 0], [0, 1, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0, 1]])
    rows = -(target * logits.log_softmax(1)).sum(1).mean()
    columns = -(target * logits.T.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(contrastive_loss(logits, texts=texts), 0.75 * rows + 0.25 * columns)


def test_image_weight_moves_between_the_directions() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 5)
    target = torch.arange(5)
    close(contrastive_loss(logits, image_weight=1.0), nn.functional.cross_entropy(logits, target))
    close(contrastive_loss(logits, image_weight=0.0), nn.functional.cross_entropy(logits.T, target))


def test_losses_refuse_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"expected \(b, b\)"):
        contrastive_loss(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="expected one shape"):
        mask_loss(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match="'squared' or 'log'"):
        mask_loss(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), dice="soft")
    with pytest.raises(ValueError, match=r"expected \(b, b\)"):
        siglip_loss(torch.zeros(2, 3))


def test_siglip_is_open_clips_where_all_texts_differ() -> None:
    from open_clip.loss import SigLipLoss

    torch.manual_seed(0)
    image, text = (nn.functional.normalize(torch.randn(7, 12), dim=1) for _ in range(2))
    scale, bias = torch.tensor(20.0), torch.tensor(-10.0)
    theirs = SigLipLoss()(image, text, scale, bias)
    close(siglip_loss(scale * text @ image.T + bias), theirs)
    close(siglip_loss(scale * text @ image.T + bias, texts=torch.randperm(7)), theirs)


def test_siglip_says_yes_to_equal_texts() -> None:
    logits, texts = torch.tensor([[1.0, 2, 3], [-1, 0, 1], [0.5, 4, -2]]), torch.tensor([5, 5, 1])
    signs = [[1 if a == b else -1 for b in texts.tolist()] for a in texts.tolist()]
    expected = sum(math.log1p(math.exp(-signs[i][j] * logits[i, j])) for i in range(3) for j in range(3))
    close(siglip_loss(logits, texts=texts), torch.tensor(expected / 3))


def test_shares_of_a_batch_sum_to_its_loss() -> None:
    torch.manual_seed(0)
    logits, texts = torch.randn(9, 9), torch.tensor([0, 1, 2, 0, 3, 4, 1, 0, 5])
    parts = [slice(0, 4), slice(4, 9)]
    shares = [contrastive_share(logits[p], logits.T[p], texts[p], texts, image_weight=0.75) for p in parts]
    close(torch.stack(shares).sum(), contrastive_loss(logits, texts=texts))
    shares = [siglip_share(logits[p], texts[p], texts) for p in parts]
    close(torch.stack(shares).sum(), siglip_loss(logits, texts=texts))


def test_false_negatives_of_equal_texts_cost_what_they_should() -> None:
    """Perfect embeddings of two texts: the plain loss calls half of the batch wrong, ours none of it."""
    texts = torch.tensor([0, 1] * 4)
    logits = 50 * (texts[:, None] == texts[None, :]).float()
    close(contrastive_loss(logits, texts=texts), torch.tensor(math.log(4)))  # four alike: which of them is a guess
    assert siglip_loss(logits - 25, texts=texts) < 1e-6 < siglip_loss(logits - 25)
