"""Many heads at once come out as torch's own modules, optimiser and schedule make each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from made import BINARY, BOTH, KIND, TARGETS, told_labels
from torch import Tensor, nn

from embedcache.errors import TrainingError
from embedcache.stage_two.head_fits import Fit, Fitted, fit_heads
from embedcache.stage_two.heads import HeadConfig, HeadStack
from embedcache.stage_two.targets import Target

SIZES = (2, 10, 37, 128, 129, 130, 257)  # at 128 a batch: padded last batches, and last ones of one row
QUICK = HeadConfig(epochs=4, min_steps=0, batch_size=16, lr=1e-2, dropout=0.0)


def stack(kind: str, seeds: Sequence[int] = (0,), *, dim: int = 6, outputs: int = 2, dropout: float = 0.0) -> HeadStack:
    return HeadStack(kind, dim, outputs, seeds=seeds, dropout=dropout, device="cpu")


def torchs(heads: HeadStack, k: int = 0) -> nn.Module:
    """One head of a stack as torch's own modules, with the same weights."""
    out = nn.Linear(heads.out.shape[1], heads.out.shape[2])
    out.load_state_dict({"weight": heads.out[k].T, "bias": heads.bias[k, 0]})
    if not heads.is_mlp:
        return nn.Sequential(nn.Dropout(0.0), out)
    hidden = nn.Linear(heads.hidden.shape[1], 512, bias=False)
    hidden.load_state_dict({"weight": heads.hidden[k].T})
    return nn.Sequential(nn.Dropout(0.0), hidden, nn.BatchNorm1d(512), nn.ReLU(), nn.Dropout(0.0), out)


