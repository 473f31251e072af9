"""What a store directory says of itself: its document, its plans, and which planned shards count.

The state is derived from published files alone, in the order of their numbers; nothing is remembered
elsewhere and no time or host is involved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from embedcache.errors import (
    EmbedCacheError,
    FingerprintMismatchError,
    StoreFormatError,
    StoreNotFoundError,
    StoreWriteError,
)
from embedcache.store import commit, layout
from embedcache.store.layout import Layout


@dataclass(frozen=True)
class PlannedShard:
    """One shard's worth of work: its ids in order, encoded `batch_size` at a time."""

    number: int
    ids: Sequence[str]
    batch_size: int


@dataclass(frozen=True)
class Plan:
    """One extraction's plan, published before its first shard.

    Args:
        ids: all ids of the plan, in the order of their rows.
        bounds: shard k holds `ids[bounds[k]:bounds[k + 1]]`.
        first_shard: number of the plan's first shard.
        batch_size: rows encoded together; batches never cross a shard.
        abandons: unfinished shards of earlier plans whose ids are planned again here or gone.
    """

    ids: Sequence[str]
    bounds: Sequence[int]
    first_shard: int
    batch_size: int
    abandons: Sequence[int] = field(default_factory=list)

    def shards(self) -> Iterator[PlannedShard]:
        for k, (start, stop) in enumerate(pairwise(self.bounds)):
            yield PlannedShard(self.first_shard + k, self.ids[start:stop], self.batch_size)


@dataclass(frozen=True)
class Catalogue:
    """A store's published documents.

    Args:
        document: the content of `store.json`.
        shards: documents of the shards that count, by number.
        n_plans: how many plans were published.
        damaged: damaged documents of shards by file name, where the reader asked to be told and not to be stopped.
    """

    path: Path
    document: dict[str, Any]
    shards: Mapping[int, dict[str, Any]]
    n_plans: int
    damaged: Mapping[str, EmbedCacheError] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, *, tolerant: bool = False) -> Catalogue:
        """Reads the documents of a store directory; plans are read when they are first asked for.

        Args:
            tolerant: collect damaged documents of shards in `damaged` instead of raising.

        Raises:
            StoreNotFoundError: no store there.
            StoreFormatError: a damaged document.
        """
        document_path = path / layout.STORE_NAME
        if not document_path.is_file():
            found = "an empty directory" if path.is_dir() else "a file" if path.is_file() else "nothing"
            if path.is_dir() and any(layout.shard_file_number(entry.name) is not None for entry in path.iterdir()):
                raise StoreFormatError(
                    f"{document_path}: not there, but shards are; run 'embedcache repair {path}' to write it anew"
                )
            raise StoreNotFoundError(
                f"{path}: no store there (found {found}, expected a directory with {layout.STORE_NAME}); "
                "make it with 'embedcache extract MANIFEST ENCODER --store " + str(path) + "'"
            )
        document = commit.read_document(document_path)
        layout.check_store_document(document, document_path)
        names = sorted(entry.name for entry in path.iterdir())
        plan_numbers = sorted(number for name in names if (number := layout.plan_number(name)) is not None)
        if plan_numbers != list(range(len(plan_numbers))) and not tolerant:
            raise StoreFormatError(
                f"{path}: plans {plan_numbers}, expected 0 to {len(plan_numbers) - 1}: a plan was taken away; put it "
                f"back, or run 'embedcache repair {path}'"
            )
        shards: dict[int, dict[str, Any]] = {}
        damaged: dict[str, EmbedCacheError] = {}
        for name in names:
            number = layout.shard_doc_number(name)
            if number is None:
                continue
            try:
                shards[number] = _read_shard_document(path / name, number, document)
            except (StoreFormatError, FingerprintMismatchError) as error:
                if not tolerant:
                    raise
                damaged[name] = error
        return cls(path, document, dict(sorted(shards.items())), max(plan_numbers, default=-1) + 1, damaged)

    @property
    def layout(self) -> Layout:
        return Layout.from_json(self.document["layout"])

    @cached_property
    def plans(self) -> Sequence[Plan]:
        """In order of publication.

        Raises:
            StoreFormatError: a damaged plan.
        """
        return [read_plan(self.path / layout.plan_name(number)) for number in range(self.n_plans)]

    def pending(self) -> list[PlannedShard]:
        """Planned shards that neither count yet nor were abandoned."""
        abandoned = {number for plan in self.plans for number in plan.abandons}
        return [
            shard
            for plan in self.plans
            for shard in plan.shards()
            if shard.number not in self.shards and shard.number not in abandoned and shard.ids
        ]

    def has_shard(self, number: int) -> bool:
        """Whether the shard counts by now, whoever published it."""
        return number in self.shards or (self.path / layout.shard_doc_name(number)).exists()

    def next_shard(self) -> int:
        """The first shard number that no plan and no shard has taken."""
        ends = [plan.first_shard + len(plan.bounds) - 1 for plan in self.plans]
        return max([*ends, *(number + 1 for number in self.shards)], default=0)


