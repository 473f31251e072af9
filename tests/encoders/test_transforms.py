"""The paper's transform against OpenCV's own, and transforms resolved to their last setting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import embedcache
from embedcache.encoders.transforms import of_compose, paper_transform
from embedcache.errors import EncoderError

cv2 = pytest.importorskip("cv2")


def as_the_paper(grey: np.ndarray) -> np.ndarray:
    """Longer side to 256 by OpenCV's area interpolation, black borders, the 224 pixels in the middle."""
    height, width = grey.shape
    scale = 256 / max(height, width)
    size = (256, int(height * scale)) if width > height else (int(width * scale), 256)
    resized = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    square = np.zeros((256, 256), np.uint8)
    top, left = (256 - resized.shape[0]) // 2, (256 - resized.shape[1]) // 2
    square[top : top + resized.shape[0], left : left + resized.shape[1]] = resized
    return square[16:240, 16:240]


@pytest.mark.parametrize("shape", [(2500, 3000), (1024, 1024), (512, 512), (777, 301), (1000, 333), (299, 300)])
def test_the_papers_transform_is_opencvs_to_the_grey_level(shape: tuple[int, int]) -> None:
    grey = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    got = paper_transform().apply(grey)
    assert got.shape == (3, 224, 224)
    assert torch.equal(got[0], got[2])
    levels = np.rint((got[0].numpy() * 0.5 + 0.5) * 255)
    differing = levels != as_the_paper(grey)
    assert differing.mean() < 1e-4  # OpenCV adds in single precision, so a tie may fall to the other side
    assert np.abs(levels - as_the_paper(grey)).max() <= 1
    for_xrv = paper_transform(to_unit=False).apply(grey)
    np.testing.assert_allclose(for_xrv[0], (2 * levels / 255 - 1) * 1024, atol=1e-3)


def test_a_small_image_is_enlarged_within_a_grey_level() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (200, 150), dtype=np.uint8)
    levels = (paper_transform().apply(grey)[0].numpy() * 0.5 + 0.5) * 255
    assert np.abs(levels - as_the_paper(grey)).max() <= 1.001


def test_an_encoder_takes_the_papers_transform_by_name(made, images: list[Path]) -> None:
    encoder = embedcache.load_encoder(f"timm:{made['timm']['resnet']}", transform="paper", device="cpu")
    described = encoder.record.identity["transform"]
    assert described["name"] == "paper"
    assert described["channel_order"] == "grey"
    assert encoder.record.identity["decode"]["channels"] == "grey"
    prepared = encoder.prepare(images[0])
    assert prepared.inputs.shape == (3, 224, 224)
    grey = embedcache.load_encoder(f"xrv:{made['xrv']['101-elastic']}", transform="paper", device="cpu")
    assert grey.prepare(images[0]).inputs.shape == (1, 224, 224)
    assert grey.prepare(images[0]).inputs.min() >= -1024


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf-image/vit", {"interpolation": "bicubic", "antialias": True, "crop": 32, "mean": [0.5, 0.4, 0.3]}),
        ("timm/vit", {"interpolation": "bicubic", "antialias": True, "crop": 32, "mean": [0.5, 0.5, 0.5]}),
        ("open_clip/native", {"interpolation": "bicubic", "antialias": True, "crop": 32, "mean": [0.5, 0.4, 0.3]}),
    ],
)
def test_a_transform_is_resolved_into_the_record(made, source: str, expected: dict) -> None:
    library, _, name = source.partition("/")
    prefix = library.removesuffix("-image")
    options = {"modality": "image"} if prefix == "open_clip" else {}
    record = embedcache.load_encoder(f"{prefix}:{made[library][name]}", device="cpu", **options).record
    described = record.identity["transform"]
    steps = {key.lower().replace("_", ""): value for step in described["steps"] for key, value in step.items()}
    assert steps["resize"]["interpolation"] == expected["interpolation"]
    assert steps["resize"]["antialias"] is True
    crop = steps["centercrop"]
    assert expected["crop"] in (crop.get("height"), (crop.get("size") or [None])[0])
    np.testing.assert_allclose(steps["normalize"]["mean"], expected["mean"], atol=1e-6)
    assert described["channel_order"] == "RGB"


def test_a_step_of_unknown_content_is_refused() -> None:
    from torchvision.transforms import Compose, Lambda, Resize, ToTensor

    class Mine:
        def __call__(self, image):
            return image

    with pytest.raises(EncoderError, match=r"a step .*Mine of unknown content"):
        of_compose(Compose([Mine(), ToTensor()]), "x")
    with pytest.raises(EncoderError, match=r"transform Lambda cannot be fingerprinted"):
        of_compose(Compose([Lambda(lambda image: image), ToTensor()]), "x")
    own = of_compose(Compose([Mine(), Resize((8, 8)), ToTensor()]), "x", own_modules=(Mine.__module__,))
    assert own.output_shape("x") == (3, 8, 8)
