"""Each head learns from its budget's labels alone and chooses its setting by the least loss on those set aside."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made import BINARY, BOTH, KIND, TARGETS, told_labels
from sklearn.metrics import roc_auc_score
from torch import Tensor

from embedcache import ProbeConfig
from embedcache.stage_two import answers as module
from embedcache.stage_two.answers import NEIGHBOURS, Answer, answers
from embedcache.stage_two.head_fits import Fit, Fitted, fit_heads
from embedcache.stage_two.heads import HeadConfig
from embedcache.stage_two.label_budget import Budget
from embedcache.stage_two.logistic import STRENGTHS, fit_logistic
from embedcache.stage_two.neighbours import neighbour_logits
from embedcache.stage_two.probe_config import HEADS
from embedcache.stage_two.targets import Target

CONFIG = ProbeConfig(head=HeadConfig(epochs=12, min_steps=0, batch_size=64, lr=1e-2))
ASKED = np.arange(239, 179, -1)
NOTHING = np.empty(0, np.int64)
UNTRAINED = {"knn": NEIGHBOURS, "logistic": STRENGTHS}
FIXED = {"knn": 20, "logistic": 0.01}


def world(target: Target, choice: str, seed: int = 0) -> tuple[Tensor, Budget]:
    """240 rows: 100 to learn from, 80 to choose by, the rest are asked."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(240, 8)).astype(np.float32)
    labels, order = told_labels(target, x, rng, blank=0.2), rng.permutation(180)
    rows = order[:100][target.known(labels[order[:100]])]
    valid = order[100:] if choice == "valid" else NOTHING
    folds = rng.integers(0, 5, len(rows)) if choice == "folds" else NOTHING
    return torch.from_numpy(x), Budget(1.0, 0, seed, rows, labels[rows], choice, valid, labels[valid], folds)  # type: ignore[arg-type]


def ask(head: str, x: Tensor, *some: Budget, target: Target = BINARY, config: ProbeConfig = CONFIG) -> list[Answer]:
    return answers(head, x, some, ASKED, target=target, config=config)


def one(head: str, x: Tensor, rows: np.ndarray, labels: np.ndarray, of: np.ndarray, setting: float, target: Target):
    if head == "knn":
        return neighbour_logits(x, rows, labels, of, target=target, ks=[int(setting)], class_weight="none")[0]
    (fitted,) = fit_logistic(x[rows].numpy(), labels, target=target, strengths=[setting], class_weight="none")
    return fitted(x[of].numpy())


def loss(logits: np.ndarray, labels: np.ndarray, target: Target) -> float:
    """Mean over the labels that are there, as torch has it."""
    known, z = ~np.isnan(labels), torch.from_numpy(logits)
    if target.task == "multi-class":
        return F.cross_entropy(z[known[:, 0]], torch.from_numpy(labels[known]).long()).item()
    return F.binary_cross_entropy_with_logits(z[known], torch.from_numpy(labels[known]).float()).item()


def close(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours, theirs, atol=5e-3 * np.ptp(theirs))


# heads that nothing trains


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("head", UNTRAINED)
def test_the_setting_of_least_loss_on_validation(head: str, target: Target) -> None:
    x, budget = world(target, "valid")
    (found,) = ask(head, x, budget, target=target)
    losses = [
        loss(one(head, x, budget.rows, budget.labels, budget.valid, s, target), budget.valid_labels, target)
        for s in UNTRAINED[head]
    ]
    best = UNTRAINED[head][int(np.argmin(losses))]
    assert found.setting == best
    close(found.logits, one(head, x, budget.rows, budget.labels, ASKED, best, target))
    close(found.chosen_logits, one(head, x, budget.rows, budget.labels, budget.valid, best, target))
    assert np.array_equal(found.chosen_on, budget.valid)
    assert np.array_equal(found.chosen_labels, budget.valid_labels, equal_nan=True)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("head", UNTRAINED)
def test_the_setting_of_least_loss_on_folds(head: str, target: Target) -> None:
    x, budget = world(target, "folds")
    (found,) = ask(head, x, budget, target=target)
    losses, held_of = [], {}
    for setting in UNTRAINED[head]:
        held = np.zeros((len(budget.rows), target.n_outputs), np.float32)
        for fold in range(5):
            out = budget.folds == fold
            held[out] = one(head, x, budget.rows[~out], budget.labels[~out], budget.rows[out], setting, target)
        losses.append(loss(held, budget.labels, target))
        held_of[setting] = held
    best = UNTRAINED[head][int(np.argmin(losses))]
    assert found.setting == best
    close(found.logits, one(head, x, budget.rows, budget.labels, ASKED, best, target))
    close(found.chosen_logits, held_of[best])
    assert np.array_equal(found.chosen_on, budget.rows)
    assert np.array_equal(found.chosen_labels, budget.labels, equal_nan=True)


