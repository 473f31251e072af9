"""The Adaptor of *Freeze the backbones* (2024): a light module on top of frozen, cached embeddings.

Shape notation: b samples, l tokens, d_image and d_text embedding widths, p projection width, h heads, f
feed-forward width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedcache.errors import RunNotFoundError

INITIAL_LOGIT_SCALE = 2.6592  # log(1 / 0.07), as in CLIP
_WEIGHTS, _CONFIG = "adaptor.safetensors", "adaptor.json"


class AdaptorOutput(NamedTuple):
    """What the Adaptor makes of b pairs.

    image_embeds: unit vectors, (b, p). text_embeds: unit vectors, (b, p). logits_per_text: scaled cosine
    similarities, rows are texts, (b, b).
    """

    image_embeds: Tensor
    text_embeds: Tensor
    logits_per_text: Tensor


@dataclass(frozen=True)
class AdaptorConfig:
    """Sizes of an Adaptor, as kept beside its weights."""

    image_dim: int
    text_dim: int
    projection_dim: int = 768
    n_layers: int = 2
    n_heads: int = 12
    ff_dim: int = 2048
    dropout: float = 0.1


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

    def forward(self, x: Tensor) -> Tensor:
        """One token per sample, (b, p), or self-attention over the tokens of each sample, (b, l, p)."""
        attended = self._attend_single(x) if x.ndim == 2 else self._attend(x)
        x = self.norm1(x + F.dropout(self.out_proj(attended), self.dropout, self.training))
        hidden = F.dropout(F.relu(self.linear1(x)), self.dropout, self.training)  # (..., f)
        return self.norm2(x + F.dropout(self.linear2(hidden), self.dropout, self.training))

    def _attend_single(self, x: Tensor) -> Tensor:
        values = F.linear(x, self.in_proj_weight[2 * self.dim :], self.in_proj_bias[2 * self.dim :])
        if not (self.training and self.dropout):
            return values
        heads = F.dropout(values.new_ones(len(x), self.n_heads, 1), self.dropout)
        return (values.view(len(x), self.n_heads, -1) * heads).flatten(1)

    def _attend(self, x: Tensor) -> Tensor:
        b, length, _ = x.shape
        query, key, value = (
            part.view(b, length, self.n_heads, -1).transpose(1, 2)  # (b, h, l, p / h)
            for part in F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        )
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout).transpose(1, 2).flatten(2)


class Adaptor(nn.Module):
    """Projects both modalities into one space and refines them with shared attention blocks.

    Source: *Freeze the backbones*, arXiv 2401.01179. Two bias-free projections, L2 norm, `n_layers` post-norm
    blocks shared by both modalities, L2 norm. On pooled embeddings each modality is a single token, no information
    crosses between them, and the blocks run without queries and keys.

    Args:
        image_dim: d_image, width of the image embeddings.
        text_dim: d_text, width of the text embeddings.
        projection_dim: p, width of the shared space.
        n_layers: attention blocks.
        n_heads: h, must divide `projection_dim`.
        ff_dim: f, width of the feed-forward layer.
        dropout: of attention weights, of the feed-forward layer and of both residual branches.
    """

    def __init__(
        self,
        image_dim: int,
        text_dim: int,
        *,
        projection_dim: int = 768,
        n_layers: int = 2,
        n_heads: int = 12,
        ff_dim: int = 2048,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if projection_dim % n_heads:
            raise ValueError(f"projection_dim ({projection_dim}) must be divisible by n_heads ({n_heads})")
        self.config = AdaptorConfig(image_dim, text_dim, projection_dim, n_layers, n_heads, ff_dim, dropout)
        self.image_projection = nn.Linear(image_dim, projection_dim, bias=False)
        self.text_projection = nn.Linear(text_dim, projection_dim, bias=False)
        self.blocks = nn.ModuleList(
            AttentionBlock(projection_dim, n_heads=n_heads, ff_dim=ff_dim, dropout=dropout) for _ in range(n_layers)
        )
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))
        self.notes: dict[str, Any] = {}  # kept beside the weights, such as both encoders' fingerprints

    def forward(self, image: Tensor, text: Tensor) -> AdaptorOutput:
        """Embeds b pairs and compares each text with each image.

        Args:
            image: pooled embeddings, (b, d_image).
            text: pooled embeddings, (b, d_text).

        Raises:
            ValueError: shapes that are no pooled pairs. Tokens of both modalities are refused: text queries would
                carry each pair's own report into its image, and the loss would have a shortcut.
        """
        if image.ndim != 2 or text.ndim != 2 or len(image) != len(text):
            raise ValueError(
                f"image {tuple(image.shape)} and text {tuple(text.shape)}, expected (b, {self.config.image_dim}) and "
                f"(b, {self.config.text_dim}); tokens go through encode_image or encode_text, one modality at a time"
            )
        # the blocks are shared and no information crosses: both modalities go through as one batch
        both = torch.cat([_unit(self.image_projection(image)), _unit(self.text_projection(text))])
        image_embeds, text_embeds = self._refine(both).chunk(2)
        logits_per_text = self.logit_scale.exp() * text_embeds @ image_embeds.T
        return AdaptorOutput(image_embeds, text_embeds, logits_per_text)

    def encode_image(self, image: Tensor) -> Tensor:
        """Image embeddings (b, d_image) or tokens (b, l, d_image) to unit vectors (..., p)."""
        return self._refine(_unit(self.image_projection(image)))

    def encode_text(self, text: Tensor) -> Tensor:
        """Text embeddings (b, d_text) or tokens (b, l, d_text) to unit vectors (..., p)."""
        return self._refine(_unit(self.text_projection(text)))

    def _refine(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return _unit(x)

    @classmethod
    def from_reference(cls, state_dict: Mapping[str, Tensor], *, n_heads: int = 12) -> Adaptor:
        """Takes over a checkpoint of the paper's own code.

        Args:
            state_dict: its names, `projection.*`, `adaptor_module.*`, `logit_scale`; others are ignored.
            n_heads: not part of a state dict.

        Raises:
            KeyError: the state dict lacks a weight; the message names it.
        """
        ours = {}
        prefix = "adaptor_module.encoder."
        names = sorted({key.removeprefix(prefix).split(".")[0] for key in state_dict if key.startswith(prefix)})
        numbered = all(name.isdigit() for name in names)  # the paper's code has no number where there is one block
        n_layers = len(names) if numbered else 1
        renamed = {
            "image_projection.weight": "projection.visual_projection.weight",
            "text_projection.weight": "projection.text_projection.weight",
            "logit_scale": "logit_scale",
        }
        for i in range(n_layers):
            theirs = f"{prefix}{i}." if numbered else prefix
            for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"):
                renamed[f"blocks.{i}.{name}"] = f"{theirs}attn.{name}"
            for layer in ("linear1", "linear2", "norm1", "norm2"):
                for kind in ("weight", "bias"):
                    renamed[f"blocks.{i}.{layer}.{kind}"] = f"{theirs}{layer}.{kind}"
        for name, reference in renamed.items():
            if reference not in state_dict:
                raise KeyError(f"the reference checkpoint lacks {reference!r}, expected for our {name!r}")
            ours[name] = state_dict[reference]
        projection_dim, image_dim = ours["image_projection.weight"].shape
        adaptor = cls(
            image_dim,
            ours["text_projection.weight"].shape[1],
            projection_dim=projection_dim,
            n_layers=n_layers,
            n_heads=n_heads,
            ff_dim=ours["blocks.0.linear1.weight"].shape[0],
        )
        adaptor.load_state_dict(ours)
        return adaptor

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `adaptor.safetensors` and `adaptor.json` (sizes, and `notes`)."""
        from safetensors.torch import save_file

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), directory / _WEIGHTS)
        described = {"adaptor": asdict(self.config), "notes": self.notes}
        (directory / _CONFIG).write_text(json.dumps(described, indent=2) + "\n", "utf-8")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Adaptor:
        """Reads what `save_pretrained` wrote; `adaptor.notes` holds its notes.

        Raises:
            RunNotFoundError: no Adaptor there; a `FileNotFoundError`.
        """
        from safetensors.torch import load_file

        directory = Path(directory)
        if not (directory / _CONFIG).is_file():
            raise RunNotFoundError(
                f"{directory}: no {_CONFIG} there; name a run directory that 'embedcache train' wrote"
            )
        described = json.loads((directory / _CONFIG).read_text("utf-8"))
        adaptor = cls(**described["adaptor"])
        adaptor.load_state_dict(load_file(directory / _WEIGHTS))
        adaptor.notes = described["notes"]
        return adaptor.eval()


def count_parameters(module: nn.Module) -> int:
    """How many numbers training changes."""
    return sum(math.prod(p.shape) for p in module.parameters() if p.requires_grad)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)
