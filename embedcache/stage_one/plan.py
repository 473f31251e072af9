"""Which ids go into which shard, decided before any is encoded and never by where a run was stopped."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from embedcache.errors import SettingsError
from embedcache.store.catalogue import Catalogue, Plan, PlannedShard

Groups = Callable[[Sequence[str]], Sequence[Sequence[str]]]


@dataclass(frozen=True)
class Part:
    """One of n parts that a plan is split into, the same way wherever it is split: by the numbers of its shards.

    Args:
        number: from 1 to n.

    Raises:
        SettingsError: it is not.
    """

    number: int
    n: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.n:
            raise SettingsError(f"part {self.number}/{self.n}, expected 1/{self.n} to {self.n}/{self.n}")

    @classmethod
    def parse(cls, text: str) -> Part:
        """From `i/n`.

        Raises:
            SettingsError: not of this form, or i not from 1 to n.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if found is None or int(found[2]) < 1:
            raise SettingsError(f"part {text!r}, expected i/n such as 1/4")
        return cls(int(found[1]), int(found[2]))

    def __contains__(self, shard_number: int) -> bool:
        return shard_number % self.n == self.number - 1


def next_plan(
    catalogue: Catalogue,
    ids: Sequence[str],
    *,
    again: Collection[str],
    groups: Groups,
    shard_ids: int,
    batch_size: int,
) -> Plan | None:
    """A plan for the ids that no shard holds or is going to hold; None where there are none.

    An unfinished shard some of whose ids are asked for and some not is abandoned: its ids that are asked for are
    planned again.

    Args:
        ids: all ids asked for, in order.
        again: ids to plan although a finished shard names them: failures to be retried.
        groups: puts ids together that are encoded as one; a group stays in one shard if it fits.
        shard_ids: most ids in a shard.
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
    grouped = groups(new)
    return Plan(
        [i for group in grouped for i in group],
        _bounds([len(group) for group in grouped], shard_ids),
        catalogue.next_shard(),
        batch_size,
        abandons,
    )


def work_for(catalogue: Catalogue, ids: Collection[str], part: Part | None = None) -> list[PlannedShard]:
    """The unfinished shards all of whose ids are asked for; of a part those that belong to it."""
    wanted = set(ids)
    return [
        shard
        for shard in catalogue.pending()
        if wanted.issuperset(shard.ids) and (part is None or shard.number in part)
    ]


def ids_of(catalogue: Catalogue, ids: Sequence[str], part: Part) -> list[str]:
    """The ids that belong to a part: those whose latest shard does."""
    abandoned = {number for plan in catalogue.plans for number in plan.abandons}
    latest = {
        i: shard.number
        for plan in catalogue.plans
        for shard in plan.shards()
        if shard.number not in abandoned or shard.number in catalogue.shards
        for i in shard.ids
    }
    return [i for i in ids if latest[i] in part]


def _bounds(sizes: Sequence[int], shard_ids: int) -> list[int]:
    """Where shards begin and end; a group is split only where it is larger than a shard."""
    bounds, total = [0], 0
    for size in sizes:
        if size <= shard_ids < total + size - bounds[-1]:
            bounds.append(total)
        total += size
        while total - bounds[-1] > shard_ids:
            bounds.append(bounds[-1] + shard_ids)
    return [*bounds, total]
