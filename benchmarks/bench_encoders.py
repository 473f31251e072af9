"""What an encoder costs before it encodes: decoding at a reduced scale, and hashing the weights.

    python benchmarks/bench_encoders.py [--json]

Radiographs are drawn: 2,500 x 3,000 pixels, smooth with noise, JPEG quality 90. Decoding and resizing to 224 are the
encoder's own steps (`read_radiograph`, then a ViT's image processor), on one core, the digest of the file included.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from measuring import Goal, Result, median_ratio, seconds, table, turn_by_turn
from PIL import Image
from transformers import ViTImageProcessor

from embedcache.data.radiograph import DecodePolicy, read_radiograph
from embedcache.encoders.base import digest_weights
from embedcache.encoders.transforms import of_processor

_SHAPE = (3000, 2500)
_TARGET = 224
_WEIGHTS_MB = 350


def shades(shape: tuple[int, int]) -> np.ndarray:
    """Pixels like a radiograph's: smooth shades with noise, uint8."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.uniform(0, 255, (12, 10)).astype(np.float32))
    smooth = np.asarray(coarse.resize(shape[::-1], Image.Resampling.BICUBIC))
    return np.clip(smooth + rng.normal(0, 4, shape), 0, 255).astype(np.uint8)


def preparing(path: Path, policy: DecodePolicy) -> Callable[[], torch.Tensor]:
    """A call that decodes a file and resizes it to the target."""
    processor = ViTImageProcessor(size={"height": _TARGET, "width": _TARGET}, resample=3)
    transform = of_processor(processor, "bench")
    return lambda: transform.apply(read_radiograph(path, policy).pixels)


def decoding(folder: Path, repeats: int) -> list[Result]:
    """Reduced against full decoding, each with the resize behind it."""
    results = []
    for name, mode in (("grey JPEG", "L"), ("RGB JPEG", "RGB")):
        path = folder / f"{mode}.jpg"
        Image.fromarray(shades(_SHAPE)).convert(mode).save(path, quality=90)
        full = preparing(path, DecodePolicy())
        reduced = preparing(path, DecodePolicy(jpeg_min_side=2 * _TARGET))
        levels = (full() - reduced()).abs().mean().item() * 255 / 2  # mean = std = 0.5, so [-1, 1] is 255 levels
        taken = turn_by_turn({"full": seconds(full), "reduced": seconds(reduced)}, repeats)
        results.append(
            Result(
                f"{name} {_SHAPE[1]} x {_SHAPE[0]} to {_TARGET}, reduced",
                1000 * statistics.median(taken["reduced"]),
                "ms",
                median_ratio(taken["full"], taken["reduced"]),
                "full / reduced decoding",
                Goal("ratio", 2.5),
            )
        )
        results.append(Result(f"{name}: mean difference of the two", levels, "grey levels"))
    return results


def hashing(repeats: int) -> list[Result]:
    """The digest of a model's weights against SHA-256 of as many bytes."""
    n = _WEIGHTS_MB * 2**20 // 4 // 64
    model = torch.nn.ParameterList([torch.randn(n) for _ in range(64)])
    raw = np.random.default_rng(0).bytes(n * 4 * 64)
    ours = seconds(lambda: digest_weights(model))
    plain = seconds(lambda: hashlib.sha256(raw).digest())
    taken = turn_by_turn({"ours": ours, "plain": plain}, repeats)
    ratio = median_ratio(taken["plain"], taken["ours"])
    value = statistics.median(taken["ours"])
    return [
        Result(f"digest of {_WEIGHTS_MB} MB of weights", value, "s", ratio, "SHA-256 / ours", Goal("value", 1, "<="))
    ]


@click.command()
@click.option("--repeats", type=click.IntRange(min=1), default=7, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(repeats: int, as_json: bool) -> None:
    """Measures and prints one table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench-encoders-") as folder:
        results = decoding(Path(folder), repeats) + hashing(repeats)
    click.echo(json.dumps([r.as_json() for r in results], indent=2) if as_json else table(results))


if __name__ == "__main__":
    main()
