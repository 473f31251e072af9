"""Where a store's rows are read from: a directory of shards or one packed file, checked before HDF5 sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedcache.errors import StoreFormatError
from embedcache.fingerprint import digest_file
from embedcache.store import layout
from embedcache.store.catalogue import Catalogue
from embedcache.store.gate import Shard, open_shard


@dataclass(frozen=True)
class Source:
    """Where a store's rows were read from: enough to open the very same rows again in another process.

    Args:
        path: the store's directory, or its one file.
        document: the content of `store.json`.
        shards: the documents of its shards; of a packed store the one in its user block.
        packed: whether the store is one file.
    """

    path: Path
    document: dict[str, Any]
    shards: Sequence[dict[str, Any]]
    packed: bool

    def open(self, *, digest: bool = False) -> list[Shard]:
        """Maps every shard.

        Args:
            digest: whether to compare the SHA-256 of every byte before HDF5 sees any.

        Raises:
            StoreFormatError: a file is missing, damaged, or another than it was.
        """
        return [open_counted(self, document, digest=digest) for document in self.shards]


def find_source(path: Path, *, digest: bool = False) -> Source:
    """What lies at a path.

    Args:
        digest: whether to compare the SHA-256 of every byte of a packed store, whose record is in its HDF5 part.

    Raises:
        StoreNotFoundError: no store there.
        StoreFormatError: a damaged document, or a damaged packed store.
    """
    if path.is_file():
        document = packed_document(path)
        check_file(path, document, digest=digest)
        record = open_shard(path, user_block=layout.USER_BLOCK_BYTES).record
        return Source(path, record, [document], packed=True)
    catalogue = Catalogue.read(path)
    return Source(path, catalogue.document, list(catalogue.shards.values()), packed=False)


def open_counted(source: Source, document: dict[str, Any], *, digest: bool) -> Shard:
    """Opens a shard that a document makes count.

    Raises:
        StoreFormatError: not the file that the document means, or not of this store.
    """
    file = source.path if source.packed else source.path / document["file"]
    check_file(file, document, digest=digest)
    shard = open_shard(file, user_block=layout.USER_BLOCK_BYTES if source.packed else 0)
    if shard.record != source.document:
        raise StoreFormatError(
            f"{file}: its record has fingerprint {str(shard.record.get('fingerprint'))[:12]}..., the store "
            f"{source.document['fingerprint'][:12]}...: a shard of another store"
        )
    of_1_0 = {} if "index_sha256" in document else {"index_sha256": shard.facts["index_sha256"]}  # which has none
    said = {**{key: document.get(key) for key in shard.facts}, **of_1_0}
    if said != shard.facts:
        raise StoreFormatError(
            f"{file}: holds {shard.facts}, its document says {said}; run 'embedcache verify {source.path}'"
        )
    return shard


def packed_document(path: Path) -> dict[str, Any]:
    """What a packed store's user block says.

    Raises:
        StoreFormatError: no packed store, or its document is damaged.
    """
    try:
        with path.open("rb") as handle:
            block = handle.read(layout.USER_BLOCK_BYTES)
    except OSError as error:
        raise StoreFormatError(f"{path}: cannot be read ({error.strerror})") from error
    if not block.startswith(b"{"):
        raise StoreFormatError(
            f"{path}: not a packed store (it begins with {block[:8]!r}); open the directory of a store, or make one "
            "file of it with 'embedcache pack'"
        )
    document = layout.unseal(block.rstrip(b" \n"), path)
    kind = document.get("encoding-type")
    if kind != layout.PACKED_ENCODING or not layout.is_sized(document):
        raise StoreFormatError(
            f"{path}: encoding-type is {kind!r}, expected {layout.PACKED_ENCODING!r} with its digest"
        )
    return document


def check_file(file: Path, document: dict[str, Any], *, digest: bool) -> None:
    """Compares a shard or packed store with what its document says, before HDF5 sees it.

    Raises:
        StoreFormatError: missing, of another size or, with `digest`, of another content.
    """
    packed = document.get("encoding-type") == layout.PACKED_ENCODING
    remedy = f"run 'embedcache verify {file if packed else file.parent}'"
    if file.is_symlink() and not packed:
        raise StoreFormatError(f"{file}: a link to another place; copy the store with the files themselves (cp -rL)")
    if not file.is_file():
        raise StoreFormatError(f"{file}: the shard's document names it, but it is not there; {remedy}")
    size = file.stat().st_size
    if size != document["size"]:
        raise StoreFormatError(f"{file}: {size} bytes, its document says {document['size']}; {remedy}")
    if digest:
        try:
            found = digest_file(file, skip=layout.USER_BLOCK_BYTES if packed else 0)
        except OSError as error:
            raise StoreFormatError(f"{file}: cannot be read ({error.strerror}); restore it, or {remedy}") from error
        if found != document["sha256"]:
            raise StoreFormatError(
                f"{file}: SHA-256 {found[:12]}..., its document says {document['sha256'][:12]}...; {remedy}"
            )
