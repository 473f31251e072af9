"""Masks: boxes, runs and files to pixels, each the right way round, and every wrong one refused."""

from __future__ import annotations

import csv
import gzip
import struct
import time
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from odd_images import png_chunk, png_with, write_bad
from PIL import Image

from embedcache.data.masks import boxes_mask, is_mask_path, mask_size, read_mask, relative_rle_mask, resize_mask
from embedcache.data.radiograph import DecodePolicy
from embedcache.errors import InputError

SIIM_LABELS = Path(__file__).parents[3] / "shared" / "data" / "labels" / "train-rle.csv.gz"

# 4 rows, 5 columns: an L lying on its back, so that no mirror or turn of it is the same
L_SHAPE = np.array([[0, 1, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]], bool)


def shown(mask: np.ndarray) -> list[str]:
    return ["".join(".#"[int(v)] for v in row) for row in mask]


def test_runs_go_down_the_columns_first(tmp_path: Path) -> None:
    mask = read_mask("rle:4x5:4 3 10 1 14 1", tmp_path)
    assert shown(mask) == [".#...", ".#...", ".###.", "....."]
    assert mask.dtype == bool
    assert mask.flags.c_contiguous
    np.testing.assert_array_equal(mask, L_SHAPE)
    assert shown(read_mask("rle:4x5:0 1 3 2 19 1", tmp_path)) == ["##...", ".....", ".....", "#...#"]
    assert shown(read_mask("rle:2x3:0 2 2 1", tmp_path)) == ["##.", "#.."]  # one run may begin where another ends


def test_relative_runs_become_absolute_and_rows_are_united(tmp_path: Path) -> None:
    assert relative_rle_mask(["4 3 3 1 3 1"], (4, 5)) == "rle:4x5:4 3 10 1 14 1"
    assert relative_rle_mask(["4 2", " 5 2 3 1", "14 1 "], (4, 5)) == "rle:4x5:4 3 10 1 14 1"
    assert relative_rle_mask(["8 4 0 4", "2 12"], (4, 5)) == "rle:4x5:2 14"
    assert relative_rle_mask(["0 2 2 2", "10 1"], (4, 5)) == "rle:4x5:0 2 4 2 10 1"
    assert relative_rle_mask(["0 20"], (4, 5)) == "rle:4x5:0 20"
    assert shown(read_mask(relative_rle_mask(["4 3 3 1 3 1"], (4, 5)), tmp_path)) == shown(L_SHAPE)


@pytest.mark.parametrize("rows", [["-1"], [" -1"], ["-1", "-1\n"]])
def test_minus_one_is_a_mask_known_to_be_empty(tmp_path: Path, rows: list[str]) -> None:
    assert relative_rle_mask(rows, (4, 5)) == "rle:4x5:"
    assert read_mask("rle:4x5:", tmp_path).shape == (4, 5)
    assert not read_mask("rle:4x5:", tmp_path).any()
    assert relative_rle_mask([*rows, "4 1"], (4, 5)) == "rle:4x5:4 1"


def test_runs_of_any_mask_are_its_pixels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        size = tuple(int(v) for v in rng.integers(1, 12, 2))
        masks = [rng.random(size) < rng.random() for _ in range(int(rng.integers(1, 4)))]
        text = relative_rle_mask([relative(mask) for mask in masks], size)
        expected = np.logical_or.reduce(masks)
        np.testing.assert_array_equal(read_mask(text, tmp_path), expected)
        numbers = np.array(text.split(":")[2].split(), int)
        assert (numbers[2::2] > numbers[:-2:2] + numbers[1:-2:2]).all()  # sorted, no two touching


def relative(mask: np.ndarray) -> str:
    """SIIM-ACR's text for a mask, by the book: pixel after pixel."""
    numbers, position, previous = [], 0, 0
    flat = [*mask.T.ravel().tolist(), False]
    for k, value in enumerate(flat):
        if value and not (k and flat[k - 1]):
            position = k
        if not value and k and flat[k - 1]:
            numbers += [position - previous, k - position]
            previous = k
    return " ".join(map(str, numbers)) or "-1"


