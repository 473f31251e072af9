"""From stored tokens to the feature maps that a decoder takes: resident on the device, or streamed with a prefetch.

Shape notation: n samples, v views, m rows of the store, b samples of a batch, l tokens, d their width, p width of an
Adaptor's output, c channels (d, or p behind an Adaptor), g x g' the token grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from embedcache.device import moved
from embedcache.errors import SettingsError
from embedcache.stage_two.adaptor import Adaptor
from embedcache.stage_two.feed import ahead, room_for
from embedcache.stage_two.tensors import read_tokens, width
from embedcache.store.store import Store

_CHUNK = 4096  # tokens that go through an Adaptor at once where all are made ready before


class TokenFeed:
    """Feature maps of samples.

    The Adaptor is frozen too: where all maps fit on the device its outputs are computed once, in the precision in which
    the store has tokens; else batch by batch.

    Args:
        rows: of the store, for each sample and view, (n, v).
        adaptor: applied to the tokens of each sample by itself; None for the tokens as they are.
        data: `resident`, `streamed`, or `auto`: resident if they fit.

    Raises:
        SettingsError: a store without tokens, or with tokens that make no grid.
    """

    def __init__(
        self,
        store: Store,
        rows: np.ndarray,
        adaptor: Adaptor | None,
        device: str,
        *,
        data: Literal["auto", "resident", "streamed"] = "auto",
    ) -> None:
        self._store, self.device, self.grid = store, device, token_grid(store)
        self._adaptor = None if adaptor is None else adaptor.to(device).eval()
        self.dim = width(store, "tokens") if adaptor is None else int(adaptor.config["projection_dim"])
        self._rows, place = np.unique(rows, return_inverse=True)
        self._place = place.reshape(rows.shape)
        self._stored = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(store.layout.dtype, torch.float32)
        n_bytes = len(self._rows) * self.grid[0] * self.grid[1] * self.dim * self._stored.itemsize
        is_resident = data == "resident" or (data == "auto" and n_bytes <= room_for(device))
        self._maps = self._all() if is_resident else None

    @property
    def is_resident(self) -> bool:
        """Whether all maps lie on the device."""
        return self._maps is not None

    def batches(self, chosen: Iterable[tuple[np.ndarray, np.ndarray | int]]) -> Iterator[Tensor]:
        """The maps of samples (b,) in the views (b,), batch after batch, (b, c, g, g') float32 on the device."""
        places = (self._place[samples, views] for samples, views in chosen)
        if self._maps is not None:
            for place in places:
                yield self._shaped(self._maps.index_select(0, torch.from_numpy(place).to(self.device)))
            return
        for tokens in ahead(read_tokens(self._store, self._rows[place]) for place in places):
            yield self._shaped(self._adapted(moved(tokens, self.device)).to(self._stored))  # rounded as resident ones

    @torch.no_grad()
    def _adapted(self, tokens: Tensor) -> Tensor:
        """(b, l, d) to (b, l, c)."""
        return tokens if self._adaptor is None else self._adaptor.encode_image(tokens.float())

    def _shaped(self, tokens: Tensor) -> Tensor:
        return tokens.float().transpose(1, 2).unflatten(2, self.grid)

    def _all(self) -> Tensor:
        n_tokens = self.grid[0] * self.grid[1]
        maps = torch.empty(len(self._rows), n_tokens, self.dim, dtype=self._stored, device=self.device)
        size = max(_CHUNK // n_tokens, 1)
        starts = range(0, len(self._rows), size)
        parts = ahead(read_tokens(self._store, self._rows[start : start + size]) for start in starts)
        for start, tokens in zip(starts, parts, strict=True):
            maps[start : start + len(tokens)] = self._adapted(moved(tokens, self.device))
        return maps


def token_grid(store: Store) -> tuple[int, int]:
    """Rows and columns of the tokens of an image.

    Raises:
        SettingsError: no tokens, or tokens of which none is said to lie where.
    """
    width(store, "tokens")
    said, length = store.encoder.get("identity", {}).get("token_grid"), store.layout.tokens.length  # type: ignore[union-attr]  # width has seen them
    if said is not None:
        return int(said[0]), int(said[1])
    side = round((length or 0) ** 0.5)
    if length is None or side * side != length:
        raise SettingsError(
            f"{store.path}: {length or 'a varying number of'} tokens of an image make no grid; use a store whose "
            "encoder has a token grid, or a square number of tokens"
        )
    return side, side
