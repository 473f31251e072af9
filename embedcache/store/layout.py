"""Format 1 of the store: names of files and datasets, and the sealed JSON documents beside the shards.

`cache/README.md` specifies the same for readers in other languages.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from embedcache.errors import StoreFormatError
from embedcache.fingerprint import canonical_json, fingerprint

FORMAT = "1.0"
STORE_NAME = "store.json"
SHARD_ENCODING = "embedcache-shard"

_PLAN = re.compile(r"plan-(\d{5,})\.json")
_SHARD_DOC = re.compile(r"shard-(\d{5,})\.json")

# name of the stored dtype -> numpy dtype of the bytes in the shard; bfloat16 travels as its bit pattern
STORED_DTYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}


@dataclass(frozen=True)
class Layout:
    """What every shard of a store has in common.

    Args:
        dtype: stored dtype of the embeddings, a key of `STORED_DTYPES`.
        dim: d, the width of an embedding.
        views: how many views of each sample are stored.
    """

    dtype: str
    dim: int
    views: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in STORED_DTYPES:
            raise StoreFormatError(f"unknown stored dtype {self.dtype!r}, expected one of {', '.join(STORED_DTYPES)}")


def plan_name(number: int) -> str:
    """File name of a plan."""
    return f"plan-{number:05d}.json"


def shard_doc_name(number: int) -> str:
    """File name of a shard's document."""
    return f"shard-{number:05d}.json"


def shard_file_name(number: int, sha256: str) -> str:
    """File name of a shard; `sha256` is of its bytes, in hex."""
    return f"shard-{number:05d}-{sha256[:12]}.h5"


def plan_number(name: str) -> int | None:
    """The number in a plan's file name, None for other names."""
    match = _PLAN.fullmatch(name)
    return int(match[1]) if match else None


def shard_doc_number(name: str) -> int | None:
    """The number in the name of a shard's document, None for other names."""
    match = _SHARD_DOC.fullmatch(name)
    return int(match[1]) if match else None


def store_fingerprint(encoder_fingerprint: str, layout: Layout) -> str:
    """Covers the encoder and all that the store adds to it."""
    return fingerprint({"encoder": encoder_fingerprint, "format": FORMAT.split(".")[0], "layout": asdict(layout)})


def seal(document: dict[str, Any]) -> bytes:
    """Canonical JSON of a document with its format version and the digest of itself."""
    document = {**document, "format": FORMAT}
    return canonical_json({**document, "digest": fingerprint(document)}) + b"\n"


def unseal(data: bytes, path: Path) -> dict[str, Any]:
    """Reads a sealed document; unknown keys of a newer minor version are kept.

    Raises:
        StoreFormatError: damaged, edited, or of another major version.
    """
    try:
        document = json.loads(data)
        found, version = document.pop("digest"), document["format"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreFormatError(
            f"{path}: not a sealed store document ({type(error).__name__}); run 'embedcache verify {path.parent}'"
        ) from error
    check_version(version, path)
    expected = fingerprint(document)
    if found != expected:
        raise StoreFormatError(
            f"{path}: content has digest {expected[:12]}..., the file says {str(found)[:12]}...: it was damaged or "
            f"edited; run 'embedcache verify {path.parent}'"
        )
    return document


def check_version(version: Any, path: Path) -> None:
    """Refuses a format of another major version by name."""
    if str(version).split(".")[0] != FORMAT.split(".")[0]:
        raise StoreFormatError(
            f"{path}: store format {version!r}, this embedcache reads {FORMAT.split('.')[0]}.x; "
            "use the embedcache that wrote it, or extract again into a new directory"
        )
