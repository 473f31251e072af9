"""Taking what is damaged out of a store, and writing anew what its sound shards still tell.

Nothing is deleted: damaged files go to `quarantine/` in the store's directory. A planned shard whose document is gone
counts as not yet computed, so that the next extraction computes exactly that one.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from embedcache.errors import RepairError, StoreFormatError, StoreNotFoundError
from embedcache.fingerprint import digest_file
from embedcache.store import commit, layout
from embedcache.store.catalogue import Catalogue, Plan, publish_plan, read_plan
from embedcache.store.gate import Shard, open_shard
from embedcache.store.verify import Problem, unplanned_shards, verify_store

QUARANTINE = "quarantine"


@dataclass(frozen=True)
class RepairReport:
    """What a repair did.

    Args:
        quarantined: files that were moved to `quarantine/`.
        restored: documents that were written anew from sound shards.
        to_extract: ids whose planned shards the next extraction computes again.
        swept: temporaries of dead processes that were removed.
    """

    quarantined: tuple[str, ...]
    restored: tuple[str, ...]
    to_extract: tuple[str, ...]
    swept: int


def repair_store(path: str | Path) -> RepairReport:
    """Moves damaged files of a store aside and restores the documents that its sound shards allow.

    Raises:
        StoreNotFoundError: no store there.
        RepairError: a packed store, or one without a single sound shard to tell what it was.
    """
    path = Path(path)
    if path.is_file():
        raise RepairError(
            f"{path}: a packed store is one file and cannot be repaired; take a sound copy, or pack it again from its "
            "directory"
        )
    repair = _Repair(path)
    problems = {problem.shard: problem for problem in verify_store(path)}
    if layout.STORE_NAME in problems or not (path / layout.STORE_NAME).is_file():
        repair.store_document()
        problems = {problem.shard: problem for problem in verify_store(path)}
    repair.shards(problems)
    repair.plans(problems)
    repair.loose_files()
    pending = [i for shard in Catalogue.read(path).pending() for i in shard.ids]
    return RepairReport(tuple(repair.quarantined), tuple(repair.restored), tuple(pending), commit.sweep(path))


class _Repair:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.quarantined: list[str] = []
        self.restored: list[str] = []

    def store_document(self) -> None:
        """Writes `store.json` anew from the record that every shard carries."""
        for _, shard in self._sound_files():
            self._set_aside(layout.STORE_NAME)
            published = commit.publish(self.path / layout.STORE_NAME, layout.seal(shard.record))
            self._restored(layout.STORE_NAME, published)
            return
        raise RepairError(
            f"{self.path}: {layout.STORE_NAME} is damaged and no sound shard is left to write it from; extract into "
            "another --store"
        )

    def shards(self, problems: dict[str, Problem]) -> None:
        """Sets damaged shards aside with their documents; a damaged document is written anew if its shard is sound."""
        catalogue = Catalogue.read(self.path, tolerant=True)
        for number, document in catalogue.shards.items():
            if document["file"] in problems:
                self._set_aside(layout.shard_doc_name(number))
                self._set_aside(document["file"])
        for name in catalogue.damaged:
            self._set_aside(name)
            files = list(self._sound_files(name.replace(".json", "-*.h5")))
            if len(files) == 1 and files[0][1].record == catalogue.document:
                file, shard = files[0]
                sealed = {**shard.facts, "file": file.name, "sha256": digest_file(file), "size": file.stat().st_size}
                self._restored(name, commit.publish(self.path / name, layout.seal(sealed)))

    def plans(self, problems: dict[str, Problem]) -> None:
        """Writes lost plans anew as far as their sound shards tell; ids of the others will be planned again."""
        catalogue = Catalogue.read(self.path, tolerant=True)
        for number in [k for k in range(catalogue.n_plans) if layout.plan_name(k) in problems]:
            self._set_aside(layout.plan_name(number))
            self._publish_plan(number, self._range_of(number, catalogue), catalogue)
        shards = (shard for k in range(catalogue.n_plans) for shard in self._plan(k).shards())
        unplanned = unplanned_shards(catalogue, {shard.number for shard in shards if shard.ids})
        # theirs were the last plans at some time; since then others may have followed
        starts = [k for k, number in enumerate(unplanned) if not k or unplanned[k - 1] != number - 1]
        for k, (start, stop) in enumerate(pairwise([*starts, len(unplanned)])):
            run = range(unplanned[start], unplanned[stop - 1] + 1)
            self._publish_plan(catalogue.n_plans + k, run, catalogue)

    def _publish_plan(self, number: int, shards: range, catalogue: Catalogue) -> None:
        ids, bounds = [], [0]
        for shard_number in shards:
            document = catalogue.shards.get(shard_number)
            if document is not None:
                shard = open_shard(self.path / document["file"])
                ids += [*dict.fromkeys(shard.ids), *(f.id for f in shard.failures)]
            bounds.append(len(ids))
        self._restored(layout.plan_name(number), publish_plan(self.path, number, Plan(ids, bounds, shards.start, 1)))

    def loose_files(self) -> None:
        """Sets aside shard files that no document names: a rival's bytes, or bytes that their name does not give."""
        named = {document["file"] for document in Catalogue.read(self.path).shards.values()}
        counted = set(Catalogue.read(self.path).shards)
        for file in sorted(self.path.glob("shard-*.h5")):
            number = layout.shard_file_number(file.name)
            if number is not None and file.name not in named and (number in counted or not _is_what_it_says(file)):
                self._set_aside(file.name)

    def _range_of(self, number: int, catalogue: Catalogue) -> range:
        """The shard numbers of a plan that cannot be read: from the end of the one before to the one after."""
        first = 0
        if number:
            before = self._plan(number - 1)
            first = before.first_shard + len(before.bounds) - 1
        for later in range(number + 1, catalogue.n_plans):
            with contextlib.suppress(StoreFormatError, StoreNotFoundError):
                return range(first, max(self._plan(later).first_shard, first))
        return range(first, max([first, *(k + 1 for k in catalogue.shards)]))

    def _plan(self, number: int) -> Plan:
        return read_plan(self.path / layout.plan_name(number))

    def _sound_files(self, pattern: str = "shard-*.h5") -> Iterator[tuple[Path, Shard]]:
        """Shard files whose bytes are what their name says."""
        for file in sorted(self.path.glob(pattern)):
            if layout.shard_file_number(file.name) is not None and _is_what_it_says(file):
                with contextlib.suppress(StoreFormatError):
                    yield file, open_shard(file)

    def _restored(self, name: str, published: bool) -> None:
        if not published:
            raise RepairError(
                f"{self.path / name}: came to be while it was repaired; stop what writes to the store first"
            )
        self.restored.append(name)

    def _set_aside(self, name: str) -> None:
        if os.path.lexists(self.path / name):
            commit.set_aside(self.path / name, self.path / QUARANTINE)
            self.quarantined.append(name)


def _is_what_it_says(file: Path) -> bool:
    """Whether a shard file is one, and its SHA-256 begins as its name says."""
    if not stat.S_ISREG(file.lstat().st_mode):
        return False
    return layout.shard_file_name(layout.shard_file_number(file.name) or 0, digest_file(file)) == file.name
