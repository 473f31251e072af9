"""Pictures for pages: thumbnails with masks drawn in, as data URIs.

Shape notation: h' and w' of a thumbnail.
"""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

_COLOUR = (255, 96, 0)  # of masks: no radiograph has it
_OTHER = (0, 190, 255)  # of the mask that another is compared with
_FILL = 0.3


def thumbnail(pixels: np.ndarray, size: int) -> np.ndarray:
    """(h', w', 3) uint8, the longer of h' and w' being `size`."""
    height, width = pixels.shape[:2]
    scale = size / max(height, width)
    small = (max(round(width * scale), 1), max(round(height * scale), 1))
    return np.asarray(Image.fromarray(pixels).resize(small, Image.Resampling.LANCZOS))


def overlaid(pixels: np.ndarray, mask: np.ndarray, other: np.ndarray | None = None) -> np.ndarray:
    """Pixels tinted where the mask is, with its border drawn, and with the border of another one in another colour.

    Args:
        pixels: (h', w', 3) uint8.
        mask: (h', w') bool.
        other: (h', w') bool.
    """
    shown = pixels.astype(np.float32)
    shown[mask] += _FILL * (np.array(_COLOUR, np.float32) - shown[mask])
    shown[_border(mask)] = _COLOUR
    if other is not None:
        shown[_border(other)] = _OTHER
    return np.rint(shown).astype(np.uint8)


def data_uri(pixels: np.ndarray) -> str:
    """A JPEG of (h', w', 3) uint8, as a text that a page can hold."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=88, subsampling=0)  # halved colours would smear a mask's border
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def _border(mask: np.ndarray) -> np.ndarray:
    around = np.pad(mask, 1)
    inner = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    return mask & ~inner
