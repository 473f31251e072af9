"""Decoding: every kind of image file to stated grey or RGB, and every bad file to a reason."""

from __future__ import annotations

import base64
import dataclasses
import logging
import traceback
from pathlib import Path

import numpy as np
import pytest
from odd_images import encoded, good_images, pixels, write_bad
from PIL import Image

from embedcache.data.radiograph import DecodePolicy, read_radiograph
from embedcache.errors import InputError

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def decoded(path: Path, **policy: object) -> np.ndarray:
    return read_radiograph(path, DecodePolicy(**policy)).pixels


def test_grey_png_is_exact(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "x.png")
    pixels = decoded(tmp_path / "x.png")
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.repeat(GREY[..., None], 3, axis=2))


def test_sixteen_bit_is_scaled_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "x.png")
    np.testing.assert_array_equal(decoded(tmp_path / "x.png")[..., 0], GREY)


def test_one_bit_palette_and_cmyk(tmp_path: Path) -> None:
    Image.fromarray(GREY > 127).save(tmp_path / "bit.png")
    assert set(np.unique(decoded(tmp_path / "bit.png"))) == {0, 255}
    Image.fromarray(GREY).convert("P").save(tmp_path / "palette.png")
    np.testing.assert_array_equal(decoded(tmp_path / "palette.png")[..., 0], GREY)
    Image.fromarray(GREY).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    assert np.abs(decoded(tmp_path / "cmyk.jpg")[..., 0].astype(int) - GREY).max() <= 8


def test_transparency_is_composited_on_the_stated_grey(tmp_path: Path) -> None:
    clear = np.zeros((4, 4, 4), np.uint8)
    Image.fromarray(clear, "RGBA").save(tmp_path / "x.png")
    assert set(np.unique(decoded(tmp_path / "x.png"))) == {0}
    assert set(np.unique(decoded(tmp_path / "x.png", background=99))) == {99}


