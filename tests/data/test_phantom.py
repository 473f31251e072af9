from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedcache.data.datasets.phantom import PhantomConfig, make_phantom
from embedcache.errors import ManifestError

SMALL = PhantomConfig(n_images=60, size=64)


def test_it_is_drawn_once_and_read_back(tmp_path: Path) -> None:
    drawn = make_phantom(tmp_path / "a", SMALL)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*") if p.is_file()}
    read = make_phantom(tmp_path / "a", SMALL)
    assert read.frame.equals(drawn.frame)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*") if p.is_file()}
    with pytest.raises(ManifestError, match="other settings"):
        make_phantom(tmp_path / "a", PhantomConfig(n_images=61, size=64))


def test_the_same_seed_draws_the_same_files(tmp_path: Path) -> None:
    first, second = make_phantom(tmp_path / "a", SMALL), make_phantom(tmp_path / "b", SMALL)
    for image in first.frame["image"]:
        assert first.path(image).read_bytes() == second.path(image).read_bytes()


def test_reports_and_masks_tell_what_is_drawn(tmp_path: Path) -> None:
    manifest = make_phantom(tmp_path / "a", SMALL)
    frame = manifest.frame
    assert len(frame) == 60
    assert 0 < frame["patient"].nunique() < 60
    for row in frame.to_dict("records"):
        text = row["report"].lower()
        assert ("effusion" in text and "no pleural effusion" not in text) == bool(row["label.effusion"])
        assert ("enlarged" in text or "cardiomegaly" in text) == bool(row["label.cardiomegaly"])
        mask = np.asarray(Image.open(manifest.path(row["mask"])))
        assert mask.any() == bool(row["label.opacity"])
        assert Image.open(manifest.path(row["image"])).size == (64, 64)
    assert {Path(p).suffix for p in frame["image"]} == {".png", ".jpg"}
    assert not manifest.audit().leaks
