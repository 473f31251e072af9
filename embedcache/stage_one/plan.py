"""Which ids go into which shard, decided before any is encoded and never by where a run was stopped."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from embedcache.store.catalogue import Catalogue, Plan, PlannedShard


def next_plan(
    catalogue: Catalogue, ids: Sequence[str], *, again: Collection[str], shard_rows: int, batch_size: int
) -> Plan | None:
    """A plan for the ids that no shard holds or is going to hold; None where there are none.

    An unfinished shard some of whose ids are asked for and some not is abandoned: its ids that are asked for are
    planned again.

    Args:
        ids: all ids asked for, in order.
        again: ids to plan although a finished shard names them: failures to be retried.
    """
    wanted, pending = set(ids), catalogue.pending()
    abandons = [
        shard.number for shard in pending if not wanted.isdisjoint(shard.ids) and not wanted.issuperset(shard.ids)
    ]
    unfinished = {i for shard in pending if shard.number not in abandons for i in shard.ids}
    finished = {
        i for plan in catalogue.plans for shard in plan.shards() if shard.number in catalogue.shards for i in shard.ids
    }
    retried = set(again) - unfinished
    new = [i for i in ids if i in retried or (i not in unfinished and i not in finished)]
    if not new:
        return None
    bounds = [*range(0, len(new), shard_rows), len(new)]
    return Plan(new, bounds, catalogue.next_shard(), batch_size, abandons)


def work_for(catalogue: Catalogue, ids: Collection[str]) -> list[PlannedShard]:
    """The unfinished shards all of whose ids are asked for."""
    wanted = set(ids)
    return [shard for shard in catalogue.pending() if wanted.issuperset(shard.ids)]
