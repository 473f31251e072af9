"""What the data path of segmentation costs, as a ratio against the decoder alone, in this one run.

    python benchmarks/bench_segment.py                     16 x 16 tokens of 768 to 224 pixels, about ten minutes
    python benchmarks/bench_segment.py --decoder linear --json
    python benchmarks/bench_segment.py --device cuda

An epoch as `segment` runs it (tokens of a float16 store, masks unpacked from bits, no augmentation), against as many
steps of the same decoder, loss and optimizer on one resident random batch: with the Adaptor's maps resident, with
tokens streamed, and with tokens streamed through the Adaptor batch by batch. `value` is the median over the repeats in
ms a step, `ratio` the median of the ratios within each repeat.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from measuring import Goal, Result, machine, median_ratio, seconds, shown, turn_by_turn, waited

from embedcache import save_store
from embedcache.device import full_precision
from embedcache.stage_two.adaptor import Adaptor
from embedcache.stage_two.decoder_fit import DecoderFit
from embedcache.stage_two.decoders import make_decoder
from embedcache.stage_two.losses import mask_loss
from embedcache.stage_two.mask_targets import MaskTargets
from embedcache.stage_two.segment_config import SegmentConfig
from embedcache.stage_two.token_feed import TokenFeed

_GRID, _DIM, _SIZE = (16, 16), 768, (224, 224)


def _targets(n: int) -> MaskTargets:
    """Boxes, four of five images without one."""
    rng, masks = np.random.default_rng(0), []
    place, areas = np.full((n, 1), -1), np.zeros((n, 1), np.int64)
    for k in range(0, n, 5):
        mask = np.zeros(_SIZE, bool)
        y, x = rng.integers(0, 150, 2)
        mask[y : y + 60, x : x + 40] = True
        place[k], areas[k] = len(masks), mask.sum()
        masks.append(np.packbits(mask))
    return MaskTargets(_SIZE, np.stack(masks), place, areas, np.zeros(n, bool))


@click.command()
@click.option("--decoder", type=click.Choice(["paper", "conv", "linear"]), default="conv")
@click.option("--n", type=click.IntRange(min=16), default=256, help="Images.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16)
@click.option("--device", default="cpu")
@click.option("--repeats", type=click.IntRange(min=1), default=3)
@click.option("--json", "as_json", is_flag=True)
def main(decoder: str, n: int, batch_size: int, device: str, repeats: int, as_json: bool) -> None:
    """Measures and prints."""
    config = SegmentConfig(decoders=(decoder,), epochs=1, min_steps=0, batch_size=batch_size, patience=None)
    targets, rows, n_steps = _targets(n), np.arange(n), -(-n // batch_size)
    adaptor = Adaptor(_DIM, _DIM)
    with tempfile.TemporaryDirectory() as folder:
        tokens = np.random.default_rng(0).standard_normal((n, _GRID[0] * _GRID[1], _DIM), np.float32)
        store = save_store(
            Path(folder) / "store", [f"i{k}" for k in range(n)], tokens.mean(1), tokens=tokens, store_dtype="float16"
        )

        def epoch(of: Adaptor | None, data: str) -> Callable[[], None]:
            feed = TokenFeed(store, rows[:, None], of, device, data=data)  # type: ignore[arg-type]
            fit = DecoderFit(decoder, feed, targets, config, seed=0)

            return waited(lambda: fit.train(rows, rows[:0]), device)

        calls = {
            "the decoder alone, resident random maps": _alone(decoder, n_steps, batch_size, device, config),
            "resident maps of the Adaptor": epoch(adaptor, "resident"),
            "tokens streamed, no Adaptor": epoch(None, "streamed"),
            "tokens streamed through the Adaptor": epoch(adaptor, "streamed"),
        }
        with full_precision:  # as `segment` works
            for call in calls.values():
                call()
            found = turn_by_turn({name: seconds(call) for name, call in calls.items()}, repeats)
    alone = found["the decoder alone, resident random maps"]
    results = [
        Result(
            name,
            statistics.median(times) / n_steps * 1000,
            "ms a step",
            None if times is alone else median_ratio(times, alone),
            "" if times is alone else "that / the decoder alone",
            None if times is alone or "through" in name else Goal("ratio", 1.1, "<="),
        )
        for name, times in found.items()
    ]
    about = machine("torch", "numpy") | {"decoder": decoder, "batch": batch_size}
    click.echo(shown(results, about, as_json))


def _alone(name: str, n_steps: int, batch_size: int, device: str, config: SegmentConfig) -> Callable[[], None]:
    """Steps on one batch that is there."""
    decoder = make_decoder(name, _DIM, _GRID, _SIZE).to(memory_format=torch.channels_last).to(device)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    x = torch.randn(batch_size, _DIM, *_GRID, device=device).to(memory_format=torch.channels_last)
    y = (torch.rand(batch_size, 1, *_SIZE, device=device) < 0.05).to(torch.uint8)

    def run() -> None:
        decoder.train()
        for _ in range(n_steps):
            loss = mask_loss(decoder(x), y, alpha=config.alpha, dice=config.loss)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return waited(run, device)


if __name__ == "__main__":
    main()
