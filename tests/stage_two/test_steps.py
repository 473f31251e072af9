"""A step: the paper's trajectory, and several models together as each alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from golden_numbers import close, part
from torch import Tensor

from embedcache.stage_two import steps as steps_module
from embedcache.stage_two.adaptor import Adaptor
from embedcache.stage_two.config import TrainConfig, schedule
from embedcache.stage_two.distributed import Group
from embedcache.stage_two.feed import Batch
from embedcache.stage_two.steps import Steps


def one_batch(image: Tensor, text: Tensor, codes: Tensor | None = None) -> Batch:
    """The same batch for one model."""
    codes = torch.arange(len(image)) if codes is None else codes
    return Batch(image[None], text[None], None, None, codes[None], codes[None])


def test_ten_steps_of_the_paper(golden: dict[str, Tensor]) -> None:
    adaptor = Adaptor.from_reference(part(golden, "weights.")).eval()  # dropout off, as where the numbers come from
    factor, config = schedule("linear", 20, 2), TrainConfig(lr=1e-3, weight_decay=0.01)
    steps = Steps([adaptor], [config], Group())
    batch = one_batch(golden["input.image"], golden["input.text"])
    losses = [steps.step(batch, factor(k))[0] for k in range(10)]
    close(torch.stack(losses), golden["trajectory.loss"])


def test_a_step_is_torchs_own_adamw_and_no_gradient_reaches_queries_and_keys() -> None:
    torch.manual_seed(0)
    image, text = torch.randn(8, 6), torch.randn(8, 5)
    adaptor = Adaptor(6, 5, projection_dim=24, ff_dim=32, dropout=0.0)
    other = Adaptor(6, 5, projection_dim=24, ff_dim=32, dropout=0.0)
    other.load_state_dict(adaptor.state_dict())
    config = TrainConfig(lr=1e-2, clip_norm=0.1)
    steps, optimizer = Steps([adaptor], [config], Group()), torch.optim.AdamW(other.parameters(), lr=1e-2)
    for _ in range(3):
        steps.step(one_batch(image, text), 1.0)
        optimizer.zero_grad()
        logits = other(image, text).logits_per_text
        target = torch.arange(8)
        loss = 0.75 * torch.nn.functional.cross_entropy(logits, target)
        (loss + 0.25 * torch.nn.functional.cross_entropy(logits.T, target)).backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        optimizer.step()
    for (name, ours), theirs in zip(adaptor.named_parameters(), other.parameters(), strict=True):
        close(ours, theirs)
        if name.endswith("in_proj_weight"):
            assert ours.grad is not None
            assert not ours.grad[:48].any()


@pytest.fixture(params=[True, False], ids=["batched", "one by one"])
def batched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(steps_module, "_BATCHED_WORK_OF_CPU", 1e12 if request.param else 0)
    return request.param


@pytest.mark.parametrize(
    "changes",
    [{}, {"adaptor": "mlp"}, {"adaptor": "linear"}, {"adaptor": "identity"}, {"loss": "siglip"}, {"clip_norm": 0.05}],
    ids=str,
)
def test_together_is_as_alone(batched: bool, changes: dict) -> None:
    torch.manual_seed(0)
    k, n = 3, 10
    image, text, codes = torch.randn(k, n, 6), torch.randn(k, n, 6), torch.randint(0, 7, (k, n))
    base = replace(TrainConfig(lr=1e-3, projection_dim=24, ff_dim=32, dropout=0.0, batch_size=n), **changes)
    configs = [replace(base, lr=lr, weight_decay=wd) for lr, wd in ((1e-2, 0.0), (1e-3, 0.1), (3e-3, 0.01))]

    def adaptors() -> list[Adaptor]:
        made = []
        for i in range(k):
            torch.manual_seed(i)
            made.append(
                Adaptor(6, 6, kind=base.adaptor, projection_dim=24, ff_dim=32, dropout=0.0, logit_bias=base.logit_bias)
            )
        return made

    together, alone = adaptors(), adaptors()
    steps = Steps(together, configs, Group())
    assert (steps._stacked is not None) == batched
    singles = [Steps([adaptor], [config], Group()) for adaptor, config in zip(alone, configs, strict=True)]
    for step in range(6):
        batch = Batch(image + step, text - step, None, None, codes, codes)
        losses = steps.step(batch, 0.5)
        for i, single in enumerate(singles):
            close(single.step(one_batch(image[i] + step, text[i] - step, codes[i]), 0.5)[0], losses[i])
        if step == 2:  # the middle one has stopped
            steps.keep([0, 2])
            image, text, codes = image[[0, 2]], text[[0, 2]], codes[[0, 2]]
            singles = [singles[0], singles[2]]
    for ours, theirs in zip(together, alone, strict=True):
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            close(a, b)


def test_masks_of_dropout_differ_between_models_together(batched: bool) -> None:
    torch.manual_seed(0)
    adaptor = Adaptor(6, 5, projection_dim=24, ff_dim=32, dropout=0.5)
    same = Adaptor(6, 5, projection_dim=24, ff_dim=32, dropout=0.5)
    same.load_state_dict(adaptor.state_dict())
    steps = Steps([adaptor, same], [TrainConfig(dropout=0.5)] * 2, Group())
    steps.train()
    image, text = torch.randn(9, 6).expand(2, 9, 6), torch.randn(9, 5).expand(2, 9, 5)
    codes = torch.arange(9).expand(2, 9)
    losses = steps.step(Batch(image, text, None, None, codes, codes), 1.0)
    assert losses[0] != losses[1]


def test_the_optimisers_state_can_be_kept_and_given_back(batched: bool) -> None:
    torch.manual_seed(0)
    image, text, codes = torch.randn(2, 9, 6), torch.randn(2, 9, 5), torch.arange(9).expand(2, 9)
    batch = Batch(image, text, None, None, codes, codes)
    configs = [TrainConfig(lr=1e-2, batch_size=9), TrainConfig(lr=1e-3, batch_size=9)]

    def adaptors() -> list[Adaptor]:
        torch.manual_seed(1)
        return [Adaptor(6, 5, projection_dim=24, ff_dim=32, dropout=0.0) for _ in range(2)]

    straight = adaptors()
    steps = Steps(straight, configs, Group())
    for _ in range(4):
        steps.step(batch, 1.0)
    broken = adaptors()
    before = Steps(broken, configs, Group())
    for _ in range(2):
        before.step(batch, 1.0)
    again = adaptors()
    for new, old in zip(again, broken, strict=True):
        new.load_state_dict(old.state_dict())
    after = Steps(again, configs, Group())
    for i in range(2):
        after.restore_optimizer(i, {k: v.clone() for k, v in before.optimizer_state(i).items()})
    for _ in range(2):
        after.step(batch, 1.0)
    for a, b in zip(straight, again, strict=True):
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
            assert torch.equal(x, y)


def test_bfloat16_is_near_float32() -> None:
    torch.manual_seed(0)
    image, text = torch.randn(16, 12), torch.randn(16, 10)
    losses = {}
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(1)
        adaptor = Adaptor(12, 10, projection_dim=48, ff_dim=64, dropout=0.0)
        config = TrainConfig(lr=1e-3, precision=precision)  # type: ignore[arg-type]
        steps = Steps([adaptor], [config], Group())
        losses[precision] = torch.stack([steps.step(one_batch(image, text), 1.0)[0] for _ in range(10)])
        assert all(p.dtype == torch.float32 for p in adaptor.parameters())
    assert losses["bfloat16"].dtype == torch.float32
    torch.testing.assert_close(losses["bfloat16"], losses["float32"], atol=0.05, rtol=0.05)
    assert not torch.equal(losses["bfloat16"], losses["float32"])
