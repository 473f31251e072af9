"""Content digests: canonical JSON to SHA-256, and digests of weights, files and inputs.

A fingerprint covers what determines values and nothing else. What cannot be hashed exactly is an error,
never a partial or random hash.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

INPUT_DIGEST_BYTES = 16


def canonical_json(value: Any) -> bytes:
    """Serialises to the one JSON text that equal values share: sorted keys, no spaces, UTF-8.

    Raises:
        TypeError: a value that JSON cannot hold exactly; the message names its key path.
        ValueError: NaN, infinity, or text that is not valid Unicode.
    """
    return json.dumps(
        _plain(value, "$"), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode("utf-8")


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where}: cannot fingerprint {value!r}, expected a finite number")
        return value
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where}: cannot fingerprint the key {key!r}, expected str")
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        if set(map(type, value)) == {str}:  # a million ids need no look at each
            return value
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise TypeError(
        f"{where}: cannot fingerprint a {type(value).__module__}.{type(value).__qualname__}, "
        "expected None, bool, int, float, str, list or dict"
    )


def fingerprint(value: Any) -> str:
    """SHA-256 of the canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def input_digest(data: bytes) -> bytes:
    """First 16 bytes of the SHA-256 of one input, as kept beside its row."""
    return hashlib.sha256(data).digest()[:INPUT_DIGEST_BYTES]


def digest_file(path: Path, *, skip: int = 0) -> str:
    """SHA-256 of a file's bytes, 64 hex digits.

    Args:
        skip: bytes at the beginning to leave out.
    """
    with path.open("rb") as handle:
        handle.seek(skip)
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest_arrays(arrays: Iterable[tuple[str, np.ndarray]]) -> str:
    """SHA-256 over dtype name, shape and bytes of arrays, in the order given.

    Args:
        arrays: pairs of dtype name (numpy has no bfloat16, so it is told) and array of any shape.
    """
    total = hashlib.sha256()
    for dtype_name, array in arrays:
        array = np.ascontiguousarray(array)
        total.update(canonical_json([dtype_name, list(array.shape)]))
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()
