"""A manifest's `mask` column: its text to pixels, and a dataset's boxes and runs to its text.

The text is one of

- blank: unknown, which is not the same as empty;
- `boxes:<height>x<width>:x,y,w,h;x,y,w,h`: filled boxes in pixels, (x, y) their top left corners;
- `rle:<height>x<width>:start length start length`: runs of set pixels, counted from 0 down the columns first, sorted,
  none over another;
- anything else: the path of an image file below the manifest's root; a pixel counts where any channel but alpha is
  above 0.

Boxes or runs that are none (`rle:1024x1024:`) are a mask known to be empty.

Shape notation: h and w of a mask; n runs. A size is (height, width).
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from embedcache.data.image_files import MAX_FILE_BYTES, MAX_PIXELS, check_pixels, keep_quiet, read_regular
from embedcache.data.manifest import path_below
from embedcache.errors import InputError, refusing

if TYPE_CHECKING:
    from PIL import Image

Size = tuple[int, int]

_FORMS = {"boxes": "'boxes:<height>x<width>:x,y,w,h;...'", "rle": "'rle:<height>x<width>:start length ...'"}
_HEADER = re.compile(r"(boxes|rle):([0-9]{1,9})x([0-9]{1,9}):")
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_REAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")
_FILE_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP")


def boxes_mask(boxes: Iterable[tuple[float, float, float, float]], size: Size) -> str:
    """The manifest's text for boxes; none is a mask known to be empty.

    Args:
        boxes: x, y of the top left corner, width and height of each, in pixels.
        size: of the image that they are drawn in.

    Raises:
        InputError: `bad-mask`: no finite numbers, no extent, or no pixel of the image inside.
    """
    height, width = _checked_size(size)
    texts = []
    for k, box in enumerate(boxes):
        try:
            x, y, w, h = (float(value) for value in box)
        except (TypeError, ValueError, OverflowError):
            _refuse(f"box {k + 1} is not four numbers, expected x, y, width and height")
        _corners((x, y, w, h), k, (height, width))
        texts.append(",".join(map(_number, (x, y, w, h))))
    return f"boxes:{height}x{width}:{';'.join(texts)}"


def relative_rle_mask(rows: Iterable[str], size: Size) -> str:
    """The manifest's text for SIIM-ACR's runs, all rows of one image united.

    Args:
        rows: `gap length gap length ...` each: the gap is counted from the end of the run before, the first from the
            image's first pixel, down the columns first; or `-1`, which has no run.
        size: of the image.

    Raises:
        InputError: `bad-mask`: no row at all, an odd count, a length that is not positive, a gap that is negative, a
            run behind the last pixel.
    """
    size = _checked_size(size)
    starts, ends = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    n_rows = 0
    for n_rows, row in enumerate(rows, start=1):
        text = f"{row}".strip()  # a blank cell may come as NaN
        if text == "-1":
            continue
        if not text:
            _refuse(f"row {n_rows} is blank, expected 'gap length gap length ...', or '-1' for an empty mask")
        gaps, lengths = _pairs(text, "gap", f"row {n_rows}: ")
        _check_end(np.maximum(gaps, lengths), size, f"row {n_rows}: ")  # so that no sum of them overflows
        end = np.cumsum(gaps + lengths)
        _check_end(end, size, f"row {n_rows}: ")
        starts.append(end - lengths)
        ends.append(end)
    if not n_rows:
        _refuse("no row, expected one at least; an empty mask is a row of '-1', an unknown one is left blank")
    start, length = _united(np.concatenate(starts), np.concatenate(ends))
    runs = " ".join(map(str, np.stack((start, length), axis=1).ravel().tolist()))
    return f"rle:{size[0]}x{size[1]}:{runs}"


def is_mask_path(text: str) -> bool:
    """Whether it names a file."""
    return bool(text.strip()) and not text.startswith(tuple(f"{kind}:" for kind in _FORMS))


def mask_size(text: str) -> Size | None:
    """What the text says of the mask's size; None where it is blank or names a file.

    Raises:
        InputError: `bad-mask`: boxes or runs without a size that can be.
    """
    return None if is_mask_path(text) or not text.strip() else _header(text)[1]


def read_mask(text: str, root: str | Path, *, size: Size | None = None, image_size: Size | None = None) -> np.ndarray:
    """The pixels of a mask, (h, w) bool.

    Boxes are filled as the paper's code fills them: x, y, x + w and y + h truncated to integers, clipped to the image.

    Args:
        text: a value of the manifest's `mask` column, not blank.
        root: of the manifest.
        size: the mask's pixels are resized to it, see `resize_mask`; by default it keeps its own size.
        image_size: of the radiograph that it belongs to: the mask must have it, or be scaled by one factor.

    Raises:
        InputError: `bad-mask`: blank, of no form that is known, out of its own bounds, of another shape than the
            image; a file that is missing, outside the root, truncated, or no image.
    """
    if not text.strip():
        _refuse("blank, which is an unknown mask; read those rows alone that have one")
    if is_mask_path(text):
        mask = _from_file(text, Path(root))
    else:
        kind, own_size, body = _header(text)
        mask = (_from_boxes if kind == "boxes" else _from_runs)(body, own_size)
    if image_size is not None:
        _check_belongs((mask.shape[0], mask.shape[1]), _checked_size(image_size))
    return mask if size is None else resize_mask(mask, size)


def resize_mask(mask: np.ndarray, size: Size) -> np.ndarray:
    """A mask in another size, where a pixel counts if at least half of its area is inside; exact, in integers.

    Args:
        mask: (h, w) bool.

    Returns:
        (height, width) bool.
    """
    height, width = _checked_size(size)
    if mask.shape == (height, width):
        return mask
    inside = _sums(_sums(mask, height).T, width).T  # of h * w parts of each new pixel
    return np.ascontiguousarray(2 * inside >= mask.size)


def _sums(values: np.ndarray, n: int) -> np.ndarray:
    """Sums over n equal stretches of the first axis, times n, so that a value cut by a border has an integer share."""
    edges, parts = np.divmod(np.arange(n + 1) * len(values), n)
    before = np.zeros((len(values) + 1, values.shape[1]), np.int32 if values.dtype == bool else np.int64)
    np.cumsum(values, axis=0, dtype=before.dtype, out=before[1:])
    cut = values[np.minimum(edges, len(values) - 1)]
    return np.diff(before[edges].astype(np.int64) * n + cut * parts[:, None], axis=0)


def _from_boxes(body: str, size: Size) -> np.ndarray:
    mask = np.zeros(size, bool)
    for k, text in enumerate(body.split(";") if body else []):
        values = text.split(",")
        if len(values) != 4:
            _refuse(f"box {k + 1} has {len(values)} value(s), expected x,y,w,h")
        for value in values:
            if not _REAL.fullmatch(value.strip()):
                _refuse(f"box {k + 1} holds {_short(value)}, expected a finite number")
        left, top, right, bottom = _corners(tuple(map(float, values)), k, size)
        mask[top:bottom, left:right] = True
    return mask


def _corners(box: Sequence[float], k: int, size: Size) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the pixels in a box; right and bottom are outside."""
    x, y, w, h = box
    height, width = size
    said = f"box {k + 1} (x {x:.10g}, y {y:.10g}, w {w:.10g}, h {h:.10g})"
    if not all(map(math.isfinite, box)):
        _refuse(f"{said}: expected finite numbers")
    if w <= 0 or h <= 0:
        _refuse(f"{said}: expected a width and a height above 0")
    left, right = (int(min(max(value, 0), width)) for value in (x, x + w))
    top, bottom = (int(min(max(value, 0), height)) for value in (y, y + h))
    if left >= right or top >= bottom:
        _refuse(f"{said}: no pixel of an image of {_words(size)} is inside; expected pixels, not shares of the image")
    return left, top, right, bottom


