"""What stores say of themselves, for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from embedcache.errors import EmbedCacheError, StoreFormatError, StoreNotFoundError
from embedcache.store import layout
from embedcache.store.source import packed_document
from embedcache.store.store import open_store


def describe(path: str | Path) -> dict[str, Any]:
    """Facts of one store, JSON-ready.

    Raises:
        StoreNotFoundError: no store there.
        StoreFormatError: it cannot be opened.
    """
    store = open_store(path)
    tokens = store.layout.tokens
    return {
        "path": str(path),
        "modality": store.modality,
        "rows": len(store),
        "ids": len(set(store.ids)) if store.layout.views > 1 else len(store),
        "views": store.layout.views,
        "view_policy": store.layout.view_policy,
        "failed": len(store.failures),
        "unfinished_shards": store.n_pending_shards,
        "dim": store.layout.dim,
        "dtype": store.layout.dtype,
        "tokens": None if tokens is None else f"{tokens.length or 'ragged'} x {tokens.dim}",
        "shards": store.n_shards,
        "bytes": store.n_bytes,
        "format": store.document["format"],
        "fingerprint": store.fingerprint,
        "encoder_fingerprint": store.encoder_fingerprint,
        "encoder": store.encoder,
    }


def list_stores(root: str | Path) -> list[dict[str, Any]]:
    """Facts of every store at or below a directory, by path; of one that cannot be opened, `path` and `error`.

    Raises:
        StoreNotFoundError: no such directory.
    """
    root = Path(root)
    if not root.exists():
        raise StoreNotFoundError(f"{root}: no such directory; name the one that your stores are in")
    found: list[dict[str, Any]] = []
    for path in [root, *sorted(root.rglob("*"))]:
        if not _is_store(path):
            continue
        try:
            facts = describe(path)
        except EmbedCacheError as error:
            found.append({"path": str(path), "error": str(error)})
            continue
        found.append({**facts, "encoder": str(facts["encoder"].get("name", "made elsewhere"))})
    return found


def _is_store(path: Path) -> bool:
    if path.is_dir():
        return (path / layout.STORE_NAME).is_file()
    if path.suffix != ".h5" or layout.shard_file_number(path.name) is not None or not path.is_file():
        return False
    try:
        packed_document(path)
    except (StoreFormatError, OSError):
        return False
    return True
