"""Format 1 of the store: names of files and datasets, and the sealed JSON documents beside the shards.

`cache/README.md` specifies the same for readers in other languages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from embedcache.errors import StoreFormatError
from embedcache.fingerprint import canonical_json, fingerprint

FORMAT = "1.1"
STORE_NAME = "store.json"
STORE_ENCODING = "embedcache-store"
SHARD_ENCODING = "embedcache-shard"
PACKED_ENCODING = "embedcache-packed-store"
MODALITIES = ("image", "text")

SHARD_BYTES = 256 * 2**20  # most bytes of rows in a shard of an extraction
USER_BLOCK_BYTES = 1024  # before the HDF5 part of a packed store: its document, padded with spaces
ALIGN_BYTES = 64  # every dataset starts on a cache line ...
ALIAS_BYTES = 4096  # ... but rows not on a page, where they would alias with numpy's own buffers

_PLAN = re.compile(r"plan-(\d{5,})\.json")
_SHARD_DOC = re.compile(r"shard-(\d{5,})\.json")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHARD_FILE = re.compile(r"shard-(\d{5,})-([0-9a-f]{12})\.h5")

# name of the stored dtype -> numpy dtype of the bytes in the shard; bfloat16 travels as its bit pattern
STORED_DTYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "int8": "|i1"}


@dataclass(frozen=True)
class TokenLayout:
    """What the tokens of a store's rows have in common.

    Args:
        dim: width of a token.
        length: l, tokens in each row; None where rows have lengths of their own (ragged).
    """

    dim: int
    length: int | None


@dataclass(frozen=True)
class Layout:
    """What every shard of a store has in common.

    Args:
        dtype: stored dtype of embeddings and tokens, a key of `STORED_DTYPES`.
        dim: d, the width of an embedding.
        views: how many views of each sample are stored.
        tokens: None where only embeddings are stored.
        view_policy: how views beyond the plain one are drawn, JSON-ready; None where there are none.
    """

    dtype: str
    dim: int
    views: int = 1
    tokens: TokenLayout | None = None
    view_policy: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in STORED_DTYPES:
            raise StoreFormatError(f"unknown stored dtype {self.dtype!r}, expected one of {', '.join(STORED_DTYPES)}")

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Layout:
        """The layout in a store's document; keys of a newer minor version are left where they are."""
        tokens = document.get("tokens")
        return cls(
            str(document["dtype"]),
            int(document["dim"]),
            int(document["views"]),
            None if tokens is None else TokenLayout(int(tokens["dim"]), tokens["length"]),
            document.get("view_policy"),
        )

    def to_json(self) -> dict[str, Any]:
        """As documents and fingerprints hold it; `tokens` and `view_policy` stand only where there are some."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def datasets(self) -> set[str]:
        """Names of the datasets that a shard of this layout has."""
        names = {"record", "failures", "ids", "views", "input_digests", "block_digests", "embeddings"}
        if self.dtype == "int8":
            names.add("scales")
        if self.tokens is not None:
            names.add("tokens")
            if self.tokens.length is None:
                names.add("token_offsets")
            if self.dtype == "int8":
                names.add("token_scales")
        return names

    def row_bytes(self) -> int:
        """Bytes of one row, but for ragged tokens and int8 scales."""
        n_tokens = 0 if self.tokens is None or self.tokens.length is None else self.tokens.length * self.tokens.dim
        width = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}[self.dtype]
        return (self.dim + n_tokens) * width


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


def shard_file_number(name: str) -> int | None:
    """The number in a shard's file name, None for other names."""
    match = _SHARD_FILE.fullmatch(name)
    return int(match[1]) if match else None


def store_fingerprint(encoder_fingerprint: str, layout: Layout) -> str:
    """Covers the encoder and all that the store adds to it."""
    return fingerprint({"encoder": encoder_fingerprint, "format": FORMAT.split(".")[0], "layout": layout.to_json()})


def store_document(
    *, encoder: dict[str, Any], encoder_fingerprint: str, modality: str, store_layout: Layout
) -> dict[str, Any]:
    """The content of a `store.json` but for its seal.

    Args:
        encoder: the encoder's record, JSON-ready.
    """
    return {
        "encoding-type": STORE_ENCODING,
        "encoder": encoder,
        "encoder_fingerprint": encoder_fingerprint,
        "fingerprint": store_fingerprint(encoder_fingerprint, store_layout),
        "layout": store_layout.to_json(),
        "modality": modality,
    }


def check_store_document(document: Mapping[str, Any], path: Path) -> None:
    """Refuses a store's document that lacks what every reader relies on.

    Raises:
        StoreFormatError: the message names what was found.
    """
    kind = document.get("encoding-type")
    if kind != STORE_ENCODING:
        raise StoreFormatError(f"{path}: encoding-type is {kind!r}, expected {STORE_ENCODING!r}")
    try:
        layout = Layout.from_json(document["layout"])
        lengths = [layout.dim, layout.views, *([] if layout.tokens is None else [layout.tokens.dim])]
        if min(lengths) < 0 or not isinstance(document["encoder"], dict) or document["modality"] not in MODALITIES:
            raise ValueError("impossible layout, encoder or modality")
        covered = {"encoder": document["encoder_fingerprint"], "format": FORMAT.split(".")[0]}
        if document["fingerprint"] != fingerprint({**covered, "layout": document["layout"]}):
            raise ValueError("its fingerprint is not that of its encoder and layout")
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        raise StoreFormatError(f"{path}: not a store's document ({error})") from error


def is_sized(document: Mapping[str, Any]) -> bool:
    """Whether a document says of a file what every reader relies on: SHA-256, size, rows and failures."""
    counts = [document.get(key) for key in ("size", "n", "n_failed")]
    sha256 = document.get("sha256")
    return (
        isinstance(sha256, str) and bool(_SHA256.fullmatch(sha256)) and all(type(c) is int and c >= 0 for c in counts)
    )


def seal(document: dict[str, Any]) -> bytes:
    """Canonical JSON of a document with its format version, where it has none this one, and the digest of itself."""
    document = {"format": FORMAT, **document}
    return canonical_json({**document, "digest": fingerprint(document)}) + b"\n"


def unseal(data: bytes, path: Path) -> dict[str, Any]:
    """Reads a sealed document; unknown keys of a newer minor version are kept.

    Raises:
        StoreFormatError: damaged, edited, or of another major version.
    """
    try:
        document = json.loads(data)
        found, version = document.pop("digest"), document["format"]
        expected = fingerprint(document)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreFormatError(
            f"{path}: not a sealed store document ({type(error).__name__}); run 'embedcache verify {path.parent}'"
        ) from error
    check_version(version, path)
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