def test_siims_own_file() -> None:
    if not SIIM_LABELS.is_file():
        pytest.skip(f"no {SIIM_LABELS.name} of SIIM-ACR beside the repository")
    rows_of = defaultdict(list)
    with gzip.open(SIIM_LABELS, "rt") as handle:
        rows = list(csv.reader(handle))[1:]
    for image, runs in rows:
        rows_of[image].append(runs)
    assert (len(rows), len(rows_of)) == (12_954, 12_047)
    started = time.perf_counter()
    texts = {image: relative_rle_mask(runs, (1024, 1024)) for image, runs in rows_of.items()}
    assert time.perf_counter() - started < 20  # a second on an idle core; drawing each mask would take minutes
    positive = [image for image, text in texts.items() if not text.endswith(":")]
    assert len(positive) == 2_669
    several = [image for image in positive if len(rows_of[image]) > 1]
    for image in [*several[:25], *positive[:25]]:
        dense = np.zeros((1024, 1024), bool)
        for runs in rows_of[image]:
            numbers, flat, position = [int(v) for v in runs.split()], np.zeros(1024 * 1024, bool), 0
            for gap, length in zip(numbers[::2], numbers[1::2], strict=True):
                position += gap
                flat[position : position + length] = True
                position += length
            dense |= flat.reshape(1024, 1024).T
        np.testing.assert_array_equal(read_mask(texts[image], "."), dense)
        assert sum(map(int, texts[image].split(":")[2].split()[1::2])) == dense.sum()


def test_boxes_are_filled_from_their_top_left_corner(tmp_path: Path) -> None:
    mask = read_mask("boxes:4x5:1,0,1,3;2,2,2,1", tmp_path)
    np.testing.assert_array_equal(mask, L_SHAPE)
    assert shown(read_mask("boxes:4x5:3,1,2,1", tmp_path)) == [".....", "...##", ".....", "....."]
    assert not read_mask("boxes:4x5:", tmp_path).any()


def test_corners_are_truncated_and_clipped(tmp_path: Path) -> None:
    assert shown(read_mask("boxes:4x5:1.9,0.9,1.2,1.2", tmp_path)) == [".##..", ".##..", ".....", "....."]
    assert shown(read_mask("boxes:4x5:-0.9,-3,1.95,4.5", tmp_path)) == ["#....", ".....", ".....", "....."]
    assert shown(read_mask("boxes:4x5:3,2,1e9,99", tmp_path)) == [".....", ".....", "...##", "...##"]
    assert read_mask("boxes:4x5:-5e307,-1,1.7e308,1e300", tmp_path).all()


def test_boxes_keep_every_digit(tmp_path: Path) -> None:
    boxes = [(1, 0.0, 1.5, 3), (0.1 + 0.2, 2, np.float64(2), np.float32(1.1)), (-0.0, 1e-7, 1e17, 2)]
    text = boxes_mask(boxes, (4, 5))
    assert text == f"boxes:4x5:1,0,1.5,3;0.30000000000000004,2,2,{float(np.float32(1.1))!r};0,1e-07,1e+17,2"
    read_mask(text, tmp_path)
    assert boxes_mask([], (1024, 512)) == "boxes:1024x512:"


