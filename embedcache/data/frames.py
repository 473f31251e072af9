"""Frames: which part of an image an encoder saw, so that masks are put under its tokens and predictions back.

A frame is what lies behind the encoder's square (or oblong) input after resizing, padding, cropping and, for a further
view, rotation. It is read from the transform in the encoder's record.

Shape notation: h and w of an image or its mask, H and W of what a frame is sampled at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedcache.data.masks import Size, resize_mask
from embedcache.data.views import Placement
from embedcache.errors import SettingsError

_OF_VALUES = {  # steps that change values and leave every pixel where it is
    "rescale", "normalize", "Normalize", "ToTensor", "MaybeToTensor", "MaybePILToTensor", "PILToTensor",
    "ConvertImageDtype", "ToDtype", "Lambda", "function",
}  # fmt: skip
_MOST_SAMPLES = 8  # on each axis within a pixel of a frame
_ROWS_AT_ONCE = 16  # of a frame: bounds memory
_UNSEEN = ("crop_pct", "do_pad", "pad_size")  # of processors of transformers: they move pixels, and no step says so
_TRIED: Size = (480, 640)  # an image whose way through a transform shows whether the steps say all


@dataclass(frozen=True)
class Frame:
    """An affine map from a frame to its image.

    Args:
        size: height and width of the image, in pixels.
        matrix: takes (u, v, 1), u to the right and v down, both from 0 to 1 over the frame, to x and y in pixels,
            (2, 3).
    """

    size: Size
    matrix: np.ndarray

    @classmethod
    def of(cls, steps: Sequence[Mapping[str, Any]], size: Size, placement: Placement | None = None) -> Frame:
        """The frame of an image under an encoder's transform.

        Args:
            steps: of the transform, as an encoder's record has them; none is the whole image.
            size: of the image.
            placement: of a further view; None for the plain one.

        Raises:
            SettingsError: a step of which it is not known where it leaves a pixel.
        """
        if placement is None:
            return cls(size, _through(steps, size).matrix)
        inner = _through(steps, (placement.height, placement.width)).matrix
        inner[:, 2] += placement.left, placement.top
        turn, centre = np.deg2rad(placement.angle), np.array([size[1] / 2, size[0] / 2])
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])  # y points down
        inner[:, 2] -= centre
        turned = rotation @ inner
        turned[:, 2] += centre
        return cls(size, turned)

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole image, upright."""
        height, width = self.size
        return bool(np.allclose(self.matrix, [[width, 0, 0], [0, height, 0]], atol=1e-6))

    def of_mask(self, mask: np.ndarray, size: Size) -> np.ndarray:
        """The mask within the frame, (h, w) bool to (H, W) bool.

        A pixel counts if at least half of it is inside: exactly where the frame is the whole image, else judged by up
        to 8 x 8 points. What lies outside the image is no mask.

        Args:
            mask: of the frame's image, in its size or scaled by one factor.
        """
        if self.is_whole:
            return resize_mask(mask, size)
        scale = np.array([[mask.shape[1] / self.size[1]], [mask.shape[0] / self.size[0]]])
        matrix = self.matrix * scale
        finest = np.abs(matrix[:, :2]).sum(axis=0) / (size[1], size[0])  # mask pixels that a pixel of the frame spans
        n = int(np.clip(np.ceil(finest.max()), 2, _MOST_SAMPLES))
        u = (np.arange(size[1] * n) + 0.5) / (size[1] * n)
        out = np.empty(size, bool)
        for start in range(0, size[0], _ROWS_AT_ONCE):
            rows = np.arange(start * n, min(start + _ROWS_AT_ONCE, size[0]) * n)
            v = (rows[:, None] + 0.5) / (size[0] * n)
            x, y = (np.floor(a * u + b * v + c).astype(np.int32) for a, b, c in matrix)
            inside = (x >= 0) & (y >= 0) & (x < mask.shape[1]) & (y < mask.shape[0])
            hits = inside & mask[np.clip(y, 0, mask.shape[0] - 1), np.clip(x, 0, mask.shape[1] - 1)]
            counts = hits.reshape(-1, n, size[1], n).sum(axis=(1, 3))
            out[start : start + len(counts)] = 2 * counts >= n * n
        return out

    def to_image(self, values: np.ndarray) -> np.ndarray:
        """Values of the frame (H, W) float put back into the image, (h, w) float32; 0 where the frame is not."""
        height, width = self.size
        if self.matrix[0, 1] == 0 == self.matrix[1, 0]:  # upright: rows and columns by themselves
            u = (np.arange(width) + 0.5 - self.matrix[0, 2]) / self.matrix[0, 0]
            v = (np.arange(height) + 0.5 - self.matrix[1, 2]) / self.matrix[1, 1]
            along = _between(np.asarray(values, np.float32).T, u)  # (width, H)
            return _between(along.T, v)
        inverse = np.linalg.inv(np.vstack([self.matrix, [0, 0, 1]]))[:2]
        y, x = np.mgrid[0:height, 0:width]
        u, v = np.tensordot(inverse, np.stack([x + 0.5, y + 0.5, np.ones(x.shape)]), 1)
        inside = (u >= 0) & (v >= 0) & (u <= 1) & (v <= 1)
        return np.where(inside, _bilinear(values, u, v), 0).astype(np.float32)


