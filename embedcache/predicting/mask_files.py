"""Masks of new images as files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from embedcache.data.frames import Frame
from embedcache.output import write_whole

_ENDING = ".mask.png"


def mask_files(files: Sequence[Path], folder: Path) -> list[Path]:
    """A file in the folder for the mask of each image, `<name>.mask.png`; later ones of equal names are numbered."""
    taken: Counter[str] = Counter()
    names = []
    for file in files:
        stem = file.stem
        while taken[stem]:
            taken[file.stem] += 1
            stem = f"{file.stem}-{taken[file.stem]}"
        taken[stem] += 1
        names.append(folder / f"{stem}{_ENDING}")
    return names


def write_mask(file: Path, place: Frame, probabilities: np.ndarray, threshold: float) -> dict[str, object]:
    """Writes a mask in its image's own frame, 255 inside and 0 outside.

    Args:
        place: the frame that the encoder saw, in the image.
        probabilities: of the mask in that frame, (H, W).

    Returns:
        `mask`, the file, and `mask.area`, its share of the image.

    Raises:
        OutputError: it cannot be written.
    """
    from PIL import Image

    inside = place.to_image(probabilities) > threshold
    picture = Image.fromarray(inside.astype(np.uint8) * np.uint8(255))
    write_whole(file, lambda temporary: picture.save(temporary, format="PNG"))
    return {"mask": str(file), "mask.area": float(inside.mean())}