def open_or_create(path: Path, document: dict[str, Any]) -> Catalogue:
    """The catalogue of the store at `path`, created if there is none.

    Args:
        document: what `layout.store_document` gives.

    Raises:
        FingerprintMismatchError: the store there holds another encoder's values.
        StoreWriteError: a packed store is there, or the directory cannot be written.
    """
    if path.is_file():
        raise StoreWriteError(f"{path}: a file; a packed store does not grow. Name a directory with --store")
    commit.make_directory(path)
    if not (path / layout.STORE_NAME).exists():
        commit.publish(path / layout.STORE_NAME, layout.seal(document))
    catalogue = Catalogue.read(path)
    check_document(catalogue.document, document, path / layout.STORE_NAME)
    return catalogue


def publish_plan(path: Path, number: int, plan: Plan) -> bool:
    """Publishes a plan under its number; False if another process took the number first."""
    return commit.publish(path / layout.plan_name(number), layout.seal({**vars(plan), "number": number}))


def read_plan(path: Path) -> Plan:
    """Reads one plan.

    Raises:
        StoreFormatError: damaged.
    """
    document = commit.read_document(path)
    try:
        plan = Plan(*(_typed(key, document[key]) for key in ("ids", "bounds", "first_shard", "batch_size", "abandons")))
        if b"\0" in "".join(plan.ids).encode("utf-8"):
            raise ValueError("an id with a NUL character")
        number = layout.plan_number(path.name)
        if document.get("number", number) != number:  # 1.0 has none
            raise ValueError(f"it is plan {document['number']}")
        in_order = all(start <= stop for start, stop in pairwise(plan.bounds))
        whole = plan.bounds[0] == 0 and plan.bounds[-1] == len(plan.ids) and plan.first_shard >= 0
        if not (in_order and whole and plan.batch_size >= 1):
            raise ValueError("bounds that do not part the ids")
    except (LookupError, TypeError, ValueError) as error:
        raise StoreFormatError(f"{path}: not a plan ({error})") from error
    return plan


def _typed(key: str, value: Any) -> Any:
    """A field of a plan, if it is what such a field is: text in `ids`, whole numbers elsewhere."""
    kind, parts = str if key == "ids" else int, value if key in ("ids", "bounds", "abandons") else [value]
    if not isinstance(parts, list) or set(map(type, parts)) - {kind}:
        raise TypeError(f"{key} holds something else than {kind.__name__}")
    return value


def _read_shard_document(path: Path, number: int, store_document: dict[str, Any]) -> dict[str, Any]:
    document = commit.read_document(path)
    try:
        check_fingerprint(str(document["fingerprint"]), str(store_document["fingerprint"]), path)
        if document["file"] != layout.shard_file_name(number, document["sha256"]):
            raise StoreFormatError(f"{path}: names the file {document['file']!r}, which is not this shard's")
        if not layout.is_sized(document):
            raise StoreFormatError(f"{path}: sha256 is no digest, or size, n and n_failed are not all numbers")
    except (LookupError, TypeError) as error:
        raise StoreFormatError(f"{path}: not a shard's document ({error})") from error
    return document


def check_document(found: Mapping[str, Any], expected: Mapping[str, Any], path: Path) -> None:
    """Refuses a store that does not hold what is asked for, and says what of its layout is another.

    Raises:
        FingerprintMismatchError: names the layout's fields, or both fingerprints.
    """
    if found["encoder_fingerprint"] == expected["encoder_fingerprint"]:
        is_, asked = found["layout"], expected["layout"]
        differ = [
            f"{name} {is_.get(name)!r}, asked for {asked.get(name)!r}"
            for name in sorted({*is_, *asked})
            if is_.get(name) != asked.get(name)
        ]
        if differ:
            raise FingerprintMismatchError(
                f"{path}: the same encoder, but stored with {'; '.join(differ)}. Name another directory with --store, "
                "or go back to these settings"
            )
    check_fingerprint(found["fingerprint"], expected["fingerprint"], path)


def check_fingerprint(found: str, expected: str, path: Path) -> None:
    """Refuses a store whose values are not those asked for.

    Raises:
        FingerprintMismatchError: names both.
    """
    if found != expected:
        raise FingerprintMismatchError(
            f"{path}: store fingerprint {found[:12]}..., expected {expected[:12]}...: another encoder, preprocessing "
            "or layout computed it. Name another directory with --store, or go back to the settings that made it "
            f"(embedcache info {path.parent})"
        )
