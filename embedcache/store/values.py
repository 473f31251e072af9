"""Stored values: float32 to the bytes in a shard and back."""

from __future__ import annotations

import numpy as np

from embedcache.store.layout import STORED_DTYPES


def to_stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Rounds float32 values `(n, d)` to the stored dtype; overflow becomes infinity, which callers refuse."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        to_even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return ((bits + to_even) >> np.uint32(16)).astype("<u2")
    with np.errstate(over="ignore"):
        return values.astype(STORED_DTYPES[dtype])


def from_stored(codes: np.ndarray, dtype: str) -> np.ndarray:
    """The values of stored bytes: bfloat16 comes back as float32, the others as they are, without a copy."""
    if dtype == "bfloat16":
        return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return codes