def frame_steps(encoder: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The steps of the transform in an encoder's record; none where embeddings were made elsewhere.

    Raises:
        SettingsError: a transform whose steps do not say all that moves a pixel.
    """
    identity = encoder.get("identity", {})
    transform = identity.get("transform")
    if not transform:
        return []
    steps = list(transform.get("steps", ()))
    if not steps:
        raise _unknown("unnamed", transform)
    for name in _UNSEEN:
        if transform.get("settings", {}).get(name):
            raise _unknown(name, transform["settings"][name])
    wanted, found = identity.get("input_size"), _through(steps, _TRIED)
    if wanted is not None and tuple(wanted) != (found.height, found.width):
        raise _unknown("that no record names", f"{found.height} x {found.width} pixels, not {wanted[0]} x {wanted[1]}")
    return steps


def _between(rows: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Rows (k, m) at places u (n,) from 0 to 1 along them, linearly between their centres, 0 outside: (n, m)."""
    at = np.clip(u * len(rows) - 0.5, 0, len(rows) - 1)
    below = np.minimum(at.astype(np.int64), max(len(rows) - 2, 0))
    share = (at - below).astype(np.float32)[:, None]
    found = rows[below] * (1 - share) + rows[np.minimum(below + 1, len(rows) - 1)] * share
    found[(u < 0) | (u > 1)] = 0
    return found


def _bilinear(values: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Values between the centres of pixels, at the border those of the last one."""
    height, width = values.shape
    x, y = np.clip(u * width - 0.5, 0, width - 1), np.clip(v * height - 0.5, 0, height - 1)
    left, top = np.minimum(x.astype(np.int64), max(width - 2, 0)), np.minimum(y.astype(np.int64), max(height - 2, 0))
    right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    a, b = x - left, y - top
    above = values[top, left] * (1 - a) + values[top, right] * a
    below = values[bottom, left] * (1 - a) + values[bottom, right] * a
    return above * (1 - b) + below * b


def _margin(room: int) -> int:
    """Pixels to the left of a centre crop, or minus those of padding; the odd one is on the right."""
    return room // 2 if room >= 0 else -(-room // 2)


class _Canvas:
    """An image on its way through a transform: its size, and where it lies in the image that it began as."""

    def __init__(self, size: Size) -> None:
        self.height, self.width = size
        self._scale, self._origin = np.ones(2), np.zeros(2)  # of x and y, in pixels of the image

    def resize(self, height: int, width: int) -> None:
        self._scale = self._scale * (self.width / width, self.height / height)
        self.height, self.width = height, width

    def crop(self, height: int, width: int) -> None:
        """Around the centre; where it is larger than the image, that is padded."""
        left, top = _margin(self.width - width), _margin(self.height - height)
        self._origin = self._origin + self._scale * (left, top)
        self.height, self.width = height, width

    @property
    def matrix(self) -> np.ndarray:
        x, y = self._scale * (self.width, self.height)
        return np.array([[x, 0, self._origin[0]], [0, y, self._origin[1]]])


def places_alike(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> bool:
    """Whether two transforms leave every pixel in the same place."""
    return all(np.allclose(_through(one, size).matrix, _through(other, size).matrix) for size in (_TRIED, _TRIED[::-1]))


def _through(steps: Sequence[Mapping[str, Any]], size: Size) -> _Canvas:
    """An image of this size at the end of a transform."""
    canvas = _Canvas(size)
    for step in steps:
        for name, settings in step.items():
            if name in ("resize", "Resize"):
                canvas.resize(*_resized(settings, (canvas.height, canvas.width), name))
            elif name in ("pad", "center_crop", "CenterCrop", "CenterCropOrPad"):
                canvas.crop(*_cropped(settings, (canvas.height, canvas.width), name))
            elif name not in _OF_VALUES:
                raise _unknown(name, settings)
    return canvas


def _resized(settings: Any, now: Size, name: str) -> Size:
    said = settings.get("size", settings) if isinstance(settings, Mapping) else settings
    if isinstance(said, Mapping) and {"height", "width"} <= set(said):
        return int(said["height"]), int(said["width"])
    if isinstance(said, Mapping) and "longest_edge" in said and "shortest_edge" not in said:
        longest = int(said["longest_edge"])
        return (
            (longest, max(int(now[1] * (longest / now[0])), 1))
            if now[0] >= now[1]
            else (max(int(now[0] * (longest / now[1])), 1), longest)
        )
    if isinstance(said, Mapping) and set(said) == {"shortest_edge"}:
        said = said["shortest_edge"]
    sides = [said] if isinstance(said, int) else list(said) if isinstance(said, list | tuple) else []
    most = settings.get("max_size") if isinstance(settings, Mapping) else None
    if most is not None or not sides or not all(isinstance(side, int) for side in sides) or len(sides) > 2:
        raise _unknown(name, settings)
    if len(sides) == 2:
        return sides[0], sides[1]
    short, long = min(now), max(now)
    other = int(sides[0] * long / short)
    return (sides[0], other) if now[0] <= now[1] else (other, sides[0])


def _cropped(settings: Any, now: Size, name: str) -> Size:
    if settings == "square":
        return min(now), min(now)
    said = settings.get("size", settings) if isinstance(settings, Mapping) else settings
    if isinstance(said, Mapping) and {"height", "width"} <= set(said):
        return int(said["height"]), int(said["width"])
    sides = [said] * 2 if isinstance(said, int) else list(said) if isinstance(said, list | tuple) else []
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise _unknown(name, settings)
    return sides[0], sides[1]


def _unknown(name: str, settings: Any) -> SettingsError:
    return SettingsError(
        f"the encoder's transform has a step {name!r} ({settings!r}), and where that leaves a pixel is not known, so "
        "no mask can be put under its tokens; extract with --transform paper"
    )
