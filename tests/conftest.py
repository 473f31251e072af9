"""Inputs that the tests make for themselves; nothing is downloaded."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network must fail
if "PYTEST_XDIST_WORKER" in os.environ:  # beside others: before torch counts the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
for _number in (signal.SIGINT, signal.SIGHUP):  # ignored by a suite in the background; its children must not
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.SIG_DFL)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one tiny random checkpoint of each kind."""
    from embedcache.encoders.random_init import write_tiny

    root = tmp_path_factory.mktemp("checkpoints")
    reports = ["The lungs are clear.", "There is an opacity in the left lower zone.", "Heart size is normal."]
    write_tiny("tiny-vit", root / "vit", seed=0)
    write_tiny("tiny-resnet", root / "resnet", seed=0)
    write_tiny("tiny-bert", root / "bert", seed=0, reports=reports)
    return root


@pytest.fixture(scope="session")
def image_encoder(checkpoints: Path):
    import embedcache

    return embedcache.load_encoder(f"hf:{checkpoints / 'vit'}", pooling="mean", device="cpu")


@pytest.fixture(scope="session")
def text_encoder(checkpoints: Path):
    import embedcache

    return embedcache.load_encoder(f"hf:{checkpoints / 'bert'}", device="cpu")


@pytest.fixture
def make_manifest(tmp_path: Path):
    """Draws a small dataset: bright squares are positive, and the report says so."""
    from embedcache import Manifest

    def make(n: int = 24, *, name: str = "squares", prefix: str = "s") -> Manifest:
        rng = np.random.default_rng(0)
        root = tmp_path / name
        root.mkdir()
        rows = []
        for i in range(n):
            positive = i % 2
            pixels = rng.integers(0, 60, (40, 40), dtype=np.uint8)
            if positive:
                pixels[10:30, 10:30] += 150
            file = f"{prefix}{i:03d}.{'png' if i % 3 else 'jpg'}"
            Image.fromarray(pixels).save(root / file)
            rows.append(
                {
                    "id": f"{prefix}{i:03d}",
                    "image": file,
                    "report": f"{'An opacity' if positive else 'Clear lungs'} in image {i}.",
                    "patient": f"p{i // 2}",
                    "split": ("train", "train", "train", "valid", "test")[i // 2 % 5],
                    "label.opacity": positive,
                }
            )
        return Manifest(pd.DataFrame(rows), name=name, root=root)

    return make
