"""Image files to pixel arrays: PNG and JPEG, decoded in full, by a policy that the fingerprint covers."""

from __future__ import annotations

import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from embedcache.errors import InputError
from embedcache.fingerprint import input_digest


@dataclass(frozen=True)
class DecodePolicy:
    """How a file becomes 8-bit RGB. Every field is part of the encoder's fingerprint.

    Args:
        formats: file formats that are read; anything else is refused.
        background: grey value (0 to 255) that transparent pixels are composited on.
        exif_rotation: whether the EXIF orientation is applied.
        sixteen_bit: how 16-bit grey becomes 8-bit: `full-range` divides by 257.
        max_pixels: a larger image is refused from its header.
    """

    formats: tuple[str, ...] = ("PNG", "JPEG")
    background: int = 0
    exif_rotation: bool = True
    sixteen_bit: str = "full-range"
    max_pixels: int = 80_000_000


@dataclass(frozen=True)
class Radiograph:
    """A decoded image: pixels (h, w, 3) uint8, and the digest of the file's bytes."""

    pixels: np.ndarray
    digest: bytes


def read_radiograph(path: Path, policy: DecodePolicy) -> Radiograph:
    """Reads and decodes one image file.

    Raises:
        InputError: not a regular file, not readable, of another format, too large, truncated or corrupt.
    """
    data = read_regular(path)
    return Radiograph(_decode(data, policy), input_digest(data))


def read_regular(path: Path) -> bytes:
    """All bytes of a regular file.

    Raises:
        InputError: not a regular file, not readable, or empty.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO must not block
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InputError("not-a-file", "its path is not a regular file")
            with os.fdopen(descriptor, "rb", closefd=False) as handle:
                data = handle.read()
        finally:
            os.close(descriptor)
    except OSError as error:
        raise InputError("unreadable", f"the file cannot be read ({error.strerror})") from error
    if not data:
        raise InputError("empty-file", "the file has no bytes")
    return data


def _decode(data: bytes, policy: DecodePolicy) -> np.ndarray:
    try:
        image = Image.open(io.BytesIO(data), formats=policy.formats)
    except UnidentifiedImageError as error:
        raise InputError("unknown-format", f"not a {' or '.join(policy.formats)} file") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError("too-large", f"more pixels than the limit of {policy.max_pixels:,}") from error
    except MemoryError:
        raise
    except Exception as error:
        raise InputError("corrupt", f"its header cannot be read ({type(error).__name__})") from error
    with image:
        if image.width * image.height > policy.max_pixels:
            raise InputError("too-large", f"{image.width} x {image.height} pixels, limit {policy.max_pixels:,}")
        n_frames = getattr(image, "n_frames", 1)
        if n_frames > 1:
            raise InputError("several-frames", f"{n_frames} frames, expected a single image")
        try:
            image.load()
            return _to_rgb(image, policy)
        except MemoryError:
            raise
        except Exception as error:
            raise InputError(
                "truncated", f"its pixels cannot be decoded to the end ({type(error).__name__})"
            ) from error


def _to_rgb(image: Image.Image, policy: DecodePolicy) -> np.ndarray:
    if policy.exif_rotation:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey; convert("RGB") would clip everything above 255 to white
        grey = np.clip(np.asarray(image, np.int64), 0, 65535)
        return np.repeat(((grey + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (policy.background,) * 3 + (255,))
        image = Image.alpha_composite(canvas, image)
    return np.array(image.convert("RGB"))
