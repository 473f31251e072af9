"""Decoding: every kind of PNG and JPEG to stated RGB, and every bad file to a reason."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedcache.data.radiograph import DecodePolicy, read_radiograph
from embedcache.errors import InputError

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def decoded(path: Path, **policy: object) -> np.ndarray:
    return read_radiograph(path, DecodePolicy(**policy)).pixels


def test_grey_png_is_exact(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "x.png")
    pixels = decoded(tmp_path / "x.png")
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.repeat(GREY[..., None], 3, axis=2))


def test_sixteen_bit_is_scaled_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "x.png")
    np.testing.assert_array_equal(decoded(tmp_path / "x.png")[..., 0], GREY)


def test_one_bit_palette_and_cmyk(tmp_path: Path) -> None:
    Image.fromarray(GREY > 127).save(tmp_path / "bit.png")
    assert set(np.unique(decoded(tmp_path / "bit.png"))) == {0, 255}
    Image.fromarray(GREY).convert("P").save(tmp_path / "palette.png")
    np.testing.assert_array_equal(decoded(tmp_path / "palette.png")[..., 0], GREY)
    Image.fromarray(GREY).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    assert np.abs(decoded(tmp_path / "cmyk.jpg")[..., 0].astype(int) - GREY).max() <= 8


def test_transparency_is_composited_on_the_stated_grey(tmp_path: Path) -> None:
    clear = np.zeros((4, 4, 4), np.uint8)
    Image.fromarray(clear, "RGBA").save(tmp_path / "x.png")
    assert set(np.unique(decoded(tmp_path / "x.png"))) == {0}
    assert set(np.unique(decoded(tmp_path / "x.png", background=99))) == {99}


def test_exif_rotation_is_a_policy(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    Image.fromarray(GREY[:8]).save(tmp_path / "x.jpg", exif=exif)
    assert decoded(tmp_path / "x.jpg").shape[:2] == (16, 8)
    assert decoded(tmp_path / "x.jpg", exif_rotation=False).shape[:2] == (8, 16)


def test_the_digest_is_of_the_files_bytes(tmp_path: Path) -> None:
    import hashlib

    Image.fromarray(GREY).save(tmp_path / "x.png")
    expected = hashlib.sha256((tmp_path / "x.png").read_bytes()).digest()[:16]
    assert read_radiograph(tmp_path / "x.png", DecodePolicy()).digest == expected


def bad_inputs(root: Path) -> dict[str, str]:
    """One file of each bad kind below `root`, and the reason it must fail for."""
    good = root / "good.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save(good)
    png = good.read_bytes()
    jpeg_path = root / "good.jpg"
    Image.open(good).save(jpeg_path)
    (root / "cut.png").write_bytes(png[: len(png) // 2])
    (root / "cut.jpg").write_bytes(jpeg_path.read_bytes()[: jpeg_path.stat().st_size // 2])
    (root / "crc.png").write_bytes(png[:60] + bytes([png[60] ^ 0xFF]) + png[61:])
    (root / "empty.png").write_bytes(b"")
    (root / "page.jpg").write_bytes(b"<html>not found</html>")
    (root / "head.png").write_bytes(png[:20])
    (root / "folder.png").mkdir()
    os.mkfifo(root / "pipe.png")
    Image.new("1", (12000, 12000)).save(root / "huge.png")
    Image.new("L", (4, 4)).save(root / "x.gif")
    frames = [Image.new("L", (4, 4), c) for c in (0, 255)]
    frames[0].save(root / "frames.png", save_all=True, append_images=frames[1:])
    return {
        "cut.png": "truncated", "cut.jpg": "truncated", "crc.png": "truncated", "empty.png": "empty-file",
        "page.jpg": "unknown-format", "head.png": "corrupt|unknown-format|truncated", "folder.png": "not-a-file",
        "pipe.png": "not-a-file", "huge.png": "too-large", "x.gif": "unknown-format", "frames.png": "several-frames",
        "none.png": "unreadable",
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_every_bad_file_has_its_reason(tmp_path: Path) -> None:
    for name, reason in bad_inputs(tmp_path).items():
        with pytest.raises(InputError) as caught:
            decoded(tmp_path / name)
        assert caught.value.reason in reason.split("|"), name
        assert str(tmp_path) not in str(caught.value)
