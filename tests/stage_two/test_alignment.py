"""Measures of alignment against dense references, and what they say of a collapse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from embedcache.stage_two.alignment import alignment


def test_recalls_equal_a_dense_reference() -> None:
    rng = np.random.default_rng(0)
    texts = rng.integers(0, 40, 90)
    names, codes = np.unique(texts, return_inverse=True)
    vectors = normalize(torch.from_numpy(rng.normal(size=(len(names), 8))), dim=1).float()
    text = vectors[torch.from_numpy(codes)]
    image = normalize(text + 0.5 * torch.from_numpy(rng.normal(size=(90, 8))).float(), dim=1)
    found = alignment(image, text, texts)
    scores = (image @ vectors.T).numpy()
    to_text = [(np.argsort(-scores[i]) == codes[i]).argmax() + 1 for i in range(90)]
    to_image = [np.isin(np.argsort(-scores[:, j]), np.flatnonzero(codes == j)).argmax() + 1 for j in range(len(names))]
    for direction, ranks in (("image_to_text", to_text), ("text_to_image", to_image)):
        for k in (1, 5, 10):
            assert found[f"{direction}_recall@{k}"] == pytest.approx(np.mean(np.array(ranks) <= k))
        assert found[f"{direction}_median_rank"] == np.median(ranks)
    assert found["image_to_text_chance@5"] == pytest.approx(5 / len(names))
    assert found["text_to_image_chance@1"] == pytest.approx(90 / len(names) / 90)
    assert found["alignment"] == pytest.approx(((image - text) ** 2).sum(1).mean().item(), rel=1e-5)


def test_strangers_are_found_by_chance() -> None:
    rng = np.random.default_rng(0)
    image, text = (normalize(torch.from_numpy(rng.normal(size=(3000, 32))).float(), dim=1) for _ in range(2))
    found = alignment(image, text, np.arange(3000) // 3)
    for direction in ("image_to_text", "text_to_image"):
        chance = found[f"{direction}_chance@10"]
        assert found[f"{direction}_recall@10"] == pytest.approx(chance, abs=5 * np.sqrt(chance / 1000))


def test_a_collapse_is_no_success() -> None:
    same = normalize(torch.ones(50, 4), dim=1)
    found = alignment(same, same, np.arange(50))
    assert found["image_to_text_recall@10"] == found["text_to_image_recall@10"] == 0
    assert found["image_to_text_median_rank"] == 25.5
    assert found["image_uniformity"] == pytest.approx(0, abs=1e-5)
    assert found["modality_gap"] == pytest.approx(0, abs=1e-6)


def test_the_gap_and_the_spread() -> None:
    torch.manual_seed(0)
    spread = normalize(torch.randn(4000, 64), dim=1)
    found = alignment(spread, spread, np.arange(4000))
    assert found["image_uniformity"] == pytest.approx(-4, abs=0.15)
    apart = torch.eye(2).repeat(10, 1)
    found = alignment(apart[::2], apart[1::2], np.arange(10))
    assert found["modality_gap"] == pytest.approx(2**0.5)
    assert found["alignment"] == pytest.approx(2)


def test_all_texts_equal_is_no_retrieval() -> None:
    image = normalize(torch.randn(5, 4), dim=1)
    found = alignment(image, image[:1].expand(5, 4), np.zeros(5))
    assert found["image_to_text_recall@1"] == found["image_to_text_chance@1"] == 1
    assert np.isnan(found["text_uniformity"])