@pytest.mark.parametrize("head", UNTRAINED)
def test_where_nothing_is_left_to_choose_by_the_setting_is_fixed(head: str) -> None:
    x, budget = world(BOTH, "fixed")
    (found,) = ask(head, x, budget, target=BOTH)
    assert found.setting == FIXED[head]
    close(found.logits, one(head, x, budget.rows, budget.labels, ASKED, FIXED[head], BOTH))
    assert (found.chosen_on.shape, found.chosen_labels.shape, found.chosen_logits.shape) == ((0,), (0, 2), (0, 2))


@pytest.mark.parametrize("head", UNTRAINED)
def test_seeds_of_equal_labels_share_one_answer(head: str) -> None:
    x, budget = world(BINARY, "folds")
    other = replace(budget, seed=1)
    flipped, otherwise = replace(other, labels=1 - budget.labels), replace(other, folds=budget.folds[::-1].copy())
    found = ask(head, x, budget, other, flipped, otherwise)
    assert found[0] is found[1]
    assert len({id(answer) for answer in found}) == 3
    close(found[2].logits, -found[0].logits)


@pytest.mark.parametrize("head", UNTRAINED)
def test_classes_that_count_alike_shift_the_logits(head: str) -> None:
    x, budget = world(BINARY, "fixed")
    rare = budget.labels[:, 0] == 1
    kept = ~rare | (np.cumsum(rare) <= 8)
    budget = replace(budget, rows=budget.rows[kept], labels=budget.labels[kept])
    plain, balanced = (
        ask(head, x, budget, config=replace(CONFIG, class_weight=weight))[0].logits  # type: ignore[arg-type]
        for weight in ("none", "balanced")
    )
    assert balanced.mean() > plain.mean() + 0.5


# trained heads


def fit(x: Tensor, found: Fit, of: np.ndarray, target: Target, head: str = "mlp") -> Fitted:
    return fit_heads(head, x, [found], target=target, config=CONFIG.head, class_weight="none", asked=of)[0]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_trained_heads_keep_the_epoch_of_least_validation_loss(head: str, target: Target) -> None:
    x, budget = world(target, "valid", seed=3)
    (found,) = ask(head, x, budget, target=target)
    by_epoch = Fit(budget.rows, budget.labels, 3, budget.valid, budget.valid_labels, keeps_curve=True)
    curve = fit(x, by_epoch, NOTHING, target, head).curve
    best = int(np.argmin([loss(logits, budget.valid_labels, target) for logits in curve])) + 1
    assert found.setting == best
    close(found.chosen_logits, curve[best - 1])
    cut = Fit(budget.rows, budget.labels, 3, n_epochs=best)
    close(found.logits, fit(x, cut, ASKED, target, head).logits)
    assert np.array_equal(found.chosen_on, budget.valid)


@pytest.mark.parametrize("target", TARGETS)
def test_trained_heads_take_the_epoch_of_least_loss_on_folds(target: Target) -> None:
    x, budget = world(target, "folds", seed=3)
    (found,) = ask("mlp", x, budget, target=target)
    held = np.zeros((CONFIG.head.epochs, len(budget.rows), target.n_outputs), np.float32)
    for fold in range(5):
        out = budget.folds == fold
        of_fold = Fit(budget.rows[~out], budget.labels[~out], 3, budget.rows[out], budget.labels[out], keeps_curve=True)
        held[:, out] = fit(x, of_fold, NOTHING, target).curve
    sizes = [(budget.folds == fold).sum() for fold in range(5)]
    losses = [
        np.average(
            [loss(h[budget.folds == fold], budget.labels[budget.folds == fold], target) for fold in range(5)],
            weights=sizes,
        )
        for h in held
    ]
    best = int(np.argmin(losses)) + 1
    assert found.setting == best
    close(found.chosen_logits, held[best - 1])
    close(found.logits, fit(x, Fit(budget.rows, budget.labels, 3, n_epochs=best), ASKED, target).logits)
    assert np.array_equal(found.chosen_on, budget.rows)
    assert np.array_equal(found.chosen_labels, budget.labels, equal_nan=True)


