"""Masks of new images, and the files that they are written to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from embedcache.errors import OutputError
from embedcache.output import write_whole

_ENDING = ".mask.png"
_IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".dcm", ".dicom")


def mask_files(names: Sequence[str], folder: Path) -> list[Path]:
    """A file in the folder for the mask of each image.

    It is called as the image is, without the ending of an image file (a UID's last part is none), and `.mask.png`; of
    equal names the later ones are numbered.

    Raises:
        OutputError: one of them is there already.
    """
    found: list[Path] = []
    taken: set[str] = set()
    for name in names:
        path = Path(name)
        stem = path.stem if path.suffix.lower() in _IMAGES else path.name
        numbered = (f"{stem}-{k}" for k in range(2, len(names) + 2))
        stem = stem if stem not in taken else next(n for n in numbered if n not in taken)
        taken.add(stem)
        found.append(folder / f"{stem}{_ENDING}")
    there = next((file for file in found if file.exists() or file.is_symlink()), None)
    if there is not None:
        raise OutputError(f"{there}: is there already, and no mask replaces a file; name another folder, or delete it")
    return found


def write_mask(file: Path, mask: np.ndarray) -> None:
    """Writes a mask (h, w) bool as PNG, 255 inside and 0 outside; never in the place of another file.

    Raises:
        OutputError: it cannot be written, or something is there.
    """
    from PIL import Image

    picture = Image.fromarray(mask.astype(np.uint8) * np.uint8(255))
    write_whole(file, lambda temporary: picture.save(temporary, format="PNG"), replaces=False)
