"""Odd image files of every kind: those that must be read, and those that must be refused, each with its reason."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE = 48


def pixels(channels: int = 0, *, dtype: type = np.uint8) -> np.ndarray:
    """A smooth pattern over the whole range of the dtype, (SIDE, SIDE) or (SIDE, SIDE, channels)."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / (SIDE - 1)
    planes = [(y + x * (k + 1)) / (k + 2) for k in range(max(channels, 1))]
    values = np.stack(planes, axis=-1) if channels else planes[0]
    return np.rint(values * np.iinfo(dtype).max).astype(dtype)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_with(header: bytes, *chunks: bytes) -> bytes:
    """A PNG made by hand from the 13 bytes of its header and further chunks."""
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + b"".join(chunks) + png_chunk(b"IEND", b"")


def good_images() -> dict[str, bytes]:
    """Odd files that hold a readable image: every mode, depth and layout."""
    grey, rgb = Image.fromarray(pixels()), Image.fromarray(pixels(3))
    alpha = Image.fromarray(pixels(4))
    wide = Image.fromarray(pixels(dtype=np.uint16))
    quarter = Image.Exif()
    quarter[0x0112] = 6
    floating = Image.fromarray((pixels() / 255).astype(np.float32))
    interlaced = b"".join(
        b"\0" + bytes(grey.crop((0, y, SIDE, y + 1)).tobytes())[start::step]
        for first, every, start, step in (
            (0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1),
        )
        for y in range(first, SIDE, every)
    )  # fmt: skip
    adam7 = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 0, 0, 0, 1)
    return {
        "grey.png": encoded(grey, "PNG"),
        "rgb.png": encoded(rgb, "PNG"),
        "one-bit.png": encoded(grey.point(lambda v: 255 * (v > 127)).convert("1"), "PNG"),
        "sixteen.png": encoded(wide, "PNG"),
        "palette.png": encoded(rgb.quantize(16), "PNG"),
        "palette-clear.png": encoded(rgb.quantize(16), "PNG", transparency=3),
        "alpha.png": encoded(alpha, "PNG"),
        "grey-alpha.png": encoded(alpha.convert("LA"), "PNG"),
        "interlaced.png": png_with(adam7, png_chunk(b"IDAT", zlib.compress(interlaced))),
        "text.png": png_with(
            struct.pack(">IIBBBBB", 2, 2, 8, 0, 0, 0, 0),
            png_chunk(b"tEXt", b"Comment\0canary"),
            png_chunk(b"IDAT", zlib.compress(b"\0\1\2\0\3\4")),
        ),
        "grey.jpg": encoded(grey, "JPEG", quality=95),
        "rgb.jpg": encoded(rgb, "JPEG", quality=95),
        "progressive.jpg": encoded(rgb, "JPEG", progressive=True),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG", quality=95),
        "rotated.jpg": encoded(rgb, "JPEG", exif=quarter),
        "named-wrong.png": encoded(rgb, "JPEG"),
        "grey.tiff": encoded(grey, "TIFF"),
        "sixteen.tiff": encoded(wide, "TIFF"),
        "float.tiff": encoded(floating, "TIFF"),
        "lzw.tiff": encoded(rgb, "TIFF", compression="tiff_lzw"),
        "deflate.tiff": encoded(grey, "TIFF", compression="tiff_adobe_deflate"),
        "lossy.webp": encoded(rgb, "WEBP"),
        "lossless.webp": encoded(alpha, "WEBP", lossless=True),
        "one-pixel.png": encoded(Image.new("L", (1, 1), 9), "PNG"),
        "constant.png": encoded(Image.new("L", (SIDE, SIDE), 9), "PNG"),
        "very-wide.png": encoded(Image.new("L", (4000, 2), 9), "PNG"),
    }


