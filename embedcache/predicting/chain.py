"""From an encoder's outputs to answers, as one module: what prediction runs and what an export holds.

Shape notation: b images, d embedding width, l tokens, p width of an Adaptor's output, c outputs of a head, H and W
pixels of a mask.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from embedcache.predicting.run_models import RunModels
from embedcache.stage_two.kept import Source

Said = tuple[Tensor, Tensor]  # probabilities as a head says them and calibrated, (b, c) each

_INT8_MAX = 127


class AnswerChain(nn.Module):
    """Adaptor, heads and decoder of a run.

    Args:
        rounds: whether an encoder's outputs are rounded as the store had them that heads and decoder were fitted on.
    """

    def __init__(self, models: RunModels, *, rounds: bool = True) -> None:
        super().__init__()
        self._rounds = rounds
        self.adaptor = models.adaptor
        self.heads = nn.ModuleList(head.module() for head in models.heads.values())
        self.decoder = None if models.decoder is None else models.decoder.module()
        self._sources = [head.source for head in models.heads.values()]
        self._kept = models.decoder
        self.eval()

    def forward(self, embeddings: Tensor, tokens: Tensor | None = None) -> tuple[list[Said], Tensor | None]:
        """What is said of b images.

        Args:
            embeddings: (b, d) float32.
            tokens: (b, l, d) float32; None where no mask is asked for.

        Returns:
            What each head says; and the probability of the mask in the frame that the encoder saw, (b, H, W), or None.
        """
        features: dict[tuple[str, bool], Tensor] = {}
        found = []
        for head, source in zip(self.heads, self._sources, strict=True):
            key = source.dtype, bool(source.adaptor_digest)
            if key not in features:
                features[key] = self._features(embeddings, source)
            found.append(head(features[key]))
        if tokens is None or self.decoder is None or self._kept is None:
            return found, None
        source = self._kept.source
        cells = self._stored(self._features(tokens, source), "float32" if source.dtype == "int8" else source.dtype)
        maps = cells.transpose(1, 2).unflatten(2, self._kept.grid)  # rounded as `TokenFeed` keeps them
        return found, self.decoder(maps)[:, 0].sigmoid()

    def _features(self, outputs: Tensor, source: Source) -> Tensor:
        """(b, d) to (b, d or p), or (b, l, d) to (b, l, d or p)."""
        stored = self._stored(outputs, source.dtype)
        if not source.adaptor_digest:
            return stored
        assert self.adaptor is not None  # `read_run` has seen it
        return self.adaptor.encode_image(stored)

    def _stored(self, x: Tensor, dtype: str) -> Tensor:
        return rounded(x, dtype) if self._rounds else x


def rounded(x: Tensor, dtype: str) -> Tensor:
    """Values as a store of this dtype gives them back, see `store.values`; (..., d) float32."""
    if dtype == "int8":
        scale = x.abs().amax(dim=-1, keepdim=True) / _INT8_MAX
        return torch.where(scale > 0, (x / scale).round().clamp(-_INT8_MAX, _INT8_MAX) * scale, 0.0)
    return x if dtype == "float32" else x.to(getattr(torch, dtype)).float()
