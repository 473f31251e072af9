"""Further views of a sample: pixels augmented, sentences sampled, both drawn from the content and nothing else.

View 0 is the plain sample. Every other view is a function of the input's digest, the number of the view and the seed,
so that it is the same on every machine, in every order, and for equal inputs under other ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Le

from embedcache.settings import STRICT, check


@dataclass(frozen=True)
class ViewPolicy:
    """How views are drawn. Every field is part of the fingerprint of a store with several views.

    Images are never mirrored: in a radiograph left is not right.

    Args:
        seed: another seed gives other views.
        min_area: a crop keeps at least this share of the image's area, and its aspect ratio.
        rotation_degrees: largest angle of a rotation to either side; corners become black.
        brightness: largest factor by which values grow or shrink, 0.2 for 0.8 to 1.2.
        contrast: the same for distances from the mean.
        keep_sentence: probability of each sentence of a report to stay; one at least does, and their order.
    """

    __pydantic_config__ = STRICT

    seed: int = 0
    min_area: Annotated[float, Gt(0), Le(1)] = 0.8
    rotation_degrees: Annotated[float, Ge(0), Le(180)] = 10.0
    brightness: Annotated[float, Ge(0), Le(1)] = 0.2
    contrast: Annotated[float, Ge(0), Le(1)] = 0.2
    keep_sentence: Annotated[float, Gt(0), Le(1)] = 0.5

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Placement:
    """Where one view of an image lies in it.

    Args:
        angle: of the rotation around the image's centre, in degrees, anticlockwise.
        left, top, width, height: of the crop from the rotated image, in pixels.
    """

    angle: float
    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True)
class DrawnView:
    """One view of an image: where it lies, and factors of brightness and contrast."""

    placement: Placement
    brightness: float
    contrast: float


def drawn_view(size: tuple[int, int], digest: bytes, view: int, policy: ViewPolicy) -> DrawnView:
    """How one view of an image is made.

    Args:
        size: height and width of the image.
        digest: of the image file.
        view: from 1.
    """
    draw = _draws(digest, view, policy.seed)
    angle = (2 * next(draw) - 1) * policy.rotation_degrees if policy.rotation_degrees else 0.0
    side = (policy.min_area + next(draw) * (1 - policy.min_area)) ** 0.5
    height, width = (max(round(length * side), 1) for length in size)
    left, top = (int(next(draw) * (room + 1)) for room in (size[1] - width, size[0] - height))
    brightness, contrast = (1 + (2 * next(draw) - 1) * most for most in (policy.brightness, policy.contrast))
    return DrawnView(Placement(angle, left, top, width, height), brightness, contrast)


def sampled(sentences: Sequence[str], digest: bytes, view: int, policy: ViewPolicy) -> str:
    """One view of a text: some of its sentences, in order.

    Args:
        sentences: all of them, one at least.
        digest: of the report.
        view: from 1.
    """
    chances = list(zip(_draws(digest, view, policy.seed), sentences, strict=False))
    kept = [sentence for chance, sentence in chances if chance < policy.keep_sentence]
    return " ".join(kept) if kept else min(chances)[1]


def _draws(digest: bytes, view: int, seed: int) -> Iterator[float]:
    """Numbers in [0, 1): from SHA-256, since the streams of random generators change with their library."""
    start = hashlib.sha256(digest + f" view {view} seed {seed}".encode()).digest()
    count = 0
    while True:
        block = hashlib.sha256(start + count.to_bytes(8, "little")).digest()
        yield from (int.from_bytes(block[k : k + 8], "little") / 2**64 for k in range(0, 32, 8))
        count += 1
