"""Checking every byte of a store against what was published."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.errors import StoreFormatError
from embedcache.store import layout
from embedcache.store.catalogue import Catalogue, read_plan
from embedcache.store.gate import Shard, open_shard
from embedcache.store.id_index import IdIndex, key_array, surely_distinct
from embedcache.store.isolated import isolated
from embedcache.store.shard import block_bounds, block_digests
from embedcache.store.source import Source, check_file, find_source, open_counted, packed_document

_LOCATE_TIMEOUT_S = 60.0
_LOCATE = "embedcache.store.verify:locate_damage"


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a store.

    Args:
        shard: file name.
        kind: `missing` or `damaged`.
        ids: the rows concerned, as far as they are known.
        message: what was found and expected; for damage within rows, in which blocks.
    """

    shard: str
    kind: str
    ids: tuple[str, ...]
    message: str


def verify_store(path: str | Path, *, advance: Callable[[], None] = lambda: None) -> list[Problem]:
    """Compares every file of a store with its digest; an empty list means that the store is sound.

    A file that differs from its digest is never parsed in this process.

    Args:
        path: a store's directory, or the one file of a packed store.
        advance: called for each shard when it is done.

    Raises:
        StoreNotFoundError: no store there.
    """
    from joblib import cpu_count

    path = Path(path)
    if path.is_file():
        return _verify_packed(path)
    try:
        catalogue = Catalogue.read(path, tolerant=True)
    except StoreFormatError as error:
        return [Problem(layout.STORE_NAME, "damaged", (), str(error))]
    problems = [Problem(name, "damaged", (), str(error)) for name, error in catalogue.damaged.items()]
    planned, of_plans = _planned(catalogue)
    source = Source(path, catalogue.document, list(catalogue.shards.values()), packed=False)
    found = [*problems, *of_plans]
    with ThreadPoolExecutor(cpu_count()) as pool:  # hashing leaves the interpreter free
        planned_ids = [planned.get(number) for number in catalogue.shards]
        for problem in pool.map(partial(_verify_shard, source), source.shards, planned_ids):
            found += [] if problem is None else [problem]
            advance()
    return found


def _planned(catalogue: Catalogue) -> tuple[dict[int, tuple[str, ...]], list[Problem]]:
    """The ids planned for each shard, and what is wrong with plans."""
    planned: dict[int, tuple[str, ...]] = {}
    problems: list[Problem] = []
    for number in range(catalogue.n_plans):
        path = catalogue.path / layout.plan_name(number)
        if not path.is_file():
            problems.append(Problem(path.name, "missing", (), f"{path}: not there, but later plans are"))
            continue
        try:
            planned = {shard.number: tuple(shard.ids) for shard in read_plan(path).shards() if shard.ids} | planned
        except StoreFormatError as error:
            problems.append(Problem(path.name, "damaged", (), str(error)))
    unplanned = unplanned_shards(catalogue, planned)
    if unplanned and not problems:
        path = catalogue.path / layout.plan_name(catalogue.n_plans)
        message = f"{path}: not there, but shards {unplanned[:5]} are, which no plan names"
        problems.append(Problem(path.name, "missing", (), message))
    return planned, problems


def unplanned_shards(catalogue: Catalogue, planned: Collection[int]) -> list[int]:
    """Numbers of shards that count, and that no plan gives any id."""
    counted = catalogue.shards.items()
    return [number for number, said in counted if number not in planned and said["n"] + said["n_failed"]]


def _verify_shard(source: Source, document: dict[str, Any], planned: tuple[str, ...] | None) -> Problem | None:
    file = source.path / document["file"]
    if not file.is_file():
        return Problem(
            file.name, "missing", planned or (), f"{file}: not there, its document says {document['size']} bytes"
        )
    try:
        check_file(file, document, digest=True)
    except StoreFormatError as error:
        ids, where = _damage(file, 0, planned or ())
        return Problem(file.name, "damaged", ids, f"{error}; {where}")
    try:
        shard = open_counted(source, document, digest=False)
        _check_rows(file, shard, planned)
    except StoreFormatError as error:
        return Problem(file.name, "damaged", planned or (), str(error))
    return None


def _verify_packed(path: Path) -> list[Problem]:
    try:
        check_file(path, packed_document(path), digest=True)
    except StoreFormatError as error:
        ids, where = _damage(path, layout.USER_BLOCK_BYTES, ())
        return [Problem(path.name, "damaged", ids, f"{error}; {where}")]
    try:
        (shard,) = find_source(path).open()
        _check_rows(path, shard, None)
    except StoreFormatError as error:
        return [Problem(path.name, "damaged", (), str(error))]
    return []


def _check_rows(file: Path, shard: Shard, planned: tuple[str, ...] | None) -> None:
    """Refuses rows that were not planned for this shard, twice the same row, ids that are no text, odd scales."""
    ids = shard.ids if planned is None else planned  # read as text, to see that they are
    if not _as_planned(shard, ids):
        raise StoreFormatError(f"{file}: its ids are not the ones that its plan gives it")
    for name in ("scales", "token_scales"):
        scales = getattr(shard, name)
        if scales is not None and not np.isfinite(scales).all():
            raise StoreFormatError(f"{file}: /{name} holds a number that is not finite")
    if (shard.keys == b"").any():
        raise StoreFormatError(f"{file}: an id is empty")
    if surely_distinct(shard.keys):
        return
    rows = np.stack([IdIndex(shard.keys).firsts(), shard.views.astype(np.int64)])
    if np.unique(rows, axis=1).shape[1] != len(shard):
        raise StoreFormatError(f"{file}: an id stands in two rows of one view")


def _as_planned(shard: Shard, planned: Sequence[str]) -> bool:
    if len(shard) == len(planned) and np.array_equal(shard.keys, key_array(planned)):
        return True
    return set(shard.ids) | {f.id for f in shard.failures} == set(planned)


def _damage(file: Path, user_block: int, planned: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """The rows whose block digest differs, and words for where they are.

    HDF5 has to parse a damaged file for that, so another process does it.
    """
    try:
        blocks, ids = isolated(_LOCATE, file, str(user_block), timeout_s=_LOCATE_TIMEOUT_S)
    except ChildProcessError:
        return planned, "the damage reaches beyond the rows: none of them can be trusted"
    if not blocks:
        return planned, "every block of rows is sound: the damage is in ids, digests or metadata"
    return tuple(ids), f"blocks {', '.join(map(str, blocks[:10]))}{' ...' if len(blocks) > 10 else ''} of rows differ"


def locate_damage(file: Path, user_block: str) -> tuple[list[int], list[str]]:
    """Blocks whose digest differs, and the ids of their rows.

    Raises:
        StoreFormatError: damaged beyond its rows.
    """
    shard = open_shard(file, user_block=int(user_block))
    rows = shard.rows()
    bounds = block_bounds(len(shard), max(shard.block_rows, 1))
    found = block_digests(rows, bounds)
    blocks = np.flatnonzero((found != shard.block_digests).any(axis=1)).tolist()
    return blocks, [i for b in blocks for i in shard.ids[slice(*bounds[b])]]
