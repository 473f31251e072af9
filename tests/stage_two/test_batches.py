"""Who is in a batch with whom."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from embedcache.stage_two.batches import Planner, deal


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("n", [2, 3, 7, 64, 65, 1000])
@pytest.mark.parametrize("batch_size", [2, 3, 64, 10_000])
def test_batches_are_of_equal_size_and_an_epoch_has_each_pair_once(n: int, batch_size: int) -> None:
    batches = deal(n, np.arange(n), batch_size, rng())
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= batch_size
    seen = np.concatenate(batches)
    assert len(seen) == len(set(seen.tolist()))
    left_out = n - len(seen)
    assert left_out == 0 or (min(n, batch_size) < 4 and left_out <= -(-n // batch_size))  # those alone in their batch
    assert max(sizes) - min(sizes) <= 1


def test_a_batch_holds_a_report_once() -> None:
    reports = rng(1).integers(0, 60, 200)
    batches = deal(200, reports, 16, rng(2))
    for batch in batches:
        assert 1 < len(batch) <= 16
        assert len(set(reports[batch].tolist())) == len(batch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(200))


def test_a_report_of_very_many_images_makes_small_batches() -> None:
    reports = np.array([0] * 30 + [1] * 30 + [2])
    batches = deal(61, reports, 16, rng())
    assert all(len(set(reports[b].tolist())) == len(b) for b in batches)
    assert len(np.concatenate(batches)) >= 60


def test_one_pair_and_none_make_no_batch() -> None:
    assert deal(1, np.array([0]), 16, rng()) == []
    assert deal(0, np.array([], np.int64), 16, rng()) == []


def test_every_pair_meets_every_other_alike() -> None:
    """Over many epochs the neighbours of a pair are all the others, none of them favoured."""
    met: Counter[int] = Counter()
    for seed in range(3000):
        (with_zero,) = [b for b in deal(24, np.arange(24), 6, rng(seed)) if 0 in b]
        met.update(k for k in with_zero.tolist() if k)
    assert set(met) == set(range(1, 24))
    expected = 3000 * 5 / 23
    assert max(abs(n - expected) for n in met.values()) < 5 * np.sqrt(expected)


PLANNER = Planner(np.arange(100), (1, 1), None, batch_size=16, report_once=True, mixup=0.0)


def test_a_seed_and_an_epoch_make_one_plan() -> None:
    one, same = (PLANNER.plan(seed=3, epoch=5) for _ in range(2))
    assert one.pairs.tolist() == same.pairs.tolist()
    others = [PLANNER.plan(seed=s, epoch=e).pairs.tolist() for s, e in ((3, 6), (4, 5), (-3, 5))]
    assert one.pairs.tolist() not in others


@pytest.mark.parametrize("n", [100, 97, 101])
def test_batches_of_all_seeds_begin_at_the_same_places(n: int) -> None:
    planner = replace(PLANNER, reports=rng().integers(0, 40, n))
    starts = [planner.plan(seed=seed, epoch=epoch).starts.tolist() for seed in range(5) for epoch in range(3)]
    assert starts == [starts[0]] * 15


def test_mixup_pairs_within_a_batch() -> None:
    plan = replace(PLANNER, mixup=1.0).plan(seed=0, epoch=0)
    assert plan.partners is not None
    for s in range(plan.n_batches):
        a, b = plan.starts[s], plan.starts[s + 1]
        assert sorted(plan.partners[a:b].tolist()) == list(range(a, b))
    assert ((plan.shares > 0) & (plan.shares < 1)).all()
    assert len(set(plan.shares.tolist())) == plan.n_batches


def test_views_are_drawn_for_each_pair() -> None:
    plan = replace(PLANNER, n_views=(3, 1)).plan(seed=0, epoch=0)
    assert set(plan.image_views.tolist()) == {0, 1, 2}
    assert set(plan.text_views.tolist()) == {0}


def test_an_order_by_shards_reads_few_shards_at_a_time() -> None:
    shards = np.repeat(np.arange(40), 100)
    planner = Planner(np.arange(4000), (1, 1), shards, batch_size=32, report_once=True, mixup=0.0)
    plan = planner.plan(seed=0, epoch=0)
    assert sorted(plan.pairs.tolist()) == list(range(4000))
    of_window = []
    for a, b in zip(plan.windows[:-1], plan.windows[1:], strict=True):
        of_window.append(set(shards[plan.pairs[plan.starts[a] : plan.starts[b]]].tolist()))
    assert [len(found) for found in of_window] == [6] * 6 + [4]
    assert sum(map(len, of_window)) == 40  # each shard in one window
    first = [set(shards[planner.plan(seed=0, epoch=e).pairs[:600]].tolist()) for e in range(2)]
    assert first[0] != first[1]
    assert plan.n_batches == planner.n_batches()
