"""Stored values: float32 to the bytes in a shard and back.

Shape notation: d the width of an embedding or token, `...` any leading axes.
"""

from __future__ import annotations

import numpy as np

from embedcache.store.layout import STORED_DTYPES

_INT8_MAX = 127
_BFLOAT16_NAN = 0x7FC0


def to_stored(values: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Rounds values to the stored dtype, by way of float32 where they are not in it already.

    Overflow becomes infinity, which callers refuse. An int8 code is at most half a scale from its value: 1/254 of
    the largest absolute value of its row or token.

    Args:
        values: (..., d).

    Returns:
        Codes (..., d), and for int8 the scale of each row or token, (...) float32; otherwise None.
    """
    if values.dtype == STORED_DTYPES[dtype] and dtype in ("float16", "float32"):
        return np.ascontiguousarray(values), None
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(values, dtype=np.float32)
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        to_even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        codes = ((bits + to_even) >> np.uint32(16)).astype("<u2")
        codes[np.isnan(values)] = _BFLOAT16_NAN  # rounding some of them up would give zero
        return codes, None
    if dtype == "int8":
        with np.errstate(invalid="ignore"):
            scales = np.abs(values).max(axis=-1, initial=0) / np.float32(_INT8_MAX)
        # a row of zeros, or so near zero that its scale is, has codes of zero; one that is not finite has no codes
        usable = np.isfinite(scales) & (scales > 0)
        steps = np.where(usable[..., None], values, 0) / np.where(usable, scales, 1)[..., None]
        return np.clip(np.rint(steps), -_INT8_MAX, _INT8_MAX).astype(np.int8), scales.astype("<f4")
    with np.errstate(over="ignore"):
        return values.astype(STORED_DTYPES[dtype]), None


def from_stored(codes: np.ndarray, dtype: str, scales: np.ndarray | None = None) -> np.ndarray:
    """The values of stored bytes: bfloat16 and int8 as float32, the others as they are, without a copy.

    Args:
        codes: (..., d).
        scales: (...), for int8.
    """
    if dtype == "bfloat16":
        return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == "int8":
        if scales is None:
            raise ValueError("int8 codes without their scales")
        with np.errstate(invalid="ignore"):  # an infinite scale gives NaN, which callers refuse
            return codes.astype(np.float32) * scales[..., None]
    return codes