def test_trained_heads_without_labels_to_choose_by_train_to_the_end() -> None:
    x, budget = world(BOTH, "fixed", seed=3)
    (found,) = ask("mlp", x, budget, target=BOTH)
    assert found.setting == 12
    close(found.logits, fit(x, Fit(budget.rows, budget.labels, 3), ASKED, BOTH).logits)
    assert (found.chosen_on.shape, found.chosen_labels.shape, found.chosen_logits.shape) == ((0,), (0, 2), (0, 2))


def test_a_fold_that_explodes_late_is_judged_before(monkeypatch: pytest.MonkeyPatch) -> None:
    x, budget = world(BINARY, "folds")
    ends_after = []

    def explodes(head: str, x: Tensor, fits: list[Fit], *, asked: np.ndarray, **options: object) -> list[Fitted]:
        ends_after.extend(f.n_epochs for f in fits)
        losses, said = np.array([2.0, 1.0, np.nan], np.float32), np.zeros((len(asked), 1), np.float32)
        n_watched = [0 if f.watched is None else len(f.watched) for f in fits]
        return [
            Fitted(said, 2, np.arange(1, 1 + len(losses)), losses, np.ones((3, w, 1), np.float32), {})
            for w in n_watched
        ]

    monkeypatch.setattr(module, "fit_heads", explodes)
    (found,) = ask("linear", x, budget)
    assert ends_after == [None] * 5 + [2]
    assert (found.chosen_logits == 1).all()


# all heads


@pytest.mark.parametrize("head", HEADS)
def test_what_is_said_of_a_held_row_does_not_come_from_its_label(head: str) -> None:
    x, budget = world(BINARY, "folds")
    (before,) = ask(head, x, budget)
    row = int(np.flatnonzero(budget.folds == 2)[0])
    labels = budget.labels.copy()
    labels[row] = 1 - labels[row]
    (after,) = ask(head, x, replace(budget, labels=labels))
    same = budget.folds == 2
    assert after.setting == before.setting  # one label of a hundred
    np.testing.assert_allclose(after.chosen_logits[same], before.chosen_logits[same], atol=1e-4)
    assert np.abs(after.chosen_logits[~same] - before.chosen_logits[~same]).max() > 0.01


@pytest.mark.parametrize("head", HEADS)
def test_budgets_together_equal_each_alone(head: str) -> None:
    x, valid = world(KIND, "valid", seed=1)
    some = [world(KIND, "folds", seed=2)[1], valid, world(KIND, "fixed", seed=3)[1], world(KIND, "folds", seed=4)[1]]
    some.append(replace(valid, rows=valid.rows[:20], labels=valid.labels[:20]))
    for budget, together in zip(some, ask(head, x, *some, target=KIND), strict=True):
        (alone,) = ask(head, x, budget, target=KIND)
        assert alone.setting == together.setting
        assert np.array_equal(alone.chosen_on, together.chosen_on)
        np.testing.assert_allclose(together.logits, alone.logits, atol=2e-3)
        np.testing.assert_allclose(together.chosen_logits, alone.chosen_logits, atol=2e-3)


@pytest.mark.parametrize("choice", ["valid", "folds", "fixed"])
@pytest.mark.parametrize("head", HEADS)
def test_labels_that_are_told_are_found(head: str, choice: str) -> None:
    x, budget = world(BINARY, choice)
    config = replace(CONFIG, head=HeadConfig(epochs=50, batch_size=64, lr=1e-2))
    (found,) = ask(head, x, budget, config=config)
    assert roc_auc_score(x[ASKED, 0] > 0, found.logits) > 0.62  # of a weak signal
    assert found.logits.shape == (60, 1)
    assert found.logits.dtype == np.float32


@pytest.mark.parametrize("head", HEADS)
def test_rows_that_nobody_names_play_no_part(head: str) -> None:
    x, budget = world(BINARY, "valid")
    named = np.concatenate([budget.rows, budget.valid, ASKED])
    other = x.clone()
    other[np.setdiff1d(np.arange(240), named)] = 100.0
    (before,), (after,) = ask(head, x, budget), ask(head, other, budget)
    np.testing.assert_allclose(after.logits, before.logits, atol=1e-5)
