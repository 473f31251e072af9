"""Views of an image made of its pixels, as `views` draws them.

Shape notation: h and w of a decoded image.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from embedcache.data.views import ViewPolicy, drawn_view


def augmented(pixels: np.ndarray, digest: bytes, view: int, policy: ViewPolicy) -> np.ndarray:
    """One view of an image: rotated, cropped, brightness and contrast changed.

    Args:
        pixels: (h, w) or (h, w, 3), uint8.
        digest: of the image file.
        view: from 1.

    Returns:
        (h', w') or (h', w', 3), uint8: the crop in its own size.
    """
    drawn = drawn_view((pixels.shape[0], pixels.shape[1]), digest, view, policy)
    at, image = drawn.placement, Image.fromarray(pixels)
    if policy.rotation_degrees:
        image = image.rotate(at.angle, resample=Image.Resampling.BILINEAR)
    image = image.crop((at.left, at.top, at.left + at.width, at.top + at.height))
    mean = float(np.asarray(image).mean())
    levels = np.arange(256) * drawn.brightness
    levels = (levels - mean * drawn.brightness) * drawn.contrast + mean * drawn.brightness
    table = np.rint(np.clip(levels, 0, 255)).astype(np.uint8)
    return table[np.asarray(image)]
