"""Checking every byte of a store against what was published."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.errors import StoreFormatError
from embedcache.store.catalogue import Catalogue
from embedcache.store.shard import digest_blocks, open_shard
from embedcache.store.store import check_shard_file


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a store.

    Args:
        shard: file name.
        kind: `missing` or `damaged`.
        ids: the rows concerned, as far as they are known.
        message: what was found and expected.
    """

    shard: str
    kind: str
    ids: tuple[str, ...]
    message: str


def verify_store(path: str | Path) -> list[Problem]:
    """Compares every file of a store with its digest; an empty list means that the store is sound.

    Raises:
        StoreNotFoundError: no store there.
        StoreFormatError: `store.json` or a plan is damaged, so that nothing else can be judged.
    """
    damaged: dict[str, StoreFormatError] = {}
    catalogue = Catalogue.read(Path(path), damaged)
    planned = {shard.number: tuple(shard.ids) for plan in catalogue.plans for shard in plan.shards()}
    problems = [Problem(name, "damaged", (), str(error)) for name, error in damaged.items()]
    for number, document in catalogue.shards.items():
        problem = _check(catalogue.path / document["file"], document, planned.get(number, ()))
        if problem is not None:
            problems.append(problem)
    return problems


def _check(file: Path, document: dict[str, Any], planned: tuple[str, ...]) -> Problem | None:
    if not file.is_file():
        message = f"{file}: not there, its document says {document['size']} bytes"
        return Problem(file.name, "missing", planned, message)
    try:
        check_shard_file(file, document, digest=True)
        open_shard(file)
    except StoreFormatError as error:
        return Problem(file.name, "damaged", _damaged_ids(file, planned), str(error))
    return None


def _damaged_ids(file: Path, planned: tuple[str, ...]) -> tuple[str, ...]:
    """The rows whose block digest differs; all planned ids where the shard cannot be read that far."""
    try:
        shard = open_shard(file)
    except StoreFormatError:
        return planned
    found = digest_blocks(shard.codes, shard.block_rows)
    if found.shape != shard.block_digests.shape:
        return planned
    blocks = np.flatnonzero((found != shard.block_digests).any(axis=1))
    ids = [i for b in blocks for i in shard.ids[b * shard.block_rows : (b + 1) * shard.block_rows]]
    return tuple(ids) or planned
