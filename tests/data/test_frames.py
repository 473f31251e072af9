"""Frames: a mask lands where the encoder's own transform puts the pixels that it marks, and comes back from there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torchvision import transforms
from transformers import BitImageProcessor, CLIPImageProcessor, ConvNextImageProcessor, ViTImageProcessor

from embedcache.data.augment import augmented
from embedcache.data.frames import Frame, frame_steps, places_alike
from embedcache.data.views import ViewPolicy, drawn_view
from embedcache.encoders.transforms import ImageTransform, of_compose, of_processor, of_xrv, paper_transform
from embedcache.errors import SettingsError

SHAPES = [(300, 200), (200, 300), (256, 256), (150, 211)]
DIGEST = bytes(range(16))


def l_shape(shape: tuple[int, int]) -> np.ndarray:
    """No mirror or turn of it is the same; it reaches into no corner that a crop would take."""
    h, w = shape
    mask = np.zeros(shape, bool)
    mask[h * 3 // 10 : h * 7 // 10, w * 3 // 10 : w * 4 // 10] = True
    mask[h * 6 // 10 : h * 7 // 10, w * 3 // 10 : w * 6 // 10] = True
    return mask


def squares(size: int = 64) -> ImageTransform:
    return of_processor(ViTImageProcessor(size={"height": size, "width": size}), "made")


TRANSFORMS: dict[str, Callable[[], ImageTransform]] = {
    "paper": paper_transform,
    "squares": squares,
    "shortest edge, crop": lambda: of_processor(
        BitImageProcessor(size={"shortest_edge": 80}, crop_size={"height": 64, "width": 64}, do_convert_rgb=False), "m"
    ),
    "clip": lambda: of_processor(CLIPImageProcessor(), "made"),
    "torchvision": lambda: of_compose(
        transforms.Compose([transforms.Resize(72), transforms.CenterCrop((64, 64)), transforms.ToTensor()]), "made"
    ),
    "torchvision, both sides": lambda: of_compose(
        transforms.Compose([transforms.Resize((48, 96)), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]), "made"
    ),
}


def seen(transform: ImageTransform, grey: np.ndarray) -> np.ndarray:
    """What of a mask, drawn white, the model is given: bright or not, (H, W) bool."""
    pixels = grey if transform.channels == "grey" else np.repeat(grey[..., None], 3, axis=2)
    values = transform.apply(pixels)[0].numpy()
    black = transform.apply(np.zeros_like(pixels))[0].numpy()
    white = transform.apply(np.full_like(pixels, 255))[0].max().item()
    return values > (black.min() + white) / 2


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_mask_lands_where_the_transform_puts_its_pixels(name: str, shape: tuple[int, int]) -> None:
    transform, mask = TRANSFORMS[name](), l_shape(shape)
    expected = seen(transform, mask.astype(np.uint8) * 255)
    frame = Frame.of(frame_steps({"identity": {"transform": transform.identity}}), shape)
    got = frame.of_mask(mask, (expected.shape[0], expected.shape[1]))
    assert got.sum() > 30
    assert overlap(got, expected) > 0.93
    assert overlap(got, expected[:, ::-1]) < 0.7
    assert overlap(got, expected[::-1]) < 0.7


def test_torchxrayvisions_transform_too() -> None:
    pytest.importorskip("torchxrayvision")
    transform, mask = of_xrv(64), l_shape((300, 200))
    got = Frame.of(transform.identity["steps"], mask.shape).of_mask(mask, (64, 64))
    assert overlap(got, seen(transform, mask.astype(np.uint8) * 255)) > 0.93


@pytest.mark.parametrize("view", [1, 2, 3])
def test_a_mask_follows_a_view_that_is_rotated_and_cropped(view: int) -> None:
    policy = ViewPolicy(rotation_degrees=30, min_area=0.5, brightness=0, contrast=0)
    transform, mask = paper_transform(), l_shape((300, 200))
    pixels = augmented(mask.astype(np.uint8) * 255, DIGEST, view, policy)
    placement = drawn_view((300, 200), DIGEST, view, policy).placement
    got = Frame.of(transform.identity["steps"], mask.shape, placement).of_mask(mask, (224, 224))
    assert overlap(got, seen(transform, pixels)) > 0.93
    plain = Frame.of(transform.identity["steps"], mask.shape).of_mask(mask, (224, 224))
    assert overlap(got, plain) < 0.9


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_is_predicted_in_a_frame_comes_back_to_its_place(name: str, shape: tuple[int, int]) -> None:
    frame, mask = Frame.of(TRANSFORMS[name]().identity["steps"], shape), l_shape(shape)
    back = frame.to_image(frame.of_mask(mask, (224, 224)).astype(np.float32))
    assert back.shape == shape
    assert overlap(back >= 0.5, mask) > 0.93


def test_the_whole_image_is_resized_exactly() -> None:
    mask = np.random.default_rng(0).random((120, 80)) < 0.5
    frame = Frame.of([], (120, 80))
    assert frame.is_whole
    np.testing.assert_array_equal(frame.of_mask(mask, (120, 80)), mask)
    cells = mask.reshape(30, 4, 20, 4).sum(axis=(1, 3)) * 2 >= 16
    np.testing.assert_array_equal(frame.of_mask(mask, (30, 20)), cells)


def test_a_mask_in_another_size_than_its_image_lands_in_the_same_place() -> None:
    steps, mask = paper_transform().identity["steps"], l_shape((600, 400))
    frame = Frame.of(steps, (300, 200))
    assert overlap(frame.of_mask(mask, (224, 224)), frame.of_mask(l_shape((300, 200)), (224, 224))) > 0.97


@pytest.mark.parametrize(
    "step",
    [
        {"RandomAffine": {"degrees": 3}},
        {"resize": {"size": {"shortest_edge": 5, "longest_edge": 9}}},
        {"Resize": {"size": 3, "max_size": 9}},
    ],
)
def test_a_step_of_unknown_place_is_refused(step: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r"no mask can be put under its tokens; extract with --transform paper"):
        Frame.of([step], (30, 20))


@pytest.mark.parametrize("shape", [(171, 256), (256, 171), (90, 255)])
def test_padding_leaves_a_mask_where_it_leaves_the_pixels_to_the_pixel(shape: tuple[int, int]) -> None:
    """An image whose longer side is 256 is padded and cropped alone, by an odd number of pixels."""
    mask = l_shape(shape)
    expected = seen(paper_transform(), mask.astype(np.uint8) * 255)
    got = Frame.of(paper_transform().identity["steps"], shape).of_mask(mask, (224, 224))
    assert (got != expected).sum() <= (0 if 256 in shape else 60)


def test_processors_that_do_more_than_their_steps_say_are_refused() -> None:
    """ConvNeXt's resizes to more and crops, and only its settings know."""
    convnext = of_processor(ConvNextImageProcessor(size={"shortest_edge": 224}), "made")
    with pytest.raises(SettingsError, match="a step 'crop_pct'"):
        frame_steps({"identity": {"transform": convnext.identity}})
    with pytest.raises(SettingsError, match="a step 'unnamed'"):
        frame_steps({"identity": {"transform": {"library": "mine"}}})
    paper = paper_transform().identity
    assert frame_steps({"identity": {"transform": paper, "input_size": (224, 224)}}) == paper["steps"]
    with pytest.raises(SettingsError, match="224 x 224 pixels, not 256 x 256"):
        frame_steps({"identity": {"transform": paper, "input_size": [256, 256]}})