def world(target: Target, n: int = 300, *, blank: float = 0.2) -> tuple[Tensor, np.ndarray]:
    """Features (n, 6) and labels (n, t)."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 6)).astype(np.float32)
    return torch.from_numpy(x), told_labels(target, x, rng, blank=blank)


def fitted(
    kind: str,
    x: Tensor,
    fits: Sequence[Fit],
    *,
    target: Target = BINARY,
    config: HeadConfig = QUICK,
    weight: str = "none",
) -> list[Fitted]:
    return fit_heads(kind, x, fits, target=target, config=config, class_weight=weight, asked=np.arange(0, len(x), 3))


# one head


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_head_is_torchs_own_in_training_and_evaluation(kind: str) -> None:
    heads, x = stack(kind), torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    own = torchs(heads)
    for part in x.split(20):  # twice, for the running statistics
        ours, theirs = heads.train()(part[None])[0], own.train()(part)
        torch.testing.assert_close(ours, theirs)
    weights = torch.linspace(-1, 1, theirs.numel()).view_as(theirs)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    torch.testing.assert_close(heads.out.grad[0].T, own[-1].weight.grad)
    torch.testing.assert_close(heads.bias.grad[0, 0], own[-1].bias.grad)
    if kind == "mlp":
        torch.testing.assert_close(heads.hidden.grad[0].T, own[1].weight.grad, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(heads.scale.grad[0, 0], own[2].weight.grad, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(heads.shift.grad[0, 0], own[2].bias.grad)
        torch.testing.assert_close(heads.mean[0, 0], own[2].running_mean)
        torch.testing.assert_close(heads.variance[0, 0], own[2].running_var)
    expected = own.eval()(x)
    torch.testing.assert_close(heads.evaluated(x)[0], expected)
    torch.testing.assert_close(heads.eval()(x[None])[0], expected)


def test_padding_is_not_seen_by_the_statistics() -> None:
    heads, x = stack("mlp", (0, 1, 2)), torch.randn(3, 9, 6, generator=torch.Generator().manual_seed(0))
    n_rows = [9, 5, 2]
    present = (torch.arange(9) < torch.tensor(n_rows)[:, None]).unsqueeze(-1).float()
    logits = heads.train()(x, present)
    for k, n in enumerate(n_rows):
        own = torchs(heads, k).train()
        torch.testing.assert_close(logits[k, :n], own(x[k, :n]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(heads.mean[k, 0], own[2].running_mean)
        torch.testing.assert_close(heads.variance[k, 0], own[2].running_var)


def test_a_head_starts_alike_whichever_stand_beside_it() -> None:
    alone, among = stack("mlp", (3,)).state_dict(), stack("mlp", (5, 3, 4)).state_dict()
    for name, value in alone.items():
        assert torch.equal(among[name][1:2], value)
    assert not torch.equal(among["out"][0], among["out"][2])
    for name, fan_in in (("hidden", 6), ("out", 512), ("bias", 512)):  # as nn.Linear starts
        assert among[name].abs().max() <= fan_in**-0.5
    assert among["out"].std().item() == pytest.approx((512 * 3) ** -0.5, rel=0.05)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_each_head_drops_by_itself_and_in_training_only(kind: str) -> None:
    heads, x = stack(kind, (0, 0, 1), dropout=0.5), torch.randn(3, 50, 6)
    before = torch.get_rng_state()
    one, two = heads.train()(x[:1].expand(3, -1, -1)), heads(x[:1].expand(3, -1, -1))
    assert torch.equal(one[0], one[1])
    assert not torch.equal(one[0], two[0])
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.allclose(torchs(heads, 2).train()(x[0]), one[2])
    assert torch.equal(heads.evaluated(x[0]), heads.evaluated(x[0]))


def test_an_unknown_head_is_refused() -> None:
    with pytest.raises(ValueError, match="head 'forest', expected one of linear, mlp"):
        stack("forest")


# the schedule


def test_few_batches_are_passed_more_often() -> None:
    config = HeadConfig(epochs=50, min_steps=200)
    assert [config.n_epochs(n) for n in (1, 3, 4, 5, 100)] == [200, 67, 50, 50, 50]
    assert HeadConfig(epochs=5, min_steps=0).n_epochs(1) == 5


@pytest.mark.parametrize("n_batches", [1, 3, 7])
@pytest.mark.parametrize("restarts_by", ["step", "epoch"])
def test_the_learning_rate_is_that_of_torchs_schedule(n_batches: int, restarts_by: str) -> None:
    config = HeadConfig(epochs=11, min_steps=0, lr=3e-3, restarts_by=restarts_by)  # type: ignore[arg-type]
    n_steps = 11 * n_batches
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, int(0.4 * n_steps), eta_min=1e-8)
    for step in range(n_steps):
        assert config.lr_at(step, n_batches) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        if restarts_by == "step" or (step + 1) % n_batches == 0:
            schedule.step()


# many heads


def plain_loop(kind: str, x: Tensor, fit: Fit, target: Target, config: HeadConfig) -> Tensor:
    """A fit without dropout, in torch's own words; logits of all rows."""
    model = torchs(stack(kind, (fit.seed,), outputs=target.n_outputs))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    n, size = len(fit.rows), config.batch_size
    n_batches = sum(len(part) > 1 for part in torch.arange(n).split(size))
    n_steps = config.epochs * n_batches
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, int(0.4 * n_steps), eta_min=1e-8)
    rng, unweighted = np.random.default_rng(fit.seed), torch.ones(1, target.n_outputs, 2)
    for epoch in range(config.epochs):
        if config.reshuffle or epoch == 0:
            order = rng.permutation(n)
        for part in torch.from_numpy(order).split(size):
            if len(part) < 2:
                continue
            y = torch.from_numpy(fit.labels[part]).float()
            weights = unweighted[..., 0] if target.task == "multi-class" else unweighted
            loss = target.loss(model.train()(x[fit.rows[part]])[None], y[None], weights).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if config.restarts_by == "step":
                schedule.step()
        if config.restarts_by == "epoch":
            schedule.step()
    return model.eval()(x).detach()


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("restarts_by", ["step", "epoch"])
@pytest.mark.parametrize("reshuffle", [True, False])
def test_fits_end_where_a_plain_loop_ends(kind: str, restarts_by: str, reshuffle: bool) -> None:
    config = replace(QUICK, restarts_by=restarts_by, reshuffle=reshuffle)  # type: ignore[arg-type]
    for target in TARGETS:
        x, labels = world(target)
        rows = np.random.default_rng(1).permutation(len(x))
        fits = [Fit(rows[:n], labels[rows[:n]], seed) for seed, n in enumerate((11, 16, 33, 50))]
        for fit, found in zip(fits, fitted(kind, x, fits, target=target, config=config), strict=True):
            expected = plain_loop(kind, x, fit, target, config)[::3].numpy()
            np.testing.assert_allclose(found.logits, expected, atol=2e-3)
            assert np.abs(expected - stack_logits(kind, x, fit, target)).max() > 0.02  # something was learnt
            assert (found.n_epochs, found.losses.shape, found.curve.shape[:2]) == (4, (0,), (0, 0))