def bad_images() -> dict[str, tuple[bytes, str]]:
    """Files that must be refused: their bytes, and the reason (or reasons, parted by a bar)."""
    grey, rgb = Image.fromarray(pixels()), Image.fromarray(pixels(3))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIDE, SIDE), dtype=np.uint8))
    png, jpeg, tiff, webp = (encoded(noise, kind) for kind in ("PNG", "JPEG", "TIFF", "WEBP"))
    frames = [Image.new("L", (8, 8), c) for c in (0, 90, 255)]
    several = {"save_all": True, "append_images": frames[1:]}
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 0, 0, 0, 0)
    bomb_header = struct.pack(">IIBBBBB", 50_000, 50_000, 1, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * 100_000)
    text_bomb = zlib.compress(b"A" * 80_000_000)
    flipped = bytearray(png)
    flipped[png.index(b"IDAT") + 12] ^= 0xFF
    not_finite = pixels().astype(np.float32)
    not_finite[3, 4] = np.nan
    return {
        "nothing.png": (b"", "empty-file"),
        "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "unknown-format"),
        "login.png": (b"<html><head><title>Sign in</title></head></html>" * 40, "unknown-format"),
        "words.txt": (b"this is no image\n" * 30, "unknown-format"),
        "zeros.png": (bytes(4096), "unknown-format"),
        "json.png": (b'{"error": "not found"}', "unknown-format"),
        "pdf.png": (b"%PDF-1.7\n" + bytes(200), "unknown-format"),
        "zip.jpg": (b"PK\3\4" + bytes(200), "unknown-format"),
        "elf.png": (b"\x7fELF" + bytes(200), "unknown-format"),
        "svg.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "unknown-format"),
        "small.gif": (encoded(grey, "GIF"), "unknown-format"),
        "small.bmp": (encoded(grey, "BMP"), "unknown-format"),
        "small.ppm": (encoded(grey, "PPM"), "unknown-format"),
        "small.ico": (encoded(rgb, "ICO"), "unknown-format"),
        "small.tga": (encoded(rgb, "TGA"), "unknown-format"),
        "lfs-pointer.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "unknown-format"),
        "nifti.png": (struct.pack("<i", 348) + bytes(344), "unknown-format"),
        "numpy.png": (b"\x93NUMPY\x01\x00v\x00" + bytes(120), "unknown-format"),
        "signature-alone.png": (png[:8], "unknown-format|corrupt"),
        "header-cut.png": (png[:20], "unknown-format|corrupt|truncated"),
        "half.png": (png[: len(png) // 2], "truncated"),
        "end-cut.png": (png[:-30], "truncated"),
        "crc.png": (bytes(flipped), "truncated"),
        "no-data.png": (png_with(header), "truncated|corrupt|unknown-format"),
        "bad-zlib.png": (png_with(header, png_chunk(b"IDAT", b"not zlib at all")), "truncated"),
        "too-few-rows.png": (png_with(header, png_chunk(b"IDAT", zlib.compress(bytes(100)))), "truncated"),
        "zero-width.png": (png_with(struct.pack(">IIBBBBB", 0, 9, 8, 0, 0, 0, 0)), "unknown-format|corrupt|truncated"),
        "bit-depth-3.png": (png_with(struct.pack(">IIBBBBB", 9, 9, 3, 0, 0, 0, 0)), "unknown-format|corrupt|truncated"),
        "bomb.png": (png_with(bomb_header, png_chunk(b"IDAT", rows)), "too-large"),
        "text-bomb.png": (
            png_with(header, png_chunk(b"zTXt", b"Comment\0\0" + text_bomb), png_chunk(b"IDAT", rows)),
            "corrupt|truncated",
        ),
        "half.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "start-alone.jpg": (jpeg[:2], "unknown-format|corrupt"),
        "no-scan.jpg": (jpeg[: jpeg.index(b"\xff\xda")], "truncated|corrupt|unknown-format"),
        "no-tables.jpg": (jpeg.replace(b"\xff\xdb", b"\xff\xfe"), "truncated|corrupt"),
        "bomb.jpg": (jpeg.replace(struct.pack(">HH", SIDE, SIDE), struct.pack(">HH", 65500, 65500), 1), "too-large"),
        "half.tiff": (tiff[: len(tiff) // 2], "truncated|corrupt|unknown-format"),
        "no-directory.tiff": (b"II*\0\xff\xff\xff\x7f" + bytes(50), "corrupt|unknown-format|truncated"),
        "several.tiff": (encoded(frames[0], "TIFF", **several), "several-frames"),
        "not-finite.tiff": (encoded(Image.fromarray(not_finite), "TIFF"), "not-finite"),
        "half.webp": (webp[: len(webp) // 2], "truncated|corrupt|unknown-format"),
        "riff-alone.webp": (webp[:14], "unknown-format|corrupt"),
        "animated.webp": (
            encoded(frames[0].convert("RGB"), "WEBP", save_all=True, append_images=frames[1:]),
            "several-frames",
        ),
        "animated.png": (encoded(frames[0], "PNG", **several), "several-frames"),
        "dicom-mark-alone.dcm": (bytes(128) + b"DICM", "corrupt"),
        "dicom-noise.dcm": (bytes(128) + b"DICM" + np.random.default_rng(1).bytes(500), "corrupt|no-pixels"),
        "dicom-no-syntax.dcm": (bytes(128) + b"DICM" + struct.pack("<HH2sHI", 2, 0, b"UL", 4, 0), "corrupt"),
    }


def write_bad(root: Path) -> dict[str, str]:
    """All of `bad_images` and places that are no files, below `root`; the reason of each by name."""
    reasons = {}
    for name, (content, reason) in bad_images().items():
        (root / name).write_bytes(content)
        reasons[name] = reason
    (root / "folder.png").mkdir()
    os.mkfifo(root / "pipe.png")
    (root / "dangling.png").symlink_to(root / "nowhere.png")
    (root / "endless.png").symlink_to("/dev/zero")
    return {
        **reasons, "folder.png": "not-a-file", "pipe.png": "not-a-file", "dangling.png": "unreadable|missing",
        "endless.png": "not-a-file|outside-root", "not-there.png": "unreadable|missing",
    }  # fmt: skip


def write_good(root: Path) -> list[str]:
    """All of `good_images` below `root`; their names."""
    for name, content in good_images().items():
        (root / name).write_bytes(content)
    return list(good_images())
