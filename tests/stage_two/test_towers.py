"""The paper's attention against torch's own, and what tokens of both modalities can leak."""

from __future__ import annotations

import pytest
import torch
from golden_numbers import close
from torch import Tensor, nn

from embedcache.stage_two.adaptor import Adaptor
from embedcache.stage_two.config import TrainConfig
from embedcache.stage_two.distributed import Group
from embedcache.stage_two.dropout import dropped
from embedcache.stage_two.feed import Batch
from embedcache.stage_two.losses import contrastive_loss
from embedcache.stage_two.steps import Steps
from embedcache.stage_two.towers import AttentionBlock, mean_token


def reference_block(block: AttentionBlock, x: Tensor, query: Tensor, absent: Tensor | None = None) -> Tensor:
    """The block as torch's own modules compute it."""
    attention = nn.MultiheadAttention(block.dim, block.n_heads, batch_first=True)
    attention.load_state_dict(
        {
            "in_proj_weight": block.in_proj_weight,
            "in_proj_bias": block.in_proj_bias,
            "out_proj.weight": block.out_proj.weight,
            "out_proj.bias": block.out_proj.bias,
        }
    )
    x = block.norm1(x + attention(query, x, x, key_padding_mask=absent, need_weights=False)[0])
    return block.norm2(x + block.linear2(block.linear1(x).relu()))


@pytest.fixture
def block() -> AttentionBlock:
    torch.manual_seed(0)
    block = AttentionBlock(24, n_heads=4, ff_dim=32, dropout=0.5).eval()
    nn.init.normal_(block.in_proj_bias)
    return block


def test_a_single_token_equals_full_attention_whatever_the_query(block: AttentionBlock) -> None:
    x, query = torch.randn(5, 24), torch.randn(5, 24)
    close(block(x), reference_block(block, x[:, None], query[:, None])[:, 0])


def test_tokens_equal_torchs_attention(block: AttentionBlock) -> None:
    x = torch.randn(3, 7, 24)
    close(block(x), reference_block(block, x, x))


def test_absent_tokens_are_not_attended_to(block: AttentionBlock) -> None:
    x, mask = torch.randn(3, 7, 24), torch.arange(7) < torch.tensor([[7], [3], [1]])
    close(block(x, mask=mask)[mask], reference_block(block, x, x, absent=~mask)[mask])
    close(block(x, mask=mask)[1, :3], block(x[1:2, :3])[0])


def test_a_query_from_elsewhere_equals_torchs_attention(block: AttentionBlock) -> None:
    x, query = torch.randn(3, 7, 24), torch.randn(3, 1, 24)
    close(block(x, query=query), reference_block(block, x, query))


def test_dropout_of_a_single_token_drops_whole_heads(block: AttentionBlock) -> None:
    x = torch.randn(400, 24)
    values = block.train()._attend_single(x).view(400, 4, 6)
    expected = block.eval()._attend_single(x).view(400, 4, 6)
    kept = values.abs().sum(-1) > 0
    close(values[kept], 2 * expected[kept])
    assert 0.4 < kept.float().mean() < 0.6


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_and_the_mean(p: float) -> None:
    torch.manual_seed(0)
    x = torch.full((1001, 999), 3.0, requires_grad=True)
    y = dropped(x, p)
    kept = y != 0
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=2e-3)
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 3 / (1 - p)), rtol=1e-4, atol=0)
    assert (kept.float().mean(0) - (1 - p)).abs().max() < 0.1  # no column is spared
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient != 0, kept)
    torch.manual_seed(0)
    assert torch.equal(dropped(x, p), y)


def test_no_dropout_changes_nothing() -> None:
    x = torch.randn(3, 4)
    assert torch.equal(dropped(x, 0.0), x)


def test_mean_token_leaves_absent_ones_out() -> None:
    x = torch.arange(12.0).view(2, 3, 2)
    close(mean_token(x, None), x.mean(1))
    close(mean_token(x, torch.tensor([[True, False, True], [True, False, False]])), torch.tensor([[2.0, 3], [6, 7]]))
    close(mean_token(x[:, 0], None), x[:, 0])


# tokens of both modalities


def information_free(n: int, seed: int) -> Batch:
    """Pairs of tokens that have nothing to do with each other."""
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(1, n, 6, 16, generator=generator) for _ in range(2))
    codes = torch.arange(n)[None]
    return Batch(image, text, None, None, codes, codes)


def loss_on_unseen_noise(attention: str) -> tuple[float, float]:
    """Training loss at the end, and the loss on fresh noise, after training on noise that is fresh in each step."""
    torch.manual_seed(0)
    config = TrainConfig(attention=attention, image="tokens", text="tokens", batch_size=32, lr=3e-3)  # type: ignore[arg-type]
    adaptor = Adaptor(16, 16, projection_dim=24, n_heads=4, ff_dim=32, dropout=0.0, attention=attention)
    steps, losses = Steps([adaptor], [config], Group()), []
    for k in range(400):
        losses.append(steps.step(information_free(32, k), 1.0).item())
    fresh = information_free(32, 10_000)
    with torch.no_grad():
        logits = adaptor(fresh.image[0], fresh.text[0]).logits_per_text
    return sum(losses[-20:]) / 20, contrastive_loss(logits).item()


def test_cross_modal_attention_has_a_shortcut_and_the_default_has_none() -> None:
    """Where image and text have nothing in common, no honest loss can fall below that of guessing, log(32) = 3.466."""
    chance = torch.tensor(32.0).log().item()
    trained, unseen = loss_on_unseen_noise("self")
    assert trained > chance - 0.05
    assert unseen > chance - 0.05
    trained, unseen = loss_on_unseen_noise("cross-modal")
    assert trained < chance - 0.5
    assert unseen < chance - 0.5
