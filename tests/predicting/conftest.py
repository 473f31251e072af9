"""A small run: tiny encoders, an Adaptor, heads and a decoder of masks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import embedcache
from embedcache import Manifest, ProbeConfig, SegmentConfig, TrainConfig
from embedcache.data.labels import LabelSet
from embedcache.data.manifest import About
from embedcache.stage_two.heads import HeadConfig
from embedcache.store.store import Store

HEADS = ("mlp", "linear", "logistic")
N = 60


@dataclass(frozen=True)
class Run:
    manifest: Manifest
    run_dir: Path
    checkpoint: Path
    image: Store
    probed: dict[str, pd.DataFrame]
    masks: pd.DataFrame

    def file(self, sample: str) -> Path:
        frame = self.manifest.frame
        return self.manifest.path(dict(zip(frame["id"], frame["image"], strict=True))[sample])


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, checkpoints: Path, image_encoder, text_encoder) -> Run:
    """60 oblong images of 30 patients, a bright square in half of them; PNG and JPEG."""
    root, rng, rows = tmp_path_factory.mktemp("run"), np.random.default_rng(0), []
    for k in range(N):
        pixels, mask = rng.integers(0, 60, (90, 120), dtype=np.uint8), np.zeros((90, 120), bool)
        if k % 2:
            top, left = rng.integers(5, 45), rng.integers(5, 75)
            mask[top : top + 40, left : left + 40] = True
        pixels[mask] += 150
        file = f"s{k:03d}.{'png' if k % 3 else 'jpg'}"
        Image.fromarray(pixels).save(root / file)
        Image.fromarray(mask).save(root / f"s{k:03d}_mask.png")
        rows.append(
            {
                "id": f"s{k:03d}",
                "image": file,
                "mask": f"s{k:03d}_mask.png",
                "report": f"{'An opacity' if k % 2 else 'Clear lungs'} in image {k}.",
                "patient": f"p{k // 2}",
                "split": ("train", "train", "valid", "valid", "test")[k // 2 % 5],
                "label.opacity": k % 2,
                "label.even": int(k % 4 < 2),
                "label.kind": k % 3,
            }
        )
    sets = (
        LabelSet("two", "multi-label", ("opacity", "even")),
        LabelSet("kind", "multi-class", ("kind",), ("first", "second", "third")),
    )
    manifest = Manifest(pd.DataFrame(rows), name="squares", root=root, about=About(sets))
    embedcache.extract(manifest, image_encoder, root / "image", tokens=True, store_dtype="float16")
    embedcache.extract(manifest, text_encoder, root / "text")
    run_dir = root / "run"
    small = TrainConfig(epochs=2, batch_size=16, projection_dim=24, n_heads=2, ff_dim=32, lr=1e-3)
    embedcache.train(manifest, root / "image", root / "text", run_dir, config=small)
    head = HeadConfig(epochs=2, min_steps=60, lr=1e-2)
    config = ProbeConfig(heads=HEADS, fractions=(1.0,), n_seeds=1, n_draws=20, controls=(), head=head)
    probed = {}
    for label in ("opacity", "two", "kind"):
        result = embedcache.probe(manifest, root / "image", label=label, run_dir=run_dir, config=config)
        result.write(run_dir / "probes" / label)
        probed[label] = result.predictions
    decoders = SegmentConfig(
        decoders=("conv", "linear"),
        size=64,
        fractions=(1.0,),
        n_seeds=1,
        n_draws=20,
        controls=(),
        epochs=20,
        min_steps=60,
    )
    masks = embedcache.segment(manifest, root / "image", run_dir=run_dir, config=decoders)
    masks.write(run_dir / "masks")
    store = embedcache.open_store(root / "image")
    return Run(manifest, run_dir, checkpoints / "vit", store, probed, masks.images)
