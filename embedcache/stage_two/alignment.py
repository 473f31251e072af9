"""How well images and texts lie together in the shared space: retrieval over distinct texts, and the space's shape.

Shape notation: n pairs, m distinct texts, p width of the shared space.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from embedcache.metrics.retrieval import chance_recall_at, recall_at
from embedcache.stage_two.adaptor import Adaptor
from embedcache.stage_two.feed import Feed
from embedcache.stage_two.ranks import find_pairs

TOP = (1, 5, 10)
_SPREAD_ROWS = 2048  # the spread of a modality is measured on so many of its vectors, evenly chosen


def embed_pairs(adaptor: Adaptor, feed: Feed) -> tuple[Tensor, Tensor]:
    """Unit vectors of all pairs of a feed in their order, (n, p) both."""
    adaptor.eval()
    embedded = [
        adaptor.embed(image.values, text.values, image_mask=image.mask, text_mask=text.mask)
        for image, text in feed.chunks()
    ]
    image, text = (torch.cat(parts) for parts in zip(*embedded, strict=True))
    return image, text


def unfit_pairs(image: Tensor, text: Tensor) -> np.ndarray:
    """Which pairs have a vector that is not finite, (n,) bool."""
    return ~(image.isfinite().all(dim=1) & text.isfinite().all(dim=1)).cpu().numpy()


@torch.inference_mode()
def alignment(image: Tensor, text: Tensor, texts: np.ndarray) -> dict[str, float]:
    """Measures of n embedded pairs; NaN where undefined.

    `image_to_text_recall@1` and so on: how many images find their text among the distinct texts, and back, where a
    text has found one of its images; beside it what chance gives. `..._median_rank`: of the first match, from 1.
    `alignment`: mean squared distance within a pair. `image_uniformity`, `text_uniformity`: logarithm of the mean
    Gaussian potential, 0 where all vectors are one and about -4 where they cover the sphere (both: Wang and Isola
    2020). `modality_gap`: distance between the means of both modalities (Liang et al. 2022).

    Args:
        image, text: unit vectors, (n, p).
        texts: equal where two pairs have the same text, (n,).
    """
    pairs, found = find_pairs(image, text, texts), dict[str, float]()
    distinct = text[torch.from_numpy(pairs.first).to(text.device)]
    directions = (
        ("image_to_text", pairs.to_text.ranks, np.ones(len(image), np.int64), len(pairs.first)),
        ("text_to_image", pairs.to_image.ranks, np.bincount(pairs.text_of), len(image)),
    )
    for direction, ranks, n_matches, n_candidates in directions:
        for k in TOP:
            found[f"{direction}_recall@{k}"] = recall_at(ranks, k)
            found[f"{direction}_chance@{k}"] = chance_recall_at(n_matches, n_candidates, k)
        found[f"{direction}_median_rank"] = float(np.median(ranks)) if len(ranks) else math.nan
    found["alignment"] = float((image - text).square().sum(dim=1).mean()) if len(image) else math.nan
    found["image_uniformity"], found["text_uniformity"] = _uniformity(image), _uniformity(distinct)
    found["modality_gap"] = float((image.mean(0) - text.mean(0)).norm()) if len(image) else math.nan
    return found


def _uniformity(x: Tensor) -> float:
    n = len(x)
    if n < 2:
        return math.nan
    chosen = x[torch.linspace(0, n - 1, min(n, _SPREAD_ROWS), device=x.device).round().long()]
    distances = (2 - 2 * chosen @ chosen.T).clamp_min(0)
    others = ~torch.eye(len(chosen), dtype=torch.bool, device=x.device)
    return float((-2 * distances[others]).exp().mean().log())