def test_what_a_text_is(tmp_path: Path) -> None:
    assert is_mask_path("masks/x.png")
    assert not any(map(is_mask_path, ("", "  ", "rle:4x5:", "boxes:oops", "rle:")))
    assert mask_size("rle:4x5:0 1") == (4, 5)
    assert mask_size("boxes:1024x512:") == (1024, 512)
    assert mask_size("masks/x.png") is None
    assert mask_size(" ") is None
    with pytest.raises(InputError, match=r"begins with 'rle:', expected 'rle:<height>x<width>:start length"):
        mask_size("rle:")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "blank, which is an unknown mask"),
        (" \t", "blank, which is an unknown mask"),
        ("rle:4x5", "begins with 'rle:4x5', expected 'rle:<height>x<width>:"),
        ("rle:1024:0 1", "expected 'rle:<height>x<width>:"),
        ("boxes:4,5:0,0,1,1", "expected 'boxes:<height>x<width>:x,y,w,h"),
        ("boxes:-4x5:", "expected 'boxes:<height>x<width>"),
        ("boxes:٤x5:", "expected 'boxes:<height>x<width>"),
        ("rle:0x5:", "a size of 0 x 5, expected a height and a width above 0"),
        ("rle:100000x100000:", "limit 80,000,000"),
        ("rle:4x5:0 1 3", r"3 number\(s\), expected pairs of start and length"),
        ("rle:4x5:0 0", "run 1 has a length of 0, expected 1 or more"),
        ("rle:4x5:0 1 3 -2", "run 2 has a length of -2, expected 1 or more"),
        ("rle:4x5:-1 2", "run 1 has a start of -1, expected 0 or more"),
        ("rle:4x5:19 2", r"run 1 goes to 21, an image of 4 x 5 \(height x width\) has 20 pixels"),
        ("rle:4x5:0 1 20 1", "run 2 goes to 21"),
        (f"rle:4x5:{'9' * 18} {'9' * 18}", "run 1 goes to 999,999,999,999,999,999, "),
        (f"rle:4x5:{'9' * 30} 1", "number 1 is '99999999999999999999'..., expected an integer"),
        ("rle:4x5:0 3 2 2", "run 2 starts at 2, the one before ends at 3; expected sorted runs"),
        ("rle:4x5:9 1 3 1", "run 2 starts at 3, the one before ends at 10"),
        ("rle:4x5:0 1.5", "number 2 is '1.5', expected an integer"),
        ("rle:4x5:1_0 1", "number 1 is '1_0'"),
        ("rle:4x5:nan 1", "number 1 is 'nan'"),
        ("boxes:4x5:0,0,1", r"box 1 has 3 value\(s\), expected x,y,w,h"),
        ("boxes:4x5:0,0,1,1;", r"box 2 has 1 value\(s\)"),
        ("boxes:4x5:0,0,1,one", "box 1 holds 'one', expected a finite number"),
        ("boxes:4x5:nan,0,1,1", "box 1 holds 'nan', expected a finite number"),
        ("boxes:4x5:0,0,inf,1", "box 1 holds 'inf'"),
        ("boxes:4x5:0,0,1e999,1", "box 1 .*w inf.*: expected finite numbers"),
        ("boxes:4x5:0,0,1,1;1,1,0,1", "box 2 .*w 0, h 1.*: expected a width and a height above 0"),
        ("boxes:4x5:1,1,1,-1", "expected a width and a height above 0"),
        ("boxes:4x5:5,0,1,1", r"box 1 \(x 5, y 0, w 1, h 1\): no pixel of an image of 4 x 5"),
        ("boxes:4x5:0,4,1,1", "no pixel of an image"),
        ("boxes:4x5:-2,0,2,1", "no pixel of an image"),
        ("boxes:4x5:0.1,0.1,0.3,0.3", "expected pixels, not shares of the image"),
    ],
)
def test_every_wrong_text_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_mask(text, tmp_path)
    assert caught.value.reason == "bad-mask"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no row, expected one at least"),
        (["-1", " "], "row 2 is blank, expected 'gap length gap length"),
        ([float("nan")], "row 1: number 1 is 'nan', expected an integer"),
        (["1 2 3"], r"row 1: 3 number\(s\), expected pairs of gap and length"),
        (["1 2", "1 0"], "row 2: run 1 has a length of 0"),
        (["1 2 -1 2"], "row 1: run 2 has a gap of -1"),
        (["1 2 3 4 5 6"], "row 1: run 3 goes to 21, an image of 4 x 5"),
        ([f"{'9' * 18} 1 " * 50], "row 1: run 1 goes to 999"),
        (["1 2 x 4"], "row 1: number 3 is 'x'"),
    ],
)
def test_wrong_relative_runs_are_refused(rows: list, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        relative_rle_mask(rows, (4, 5))
    assert caught.value.reason == "bad-mask"


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([(0, 0, 1)], "box 1 is not four numbers, expected x, y, width and height"),
        ([(0, 0, 1, 1), (0, 0, 1, "wide")], "box 2 is not four numbers"),
        ([7], "box 1 is not four numbers"),
        ([(0, 0, float("nan"), 1)], "box 1 .*w nan.*expected finite numbers"),
        ([(float("inf"), 0, 1, 1)], "expected finite numbers"),
        ([(0, 0, 0, 1)], "expected a width and a height above 0"),
        ([(9, 9, 1, 1)], "no pixel of an image of 4 x 5"),
    ],
)
def test_boxes_that_cannot_be_are_refused(boxes: list, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        boxes_mask(boxes, (4, 5))
    assert caught.value.reason == "bad-mask"


def test_sizes_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for call in (
        lambda: boxes_mask([], (0, 5)),
        lambda: relative_rle_mask(["-1"], (4, -5)),
        lambda: read_mask("rle:4x5:", tmp_path, size=(0, 4)),
        lambda: read_mask("rle:4x5:", tmp_path, image_size=(4, 0)),
    ):
        with pytest.raises(InputError, match="expected a height and a width above 0"):
            call()


def test_the_limit_of_pixels_is_that_of_images() -> None:
    limit = DecodePolicy().max_pixels
    assert mask_size(f"rle:1x{limit}:") == (1, limit)
    with pytest.raises(InputError, match=f"limit {limit:,}"):
        mask_size(f"rle:1x{limit + 1}:")


def test_no_message_holds_the_whole_text(tmp_path: Path) -> None:
    for text in (f"rle:{'A' * 5000}", f"rle:4x5:{'B' * 5000}", f"boxes:4x5:{'C' * 5000},1,1,1", "D" * 5000):
        with pytest.raises(InputError) as caught:
            read_mask(text, tmp_path)
        assert len(str(caught.value)) < 300, str(caught.value)


def test_half_a_pixels_area_is_enough(tmp_path: Path) -> None:
    quarters = "rle:4x4:0 2 8 1 12 1"  # of the four new pixels two, none, one and one old ones, column by column
    assert shown(read_mask(quarters, tmp_path)) == ["#.##", "#...", "....", "...."]
    assert shown(read_mask(quarters, tmp_path, size=(2, 2))) == ["##", ".."]
    assert shown(read_mask("rle:4x4:0 1 8 1 12 1", tmp_path, size=(2, 2))) == [".#", ".."]
    assert shown(read_mask("rle:1x3:0 1", tmp_path, size=(1, 2))) == ["#."]  # 1 of 1.5
    assert shown(read_mask("rle:1x3:1 1", tmp_path, size=(1, 2))) == [".."]  # half of 1.5 to either side
    assert shown(read_mask("rle:2x2:0 1 3 1", tmp_path, size=(4, 4))) == ["##..", "##..", "..##", "..##"]
    assert shown(read_mask("rle:1x2:0 1", tmp_path, size=(1, 3))) == ["##."]  # the middle one is half inside


def test_resizing_is_exact() -> None:
    rng = np.random.default_rng(1)
    for _ in range(150):
        h, w, height, width = (int(v) for v in rng.integers(1, 14, 4))
        mask = rng.random((h, w)) < rng.random()
        fine = np.kron(mask, np.ones((height, width), bool))  # every new pixel is whole parts of it
        parts = fine.reshape(height, h, width, w)
        expected = 2 * parts.sum(axis=(1, 3)) >= h * w
        got = resize_mask(mask, (height, width))
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == bool
        assert got.flags.c_contiguous


def test_by_a_whole_factor_it_is_pillows_box_filter() -> None:
    rng = np.random.default_rng(2)
    mask = rng.random((336, 320)) < 0.5  # by another Pillow counts whole pixels alone, those whose centre is inside
    box = np.asarray(Image.fromarray(mask.astype(np.float32)).resize((64, 48), Image.Resampling.BOX))
    assert (np.abs(box - 0.5) > 1e-3).all()  # at most 17 or at least 18 of 35
    np.testing.assert_array_equal(resize_mask(mask, (48, 64)), box >= 0.5)


def test_a_mask_must_be_its_images(tmp_path: Path) -> None:
    for size in ((4, 5), (8, 10), (400, 500), (2, 2), (1023, 1279)):  # scaled, within rounding
        assert read_mask("rle:4x5:0 3", tmp_path, image_size=size).shape == (4, 5)
    for own, image in (((1024, 1024), (2991, 2990)), ((2500, 2047), (256, 210)), ((256, 209), (2500, 2047))):
        read_mask(f"rle:{own[0]}x{own[1]}:", tmp_path, image_size=image)
    with pytest.raises(InputError, match=r"mask is 4 x 5 .*, its image 5 x 4 .*height and width are swapped"):
        read_mask("rle:4x5:", tmp_path, image_size=(5, 4))
    with pytest.raises(InputError, match="height and width are swapped"):
        read_mask("boxes:1023x1024:", tmp_path, image_size=(1024, 1023))
    with pytest.raises(InputError, match="height and width are swapped"):
        read_mask("rle:512x400:", tmp_path, image_size=(800, 1024))
    with pytest.raises(InputError, match=r"its image 800 x 900 .*of that size, or scaled by one factor") as caught:
        read_mask("rle:512x400:", tmp_path, image_size=(800, 900))
    assert caught.value.reason == "bad-mask"


def test_files_of_every_mode_count_what_is_above_zero(tmp_path: Path) -> None:
    palette = Image.fromarray(L_SHAPE.astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 0, 0, 9])
    inverted = Image.fromarray((~L_SHAPE).astype(np.uint8), "P")
    inverted.putpalette([0, 1, 0, 0, 0, 0])
    one = L_SHAPE.astype(np.uint8)
    clear = np.dstack((one, 0 * one, 0 * one, 0 * one))  # its alpha is 0 throughout
    opaque = np.dstack((0 * one, one, 0 * one, 0 * one + 255))
    floating = np.where(L_SHAPE, 1e-6, -3).astype(np.float32)
    files = {
        "bit.png": Image.fromarray(L_SHAPE),
        "one.png": Image.fromarray(one),
        "full.png": Image.fromarray(one * 255),
        "rgb.png": Image.fromarray(np.dstack((0 * one, 0 * one, one))),
        "clear.png": Image.fromarray(clear),
        "opaque.png": Image.fromarray(opaque),
        "grey-alpha.png": Image.fromarray(np.dstack((one, 255 * (1 - one))), "LA"),
        "palette.png": palette,
        "inverted.png": inverted,
        "sixteen.png": Image.fromarray(one.astype(np.uint16)),
        "sixteen.tiff": Image.fromarray(one.astype(np.uint16)),
        "signed.tiff": Image.fromarray(one.astype(np.int32) * 9 - 4),
        "float.tiff": Image.fromarray(floating),
        "lossless.webp": Image.fromarray(np.dstack([one * 255] * 3)),
    }
    for name, image in files.items():
        image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
        np.testing.assert_array_equal(read_mask(name, tmp_path, image_size=(8, 10)), L_SHAPE, err_msg=name)
    files["palette.png"].save(tmp_path / "clear-palette.png", transparency=1)
    np.testing.assert_array_equal(read_mask("clear-palette.png", tmp_path), L_SHAPE)


