"""From what an encoder gives to the rows of a shard: what is fit to keep, and why the rest is not.

Shape notation: n rows of a shard, d embedding width, l tokens in a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from embedcache.encoders.base import Encoded, Encoder, Prepared
from embedcache.errors import InputError
from embedcache.store.layout import SHARD_BYTES, STORED_DTYPES, Layout, TokenLayout
from embedcache.store.shard import Failure, ShardRows
from embedcache.store.values import from_stored, to_stored

Outcome = Prepared | InputError


def layout_for(encoder: Encoder, *, store_dtype: str, tokens: bool) -> Layout:
    """How the encoder's output is stored: tokens of images in equal numbers, those of texts in as many as there are.

    Raises:
        ValueError: tokens were asked of an encoder that has none.
    """
    if not tokens:
        return Layout(store_dtype, encoder.dim)
    if encoder.token_dim is None:
        raise ValueError(f"{encoder.record.name}: tokens were asked for, but the encoder has none")
    grid = encoder.token_grid
    return Layout(
        store_dtype, encoder.dim, tokens=TokenLayout(encoder.token_dim, None if grid is None else grid[0] * grid[1])
    )


def rows_in_a_shard(encoder: Encoder, store_layout: Layout) -> int:
    """Most rows of a shard, by their bytes; texts are taken to be as long as the encoder lets them be."""
    tokens = store_layout.tokens
    if tokens is not None and tokens.length is None:
        longest = int(encoder.record.identity.get("max_length", 1))
        store_layout = replace(store_layout, tokens=replace(tokens, length=longest))
    return max(SHARD_BYTES // store_layout.row_bytes(), 1)


class RowsInMaking:
    """The rows of one shard while batches come back; tokens are rounded to their stored dtype as they come.

    Args:
        ids: the shard's ids, n of them.
    """

    def __init__(self, ids: Sequence[str], store_layout: Layout) -> None:
        self._ids, self._layout = ids, store_layout
        self.wants_tokens = store_layout.tokens is not None
        self._embeddings = np.zeros((len(ids), store_layout.dim), np.float32)
        self._unfit = np.zeros(len(ids), bool)  # rows with tokens that cannot be stored
        self._tokens: list[np.ndarray] = [np.zeros((0, 0))] * len(ids)
        self._token_scales: list[np.ndarray] = [np.zeros(0, np.float32)] * len(ids)

    def put(self, encoded: Encoded, rows: Sequence[Iterable[int]]) -> None:
        """Takes one batch.

        Args:
            rows: the rows that each of its samples belongs to.
        """
        for k, of_sample in enumerate(rows):
            targets = list(of_sample)
            self._embeddings[targets] = encoded.embeddings[k]
            if self._layout.tokens is not None and encoded.tokens is not None:
                length = encoded.tokens.shape[1] if encoded.lengths is None else int(encoded.lengths[k])
                codes, scales = to_stored(encoded.tokens[k, :length], self._layout.dtype)
                fit = np.isfinite(from_stored(codes, self._layout.dtype, scales)).all()
                for row in targets:
                    self._tokens[row], self._unfit[row] = codes, not fit
                    if scales is not None:
                        self._token_scales[row] = scales

    def finish(self, outcomes: Sequence[bytes | InputError]) -> ShardRows:
        """The rows that are fit to keep; every other id becomes a failure.

        Args:
            outcomes: of each row its input's digest, or why it has none.
        """
        codes, scales = to_stored(self._embeddings, self._layout.dtype)
        faults = self._faults(codes, scales)
        kept, digests, failures = [], [], []
        for k, (sample_id, outcome) in enumerate(zip(self._ids, outcomes, strict=True)):
            if isinstance(outcome, InputError):
                failures.append(Failure(sample_id, outcome.reason, str(outcome)))
            elif k in faults:
                failures.append(Failure(sample_id, *faults[k]))
            else:
                kept.append(k)
                digests.append(outcome)
        tokens, offsets, token_scales = self._kept_tokens(kept)
        return ShardRows(
            ids=[self._ids[k] for k in kept],
            views=np.zeros(len(kept), np.uint16),
            codes=codes[kept],
            input_digests=np.frombuffer(b"".join(digests), np.uint8),
            failures=failures,
            scales=None if scales is None else scales[kept],
            tokens=tokens,
            token_offsets=offsets,
            token_scales=token_scales,
        )

    def _faults(self, codes: np.ndarray, scales: np.ndarray | None) -> dict[int, tuple[str, str]]:
        """Reason and message of each row that cannot be kept."""
        dtype, values = self._layout.dtype, self._embeddings
        stored = from_stored(codes, dtype, scales)
        checks = (
            (~np.isfinite(values).all(axis=1), "not-finite", "the encoder gave NaN or infinity"),
            (~np.isfinite(stored).all(axis=1), "overflow", f"the embedding overflows {dtype}"),
            (self._unfit, "tokens", f"a token is not finite as {dtype}"),
            (
                (values.min(axis=1) == values.max(axis=1)) & (self._layout.dim > 1),
                "constant",
                "the encoder gave the same number throughout",
            ),
            ((stored == 0).all(axis=1), "zero", f"every number of the embedding is zero as {dtype}"),
        )
        faults: dict[int, tuple[str, str]] = {}
        for found, reason, message in checks:
            for k in np.flatnonzero(found):
                faults.setdefault(int(k), (reason, message))
        return faults

    def _kept_tokens(self, kept: Sequence[int]) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
        """Tokens, for texts their offsets, and for int8 their scales, of the kept rows."""
        if self._layout.tokens is None:
            return None, None, None
        dim, length = self._layout.tokens.dim, self._layout.tokens.length
        tokens = [self._tokens[k] for k in kept]
        lengths = [len(t) for t in tokens]
        empty = np.zeros((0, dim), STORED_DTYPES[self._layout.dtype])
        joined = np.concatenate([empty, *tokens])
        scales = None
        if self._layout.dtype == "int8":
            scales = np.concatenate([np.zeros(0, np.float32), *(self._token_scales[k] for k in kept)])
        if length is None:
            return joined, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), scales
        return joined.reshape(len(kept), length, dim), None, None if scales is None else scales.reshape(-1, length)
