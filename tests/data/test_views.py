"""Views: drawn from the content, the same everywhere, and what they claim to be."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from embedcache.data.augment import augmented
from embedcache.data.views import ViewPolicy, sampled

DIGEST = bytes(range(16))
STILL = ViewPolicy(min_area=1.0, rotation_degrees=0.0, brightness=0.0, contrast=0.0)


def picture(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60, 3), (1, 1), (1, 500)])
def test_a_view_is_drawn_from_digest_number_and_seed_alone(shape: tuple[int, ...]) -> None:
    pixels, policy = picture(*shape), ViewPolicy()
    view = augmented(pixels, DIGEST, 1, policy)
    assert view.dtype == np.uint8
    assert view.ndim == pixels.ndim
    np.testing.assert_array_equal(view, augmented(pixels.copy(), DIGEST, 1, policy))
    if pixels.size > 500:
        for other in (
            augmented(pixels, DIGEST, 2, policy),
            augmented(pixels, DIGEST[::-1], 1, policy),
            augmented(pixels, DIGEST, 1, ViewPolicy(seed=1)),
        ):
            assert other.shape != view.shape or (other != view).any()


def test_the_bits_of_a_view_are_pinned() -> None:
    """Another drawing under the same policy would be other values under the same fingerprint."""
    pixels = np.add.outer(np.arange(40), 2 * np.arange(50)).astype(np.uint8)
    view = augmented(pixels, DIGEST, 1, ViewPolicy(rotation_degrees=0.0))
    assert view.shape == (36, 46)
    assert hashlib.sha256(view.tobytes()).hexdigest()[:16] == "a7e99b309ab1b20e"


def test_nothing_asked_changes_nothing() -> None:
    pixels = picture(30, 20, 3)
    np.testing.assert_array_equal(augmented(pixels, DIGEST, 3, STILL), pixels)


def test_crops_keep_the_area_asked_and_images_are_never_mirrored() -> None:
    pixels = np.tile(np.arange(0, 200, dtype=np.uint8), (100, 1))  # brighter to the right
    policy = ViewPolicy(min_area=0.5, rotation_degrees=0.0)
    areas = []
    for view in range(1, 60):
        crop = augmented(pixels, DIGEST, view, policy)
        areas.append(crop.size / pixels.size)
        assert (np.diff(crop.astype(int), axis=1) >= 0).all()
    assert 0.49 < min(areas) < 0.6
    assert 0.9 < max(areas) <= 1.0


def test_brightness_and_contrast_stay_within_what_was_asked() -> None:
    pixels = picture(64, 64) // 2 + 64
    for view in range(1, 40):
        bright = augmented(pixels, DIGEST, view, ViewPolicy(1, 1.0, 0.0, 0.2, 0.0))
        assert 0.79 < bright.mean() / pixels.mean() < 1.21
        contrast = augmented(pixels, DIGEST, view, ViewPolicy(1, 1.0, 0.0, 0.0, 0.2))
        assert abs(contrast.mean() - pixels.mean()) < 1
        assert 0.78 < contrast.std() / pixels.std() < 1.22


def test_sentences_are_kept_in_order_and_one_at_least() -> None:
    parts = [f"{word} one." for word in ("First", "Second", "Third", "Fourth")]
    views = [sampled(parts, DIGEST, view, ViewPolicy()) for view in range(1, 200)]
    for view in views:
        kept = [part for part in parts if part in view]
        assert " ".join(kept) == view != ""
    assert {len(view) for view in views} == {len(p) for p in views}
    share = np.mean([view.count("one.") for view in views]) / 4
    assert 0.45 < share < 0.62
    assert all(any(part in view for view in views) for part in parts)
    assert sampled(parts, DIGEST, 1, ViewPolicy(keep_sentence=1e-9)) in parts
    assert sampled(parts, DIGEST, 1, ViewPolicy(keep_sentence=1.0)) == " ".join(parts)
    assert sampled(["Only one."], DIGEST, 1, ViewPolicy()) == "Only one."


@pytest.mark.parametrize("wrong", [{"min_area": 0.0}, {"keep_sentence": 1.5}, {"brightness": -0.1}, {"contrast": 2.0}])
def test_policies_out_of_bounds_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ViewPolicy(**wrong)