def test_exif_rotation_is_a_policy(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    Image.fromarray(GREY[:8]).save(tmp_path / "x.jpg", exif=exif)
    assert decoded(tmp_path / "x.jpg").shape[:2] == (16, 8)
    assert decoded(tmp_path / "x.jpg", exif_rotation=False).shape[:2] == (8, 16)


def test_the_digest_is_of_the_files_bytes(tmp_path: Path) -> None:
    import hashlib

    Image.fromarray(GREY).save(tmp_path / "x.png")
    expected = hashlib.sha256((tmp_path / "x.png").read_bytes()).digest()[:16]
    assert read_radiograph(tmp_path / "x.png", DecodePolicy()).digest == expected


@pytest.mark.parametrize("name", good_images())
def test_odd_but_good_files_are_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(good_images()[name])
    rgb, grey = decoded(tmp_path / name), decoded(tmp_path / name, channels="grey")
    assert rgb.dtype == grey.dtype == np.uint8
    assert rgb.shape == (*grey.shape, 3)


@pytest.mark.parametrize(
    ("name", "level"),
    [("grey.png", 0), ("interlaced.png", 0), ("grey.tiff", 0), ("deflate.tiff", 0), ("float.tiff", 0),
     ("sixteen.png", 0), ("sixteen.tiff", 0), ("grey.jpg", 6)],
)  # fmt: skip
def test_grey_of_any_format_and_depth_is_the_same(tmp_path: Path, name: str, level: int) -> None:
    (tmp_path / name).write_bytes(good_images()[name])
    got = decoded(tmp_path / name, channels="grey").astype(int)
    assert np.abs(got - pixels()).max() <= level + name.startswith("sixteen")


@pytest.mark.parametrize(("name", "level"), [("rgb.png", 0), ("lzw.tiff", 0), ("rgb.jpg", 24), ("cmyk.jpg", 24)])
def test_colour_of_any_format_is_the_same(tmp_path: Path, name: str, level: int) -> None:
    (tmp_path / name).write_bytes(good_images()[name])
    assert np.abs(decoded(tmp_path / name).astype(int) - pixels(3)).max() <= level


def test_grey_of_colour_is_its_luma(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(good_images()["rgb.png"])
    luma = pixels(3) @ np.array([0.299, 0.587, 0.114])
    assert np.abs(decoded(tmp_path / "x.png", channels="grey") - luma).max() <= 1


def test_sixteen_bits_and_floats_by_policy(tmp_path: Path) -> None:
    narrow = (1000 + GREY.astype(np.uint16) * 4).astype(np.uint16)  # twelve bits in a file of sixteen
    Image.fromarray(narrow).save(tmp_path / "narrow.png")
    assert decoded(tmp_path / "narrow.png").max() == 8
    np.testing.assert_array_equal(decoded(tmp_path / "narrow.png", sixteen_bit="min-max")[..., 0], GREY)
    values = (GREY / 255 * 1.5 - 0.25).astype(np.float32)
    Image.fromarray(values).save(tmp_path / "float.tiff")
    np.testing.assert_array_equal(decoded(tmp_path / "float.tiff")[..., 0], GREY)
    with pytest.raises(InputError, match="outside 0 to 1"):
        decoded(tmp_path / "float.tiff", floating="unit")
    signed = (GREY.astype(np.int32) - 100) * 7
    Image.fromarray(signed).save(tmp_path / "signed.tiff")
    np.testing.assert_array_equal(decoded(tmp_path / "signed.tiff")[..., 0], GREY)


def test_a_frame_is_chosen(tmp_path: Path) -> None:
    frames = [Image.fromarray(GREY), Image.fromarray(GREY.T.copy())]
    for kind in ("tiff", "png"):
        frames[0].save(tmp_path / f"x.{kind}", save_all=True, append_images=frames[1:])
        np.testing.assert_array_equal(decoded(tmp_path / f"x.{kind}", frame=1)[..., 0], GREY.T)
        with pytest.raises(InputError, match="2 frames, frame 2 was asked for"):
            decoded(tmp_path / f"x.{kind}", frame=2)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_large_jpegs_are_decoded_at_a_scale_no_smaller_than_asked(tmp_path: Path, mode: str) -> None:
    smooth = Image.fromarray(np.add.outer(np.arange(1200), np.arange(1600)).astype(np.float32) / 11).convert("L")
    smooth.convert(mode).save(tmp_path / "x.jpg", quality=95)
    for least, expected in (
        (None, (1200, 1600)),
        (601, (1200, 1600)),
        (600, (600, 800)),
        (299, (300, 400)),
        (1, (150, 200)),
    ):
        got = decoded(tmp_path / "x.jpg", jpeg_min_side=least)
        assert got.shape[:2] == expected, least
    full = np.asarray(Image.fromarray(decoded(tmp_path / "x.jpg")).resize((400, 300), Image.Resampling.BOX), int)
    assert np.abs(full - decoded(tmp_path / "x.jpg", jpeg_min_side=300)).max() <= 4
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth.save(tmp_path / "turned.jpg", exif=exif)
    assert decoded(tmp_path / "turned.jpg", jpeg_min_side=300).shape[:2] == (400, 300)
    smooth.save(tmp_path / "x.png")
    assert decoded(tmp_path / "x.png", jpeg_min_side=300).shape[:2] == (1200, 1600)


def test_every_bad_file_has_its_reason(tmp_path: Path) -> None:
    for name, reason in write_bad(tmp_path).items():
        with pytest.raises(InputError) as caught:
            decoded(tmp_path / name)
        assert caught.value.reason in reason.split("|"), f"{name}: {caught.value.reason}: {caught.value}"
        assert str(tmp_path) not in str(caught.value)


def test_limits_are_the_policys(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "x.png")
    with pytest.raises(InputError, match="16 x 16 pixels, limit 255"):
        decoded(tmp_path / "x.png", max_pixels=255)
    with pytest.raises(InputError, match="bytes, limit 20"):
        decoded(tmp_path / "x.png", max_file_bytes=20)
    with pytest.raises(InputError, match="not a JPEG file"):
        decoded(tmp_path / "x.png", formats=("JPEG",))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"channels": "bgr"}, "channels is 'bgr', expected one of rgb, grey"),
        ({"formats": ("PNG", "GIF")}, "formats has .'GIF'., expected some of PNG"),
        ({"background": 300}, "background is 300, expected at most 255"),
        ({"frame": -1}, "frame is -1, expected at least 0"),
        ({"window": (40.0, 0.0)}, "window is .*, expected a centre and a width above 0"),
        ({"intensity": "loud", "padding": "high"}, "intensity is 'loud'.*; padding is 'high'"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecodePolicy(**setting)


def test_every_setting_of_a_policy_has_words() -> None:
    for field in dataclasses.fields(DecodePolicy):
        assert f"        {field.name}: " in str(DecodePolicy.__doc__)


CANARY = "CANARYzQ9"


def test_nothing_of_a_files_description_is_logged_shown_or_raised(tmp_path: Path, caplog, recwarn, capfd) -> None:
    image, exif = Image.fromarray(pixels(3)), Image.Exif()
    exif[0x010E] = exif[0x013B] = exif[0x8298] = CANARY
    files = {
        "x.jpg": encoded(image, "JPEG", exif=exif, comment=CANARY.encode()),
        "x.tiff": encoded(image, "TIFF", description=CANARY, software=CANARY, artist=CANARY),
        "x.png": good_images()["text.png"].replace(b"canary", CANARY[:6].encode()),
        "x.webp": encoded(image, "WEBP", exif=exif),
    }
    caplog.set_level(logging.DEBUG)
    for name, content in files.items():
        for cut in (len(content), len(content) * 3 // 4, 60):
            path = tmp_path / f"{CANARY}-{cut}-{name}"
            path.write_bytes(content[:cut])
            try:
                decoded(path)
                shown = ""
            except InputError as error:
                shown = "".join(traceback.format_exception(error)).replace(str(path), "")
            captured = capfd.readouterr()
            messages = [str(warning.message) for warning in recwarn.list]
            for text in (shown, caplog.text, captured.out, captured.err, *messages):
                assert CANARY[:6] not in text
                assert base64.b64encode(CANARY.encode()).decode() not in text