def test_a_file_is_turned_as_its_image_is(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # by a quarter
    Image.fromarray(L_SHAPE).convert("L").save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(read_mask("x.png", tmp_path), np.rot90(L_SHAPE, -1))


def test_a_file_is_resized(tmp_path: Path) -> None:
    Image.fromarray(np.kron(L_SHAPE, np.ones((6, 6), bool))).save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_mask("x.png", tmp_path, size=(4, 5)), L_SHAPE)


def test_sixteen_bits_in_colour_are_refused_not_halved(tmp_path: Path) -> None:
    rows = zlib.compress(b"\0" + struct.pack(">3H", 1, 0, 0))
    (tmp_path / "x.png").write_bytes(png_with(struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0), png_chunk(b"IDAT", rows)))
    with pytest.raises(InputError, match="16 bits in each of several channels"):
        read_mask("x.png", tmp_path)


def test_every_bad_file_is_refused(tmp_path: Path) -> None:
    for name in write_bad(tmp_path):
        with pytest.raises(InputError) as caught:
            read_mask(name, tmp_path)
        assert caught.value.reason == "bad-mask", name
        assert str(tmp_path) not in str(caught.value)


def test_files_outside_the_root_and_other_texts_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    Image.fromarray(L_SHAPE).save(tmp_path / "x.png")
    with pytest.raises(InputError, match="outside the manifest's root"):
        read_mask("../x.png", root)
    for text in ("557374 2 1015 8", "rl:4x5:0 1", "0 1 " * 2000, "x\0y"):
        with pytest.raises(InputError, match="expected the path of an image, 'boxes:<height>x<width>:") as caught:
            read_mask(text, root)
        assert caught.value.reason == "bad-mask"
