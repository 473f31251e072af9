"""Ranks and best matches by cosine, part by part: the whole matrix of similarities is never there.

Shape notation: q queries, m candidates, p width, k matches kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_SIMILARITIES_AT_ONCE = 2**22  # 16 MB of float32: what is compared is still in a processor's cache
_NUMBERS_OF_OWN = 6  # float32s that each of a query's matches takes: two integers of 8 bytes, two scores


@dataclass(frozen=True, eq=False)
class Found:
    """What queries find among candidates.

    Args:
        ranks: of each query's first match, from 1; others with its very score stand before it half of the time, so that
            equal scores everywhere are no success, (q,) float64.
        top: the candidates of the highest scores, best first, (q, k) int64; k is 0 where none were asked for.
    """

    ranks: np.ndarray
    top: np.ndarray


@dataclass(frozen=True, eq=False)
class FoundPairs:
    """What n images and m distinct texts find of each other.

    Args:
        text_of: the number of each image's text, (n,).
        first: an image of each text, (m,).
        to_text: each image its text. to_image: each text the first of its images.
    """

    text_of: np.ndarray
    first: np.ndarray
    to_text: Found
    to_image: Found


def find_pairs(image: Tensor, text: Tensor, texts: np.ndarray, *, k: int = 0) -> FoundPairs:
    """Images against distinct texts, and back, by cosine.

    Args:
        image, text: unit vectors of n pairs, (n, p).
        texts: equal where two pairs have the same text, (n,).
        k: as of `find`.
    """
    _, first, text_of = np.unique(texts, return_index=True, return_inverse=True)
    distinct, own, numbers = text[_on(first, text)], _on(text_of, text), _on(np.arange(len(first)), text)
    to_text, to_image = find(image, distinct, numbers, own, k=k), find(distinct, image, own, numbers, k=k)
    return FoundPairs(text_of, first, to_text, to_image)


def find_scored_pairs(scores: Tensor, texts: np.ndarray, *, k: int = 0) -> FoundPairs:
    """As `find_pairs`, from the score of each image with each distinct text, in their sorted order, (n, m)."""
    _, first, text_of = np.unique(texts, return_index=True, return_inverse=True)
    own, numbers, everything = _on(text_of, scores), _on(np.arange(len(first)), scores), slice(0, None)
    to_text = find_in([(everything, scores)], numbers, own, k=k)
    return FoundPairs(text_of, first, to_text, find_in([(everything, scores.T)], own, numbers, k=k))


@torch.inference_mode()
def find(queries: Tensor, candidates: Tensor, owner: Tensor, query_codes: Tensor, *, k: int = 0) -> Found:
    """Looks for the first match of each query.

    Args:
        queries: unit vectors, (q, p).
        candidates: unit vectors, (m, p).
        owner: a code for each candidate, (m,) int64.
        query_codes: of each query; its matches are the candidates of the same code, of which there is one at least,
            (q,) int64.
        k: how many of the best candidates are wanted.
    """
    most_own = int(torch.bincount(owner).max()) if len(owner) else 0
    return find_in(_similarities(queries, candidates, most_own), owner, query_codes, k=k)


@torch.inference_mode()
def find_in(parts: Iterable[tuple[slice, Tensor]], owner: Tensor, query_codes: Tensor, *, k: int = 0) -> Found:
    """As `find`, from scores that are there.

    Args:
        parts: rows of queries and their scores against all candidates, (b, m), in order.
    """
    order = torch.argsort(owner, stable=True)
    sorted_owner, k = owner[order], min(k, len(owner))
    ranks, top = [], []
    for rows, scores in parts:
        codes = query_codes[rows]
        first = torch.searchsorted(sorted_owner, codes)
        last = torch.searchsorted(sorted_owner, codes, right=True)
        best, n_best = _best_own(scores, order, first, last)
        better = (scores > best[:, None]).sum(dim=1)
        ties = (scores == best[:, None]).sum(dim=1) - n_best
        ranks.append(1 + better.double() + ties.double() / 2)
        if k:
            top.append(scores.topk(k, dim=1).indices)
    none = torch.empty(0, k, dtype=torch.int64)
    return Found(
        torch.cat(ranks).cpu().numpy() if ranks else np.empty(0),
        (torch.cat(top) if top else none).cpu().numpy(),
    )


def _on(numbers: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(numbers).to(like.device)


def _similarities(queries: Tensor, candidates: Tensor, most_own: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows of queries with their scores against all candidates, written over the ones before.

    Args:
        most_own: matches of a query, whose places and scores need room too.
    """
    size = max(_SIMILARITIES_AT_ONCE // max(len(candidates) + _NUMBERS_OF_OWN * most_own, 1), 1)
    room = torch.empty(min(size, len(queries)), len(candidates), device=queries.device)
    columns = candidates.float().T
    for start in range(0, len(queries), size):
        rows = queries[start : start + size].float()
        yield slice(start, start + len(rows)), torch.mm(rows, columns, out=room[: len(rows)])


def _best_own(scores: Tensor, order: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """The highest score among each query's matches, and how many of them have it, (b,) both."""
    longest = int((last - first).max())
    places = first[:, None] + torch.arange(longest, device=scores.device)
    there = places < last[:, None]
    own = scores.gather(1, order[places.clamp_max(len(order) - 1)]).masked_fill(~there, -torch.inf)
    best = own.amax(dim=1)
    return best, (own == best[:, None]).sum(dim=1)
