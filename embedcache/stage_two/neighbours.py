"""k nearest neighbours: nothing is trained, so what it scores is in the features.

Shape notation: n training rows, p rows asked, d feature width, t label columns, c outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from embedcache.metrics.calibration import logit
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
    weights = target.class_weights(labels, class_weight)
    votes = target.one_vs_rest(labels)  # (n, c)
    if target.task == "multi-class":
        voters = np.broadcast_to(weights @ np.nan_to_num(votes).T, votes.T.shape).T
    else:
        voters = np.where(votes == 1, weights[:, 1], weights[:, 0])
    unit_x = F.normalize(x.float(), dim=-1)  # a row of zeros stays one
    queries = unit_x[torch.from_numpy(asked).to(x.device)]
    found = np.empty((len(ks), len(asked), target.n_outputs), np.float32)
    masks, which = np.unique(~np.isnan(votes), axis=1, return_inverse=True)
    for k, known in enumerate(masks.T):  # labels that are blank for the same rows have the same neighbours
        of = np.flatnonzero(which.ravel() == k)
        own = voters[np.ix_(known, of)]
        found[..., of] = _shares(queries, unit_x, rows[known], votes[np.ix_(known, of)] * own, own, ks)
    shares = np.clip(found, _LEAST, 1 - _LEAST)
    return list(np.log(shares) if target.task == "multi-class" else logit(shares))


def _shares(
    queries: Tensor, unit_x: Tensor, rows: np.ndarray, votes: np.ndarray, voters: np.ndarray, ks: Sequence[int]
) -> np.ndarray:
    """For each number of neighbours the share of their votes for each output, (len(ks), p, outputs).

    Args:
        votes: of each row for each output, (n, outputs).
        voters: how much each row counts there, (n, outputs).
    """
    if not len(rows):  # nobody votes for anything
        return np.zeros((len(ks), len(queries), votes.shape[1]), np.float32)
    device = unit_x.device
    known = unit_x[torch.from_numpy(rows).to(device)]
    of_votes, of_voters = (torch.from_numpy(np.ascontiguousarray(a)).float().to(device) for a in (votes, voters))
    parts = []
    for part in queries.split(_AT_ONCE):
        similar, nearest = (part @ known.T).topk(min(max(ks), len(rows)), dim=1)
        closeness = ((similar - 1) / TEMPERATURE).exp().unsqueeze(-1)
        gained, cast = closeness * of_votes[nearest], closeness * of_voters[nearest]
        parts.append(torch.stack([gained[:, :k].sum(1) / cast[:, :k].sum(1) for k in ks]))
    return torch.cat(parts, dim=1).cpu().numpy()
