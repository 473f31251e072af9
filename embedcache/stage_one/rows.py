"""From what an encoder gives to the rows of a shard: what is fit to keep, and why the rest is not.

Shape notation: n rows of a shard, one for each view of each id; d embedding width, l tokens in a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace

import numpy as np

from embedcache.data.views import ViewPolicy
from embedcache.encoders.base import Encoded, Encoder
from embedcache.errors import InputError, SettingsError
from embedcache.store.layout import SHARD_BYTES, STORED_DTYPES, Layout, TokenLayout
from embedcache.store.shard import Failure, ShardRows
from embedcache.store.values import from_stored, to_stored


def layout_for(
    encoder: Encoder, *, store_dtype: str, tokens: bool, views: int = 1, view_policy: ViewPolicy | None = None
) -> Layout:
    """How the encoder's output is stored: tokens of images in equal numbers, those of texts in as many as there are.

    Raises:
        SettingsError: tokens were asked of an encoder that has none.
    """
    of_tokens = None
    if tokens:
        if encoder.token_dim is None:
            raise SettingsError(f"{encoder.record.name}: tokens were asked for, but the encoder has none")
        grid = encoder.token_grid
        of_tokens = TokenLayout(encoder.token_dim, None if grid is None else grid[0] * grid[1])
    return Layout(
        store_dtype,
        encoder.dim,
        views=views,
        tokens=of_tokens,
        view_policy=asdict(view_policy or ViewPolicy()) if views > 1 else None,
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
        ids: the shard's ids; id k has rows `k * views` to `(k + 1) * views`.
    """

    def __init__(self, ids: Sequence[str], store_layout: Layout) -> None:
        self._ids, self._layout = ids, store_layout
        self.wants_tokens = store_layout.tokens is not None
        n = len(ids) * store_layout.views
        self._embeddings = np.zeros((n, store_layout.dim), np.float32)
        self._unfit = np.zeros(n, bool)  # rows with tokens that cannot be stored
        empty = np.zeros((0, 0 if store_layout.tokens is None else store_layout.tokens.dim), self._stored_dtype)
        self._tokens: np.ndarray | list[np.ndarray] = [empty] * n  # one array where every row has as many
        self._token_scales: list[np.ndarray] = [np.zeros(0, np.float32)] * n
        if store_layout.tokens is not None and store_layout.tokens.length is not None:
            self._tokens = np.zeros((n, store_layout.tokens.length, store_layout.tokens.dim), self._stored_dtype)

    def put(self, encoded: Encoded, rows: Sequence[int]) -> None:
        """Takes one batch; several threads may put batches of other rows at the same time.

        Args:
            rows: the row of each of its samples; what is encoded beyond them only filled the batch up.
        """
        self._embeddings[rows] = encoded.embeddings[: len(rows)]
        if self._layout.tokens is None or encoded.tokens is None:
            return
        for k, row in enumerate(rows):
            length = encoded.tokens.shape[1] if encoded.lengths is None else int(encoded.lengths[k])
            codes, scales = to_stored(encoded.tokens[k, :length], self._layout.dtype)
            self._tokens[row] = codes
            self._unfit[row] = not np.isfinite(from_stored(codes, self._layout.dtype, scales)).all()
            if scales is not None:
                self._token_scales[row] = scales

    def copy(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Gives rows whose input is another's what that row has: (row, the other), once all batches are in."""
        for row, other in pairs:
            self._embeddings[row], self._unfit[row] = self._embeddings[other], self._unfit[other]
            self._tokens[row], self._token_scales[row] = self._tokens[other], self._token_scales[other]

    def finish(self, outcomes: Sequence[bytes | InputError]) -> ShardRows:
        """The rows that are fit to keep. An id has all its views or none: then it becomes a failure.

        Args:
            outcomes: of each id its input's digest, or why it has none.
        """
        codes, scales = to_stored(self._embeddings, self._layout.dtype)
        stored, dtype = from_stored(codes, self._layout.dtype, scales), self._layout.dtype
        faults, views = unusable(self._embeddings, stored, self._unfit, dtype), self._layout.views
        kept_ids, digests, failures = [], [], []
        for k, (sample_id, outcome) in enumerate(zip(self._ids, outcomes, strict=True)):
            fault = next((faults[row] for row in range(k * views, (k + 1) * views) if row in faults), None)
            if isinstance(outcome, InputError):
                failures.append(Failure(sample_id, outcome.reason, str(outcome)))
            elif fault is not None:
                failures.append(Failure(sample_id, *fault))
            else:
                kept_ids.append(k)
                digests += [outcome] * views
        kept = [k * views + view for k in kept_ids for view in range(views)]
        tokens, offsets, token_scales = self._kept_tokens(kept)
        return ShardRows(
            ids=[self._ids[k] for k in kept_ids for _ in range(views)],
            views=np.tile(np.arange(views, dtype=np.uint16), len(kept_ids)),
            codes=_rows(codes, kept),
            input_digests=np.frombuffer(b"".join(digests), np.uint8),
            failures=failures,
            scales=None if scales is None else scales[kept],
            tokens=tokens,
            token_offsets=offsets,
            token_scales=token_scales,
        )

    @property
    def _stored_dtype(self) -> np.dtype:
        return np.dtype(STORED_DTYPES[self._layout.dtype])

    def _kept_tokens(self, kept: Sequence[int]) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
        """Tokens, for texts their offsets, and for int8 their scales, of the kept rows."""
        if self._layout.tokens is None:
            return None, None, None
        scales = None
        if self._layout.dtype == "int8":
            scales = np.concatenate([np.zeros(0, np.float32), *(self._token_scales[k] for k in kept)])
        if isinstance(self._tokens, np.ndarray):
            return (
                _rows(self._tokens, kept),
                None,
                None if scales is None else scales.reshape(len(kept), self._tokens.shape[1]),
            )
        tokens = [self._tokens[k] for k in kept]
        offsets = np.concatenate([[0], np.cumsum([len(t) for t in tokens])]).astype(np.int64)
        empty = np.zeros((0, self._layout.tokens.dim), self._stored_dtype)
        return np.concatenate([empty, *tokens]), offsets, scales


def unusable(values: np.ndarray, stored: np.ndarray, bad_tokens: np.ndarray, dtype: str) -> dict[int, tuple[str, str]]:
    """Reason and message of each row of which nothing can be learnt or told.

    Args:
        values: embeddings as the encoder gave them, (n, d).
        stored: the same as a store of this dtype gives them back.
        bad_tokens: which rows have a token that is not finite, (n,) bool.
    """
    checks = (
        (~np.isfinite(values).all(axis=1), "not-finite", "the encoder gave NaN or infinity"),
        (~np.isfinite(stored).all(axis=1), "overflow", f"the embedding overflows {dtype}"),
        (bad_tokens, "tokens", f"a token is not finite as {dtype}"),
        (
            (values.min(axis=1) == values.max(axis=1)) & (values.shape[1] > 1),
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


def _rows(array: np.ndarray, kept: Sequence[int]) -> np.ndarray:
    """Some rows of an array, in order; the array itself where they are all."""
    return array if len(kept) == len(array) else array[kept]
