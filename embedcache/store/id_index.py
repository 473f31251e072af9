"""Finding rows by id, a million at a time: a hash table in one array, filled and searched without a Python loop."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np


class IdIndex:
    """Positions of byte strings; of equal ones the first.

    Open addressing with linear probing in a table at most half full.

    Args:
        keys: (n,) bytes of fixed width, padded with NUL.
    """

    def __init__(self, keys: np.ndarray) -> None:
        self._keys = keys
        self._mask = np.uint64((1 << max(2 * len(keys) - 1, 1).bit_length()) - 1)

    @cached_property
    def _table(self) -> np.ndarray:
        """The position of a key in the first free slot from its own on; -1: free."""
        keys = self._keys
        table = np.full(int(self._mask) + 1, -1, np.int32 if len(keys) < 2**31 else np.int64)
        pending, slots = np.arange(len(keys), dtype=table.dtype), self._slots(keys)
        while len(pending):
            # several may want one free slot: written in reverse, the first of them has it
            free = table[slots] < 0
            table[slots[free][::-1]] = pending[free][::-1]
            taken_by = table[slots]
            lost = taken_by != pending
            pending, slots, taken_by = pending[lost], slots[lost], taken_by[lost]
            # an equal key that stands there makes this one a repeat, which is not kept
            other = keys[taken_by] != keys[pending]
            pending, slots = pending[other], self._next(slots[other])
        return table

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Positions of keys, (len(keys),) int64; -1 where there is none.

        Args:
            keys: (m,) bytes of any fixed width.
        """
        run = self._as_run(keys)
        return self._probe(keys) if run is None else run

    def firsts(self) -> np.ndarray:
        """For each key the position of the first that is equal to it, (n,) int64."""
        return self._probe(self._keys)

    def _probe(self, keys: np.ndarray) -> np.ndarray:
        found = np.full(len(keys), -1, np.int64)
        pending, slots = np.arange(len(keys)), self._slots(keys)
        while len(pending):
            candidates = self._table[slots]
            held = candidates >= 0
            pending, slots, candidates = pending[held], slots[held], candidates[held]
            equal = self._keys[candidates] == keys[pending]
            found[pending[equal]] = candidates[equal]
            pending, slots = pending[~equal], self._next(slots[~equal])
        return found

    def _as_run(self, keys: np.ndarray) -> np.ndarray | None:
        """Positions of keys that stand here one after the other, as most callers ask for them; otherwise None."""
        if not 0 < len(keys) <= len(self._keys):
            return None
        start = int(np.argmax(self._keys == keys[0]))
        run = self._keys[start : start + len(keys)]
        return np.arange(start, start + len(keys)) if np.array_equal(run, keys) else None

    def _slots(self, keys: np.ndarray) -> np.ndarray:
        return _hashes(keys) & self._mask

    def _next(self, slots: np.ndarray) -> np.ndarray:
        return (slots + np.uint64(1)) & self._mask


def surely_distinct(keys: np.ndarray) -> bool:
    """Whether all keys differ, told by their hashes; False also where two different ones hash alike."""
    hashes = np.sort(_hashes(keys))
    return not bool((hashes[1:] == hashes[:-1]).any())


def _hashes(keys: np.ndarray) -> np.ndarray:
    """(n,) uint64; the padding of a key does not change its hash."""
    n_words = max(-(-keys.dtype.itemsize // 8), 1)
    words = keys.astype(f"S{8 * n_words}").view("<u8").reshape(len(keys), n_words)
    total, factor = np.zeros(len(keys), np.uint64), 0x9E3779B97F4A7C15
    for k in range(n_words):
        total += words[:, k] * np.uint64(factor | 1)
        factor = (factor * 0xD1342543DE82EF95 + 0x2545F4914F6CDD1D) % 2**64
    total ^= total >> np.uint64(32)
    total *= np.uint64(0xD6E8FEB86659FD93)
    return total ^ (total >> np.uint64(32))


def key_array(ids: Sequence[str]) -> np.ndarray:
    """Ids as UTF-8 bytes of one width, (n,).

    Raises:
        TypeError: an id that is no str.
        ValueError: an id with a NUL character, which the padding would swallow.
        UnicodeEncodeError: an id that is not valid Unicode.
    """
    if "\0" in "".join(ids):
        raise ValueError("an id holds a NUL character")
    try:
        return np.array(ids, dtype="S") if len(ids) else np.empty(0, "S1")
    except UnicodeEncodeError:
        return np.array([i.encode("utf-8") for i in ids])
