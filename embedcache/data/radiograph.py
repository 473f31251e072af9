"""Image files to pixel arrays: PNG, JPEG, TIFF, WebP and DICOM, decoded by a policy that the fingerprint covers.

No message and no traceback of this module holds anything of a file's content: what a library says of a bad file may
quote it, so only the class of its error is passed on.

Shape notation: h and w of the decoded image.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from embedcache.data.image_files import MAX_FILE_BYTES, MAX_PIXELS, check_pixels, keep_quiet, read_regular, usable_bytes
from embedcache.errors import InputError, refusing
from embedcache.fingerprint import input_digest
from embedcache.settings import STRICT

Format = Literal["PNG", "JPEG", "TIFF", "WEBP", "DICOM"]
_DICOM_MARK = slice(128, 132)
_TURNED = (5, 6, 7, 8)  # EXIF orientations by a quarter turn
_GREY_MODES = ("1", "L")
_COLOUR_MODES = ("RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
_PALETTE_OR_ALPHA = ("P", "PA", "LA", "La", "RGBA", "RGBa")


@dataclass(frozen=True)
class DecodePolicy:
    """How a file becomes 8-bit pixels. Every field is part of the image encoder's fingerprint.

    Args:
        formats: file formats that are read, told by content and not by name; anything else is refused.
        channels: `rgb`, or `grey`: of colour images the luma of ITU-R 601. An encoder sets it to what it takes.
        background: grey value (0 to 255) that transparent pixels are composited on.
        exif_rotation: whether the EXIF orientation of PNG, JPEG and WebP is applied; that of TIFF always is.
        icc_profile: colour profiles are ignored.
        sixteen_bit: 16-bit grey to 8-bit: `full-range` divides by 257, `min-max` stretches what the image holds.
        floating: floating-point, signed and 32-bit grey to 8-bit: `min-max`, or `unit`, which takes 0 to 1 alone.
        frame: which of several frames is taken, from 0; None: files with several are refused.
        max_pixels: a larger image is refused from its header; of a DICOM file all frames count.
        max_file_bytes: a larger file is refused, and a deflated DICOM file that unpacks to more.
        jpeg_min_side: JPEGs are decoded at the smallest scale (1/1, 1/2, 1/4, 1/8) whose shorter side has at least so
            many pixels; None: in full.
        intensity: DICOM grey to 8-bit. `voi`: modality LUT or rescale, then VOI LUT, else the window, else `min-max`.
            `min-max`: rescaled, then stretched. `max`: stored values times 255 / their largest, as the paper does.
            `stored-bits`: stored values over what their bits can hold.
        window: centre and width of a window to use instead of the file's.
        window_index: which of the file's windows or VOI LUTs is used, from 0.
        monochrome1: `invert`, so that bright means dense in every file, or `keep`.
        padding: pixels with the DICOM padding value become black (`lowest`) or stay (`keep`).
    """

    __pydantic_config__ = STRICT

    formats: tuple[Format, ...] = ("PNG", "JPEG", "TIFF", "WEBP", "DICOM")
    channels: Literal["rgb", "grey"] = "rgb"
    background: int = 0
    exif_rotation: bool = True
    icc_profile: Literal["ignore"] = "ignore"
    sixteen_bit: Literal["full-range", "min-max"] = "full-range"
    floating: Literal["min-max", "unit"] = "min-max"
    frame: int | None = None
    max_pixels: int = MAX_PIXELS
    max_file_bytes: int = MAX_FILE_BYTES
    jpeg_min_side: int | None = None
    intensity: Literal["voi", "min-max", "max", "stored-bits"] = "voi"
    window: tuple[float, float] | None = None
    window_index: int = 0
    monochrome1: Literal["invert", "keep"] = "invert"
    padding: Literal["lowest", "keep"] = "lowest"

    def __post_init__(self) -> None:
        options = {
            "channels": ("rgb", "grey"),
            "icc_profile": ("ignore",),
            "sixteen_bit": ("full-range", "min-max"),
            "floating": ("min-max", "unit"),
            "intensity": ("voi", "min-max", "max", "stored-bits"),
            "monochrome1": ("invert", "keep"),
            "padding": ("lowest", "keep"),
        }
        wrong = [
            f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}"
            for name, known in options.items()
            if getattr(self, name) not in known
        ]
        unknown = sorted(set(self.formats) - set(get_args(Format)))
        if unknown or not self.formats:
            wrong.append(f"formats has {unknown or 'nothing'}, expected some of {', '.join(get_args(Format))}")
        least = {
            "background": 0,
            "frame": 0,
            "max_pixels": 1,
            "max_file_bytes": 1,
            "jpeg_min_side": 1,
            "window_index": 0,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                wrong.append(f"{name} is {value!r}, expected at least {bound}")
        if self.background > 255:
            wrong.append(f"background is {self.background!r}, expected at most 255")
        if self.window is not None and (len(self.window) != 2 or self.window[1] <= 0):
            wrong.append(f"window is {self.window!r}, expected a centre and a width above 0")
        if wrong:
            raise ValueError("; ".join(wrong))


@dataclass(frozen=True)
class Radiograph:
    """A decoded image.

    Args:
        pixels: (h, w, 3) or, if grey, (h, w), uint8.
        digest: of the file's bytes.
        size: height and width of the image in the file, upright; larger than h and w where a JPEG was reduced.
    """

    pixels: np.ndarray
    digest: bytes
    size: tuple[int, int]


def read_radiograph(source: Path | bytes, policy: DecodePolicy) -> Radiograph:
    """Reads and decodes one image file, or the bytes of one; safe in threads.

    Raises:
        InputError: not a regular file, not readable, of another format, too large, with several frames, truncated or
            corrupt; a DICOM file without an image, or one that nothing here decodes.
    """
    if isinstance(source, bytes):
        data = usable_bytes(source, max_bytes=policy.max_file_bytes)
    else:
        data = read_regular(source, max_bytes=policy.max_file_bytes)
    if data[_DICOM_MARK] == b"DICM":
        if "DICOM" not in policy.formats:
            raise InputError("unknown-format", f"a DICOM file, expected {' or '.join(policy.formats)}")
        from embedcache.data.dicom import decode_dicom

        pixels = decode_dicom(data, policy)
        size = pixels.shape[:2]
    else:
        pixels, size = _decode(data, policy)
    return Radiograph(_in_channels(pixels, policy), input_digest(data), (size[0], size[1]))


def stretched(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values from `low` to `high` as 0 to 255, uint8; a constant image is black throughout."""
    if not high > low:
        return np.zeros(values.shape, np.uint8)
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)