def test_transforms_that_differ_in_values_alone_place_alike() -> None:
    resize, crop = {"Resize": {"size": 72}}, {"CenterCrop": {"size": (64, 64)}}
    assert places_alike([resize, crop], [resize, crop, {"Normalize": {"mean": 0.5}}])
    assert not places_alike([resize, crop], [resize])


def test_embeddings_made_elsewhere_are_of_the_whole_image() -> None:
    assert frame_steps({"name": "external"}) == []


def test_upright_frames_are_put_back_as_turned_ones_are() -> None:
    """Rows and columns by themselves give what both at once give, inside, across borders and outside."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        size, shape = tuple(rng.integers(20, 90, 2)), tuple(rng.integers(1, 40, 2))
        scale, origin = rng.uniform(0.4, 1.6, 2) * size[::-1], rng.uniform(-15, 15, 2)
        upright = np.array([[scale[0], 0, origin[0]], [0, scale[1], origin[1]]])
        hardly_turned = upright + np.array([[0, 1e-9, 0], [1e-9, 0, 0]])
        values = rng.random(shape)
        found, expected = (Frame((size[0], size[1]), m).to_image(values) for m in (upright, hardly_turned))
        assert found.shape == size
        assert found.dtype == np.float32
        assert (np.abs(found - expected) > 1e-5).mean() < 1e-3  # a pixel on the very border may fall on either side
