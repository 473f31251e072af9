"""Stores made without any encoder: a signal in the image, told by the text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from golden_numbers import golden_numbers
from made import World
from torch import Tensor

import embedcache
from embedcache import Manifest


@pytest.fixture
def world(tmp_path: Path) -> World:
    """400 images of 200 patients; a label shows in image and text embeddings amid noise."""
    rng = np.random.default_rng(0)
    n = 400
    label = rng.integers(0, 2, n)
    ids = [f"i{k:03d}" for k in range(n)]
    frame = pd.DataFrame(
        {
            "id": ids,
            "image": [f"{i}.png" for i in ids],
            "report": [f"report {k} says {y}" for k, y in enumerate(label)],
            "patient": [f"p{k // 2}" for k in range(n)],
            "split": [("train", "train", "train", "valid", "test")[k // 2 % 5] for k in range(n)],
            "label.y": label,
        }
    )
    direction = rng.normal(size=16) / 4
    image = (rng.normal(size=(n, 16)) + 2.0 * (2 * label[:, None] - 1) * direction).astype(np.float32)
    text = np.concatenate([image[:, :8], 3.0 * label[:, None] + rng.normal(size=(n, 4)) / 3], 1).astype(np.float32)
    return World(
        Manifest(frame, name="made", root=tmp_path),
        embedcache.save_store(tmp_path / "image", ids, image, store_dtype="float32"),
        embedcache.save_store(tmp_path / "text", ids, text, modality="text", store_dtype="float32"),
        image,
    )


@pytest.fixture(params=[1, 2])
def golden(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    """What the paper's own code computed with 1 and 2 layers."""
    return golden_numbers(request.param)
