"""The Adaptor against numbers computed by the paper's own code, and its parts against torch's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import embedcache
from embedcache.errors import RunNotFoundError
from embedcache.stage_two.adaptor import Adaptor, AttentionBlock, count_parameters
from embedcache.stage_two.losses import contrastive_loss, mask_loss
from embedcache.stage_two.train import linear_schedule

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(params=[1, 2])
def golden(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"adaptor_{request.param}layer.safetensors")


def part(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in golden.items() if name.startswith(prefix)}


def check_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_outputs_and_loss(golden: dict[str, Tensor]) -> None:
    adaptor = Adaptor.from_reference(part(golden, "weights.")).eval()
    output = adaptor(golden["input.image"], golden["input.text"])
    check_close(output.image_embeds, golden["output.image_embeds"])
    check_close(output.text_embeds, golden["output.text_embeds"])
    check_close(output.logits_per_text, golden["output.logits_per_text"])
    check_close(contrastive_loss(output.logits_per_text).reshape(1), golden["output.loss"])
    check_close(adaptor.encode_image(golden["input.image"]), golden["output.image_embeds"])
    check_close(adaptor.encode_text(golden["input.text"]), golden["output.text_embeds"])


def test_tokens_of_one_modality(golden: dict[str, Tensor]) -> None:
    adaptor = Adaptor.from_reference(part(golden, "weights.")).eval()
    check_close(adaptor.encode_image(golden["input.image_tokens"]), golden["output.image_tokens"])


def test_gradients_and_none_for_queries_and_keys(golden: dict[str, Tensor]) -> None:
    adaptor = Adaptor.from_reference(part(golden, "weights.")).eval()
    contrastive_loss(adaptor(golden["input.image"], golden["input.text"]).logits_per_text).backward()
    theirs = Adaptor.from_reference(part(golden, "grad."))
    for (name, ours), expected in zip(adaptor.named_parameters(), theirs.parameters(), strict=True):
        assert ours.grad is not None, name
        check_close(ours.grad, expected.data)
        if name.endswith("in_proj_weight"):
            assert not ours.grad[: 2 * adaptor.config.projection_dim].any()


def test_ten_steps_of_training(golden: dict[str, Tensor]) -> None:
    adaptor = Adaptor.from_reference(part(golden, "weights.")).eval()  # dropout off, as where the numbers come from
    optimizer = torch.optim.AdamW(adaptor.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, linear_schedule(20, 2))
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = contrastive_loss(adaptor(golden["input.image"], golden["input.text"]).logits_per_text)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    check_close(torch.stack(losses), golden["trajectory.loss"])


def test_mask_losses(golden: dict[str, Tensor]) -> None:
    logits, mask = golden["segloss.logits"], golden["segloss.mask"]
    check_close(mask_loss(logits, mask).reshape(1), golden["segloss.paper_modified_True"])
    check_close(mask_loss(logits, mask, dice="log").reshape(1), golden["segloss.paper_modified_False"])
    check_close(mask_loss(logits, mask, alpha=10.0, dice="log").reshape(1), golden["segloss.mixed_alpha10"])


@pytest.mark.parametrize(("image_dim", "expected"), [(384, 11_912_705), (768, 12_207_617), (512, 12_011_009)])
def test_parameter_counts_of_the_paper(image_dim: int, expected: int) -> None:
    assert count_parameters(Adaptor(image_dim, 768)) == expected


def reference_block(block: AttentionBlock, x: Tensor, query: Tensor) -> Tensor:
    """The block as torch's own modules compute it, with another modality's query."""
    attention = nn.MultiheadAttention(block.dim, block.n_heads, batch_first=True)
    attention.load_state_dict(
        {
            "in_proj_weight": block.in_proj_weight,
            "in_proj_bias": block.in_proj_bias,
            "out_proj.weight": block.out_proj.weight,
            "out_proj.bias": block.out_proj.bias,
        }
    )
    x = block.norm1(x + attention(query, x, x, need_weights=False)[0])
    return block.norm2(x + block.linear2(block.linear1(x).relu()))


def test_the_single_token_path_equals_full_attention_whatever_the_query() -> None:
    torch.manual_seed(0)
    block = AttentionBlock(24, n_heads=4, ff_dim=32, dropout=0.1).eval()
    nn.init.normal_(block.in_proj_bias)
    x, query = torch.randn(5, 24), torch.randn(5, 24)
    check_close(block(x), reference_block(block, x[:, None], query[:, None])[:, 0])


def test_tokens_equal_torchs_attention() -> None:
    torch.manual_seed(0)
    block = AttentionBlock(24, n_heads=4, ff_dim=32, dropout=0.1).eval()
    x = torch.randn(3, 7, 24)
    check_close(block(x), reference_block(block, x, x))


def test_dropout_of_a_single_token_drops_whole_heads() -> None:
    torch.manual_seed(0)
    block = AttentionBlock(24, n_heads=4, ff_dim=32, dropout=0.5).train()
    x = torch.randn(400, 24)
    values = block._attend_single(x).view(400, 4, 6)
    block.eval()
    kept = values.abs().sum(-1) > 0
    expected = block._attend_single(x).view(400, 4, 6)
    check_close(values[kept], 2 * expected[kept])
    assert 0.4 < kept.float().mean() < 0.6


def test_samples_do_not_touch_each_other() -> None:
    torch.manual_seed(0)
    adaptor = Adaptor(6, 5, projection_dim=24, ff_dim=32).eval()
    image = torch.randn(4, 6)
    alone = torch.cat([adaptor.encode_image(row[None]) for row in image])
    check_close(adaptor.encode_image(image), alone)


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match=r"projection_dim \(10\) must be divisible by n_heads \(3\)"):
        Adaptor(4, 4, projection_dim=10, n_heads=3)
    adaptor = Adaptor(4, 4, projection_dim=12)
    with pytest.raises(ValueError, match="one modality at a time"):
        adaptor(torch.randn(2, 7, 4), torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"expected \(b, 4\)"):
        adaptor(torch.randn(2, 4), torch.randn(3, 4))
    with pytest.raises(KeyError, match=r"lacks .projection\.visual_projection"):
        Adaptor.from_reference({"adaptor_module.encoder.0.linear1.weight": torch.zeros(2, 2)})


def test_it_is_saved_and_read_back(tmp_path: Path) -> None:
    adaptor = Adaptor(6, 5, projection_dim=24, n_layers=1, n_heads=3, ff_dim=32, dropout=0.2).eval()
    adaptor.notes = {"image": "f"}
    adaptor.save_pretrained(tmp_path / "run")
    read = embedcache.Adaptor.from_pretrained(tmp_path / "run")
    assert read.config == adaptor.config
    assert read.notes == {"image": "f"}
    image = torch.randn(3, 6)
    torch.testing.assert_close(read.encode_image(image), adaptor.encode_image(image), atol=0, rtol=0)
    with pytest.raises(RunNotFoundError, match="embedcache train"):
        embedcache.Adaptor.from_pretrained(tmp_path)


# losses


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
    check_close(contrastive_loss(logits, image_weight=1.0), nn.functional.cross_entropy(logits, target))
    check_close(contrastive_loss(logits, image_weight=0.0), nn.functional.cross_entropy(logits.T, target))


def test_losses_refuse_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"expected \(b, b\)"):
        contrastive_loss(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="expected one shape"):
        mask_loss(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match="'squared' or 'log'"):
        mask_loss(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), dice="soft")