def stack_logits(kind: str, x: Tensor, fit: Fit, target: Target) -> np.ndarray:
    """Before the first step."""
    return stack(kind, (fit.seed,), outputs=target.n_outputs).evaluated(x[::3])[0].numpy()


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("patience", [None, 2])
def test_heads_together_equal_each_alone(kind: str, dropout: float, patience: int | None) -> None:
    config = HeadConfig(epochs=6, min_steps=0, batch_size=128, lr=1e-2, dropout=dropout, patience=patience)
    x, labels = world(BOTH)
    rows = np.random.default_rng(1).permutation(len(x))
    fits = [
        Fit(rows[:n], labels[rows[:n]], seed, rows[-w:], labels[rows[-w:]], keeps_curve=True)
        for seed, (n, w) in enumerate(zip(SIZES, (5, 40, 33, 1, 7, 20, 40), strict=True))
    ]
    fits += [Fit(rows[:n], labels[rows[:n]], 9) for n in SIZES] + [Fit(rows[:37], labels[rows[:37]], 9, n_epochs=2)]
    together = fitted(kind, x, fits, target=BOTH, config=config, weight="balanced")
    for fit, found in zip(fits, together, strict=True):
        (alone,) = fitted(kind, x, [fit], target=BOTH, config=config, weight="balanced")
        assert (found.n_epochs, found.losses.shape, found.curve.shape) == (
            alone.n_epochs, alone.losses.shape, alone.curve.shape
        )  # fmt: skip
        for ours, theirs in ((found.logits, alone.logits), (found.losses, alone.losses), (found.curve, alone.curve)):
            np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_more_heads_than_go_together_keep_their_order() -> None:
    x, labels = world(BINARY, blank=0)
    fits = [Fit(np.arange(n), labels[:n], seed) for seed, n in enumerate([20, 40] * 35)]
    together = fitted("linear", x, fits)
    for k in (0, 1, 34, 64, 69):
        np.testing.assert_allclose(together[k].logits, fitted("linear", x, [fits[k]])[0].logits, atol=1e-4)


def test_fits_are_deterministic_and_leave_torchs_randomness_alone() -> None:
    x, labels = world(BINARY)
    config, before = replace(QUICK, dropout=0.2), torch.get_rng_state()
    one, two, other = (
        fitted("mlp", x, [Fit(np.arange(30), labels[:30], seed)], config=config)[0].logits for seed in (1, 1, 2)
    )
    assert np.array_equal(one, two)
    assert not np.allclose(one, other, atol=0.05)
    assert torch.equal(torch.get_rng_state(), before)


def test_balanced_classes_count_alike() -> None:
    """Without features to learn from, a head says how common a class is, or nothing where classes are balanced."""
    y = np.array([1.0] * 8 + [0] * 56)[:, None]
    x, config = torch.zeros(64, 6), HeadConfig(epochs=300, batch_size=64, lr=0.05, dropout=0, weight_decay=0)
    plain, balanced = (
        fitted("linear", x, [Fit(np.arange(64), y, 0)], config=config, weight=weight)[0].logits.mean()
        for weight in ("none", "balanced")
    )
    assert plain == pytest.approx(np.log(8 / 56), abs=0.01)
    assert balanced == pytest.approx(0, abs=0.01)


# the epoch that is kept


