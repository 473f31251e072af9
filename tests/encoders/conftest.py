from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_all
from PIL import Image


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Small checkpoints by source library and name."""
    return write_all(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Grey and RGB files, PNG and JPEG, wide and tall, larger and smaller than what the models take."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    paths = []
    for k, shape in enumerate([(200, 150), (70, 70), (128, 300), (260, 90, 3)]):
        smooth = np.cumsum(rng.normal(size=shape), axis=0)
        pixels = (255 * (smooth - smooth.min()) / np.ptp(smooth)).astype(np.uint8)
        paths.append(root / f"{k}.{'jpg' if k == 2 else 'png'}")
        Image.fromarray(pixels).save(paths[-1])
    return paths
