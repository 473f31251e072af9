"""Stores of made-up encoders: what an image shows, turned round in a space of their own, amid noise of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

import embedcache
from embedcache import Manifest, ProbeConfig
from embedcache.stage_two.heads import HeadConfig

QUICK = ProbeConfig(
    heads=("linear",),
    fractions=(1.0,),
    n_seeds=3,
    n_draws=200,
    controls=(),
    head=HeadConfig(epochs=8, min_steps=60, lr=1e-2),
)


class World:
    """Images that show two findings, in a folder of their own.

    Args:
        n: images; every patient has `per_patient` of them.
    """

    def __init__(self, folder: Path, n: int = 240, *, seed: int = 0, per_patient: int = 1) -> None:
        self.folder, self._rng = folder, np.random.default_rng(seed)
        self.shown = self._rng.normal(size=(n, 8)).astype(np.float32)  # what an image shows, (n, 8)
        told = self.shown[:, :2] + 0.7 * self._rng.normal(size=(n, 2))
        patients = np.arange(n) // per_patient
        split = np.array(["train", "train", "valid", "test", "test"], object)[patients % 5]
        self.frame = pd.DataFrame(
            {
                "id": [f"i{k}" for k in range(n)],
                "image": [f"i{k}.png" for k in range(n)],
                "report": [f"finding {k}" for k in range(n)],
                "patient": [f"p{p}" for p in patients],
                "split": split,
                "label.opacity": (told[:, 0] > 0).astype(int),
                "label.effusion": (told[:, 1] > 0).astype(int),
            }
        )

    @property
    def manifest(self) -> Manifest:
        return Manifest(self.frame, name="made", root=self.folder)

    def store(self, name: str, *, noise: float = 0.3, dim: int = 24, rows: slice = slice(None)) -> Path:
        """What an encoder makes of the images; with equal noise all see equally well."""
        turned, _ = np.linalg.qr(self._rng.normal(size=(dim, dim)))
        seen = self.shown @ turned[:8]
        x = (seen + noise * self._rng.normal(size=seen.shape)).astype(np.float32)
        path = self.folder / "stores" / name
        embedcache.save_store(path, self.frame["id"].tolist()[rows], x[rows])
        return path

    def texts(self, name: str = "words") -> Path:
        """A text store of the reports, which tell what the images show."""
        x = (self.shown @ self._rng.normal(size=(8, 16))).astype(np.float32)
        path = self.folder / "stores" / name
        embedcache.save_store(path, self.frame["id"].tolist(), x, modality="text")
        return path

    def manifest_digest(self) -> str:
        """As a study has it."""
        from embedcache.comparing.study import Task

        return Task("made", self.manifest, {}).digest
