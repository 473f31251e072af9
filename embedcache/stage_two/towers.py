"""What stands between cached embeddings and the shared space: the paper's attention, and its simpler rivals.

All have one interface: image and text, either or both, to vectors of the shared space that are not yet of unit length.

Shape notation: b samples, l tokens, d embedding width, p projection width, h heads, f feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedcache.stage_two.dropout import dropped
from embedcache.stage_two.inputs import unit


class AttentionBlock(nn.Module):
    """Attention, residual, LayerNorm, feed-forward, residual, LayerNorm.

    With one key the attention weight is exactly 1 whatever the query, so a single token needs neither queries
    nor keys; dropout of attention weights becomes dropout of whole heads.
    """

    def __init__(self, dim: int, *, n_heads: int, ff_dim: int, dropout: float) -> None:
        super().__init__()
        self.dim, self.n_heads, self.dropout = dim, n_heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))  # queries, keys, values
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        self.linear1 = nn.Linear(dim, ff_dim)
        self.linear2 = nn.Linear(ff_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, query: Tensor | None = None) -> Tensor:
        """One token per sample, (b, p), or attention over the tokens of each sample, (b, l, p).

        Args:
            mask: which tokens are there, (b, l) bool; None for all.
            query: what asks instead of each token itself, (b, 1, p); its answer is added to every token.
        """
        attended = self._attend_single(x) if x.ndim == 2 else self._attend(x, x if query is None else query, mask)
        x = self.norm1(x + self._drop(self.out_proj(attended)))
        hidden = self._drop(F.relu(self.linear1(x)))  # (..., f)
        return self.norm2(x + self._drop(self.linear2(hidden)))

    def _drop(self, x: Tensor) -> Tensor:
        return dropped(x, self.dropout) if self.training else x

    def _attend_single(self, x: Tensor) -> Tensor:
        values = F.linear(x, self.in_proj_weight[2 * self.dim :], self.in_proj_bias[2 * self.dim :])
        if not (self.training and self.dropout):
            return values
        heads = F.dropout(values.new_ones(len(x), self.n_heads, 1), self.dropout)
        return (values.view(len(x), self.n_heads, self.dim // self.n_heads) * heads).flatten(1)

    def _attend(self, x: Tensor, query: Tensor, mask: Tensor | None) -> Tensor:
        def by_head(asked: Tensor, part: slice) -> Tensor:
            projected = F.linear(asked, self.in_proj_weight[part], self.in_proj_bias[part])
            return projected.view(*asked.shape[:2], -1, self.n_heads, self.dim // self.n_heads).movedim(-2, 1)

        if query is x:
            q, k, v = by_head(x, slice(None)).unbind(-2)  # each (b, h, l, p / h)
        else:
            q = by_head(query, slice(self.dim)).squeeze(-2)
            k, v = by_head(x, slice(self.dim, None)).unbind(-2)
        attended = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if mask is None else mask[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return attended.transpose(1, 2).flatten(2)


class AttentionTowers(nn.Module):
    """Two bias-free projections, L2 norm, and blocks shared by both modalities.

    Source: *Freeze the backbones*, arXiv 2401.01179.
    """

    def __init__(
        self,
        image_dim: int,
        text_dim: int,
        *,
        projection_dim: int,
        n_layers: int,
        n_heads: int,
        ff_dim: int,
        dropout: float,
        attention: str,
    ) -> None:
        super().__init__()
        if projection_dim % n_heads:
            raise ValueError(f"projection_dim ({projection_dim}) must be divisible by n_heads ({n_heads})")
        self.cross_modal = attention == "cross-modal"
        self.image_projection = nn.Linear(image_dim, projection_dim, bias=False)
        self.text_projection = nn.Linear(text_dim, projection_dim, bias=False)
        self.blocks = nn.ModuleList(
            AttentionBlock(projection_dim, n_heads=n_heads, ff_dim=ff_dim, dropout=dropout) for _ in range(n_layers)
        )

    def image(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(b, d) or (b, l, d) to (b, p) or (b, l, p)."""
        return self._refined(unit(self.image_projection(x)), mask)

    def text(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(b, d) or (b, l, d) to (b, p) or (b, l, p)."""
        return self._refined(unit(self.text_projection(x)), mask)

    def both(
        self, image: Tensor, text: Tensor, image_mask: Tensor | None, text_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Both modalities of b pairs; under cross-modal attention each asks the other's tokens."""
        x, y = unit(self.image_projection(image)), unit(self.text_projection(text))
        if x.ndim == y.ndim == 2:  # the blocks are shared and no information crosses: one batch of both
            return self._refined(torch.cat([x, y]), None).chunk(2)  # type: ignore[return-value]  # two of them
        if not self.cross_modal:
            return self._refined(x, image_mask), self._refined(y, text_mask)
        for block in self.blocks:
            x = block(x, mask=image_mask, query=mean_token(y, text_mask).unsqueeze(1))
            y = block(y, mask=text_mask, query=mean_token(x, image_mask).unsqueeze(1))
        return x, y

    def _refined(self, x: Tensor, mask: Tensor | None) -> Tensor:
        for block in self.blocks:
            x = block(x, mask=mask)
        return x


class SeparateTowers(nn.Module):
    """A tower for each modality, and nothing shared: `mlp`, `linear`, `identity`.

    `mlp`: residual inverted bottlenecks at the encoder's width, `x + W2 gelu(W1 LayerNorm(x))`, then a linear map;
    source: FuseMix (Vouitsis et al. 2023). `linear`: the map alone. `identity`: the embeddings themselves.
    """

    def __init__(self, image: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.image_tower, self.text_tower = image, text

    def image(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(b, d) or (b, l, d) to (b, p) or (b, l, p), token by token."""
        return self.image_tower(x)

    def text(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(b, d) or (b, l, d) to (b, p) or (b, l, p), token by token."""
        return self.text_tower(x)

    def both(
        self, image: Tensor, text: Tensor, image_mask: Tensor | None, text_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Both modalities of b pairs."""
        return self.image_tower(image), self.text_tower(text)


class Bottleneck(nn.Module):
    """A residual block that widens: LayerNorm, (..., d) to (..., f), GELU, and back."""

    def __init__(self, dim: int, *, ff_dim: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.widen, self.narrow = nn.LayerNorm(dim), nn.Linear(dim, ff_dim), nn.Linear(ff_dim, dim)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) to (..., d)."""
        change = self.narrow(F.gelu(self.widen(self.norm(x))))
        return x + (dropped(change, self.dropout) if self.training else change)


def mlp_tower(dim: int, *, projection_dim: int, n_layers: int, ff_dim: int, dropout: float) -> nn.Module:
    """The tower of `mlp` for embeddings of width d."""
    blocks = [Bottleneck(dim, ff_dim=ff_dim, dropout=dropout) for _ in range(n_layers)]
    return nn.Sequential(*blocks, nn.LayerNorm(dim), nn.Linear(dim, projection_dim, bias=False))


def separate_towers(image_dim: int, text_dim: int, tower: Callable[[int], nn.Module]) -> SeparateTowers:
    """A tower of each width."""
    return SeparateTowers(tower(image_dim), tower(text_dim))


def mean_token(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over the tokens that are there, (b, l, p) to (b, p); (b, p) as it is.

    Args:
        mask: (b, l) bool, None for all.
    """
    if x.ndim == 2:
        return x
    if mask is None:
        return x.mean(dim=1)
    weight = mask.to(x.dtype)
    return (x * weight.unsqueeze(-1)).sum(dim=1) / weight.sum(dim=1, keepdim=True)