def noisy_fit(**fit: object) -> tuple[Tensor, Fit]:
    """Watched labels that soon get worse: the training labels tell nothing."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(90, 6)).astype(np.float32))
    labels = rng.integers(0, 2, (90, 1)).astype(float)
    labels[60:70, 0] = x[60:70, 0] > 0
    return x, Fit(np.arange(60), labels[:60], 0, np.arange(60, 90), labels[60:], keeps_curve=True, **fit)  # type: ignore[arg-type]


LONG = replace(QUICK, epochs=30)


def of_watched(x: Tensor, fit: Fit, config: HeadConfig) -> Fitted:
    (found,) = fit_heads("mlp", x, [fit], target=BINARY, config=config, class_weight="none", asked=np.arange(60, 90))
    return found


def test_the_epoch_of_least_watched_loss_is_kept() -> None:
    x, fit = noisy_fit()
    found = of_watched(x, fit, LONG)
    assert found.losses.shape == (30,)
    assert found.n_epochs == found.losses.argmin() + 1 < 30
    assert found.curve.shape == (30, 30, 1)
    np.testing.assert_allclose(found.curve[found.n_epochs - 1], found.logits, atol=1e-5)
    y = torch.from_numpy(fit.watched_labels).float()
    for epoch in range(30):
        expected = nn.functional.binary_cross_entropy_with_logits(torch.from_numpy(found.curve[epoch]), y)
        assert found.losses[epoch] == pytest.approx(expected.item(), rel=1e-4)


def test_a_fit_that_ends_early_follows_the_same_schedule() -> None:
    x, fit = noisy_fit()
    curve = of_watched(x, fit, LONG).curve
    for n_epochs in (1, 7, 30):
        cut = replace(fit, watched=None, watched_labels=None, n_epochs=n_epochs)
        found = of_watched(x, cut, LONG)
        assert found.n_epochs == n_epochs
        np.testing.assert_allclose(found.logits, curve[n_epochs - 1], atol=1e-5)
    assert of_watched(x, replace(cut, n_epochs=31), LONG).n_epochs == 30


def test_a_watched_fit_that_ends_early_keeps_the_best_until_then() -> None:
    x, fit = noisy_fit()
    losses = of_watched(x, fit, LONG).losses
    both = fit_heads(  # beside one that goes on
        "mlp", x, [replace(fit, n_epochs=4), fit], target=BINARY, config=LONG, class_weight="none", asked=fit.watched
    )
    assert both[0].n_epochs == losses[:4].argmin() + 1
    assert [len(found.losses) for found in both] == [4, 30]


@pytest.mark.parametrize("patience", [1, 3, 6])
def test_patience_ends_a_fit(patience: int) -> None:
    x, fit = noisy_fit()
    losses = of_watched(x, fit, LONG).losses
    best = next(e for e in range(30) if e + patience >= 30 or (losses[e] < losses[e + 1 : e + 1 + patience].min()
                and losses[e] == losses[: e + 1].min()))  # fmt: skip
    found = of_watched(x, fit, replace(LONG, patience=patience))
    assert found.n_epochs == best + 1
    assert len(found.losses) == len(found.curve) == min(best + 1 + patience, 30) < 30
    np.testing.assert_allclose(found.losses, losses[: len(found.losses)], atol=1e-6)
    np.testing.assert_allclose(found.logits, found.curve[best], atol=1e-5)


def test_a_fit_that_has_ended_stays_so_beside_one_that_goes_on() -> None:
    x, fit = noisy_fit()
    config = replace(LONG, lr=0.1)
    losses = of_watched(x, fit, config).losses
    assert losses.argmin() > 10  # much better than when patience ended
    blind = replace(fit, watched=None, watched_labels=None)
    config = replace(config, patience=1)
    beside, _ = fit_heads("mlp", x, [fit, blind], target=BINARY, config=config, class_weight="none", asked=fit.watched)
    alone = of_watched(x, fit, config)
    assert beside.n_epochs == alone.n_epochs < 5
    assert len(beside.losses) == len(beside.curve) == len(alone.losses)
    np.testing.assert_allclose(beside.logits, alone.logits, atol=1e-4)


def test_patience_does_not_end_a_fit_that_watches_nothing() -> None:
    x, fit = noisy_fit()
    blind = replace(fit, watched=None, watched_labels=None)
    found = fit_heads(
        "mlp", x, [fit, blind], target=BINARY, config=replace(LONG, patience=1), class_weight="none", asked=fit.watched
    )
    assert found[0].n_epochs < found[1].n_epochs == 30
    np.testing.assert_allclose(found[1].logits, of_watched(x, blind, LONG).logits, atol=1e-5)


# what cannot be fitted


@pytest.mark.parametrize("watches", [True, False])
def test_weights_that_explode_are_an_error(watches: bool) -> None:
    x, fit = noisy_fit()
    fit = fit if watches else replace(fit, watched=None, watched_labels=None)
    with pytest.raises(TrainingError, match=r"not finite; lower its learning rate \(1e\+38\)"):
        fitted("linear", x * 1e5, [fit], config=replace(QUICK, lr=1e38))


def test_a_fit_without_a_finite_loss_is_an_error_though_nothing_is_asked() -> None:
    x, fit = noisy_fit()
    x[0] = torch.inf
    with pytest.raises(TrainingError, match="not finite"):
        fit_heads("linear", x, [fit], target=BINARY, config=QUICK, class_weight="none", asked=np.arange(0))


def test_one_training_row_is_too_few() -> None:
    x, labels = world(BINARY)
    with pytest.raises(ValueError, match="1 training rows, expected at least 2"):
        fitted("linear", x, [Fit(np.arange(1), labels[:1], 0)])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"epochs": 0}, "epochs is 0, expected at least 1"),
        ({"batch_size": 1}, "batch_size is 1, expected at least 2"),
        ({"lr": float("inf")}, "lr is inf, expected a finite number"),
        ({"dropout": 1.0}, r"dropout is 1\.0, expected below 1"),
        ({"restarts_by": "day"}, "restarts_by is 'day', expected one of step, epoch"),
        ({"patience": 0, "min_steps": -1}, "min_steps is -1, expected at least 0; patience is 0, expected at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadConfig(**setting)


def test_classes_are_learnt() -> None:
    x, labels = world(KIND, blank=0)
    config = HeadConfig(epochs=20, batch_size=64, lr=1e-2)
    (found,) = fitted("mlp", x, [Fit(np.arange(200), labels[:200], 0)], target=KIND, config=config)
    held = np.arange(0, 300, 3) >= 200
    assert (found.logits[held].argmax(axis=1) == labels[::3][held, 0]).mean() > 0.5  # chance is a third