def _from_runs(body: str, size: Size) -> np.ndarray:
    starts, lengths = _pairs(body, "start")
    _check_end(np.maximum(starts, lengths), size)
    ends = starts + lengths
    _check_end(ends, size)
    k = _first(starts[1:] < ends[:-1])
    if k is not None:
        _refuse(
            f"run {k + 2} starts at {starts[k + 1]:,}, the one before ends at {ends[k]:,}; "
            "expected sorted runs that do not overlap"
        )
    change = np.zeros(size[0] * size[1] + 1, np.int8)
    change[starts] += 1
    change[ends] -= 1  # after the starts, since a run may begin where another ends
    flat = np.cumsum(change[:-1], dtype=np.int8).view(bool)
    return np.ascontiguousarray(flat.reshape(size[1], size[0]).T)


def _pairs(text: str, first: str, where: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Starts or gaps, and lengths, (n,) int64 each."""
    tokens = text.split()
    for k, token in enumerate(tokens):
        if not _INTEGER.fullmatch(token):
            _refuse(f"{where}number {k + 1} is {_short(token)}, expected an integer")
    if len(tokens) % 2:
        _refuse(f"{where}{len(tokens)} number(s), expected pairs of {first} and length")
    numbers = np.fromiter(map(int, tokens), np.int64, len(tokens))
    firsts, lengths = numbers[::2], numbers[1::2]
    for values, name, least in ((firsts, first, 0), (lengths, "length", 1)):
        wrong = _first(values < least)
        if wrong is not None:
            _refuse(f"{where}run {wrong + 1} has a {name} of {values[wrong]:,}, expected {least} or more")
    return firsts, lengths


def _check_end(ends: np.ndarray, size: Size, where: str = "") -> None:
    k = _first(ends > size[0] * size[1])
    if k is not None:
        _refuse(f"{where}run {k + 1} goes to {ends[k]:,}, an image of {_words(size)} has {size[0] * size[1]:,} pixels")


def _united(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of the sorted runs that cover the same pixels, no two of them touching."""
    order = np.argsort(starts)
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    apart = starts[1:] > ends[:-1]
    some = np.ones(min(len(starts), 1), bool)
    starts, ends = starts[np.concatenate((some, apart))], ends[np.concatenate((apart, some))]
    return starts, ends - starts


def _from_file(relative: str, root: Path) -> np.ndarray:
    try:
        path = path_below(root, relative)
    except InputError as error:
        _refuse(f"{error}; expected the path of an image, {' or '.join(_FORMS.values())}")
    try:
        return _decoded(read_regular(path, max_bytes=MAX_FILE_BYTES))
    except InputError as error:
        _refuse(f"its file: {error}; expected a whole image of one frame ({', '.join(_FILE_FORMATS)})")


def _decoded(data: bytes) -> np.ndarray:
    from PIL import Image, ImageOps

    keep_quiet("PIL")
    with (
        refusing("bad-mask", "it cannot be decoded to the end"),
        Image.open(io.BytesIO(data), formats=_FILE_FORMATS) as image,
    ):
        check_pixels(image.width, image.height, 1, MAX_PIXELS)
        n_frames = getattr(image, "n_frames", 1)
        if n_frames > 1:
            _refuse(f"{n_frames} frames")
        deep = any(";16" in str(tile.args) for tile in image.tile)
        image.load()
        return _above_zero(ImageOps.exif_transpose(image), deep)


def _above_zero(image: Image.Image, deep: bool) -> np.ndarray:
    """(h, w) bool; `deep` files have 16 bits a channel, of which Pillow drops half where channels are several."""
    if image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if image.mode == "F" and not np.isfinite(values).all():
            _refuse("some of its pixels are NaN or infinite")
        return values > 0
    if deep:
        _refuse("16 bits in each of several channels, whose lower half would be lost; save it with 8 bits, or in grey")
    return np.asarray(image.convert("RGB")).max(axis=2) > 0  # which leaves alpha aside and looks a palette up


def _check_belongs(own: Size, image: Size) -> None:
    if _is_scaled(own, image):
        return
    hint = "it must be of that size, or scaled by one factor"
    if _is_scaled(own, (image[1], image[0])):
        hint = "height and width are swapped: write its size as <height>x<width>, and its pixels the same way round"
    _refuse(f"the mask is {_words(own)}, its image {_words(image)}; {hint}")


def _is_scaled(one: Size, other: Size) -> bool:
    """Whether one factor, and rounding by less than a pixel either way, makes one size of the other."""

    def rounded(small: Size, large: Size) -> bool:
        (h, w), (height, width) = small, large
        return (h - 1) * width < (w + 1) * height and (w - 1) * height < (h + 1) * width

    return rounded(one, other) or rounded(other, one)


def _header(text: str) -> tuple[str, Size, str]:
    """Kind, size and the rest of a text of boxes or runs."""
    found = _HEADER.match(text)
    if not found:
        _refuse(f"it begins with {_short(text)}, expected {_FORMS[text.partition(':')[0]]}")
    return found[1], _checked_size((int(found[2]), int(found[3]))), text[found.end() :]


def _checked_size(size: Size) -> Size:
    height, width = map(int, size)
    if height < 1 or width < 1:
        _refuse(f"a size of {height} x {width}, expected a height and a width above 0")
    if height * width > MAX_PIXELS:
        _refuse(f"a size of {_words((height, width))} pixels, limit {MAX_PIXELS:,} in all")
    return height, width


def _first(wrong: np.ndarray) -> int | None:
    return int(np.argmax(wrong)) if wrong.any() else None


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)


def _words(size: Size) -> str:
    return f"{size[0]} x {size[1]} (height x width)"


def _short(text: str) -> str:
    return repr(text) if len(text) <= 24 else f"{text[:20]!r}..."


def _refuse(message: str) -> NoReturn:
    raise InputError("bad-mask", message) from None
