"""What goes into which shard: groups together, nothing lost, parts that add up."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from embedcache.stage_one.plan import Part, next_plan
from embedcache.store.catalogue import Catalogue


def plan_of(sizes: list[int], shard_ids: int):
    groups = [[f"{g}-{k}" for k in range(size)] for g, size in enumerate(sizes)]
    ids = [i for group in groups for i in group]
    empty = Catalogue(Path("s"), {}, {}, 0)
    plan = next_plan(empty, ids, again=(), groups=lambda _: groups, shard_ids=shard_ids, batch_size=4)
    assert plan is not None
    return ids, [list(shard.ids) for shard in plan.shards()]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([1] * 7, [3, 3, 1]),
        ([2, 2, 2], [2, 2, 2]),  # a group that fits a shard is not split
        ([1, 2, 3, 1], [3, 3, 1]),
        ([7], [3, 3, 1]),  # one that does not is
        ([1, 7, 1], [3, 3, 3]),
        ([3], [3]),
    ],
)
def test_groups_stay_together(sizes: list[int], expected: list[int]) -> None:
    ids, shards = plan_of(sizes, 3)
    assert [len(shard) for shard in shards] == expected
    assert [i for shard in shards for i in shard] == ids


def test_any_groups_are_planned_once_and_in_order() -> None:
    rng = random.Random(0)
    for _ in range(200):
        shard_ids = rng.randint(1, 9)
        sizes = [rng.randint(1, 12) for _ in range(rng.randint(1, 20))]
        ids, shards = plan_of(sizes, shard_ids)
        assert [i for shard in shards for i in shard] == ids
        assert all(1 <= len(shard) <= shard_ids for shard in shards)
        for group, size in enumerate(sizes):
            holding = sum(any(i.startswith(f"{group}-") for i in shard) for shard in shards)
            assert holding <= (1 if size <= shard_ids else size // shard_ids + 2)


def test_parts_divide_shards_and_are_read_from_text() -> None:
    parts = [Part.parse(f"{k}/3") for k in (1, 2, 3)]
    for number in range(20):
        assert sum(number in part for part in parts) == 1
    for wrong in ("0/3", "4/3", "1", "1/0", "a/b", "-1/2", "1/3/5"):
        with pytest.raises(ValueError, match=r"part .* expected"):
            Part.parse(wrong)