def check_frame(n_frames: int, policy: DecodePolicy) -> int:
    """Which frame is taken.

    Raises:
        InputError: several and none was chosen, or no such frame.
    """
    if policy.frame is None and n_frames > 1:
        raise InputError("several-frames", f"{n_frames} frames, expected a single image; choose one with decode.frame")
    if policy.frame is not None and policy.frame >= n_frames:
        raise InputError("no-such-frame", f"{n_frames} frames, frame {policy.frame} was asked for")
    return policy.frame or 0


def _decode(data: bytes, policy: DecodePolicy) -> tuple[np.ndarray, tuple[int, ...]]:
    """Pixels, and height and width before a reduction."""
    keep_quiet("PIL")
    formats = [str(name) for name in policy.formats if name != "DICOM"]
    with refusing("corrupt", "its header cannot be read"):
        try:
            image = Image.open(io.BytesIO(data), formats=formats)
        except UnidentifiedImageError:
            raise InputError("unknown-format", f"not a {' or '.join(policy.formats)} file") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise InputError("too-large", f"more pixels than the limit of {policy.max_pixels:,}") from None
        check_pixels(image.width, image.height, 1, policy.max_pixels)
    with image, refusing("truncated", "its pixels cannot be decoded to the end"):
        frame = check_frame(getattr(image, "n_frames", 1), policy)
        if frame:
            image.seek(frame)
            check_pixels(image.width, image.height, 1, policy.max_pixels)
        if policy.jpeg_min_side is not None and image.format in ("JPEG", "MPO"):
            whole = (image.height, image.width)
            if policy.exif_rotation and image.getexif().get(ExifTags.Base.Orientation) in _TURNED:
                whole = whole[::-1]
            image.draft(image.mode, (policy.jpeg_min_side, policy.jpeg_min_side))
            image.load()
            return _to_array(image, policy), whole
        image.load()
        pixels = _to_array(image, policy)
        return pixels, pixels.shape[:2]


def _to_array(image: Image.Image, policy: DecodePolicy) -> np.ndarray:
    """8-bit grey (h, w) or colour (h, w, 3)."""
    kind = image.format
    if policy.exif_rotation:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG"):
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)  # convert("RGB") would clip at 255
        if policy.sixteen_bit == "min-max":
            return stretched(grey, grey.min(), grey.max())
        return ((grey + 128) // 257).astype(np.uint8)
    if image.mode in ("I", "F"):
        return _from_numbers(np.asarray(image), policy)
    if image.has_transparency_data or image.mode in _PALETTE_OR_ALPHA:
        canvas = Image.new("RGBA", image.size, (policy.background,) * 3 + (255,))
        return np.array(Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB"))
    if image.mode in _GREY_MODES:
        return np.array(image.convert("L"))
    if image.mode in _COLOUR_MODES:
        return np.array(image.convert("RGB"))
    raise InputError("unsupported", f"pixels of mode {image.mode!r}, which nothing here says how to read")


def _from_numbers(values: np.ndarray, policy: DecodePolicy) -> np.ndarray:
    if not np.isfinite(values).all():
        raise InputError("not-finite", "some of its pixels are NaN or infinite")
    if policy.floating == "unit":
        if values.min() < 0 or values.max() > 1:
            raise InputError(
                "out-of-range", "some of its pixels are outside 0 to 1, which decode.floating 'unit' takes"
            )
        return stretched(values, 0, 1)
    return stretched(values, float(values.min()), float(values.max()))


def _in_channels(pixels: np.ndarray, policy: DecodePolicy) -> np.ndarray:
    if policy.channels == "grey":
        return pixels if pixels.ndim == 2 else np.array(Image.fromarray(pixels).convert("L"))
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
