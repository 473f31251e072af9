"""From stores to batches on the device: rows that are resident there, or streamed as they are needed.

Shape notation: k models, b pairs of a batch, n pairs, m rows, d width, l tokens, p pairs of a batch over all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from embedcache.device import moved, use_one_core
from embedcache.resources import available_bytes
from embedcache.stage_two.batches import Plan
from embedcache.stage_two.distributed import Share, processes_here
from embedcache.stage_two.pairs import Pairs, Side
from embedcache.stage_two.tensors import check_fit, fit_rows, read_rows, read_tokens, width
from embedcache.store.columns import RaggedTokens

_MEMORY_SHARE = 0.6  # of what is free, that resident rows may take
_PIECE = 16_384  # rows that are read at once
_CHUNK = 4096  # vectors, of samples or of tokens, that are embedded at once where nothing is learnt
_TOKENS_STEP = 32  # lengths of texts are rounded up, so that batches have few shapes
T = TypeVar("T")


class Batch(NamedTuple):
    """What k models see in a step.

    image, text: (k, b, d) or (k, b, l, d), float32. image_mask, text_mask: which tokens are there, (k, b, l) bool;
    None where all are. codes: equal for positives of each other, (k, b). all_codes: of the whole batch, (k, p), of
    which this process has a part.
    """

    image: Tensor
    text: Tensor
    image_mask: Tensor | None
    text_mask: Tensor | None
    codes: Tensor
    all_codes: Tensor

    def each(self, change: Callable[[Tensor], Any]) -> Batch:
        """The same with every tensor changed; what is None stays."""
        return Batch(*(None if part is None else change(part) for part in self))  # type: ignore[arg-type]


class Rows(NamedTuple):
    """Some rows of a store: values (..., d) or (..., l, d) float32, and which tokens are there, (..., l)."""

    values: Tensor
    mask: Tensor | None


class Resident:
    """Rows of one side on the device in the precision in which they are stored."""

    def __init__(self, side: Side, device: str) -> None:
        self._values, self._host_lengths = _read_all(side, device)
        if self._host_lengths is not None:
            starts = np.cumsum(self._host_lengths) - self._host_lengths
            self._lengths, self._starts = (torch.from_numpy(x).to(device) for x in (self._host_lengths, starts))

    def take(self, local: np.ndarray, at: Tensor) -> Rows:
        """Rows by their place among the side's rows.

        Args:
            local: (...) on the host.
            at: the same on the device.
        """
        if self._host_lengths is None:
            values = self._values.index_select(0, at.reshape(-1)).float()
            return Rows(values.view(*at.shape, *self._values.shape[1:]), None)
        flat = at.reshape(-1)
        length = _rounded_up(int(self._host_lengths[local].max(initial=1)))
        values, mask = _padded(self._values, self._starts[flat], self._lengths[flat], length)
        return Rows(values.float().view(*at.shape, length, values.shape[-1]), mask.view(*at.shape, length))


class Streamed:
    """Rows of one side, read from their store when they are asked for."""

    def __init__(self, side: Side) -> None:
        self._side = side

    def read(self, local: np.ndarray) -> Rows:
        """Rows by their place among the side's rows, on the host in the precision in which they are stored.

        Args:
            local: (m,), each once and ascending.
        """
        values, lengths = _read(self._side, local)
        if lengths is None:
            return Rows(values, None)
        starts = torch.from_numpy(np.cumsum(lengths) - lengths)
        length = _rounded_up(int(lengths.max(initial=1)))
        return Rows(*_padded(values, starts, torch.from_numpy(lengths), length))


class Feed:
    """Batches of the pairs of one split.

    Args:
        resident: whether all rows lie on the device.
        share: which part of each batch this process has.
    """

    def __init__(self, pairs: Pairs, device: str, *, resident: bool, share: Share | None = None) -> None:
        self.pairs, self.device, self.resident = pairs, device, resident
        self._share = share or Share()
        self._codes = torch.from_numpy(pairs.codes).to(device)
        self._n_codes = int(pairs.codes.max(initial=0)) + 1
        self._sides: tuple[Resident, Resident] | tuple[Streamed, Streamed] = (
            (Resident(pairs.image, device), Resident(pairs.text, device))
            if resident
            else (Streamed(pairs.image), Streamed(pairs.text))
        )

    def epoch(self, plans: Sequence[Plan], *, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch of k models, from number `first` on.

        Args:
            plans: one for each model; their batches have the same sizes.
        """
        assert all(np.array_equal(plan.starts, plans[0].starts) for plan in plans)
        if self.resident:
            yield from self._from_resident(plans, first)
        else:
            yield from ahead(self._from_stream(plans, first))

    def chunks(self) -> Iterator[tuple[Rows, Rows]]:
        """Images and texts of all pairs in order, each sample as it is, on the device, some at a time."""
        size = max(_CHUNK // max(_length(side) for side in (self.pairs.image, self.pairs.text)), 1)
        for start in range(0, len(self.pairs), size):
            at = slice(start, start + size)
            yield self._at(0, self.pairs.image.index[at, 0]), self._at(1, self.pairs.text.index[at, 0])

    def _at(self, k: int, local: np.ndarray) -> Rows:
        side = self._sides[k]
        if isinstance(side, Resident):
            return side.take(local, torch.from_numpy(local).to(self.device))
        unique, inverse = np.unique(local, return_inverse=True)
        return self._placed(side.read(unique), inverse)

    def _from_resident(self, plans: Sequence[Plan], first: int) -> Iterator[Batch]:
        host = places(self.pairs, plans)
        device = [torch.from_numpy(of_side).to(self.device) for of_side in host]
        epoch = self._epoch(plans)

        def take(k: int, which: int, part: slice) -> Rows:
            side = self._sides[k]
            assert isinstance(side, Resident)  # both sides are of one kind
            return side.take(host[k][which][:, part], device[k][which][:, part])

        for s in range(first, plans[0].n_batches):
            yield self._batch(epoch, plans[0], s, take)

    def _from_stream(self, plans: Sequence[Plan], first: int) -> Iterator[Batch]:
        """Batches whose rows are read window by window; a window and a batch are made ahead, each in a thread."""
        plan, epoch = plans[0], self._epoch(plans)
        for a, b, sides in ahead(self._windows(plans, first)):

            def take(k: int, which: int, part: slice, sides: Any = sides, a: int = a) -> Rows:
                rows, at = sides[k]
                begin = int(plan.starts[a])
                return self._placed(rows, at[which][:, part.start - begin : part.stop - begin])

            for s in range(max(a, first), b):
                yield self._batch(epoch, plan, s, take)

    def _windows(self, plans: Sequence[Plan], first: int) -> Iterator[tuple[int, int, list[tuple[Rows, np.ndarray]]]]:
        """From batch number `first` on: the first and last + 1 batch of a window, and its rows with their places."""
        plan, host = plans[0], places(self.pairs, plans)
        for a, b in pairwise(plan.windows.tolist()):
            if b <= first:
                continue
            sides = []
            for side, of_side in zip(self._sides, host, strict=True):
                assert isinstance(side, Streamed)  # both sides are of one kind
                within = of_side[:, :, plan.starts[a] : plan.starts[b]]
                unique, inverse = np.unique(within, return_inverse=True)
                sides.append((side.read(unique), inverse.reshape(within.shape)))
            yield a, b, sides

    def _batch(self, epoch: _Epoch, plan: Plan, s: int, take: Callable[[int, int, slice], Rows]) -> Batch:
        """This process's part of batch number s.

        Args:
            take: gives a side's rows of the pairs (0), or of their partners (1), of a slice of the epoch.
        """
        start, stop = int(plan.starts[s]), int(plan.starts[s + 1])
        low, high = self._share.bounds(stop - start)
        part = slice(start + low, start + high)
        image, text = take(0, 0, part), take(1, 0, part)
        if plan.partners is not None:
            image, text = (_mixed(own, take(k, 1, part), epoch.shares[:, s]) for k, own in enumerate((image, text)))
        return Batch(image.values, text.values, image.mask, text.mask, epoch.codes[:, part], epoch.codes[:, start:stop])

    def _placed(self, rows: Rows, places: np.ndarray) -> Rows:
        """Rows that were read, in their order on the device."""
        at = torch.from_numpy(places.reshape(-1))
        values = moved(rows.values.index_select(0, at), self.device).float()
        mask = None if rows.mask is None else moved(rows.mask.index_select(0, at), self.device)
        return Rows(
            values.view(*places.shape, *rows.values.shape[1:]),
            None if mask is None else mask.view(*places.shape, mask.shape[-1]),
        )

    def _epoch(self, plans: Sequence[Plan]) -> _Epoch:
        """What of an epoch is on the device from its start."""
        codes = self._codes[_stacked([plan.pairs for plan in plans], self.device)]
        partners = [plan.partners for plan in plans if plan.partners is not None]
        if partners:  # a mixture is equal to a mixture of equals alone
            codes = codes * self._n_codes + codes.gather(1, _stacked(partners, self.device))
        return _Epoch(codes, _stacked([plan.shares for plan in plans], self.device))


class _Epoch(NamedTuple):
    """codes: of each pair, (k, m). shares: how much of each batch's mixtures is the pair's own, (k, s)."""

    codes: Tensor
    shares: Tensor


def places(pairs: Pairs, plans: Sequence[Plan]) -> tuple[np.ndarray, np.ndarray]:
    """For an epoch of k models where each pair's rows, and its partner's, are among those of the image and text side.

    Returns:
        (1, k, m) each; (2, k, m) where pairs are mixed with partners.
    """
    found = []
    for side, views in ((pairs.image, "image_views"), (pairs.text, "text_views")):
        own = [side.index[plan.pairs, getattr(plan, views)] for plan in plans]
        partners = [of[plan.partners] for of, plan in zip(own, plans, strict=True) if plan.partners is not None]
        found.append(np.stack([np.stack(which) for which in (own, partners) if which]))
    return found[0], found[1]


def fits(parts: Sequence[Pairs], device: str) -> bool:
    """Whether all rows that some splits use may lie on the device."""
    needed = sum(
        len(side.rows) * _row_bytes(side) for pairs in parts for side in (pairs.image, pairs.text) if len(side.rows)
    )
    return needed <= room_for(device)


def room_for(device: str) -> float:
    """Bytes that resident rows may take there, beside those of other processes on a CPU."""
    if device != "cpu":
        return _MEMORY_SHARE * float(torch.cuda.mem_get_info(device)[0])
    return _MEMORY_SHARE * available_bytes() / processes_here()


def ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The same items, the next of them made in a thread, on one core, while one is used."""
    with ThreadPoolExecutor(1, initializer=use_one_core) as thread:
        pending = thread.submit(next, items, None)
        while (item := pending.result()) is not None:
            pending = thread.submit(next, items, None)
            yield item


def _stacked(arrays: Sequence[np.ndarray], device: str) -> Tensor:
    return torch.from_numpy(np.stack(arrays)).to(device)


def _row_bytes(side: Side) -> int:
    value_bytes = {"float16": 2, "bfloat16": 2}.get(side.store.layout.dtype, 4)
    return _length(side) * width(side.store, side.features) * value_bytes


def _length(side: Side) -> int:
    """Tokens of a sample, on average; 1 for embeddings."""
    if side.features == "embeddings":
        return 1
    tokens = side.store.tokens
    if isinstance(tokens, RaggedTokens):
        return max(round(tokens.lengths.mean()), 1) if len(tokens) else 1
    return tokens.shape[1]


def _read_all(side: Side, device: str) -> tuple[Tensor, np.ndarray | None]:
    """As `_read` of all rows, on the device; read in pieces, so that the host needs no more than one beside."""
    places = np.arange(len(side.rows))
    piece, lengths = _read(side, places[:_PIECE])
    if lengths is not None or len(places) <= _PIECE:
        values, lengths = _read(side, places) if len(places) > _PIECE else (piece, lengths)
        return values.to(device), lengths
    values = torch.empty(len(places), *piece.shape[1:], dtype=piece.dtype, device=device)
    for start in range(0, len(places), _PIECE):
        values[start : start + _PIECE] = _read(side, places[start : start + _PIECE])[0]
    return values, None


def _read(side: Side, local: np.ndarray) -> tuple[Tensor, np.ndarray | None]:
    """Rows of a side as they are stored: (m, d) or (m, l, d), or ragged tokens one after the other, (sum of l, d).

    Returns:
        With ragged tokens also the lengths, (m,) int64; else None.
    """
    rows = side.rows[local]
    if side.features == "embeddings":
        return read_rows(side.store, rows), None
    tokens = side.store.tokens
    if not isinstance(tokens, RaggedTokens):
        return read_tokens(side.store, rows), None
    parts = tokens[rows]
    lengths = np.array([len(part) for part in parts], np.int64)
    values = torch.from_numpy(np.concatenate(parts) if len(parts) else np.empty((0, tokens.dim), np.float32))
    n_fit = torch.cat([torch.zeros(1, dtype=torch.int64), fit_rows(values).cumsum(0)])
    ends = torch.from_numpy(np.cumsum(lengths))
    fit = n_fit[ends] - n_fit[ends - torch.from_numpy(lengths)] == torch.from_numpy(lengths).clamp_min(1)
    check_fit(side.store, rows, fit)
    return values.bfloat16() if side.store.layout.dtype == "bfloat16" else values, lengths


def _mixed(own: Rows, other: Rows, share: Tensor) -> Rows:
    """Latent mixup: each model's batch with its partners, in one share for both modalities. Source: FuseMix."""
    return Rows(torch.lerp(other.values, own.values, share[:, None, None]), None)


def _padded(values: Tensor, starts: Tensor, lengths: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Ragged tokens as (m, length, d), and which of them are there, (m, length); what is not repeats the last one.

    A token of zeros would have no direction, and its NaN would go through every mask.

    Args:
        values: tokens of all rows, one after the other, (sum of l, d).
        starts, lengths: where each row's begin, and how many it has, (m,).
    """
    number = torch.arange(length, device=values.device)
    at = starts[:, None] + torch.minimum(number, lengths[:, None] - 1)
    return values[at], number < lengths[:, None]


def _rounded_up(length: int) -> int:
    return -(-length // _TOKENS_STEP) * _TOKENS_STEP
