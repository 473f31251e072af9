"""Image transforms: the encoder's own, resolved to the last setting, and the paper's by name.

Shape notation: h and w of the decoded image, H and W of what the model takes, c channels.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from embedcache.encoders.base import plain_json
from embedcache.errors import EncoderError

_RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers
_KNOWN_STEPS = ("torchvision.transforms.", "timm.data.", "open_clip.transform")
_PROCESSOR_NOT_VALUES = ("image_processor_type", "feature_extractor_type", "processor_class", "auto_map")
_PAPER_SIDE, _PAPER_CROP = 256, 224


@dataclass(frozen=True)
class ImageTransform:
    """From decoded pixels to what the model takes.

    Args:
        apply: (h, w, 3) uint8, or (h, w) where `channels` is `grey`, to (c, H, W) float32.
        identity: all that determines it, JSON-ready; part of the fingerprint.
        channels: what it expects of the decoder.
        resize_side: the longer side in pixels that an image is resized to, before any crop.
    """

    apply: Callable[[np.ndarray], torch.Tensor]
    identity: Mapping[str, Any]
    channels: Literal["rgb", "grey"]
    resize_side: int

    def output_shape(self, source: str) -> tuple[int, int, int]:
        """(c, H, W), the same for every input.

        Raises:
            EncoderError: the transform's output depends on the input's shape, so that images cannot be batched.
        """
        grey = () if self.channels == "grey" else (3,)
        wide, tall = (self.apply(np.zeros((*sides, *grey), np.uint8)).shape for sides in ((48, 64), (64, 48)))
        if wide != tall or len(wide) != 3:
            raise EncoderError(
                f"{source}: its transform gives arrays of shapes {list(wide)} for a wide image and {list(tall)} for a "
                "tall one, expected [channels, height, width] alike; choose transform 'paper' (--transform paper)"
            )
        return wide[0], wide[1], wide[2]


def of_processor(processor: Any, source: str) -> ImageTransform:
    """The transform of an image processor of transformers."""
    settings = plain_json(processor.to_dict(), f"{source}: image processor")
    for unkeyed in (
        "image_processor_type",
        "processor_class",
        "_processor_class",
        "auto_map",
        "feature_extractor_type",
    ):
        settings.pop(unkeyed, None)
    sides = _numbers(settings.get("size") if settings.get("do_resize") else settings.get("crop_size"))

    def apply(pixels: np.ndarray) -> torch.Tensor:
        channels_first = torch.from_numpy(pixels).permute(2, 0, 1)
        return processor(channels_first, return_tensors="pt")["pixel_values"][0]

    identity = {
        "library": "transformers",
        "class": type(processor).__name__,
        "backend": "torchvision" if _is_torchvision(processor) else "pil",
        "channel_order": "RGB",
        "steps": _processor_steps(settings),
        "settings": settings,
    }
    return ImageTransform(apply, identity, "rgb", max(sides, default=0))


def processor_sizes(settings: Mapping[str, Any], image_size: int, source: str) -> dict[str, Any]:
    """Arguments that make an image processor of transformers give `image_size` squares, its crop ratio kept."""
    size, crop = settings.get("size") or {}, settings.get("crop_size") or {}
    if settings.get("do_center_crop") and crop:
        ratio = max(_numbers(size), default=1) / max(_numbers(crop))
        resized, arguments = round(image_size * ratio), {"crop_size": {"height": image_size, "width": image_size}}
    else:
        resized, arguments = image_size, {}
    if "shortest_edge" in size:
        return {**arguments, "size": {"shortest_edge": resized}}
    if {"height", "width"} <= set(size):
        return {**arguments, "size": {"height": resized, "width": resized}}
    raise EncoderError(f"{source}: image_size {image_size}: its processor has size {size}, which cannot be changed so")


def of_compose(compose: Any, source: str, *, own_modules: tuple[str, ...] = ()) -> ImageTransform:
    """The transform that a torchvision `Compose` of torchvision, timm or open_clip steps describes.

    Args:
        own_modules: modules whose own steps are covered by a digest of their source file.

    Raises:
        EncoderError: a step of another library, or one whose settings cannot be fingerprinted.
    """
    from PIL import Image

    steps, sides = [], [0]
    for step in compose.transforms:
        module = type(step).__module__
        if not module.startswith(_KNOWN_STEPS) and module not in own_modules:
            raise EncoderError(f"{source}: its transform has a step {module}.{type(step).__name__} of unknown content")
        settings = {key: _plain(value) for key, value in vars(step).items() if key[0] != "_" and key != "training"}
        steps.append({type(step).__name__: plain_json(settings, f"{source}: transform {type(step).__name__}")})
        if "Resize" in type(step).__name__:
            sides += _numbers(settings.get("size"))

    def apply(pixels: np.ndarray) -> torch.Tensor:
        return compose(Image.fromarray(pixels))

    identity = {"library": "torchvision", "channel_order": "RGB", "steps": steps}
    return ImageTransform(apply, identity, "rgb", max(sides))


def of_xrv(image_size: int) -> ImageTransform:
    """torchxrayvision's own: grey, values to [-1024, 1024], centre square, resized by scikit-image."""
    from torchxrayvision.datasets import XRayCenterCrop, XRayResizer
    from torchxrayvision.utils import normalize

    crop, resize = XRayCenterCrop(), XRayResizer(image_size)

    def apply(pixels: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(resize(crop(normalize(pixels, 255)[None])))

    steps = [
        {"rescale": {"from": [0, 255], "to": [-1024, 1024]}},
        {"center_crop": "square"},
        {"resize": {"size": image_size, "interpolation": "bilinear", "antialias": True, "by": "skimage"}},
    ]
    return ImageTransform(
        apply, {"library": "torchxrayvision", "channel_order": "grey", "steps": steps}, "grey", image_size
    )


def paper_transform(*, to_unit: bool = True) -> ImageTransform:
    """The paper's: grey, the longer side to 256 by area, padded with black, centre crop 224, mean = std = 0.5.

    As in the data code that the paper's code takes over from MGCA (Wang et al. 2022).

    Args:
        to_unit: False for models that take one grey channel in [-1024, 1024] instead of three in [-1, 1].
    """

    def apply(pixels: np.ndarray) -> torch.Tensor:
        square = _padded(_resized_to(pixels, _PAPER_SIDE))
        start = (_PAPER_SIDE - _PAPER_CROP) // 2
        cropped = square[start : start + _PAPER_CROP, start : start + _PAPER_CROP].astype(np.float32)
        scaled = torch.from_numpy((cropped / 255 - 0.5) / 0.5)
        return scaled.expand(3, -1, -1).contiguous() if to_unit else (scaled * 1024)[None]

    steps = [
        {"resize": {"longest_edge": _PAPER_SIDE, "interpolation": "area"}},
        {"pad": {"height": _PAPER_SIDE, "width": _PAPER_SIDE, "value": 0}},
        {"center_crop": _PAPER_CROP},
        {"rescale": 1 / 255},
        {"normalize": {"mean": 0.5, "std": 0.5}} if to_unit else {"rescale": {"to": [-1024, 1024]}},
    ]
    identity = {"library": "embedcache", "name": "paper", "channel_order": "grey", "steps": steps}
    return ImageTransform(apply, identity, "grey", _PAPER_SIDE)


def _resized_to(pixels: np.ndarray, longest: int) -> np.ndarray:
    height, width = pixels.shape
    if height >= width:
        new_height, new_width = longest, max(int(width * (longest / height)), 1)
    else:
        new_height, new_width = max(int(height * (longest / width)), 1), longest
    means = _area_means(_area_means(pixels.astype(np.float64), new_height).T, new_width).T
    halved = (height, width) == (2 * new_height, 2 * new_width)
    return (np.floor(means + 0.5) if halved else np.rint(means)).astype(np.uint8)  # OpenCV breaks these ties upwards


def _area_means(rows: np.ndarray, n: int) -> np.ndarray:
    """Means of n equal stretches along the first axis, (h, w) to (n, w); rows cut by a border count in part."""
    sums = np.concatenate([np.zeros((1, rows.shape[1])), np.cumsum(rows, axis=0)])
    borders = np.arange(n + 1) * (len(rows) / n)
    below = np.minimum(borders.astype(np.int64), len(rows) - 1)
    at_borders = sums[below] + (borders - below)[:, None] * rows[below]
    return np.diff(at_borders, axis=0) / np.diff(borders)[:, None]


def _padded(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape
    top, left = (_PAPER_SIDE - height) // 2, (_PAPER_SIDE - width) // 2
    square = np.zeros((_PAPER_SIDE, _PAPER_SIDE), np.uint8)
    square[top : top + height, left : left + width] = pixels
    return square


def _processor_steps(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a processor does, in its order, in words; `settings` beside it says the same in the library's own."""
    steps: list[dict[str, Any]] = []
    if settings.get("do_resize"):
        number = settings.get("resample")
        name = _RESAMPLING[number] if isinstance(number, int) and number < len(_RESAMPLING) else number
        steps.append({"resize": {"size": settings.get("size"), "interpolation": name, "antialias": True}})
    if settings.get("do_center_crop"):
        steps.append({"center_crop": settings.get("crop_size")})
    if settings.get("do_rescale"):
        steps.append({"rescale": settings.get("rescale_factor")})
    if settings.get("do_normalize"):
        steps.append({"normalize": {"mean": settings.get("image_mean"), "std": settings.get("image_std")}})
    return steps


def _is_torchvision(processor: Any) -> bool:
    return any(base.__name__ == "TorchvisionBackend" for base in type(processor).__mro__)


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, torch.dtype):
        return str(value)
    return value


def _numbers(value: Any) -> list[int]:
    if isinstance(value, Mapping):
        return [v for v in value.values() if isinstance(v, int)]
    if isinstance(value, (list, tuple)):
        return [v for v in value if isinstance(v, int)]
    return [value] if isinstance(value, int) else []
