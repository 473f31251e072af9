"""k nearest neighbours: nothing is trained, so what it scores is in the features.

Shape notation: n training rows, p rows asked, d feature width, t label columns, c outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from embedcache.stage_two.targets import Target

TEMPERATURE = 0.07
_AT_ONCE = 1024  # rows asked
_LEAST = 1e-6  # probability: no logit is infinite


def neighbour_logits(
    x: Tensor,
    rows: np.ndarray,
    labels: np.ndarray,
    asked: np.ndarray,
    *,
    target: Target,
    ks: Sequence[int],
    class_weight: str,
) -> list[np.ndarray]:
    """Logits by the votes of the k nearest labelled rows, each exp(cosine / 0.07); source: DINO (Caron et al. 2021).

    Args:
        x: features, (all rows, d).
        rows, labels: training rows, (n,), and their labels, (n, t), NaN where blank: such a row has no vote.
        asked: (p,); a row among `rows` would find itself.
        ks: numbers of neighbours; all of them where there are fewer.

    Returns:
        (p, c) for each k.
    """
    weights = target.class_weights(labels, balanced=class_weight == "balanced")
    votes = target.one_vs_rest(labels)  # (n, c)
    if target.task == "multi-class":
        blocks = [(votes * weights, weights @ np.nan_to_num(votes).T, ~np.isnan(labels[:, 0]))]
    else:
        each = np.where(votes == 1, weights[:, 1], weights[:, 0])
        blocks = [(votes[:, [k]] * each[:, [k]], each[:, k], ~np.isnan(votes[:, k])) for k in range(votes.shape[1])]
    unit_x = F.normalize(x.float(), dim=-1)  # a row of zeros stays one
    queries = unit_x[torch.from_numpy(asked).to(x.device)]
    found = [[np.empty(0)] * 0 for _ in ks]
    for shares, counts, known in blocks:
        of_block = _shares(queries, unit_x, rows[known], shares[known], counts[known], ks)
        for k, share in enumerate(of_block):
            found[k].append(share)
    joined = [np.clip(np.concatenate(parts, axis=1), _LEAST, 1 - _LEAST) for parts in found]
    if target.task == "multi-class":
        return [np.log(p).astype(np.float32) for p in joined]
    return [np.log(p / (1 - p)).astype(np.float32) for p in joined]


def _shares(
    queries: Tensor, unit_x: Tensor, rows: np.ndarray, present: np.ndarray, counts: np.ndarray, ks: Sequence[int]
) -> list[np.ndarray]:
    """For each k, the share of the votes of the nearest rows that is for each class, (p, classes)."""
    if not len(rows):  # nobody votes for anything
        return [np.zeros((len(queries), present.shape[1]), np.float32) for _ in ks]
    device = unit_x.device
    known = unit_x[torch.from_numpy(rows).to(device)]
    votes, voters = (torch.from_numpy(a).float().to(device) for a in (present, counts))
    parts: list[list[Tensor]] = [[] for _ in ks]
    for part in queries.split(_AT_ONCE):
        similar, nearest = (part @ known.T).topk(min(max(ks), len(rows)), dim=1)
        closeness = ((similar - 1) / TEMPERATURE).exp()
        gained, cast = closeness.unsqueeze(-1) * votes[nearest], closeness * voters[nearest]
        for j, k in enumerate(ks):
            parts[j].append(gained[:, :k].sum(1) / cast[:, :k].sum(1, keepdim=True))
    return [torch.cat(p).cpu().numpy() for p in parts]
