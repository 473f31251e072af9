"""How fast stage two trains, as ratios against the arithmetic alone and against the paper's way, in this one run.

    python benchmarks/bench_train.py                       everything, about 17 minutes on 2 cores
    python benchmarks/bench_train.py --only step --json    one part, as JSON
    python benchmarks/bench_train.py --device cuda         on a GPU, with 50 epochs over 213,000 pairs beside

The parts, by the name that `--only` takes:

    step     a step of pre-training at batch 1,024 and 768-d, against the same model of plain nn.MultiheadAttention over
             sequences of one token, with queries and keys; outputs, loss and gradients are compared before
    epoch    an epoch of `train`, against the same steps on one resident random batch
    data     rows per second of the data path alone: resident, streamed, and a DataLoader over npy maps
    many     five seeds together, against the same five one by one: small Adaptors, and the paper's
    minutes  on a GPU alone: 50 epochs over 213,000 pairs of 768-d float16, in float32 and bfloat16

How to read it: what is compared runs turn by turn within each repeat; `value` is the median over the repeats, `ratio`
the median of the ratios within each repeat, except for `step`, where the best of all repeats stands against the best,
as a busy machine makes steps slower and never faster. Both sides of `step` use torch's fused AdamW, so that the ratio
is of the model alone.

Shape notation: b pairs of a batch, d embedding width, p projection width.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import count
from pathlib import Path

import click
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from measuring import Goal, Result, machine, median_ratio, seconds, table, turn_by_turn
from torch import Tensor, nn
from usual_ways import NpyRows, Pairwise, loader_rate

from embedcache import Manifest, TrainConfig, save_store, train
from embedcache.stage_two.adaptor import Adaptor
from embedcache.stage_two.batches import Planner
from embedcache.stage_two.distributed import Group
from embedcache.stage_two.feed import Batch, Feed
from embedcache.stage_two.losses import contrastive_loss
from embedcache.stage_two.pairs import pairs_of_split
from embedcache.stage_two.steps import Steps
from embedcache.stage_two.tensors import join
from embedcache.stage_two.train import grid, train_many
from embedcache.store.store import Store

_BATCH, _DIM = 1024, 768
_LOADER_BUDGET_S = 1.0
_EPOCHS_OF_DATA = 10
_PAIRS_OF_MIMIC = 213_000

Data = tuple[Manifest, Store, Store]


class PlainBlock(nn.Module):
    """The paper's block as torch's own modules say it: attention asked by the other modality, and feed-forward."""

    def __init__(self, dim: int, n_heads: int, ff_dim: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, n_heads, dropout=dropout, batch_first=True)
        self.widen, self.narrow = nn.Linear(dim, ff_dim), nn.Linear(ff_dim, dim)
        self.norms = nn.ModuleList([nn.LayerNorm(dim), nn.LayerNorm(dim)])
        self.dropouts = nn.ModuleList([nn.Dropout(dropout) for _ in range(3)])

    def forward(self, query: Tensor, x: Tensor) -> Tensor:
        """(b, 1, p) asked by (b, 1, p)."""
        x = self.norms[0](x + self.dropouts[0](self.attention(query, x, x)[0]))
        hidden = self.dropouts[1](F.relu(self.widen(x)))
        return self.norms[1](x + self.dropouts[2](self.narrow(hidden)))


class PlainAdaptor(nn.Module):
    """The paper's Adaptor over sequences of one token, image first, then the text asked by the new image."""

    def __init__(self, ours: Adaptor) -> None:
        super().__init__()
        config = ours.config
        p = config["projection_dim"]
        self.project = nn.ModuleList(nn.Linear(config[dim], p, bias=False) for dim in ("image_dim", "text_dim"))
        self.blocks = nn.ModuleList(
            PlainBlock(p, config["n_heads"], config["ff_dim"], config["dropout"]) for _ in range(config["n_layers"])
        )
        self.logit_scale = nn.Parameter(ours.logit_scale.detach().clone())
        with torch.no_grad():
            for mine, theirs in zip(self.parameters(), _in_their_order(ours), strict=True):
                mine.copy_(theirs)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Logits of texts with images, (b, b)."""
        x, y = (
            F.normalize(project(z), dim=-1)[:, None] for project, z in zip(self.project, (image, text), strict=True)
        )
        for block in self.blocks:
            x = block(y, x)
            y = block(x, y)
        x, y = F.normalize(x[:, 0], dim=-1), F.normalize(y[:, 0], dim=-1)
        return self.logit_scale.exp() * y @ x.T


def _in_their_order(ours: Adaptor) -> list[Tensor]:
    """Our weights in the order in which `PlainAdaptor` has its own."""
    towers = ours.towers
    ordered = [ours.logit_scale, towers.image_projection.weight, towers.text_projection.weight]
    for block in towers.blocks:
        ordered += [block.in_proj_weight, block.in_proj_bias, block.out_proj.weight, block.out_proj.bias]
        for layer in (block.linear1, block.linear2, block.norm1, block.norm2):
            ordered += [layer.weight, layer.bias]
    return ordered


@dataclass(frozen=True)
class Bench:
    """What every part works on."""

    folder: Path
    device: str
    repeats: int
    n: int

    def waits(self, call: Callable[[], object]) -> Callable[[], float]:
        """Seconds of a call, with what it left to the device."""

        def done() -> None:
            call()
            if self.device != "cpu":
                torch.cuda.synchronize()

        return seconds(done)

    @cached_property
    def stores(self) -> Data:
        """n random pairs."""
        return random_pairs(self.folder / "pairs", self.n, _DIM)

    @cached_property
    def runs(self) -> Iterator[Path]:
        """A new run directory at every call of next."""
        return (self.folder / f"run-{k}" for k in count())


def random_pairs(folder: Path, n: int, dim: int) -> Data:
    """n training pairs of random float16 embeddings of one width."""
    rng = np.random.default_rng(0)
    ids = [f"i{k:06d}" for k in range(n)]
    frame = pd.DataFrame({"id": ids, "image": ids, "report": [f"report {k}" for k in range(n)], "split": "train"})
    stores = [
        save_store(folder / m, ids, rng.standard_normal((n, dim), np.float32), modality=m, store_dtype="float16")
        for m in ("image", "text")
    ]
    return Manifest(frame, name="random", root=folder), stores[0], stores[1]


def measure_step(bench: Bench) -> Iterator[Result]:
    """The paper's step against ours."""
    rng = torch.Generator().manual_seed(0)
    image, text = (torch.randn(_BATCH, _DIM, generator=rng).to(bench.device) for _ in range(2))
    codes = torch.arange(_BATCH, device=bench.device)
    batch = Batch(image[None], text[None], None, None, codes[None], codes[None])
    calls: dict[str, Callable[[], float]] = {}
    for dropout in (0.1, 0.0):
        torch.manual_seed(0)
        ours = Adaptor(_DIM, _DIM, dropout=dropout).to(bench.device)
        plain = PlainAdaptor(ours).to(bench.device)
        _check_equal(ours, plain, image, text, codes)
        ours.train()
        plain.train()
        steps = Steps([ours], [TrainConfig(dropout=dropout)], Group())
        optimizer = torch.optim.AdamW(plain.parameters(), lr=2e-5, weight_decay=0.01, fused=True)

        def plain_step(plain: PlainAdaptor = plain, optimizer: torch.optim.AdamW = optimizer) -> None:
            optimizer.zero_grad(set_to_none=True)
            logits = plain(image, text)
            (0.75 * F.cross_entropy(logits, codes) + 0.25 * F.cross_entropy(logits.T, codes)).backward()
            optimizer.step()

        calls[f"ours {dropout}"] = bench.waits(lambda steps=steps: steps.step(batch, 1.0))
        calls[f"plain {dropout}"] = bench.waits(plain_step)
    turn_by_turn(calls, 5 if bench.device != "cpu" else 1)
    times = turn_by_turn(calls, max(bench.repeats, 15))
    for dropout, goal in ((0.1, Goal("ratio", 1.35)), (0.0, None)):
        plain_s, ours_s = min(times[f"plain {dropout}"]), min(times[f"ours {dropout}"])
        yield Result(f"plain MultiheadAttention, dropout {dropout}, best step", 1e3 * plain_s, "ms")
        yield Result(
            f"our step, dropout {dropout}, best step", 1e3 * ours_s, "ms", plain_s / ours_s, "plain / ours", goal
        )


def _check_equal(ours: Adaptor, plain: PlainAdaptor, image: Tensor, text: Tensor, codes: Tensor) -> None:
    """Both give the same logits and gradients with dropout off, or there is nothing to compare."""
    ours.eval()
    plain.eval()
    logits, theirs = ours(image, text).logits_per_text, plain(image, text)
    torch.testing.assert_close(logits, theirs, atol=2e-4, rtol=2e-4)
    contrastive_loss(logits, texts=codes).backward()
    (0.75 * F.cross_entropy(theirs, codes) + 0.25 * F.cross_entropy(theirs.T, codes)).backward()
    for mine, other in zip(_in_their_order(ours), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-3)
    ours.zero_grad()
    plain.zero_grad()


def measure_epoch(bench: Bench) -> Iterator[Result]:
    """An epoch as `train` runs it, against its steps alone."""
    manifest, image_store, text_store = bench.stores
    config = TrainConfig(epochs=2, device=bench.device)
    n_batches = -(-bench.n // _BATCH)
    size = bench.n // n_batches
    torch.manual_seed(0)
    steps = Steps([Adaptor(_DIM, _DIM).to(bench.device)], [config], Group())
    steps.train()
    image, text = (torch.randn(1, size, _DIM, device=bench.device) for _ in range(2))
    codes = torch.arange(size, device=bench.device)[None]
    batch = Batch(image, text, None, None, codes, codes)

    def arithmetic() -> None:
        for _ in range(n_batches):
            steps.step(batch, 1.0)

    def epoch(**changes: object) -> Callable[[], float]:
        def second() -> float:  # the first sets up kernels and graphs
            result = train(
                manifest,
                image_store,
                text_store,
                next(bench.runs),
                config=replace(config, **changes),  # type: ignore[arg-type]
            )
            return bench.n / result.history[-1]["pairs_per_s"]

        return second

    calls = {
        "arithmetic": bench.waits(arithmetic),
        "resident": epoch(data="resident"),
        "streamed": epoch(data="streamed"),
        "by shards": epoch(data="streamed", order="shards"),
    }
    bench.waits(arithmetic)()
    times = turn_by_turn(calls, bench.repeats)
    bound = 1.05 if bench.device == "cpu" else 1.10
    yield Result(f"the steps alone, {bench.n:,} pairs", statistics.median(times["arithmetic"]), "s")
    for name in ("resident", "streamed", "by shards"):
        ratio = median_ratio(times[name], times["arithmetic"])
        goal = Goal("ratio", bound, "<=") if name == "resident" else None
        yield Result(f"epoch, rows {name}", statistics.median(times[name]), "s", ratio, "epoch / steps alone", goal)


def measure_data(bench: Bench) -> Iterator[Result]:
    """The data path alone."""
    manifest, image_store, text_store = bench.stores
    pairs = pairs_of_split(
        manifest, image_store, text_store, join(manifest, image_store, text_store), "train", TrainConfig()
    )
    feeds = {
        "resident": Feed(pairs, bench.device, resident=True),
        "streamed": Feed(pairs, bench.device, resident=False),
    }
    planner = Planner(pairs.reports, (1, 1), None, _BATCH, True, 0.0)
    seeds = count()

    def rate(feed: Feed) -> Callable[[], float]:
        def drained() -> None:
            for _ in range(_EPOCHS_OF_DATA):
                for _ in feed.epoch([planner.plan(seed=next(seeds), epoch=0)]):
                    pass

        return lambda: 2 * bench.n * _EPOCHS_OF_DATA / bench.waits(drained)()

    paths = [bench.folder / f"{store.modality}.npy" for store in (image_store, text_store)]
    for path, store in zip(paths, (image_store, text_store), strict=True):
        np.save(path, store.embeddings)
    calls = {name: rate(feed) for name, feed in feeds.items()}
    for workers in (0, 2):
        loaded = loader_rate(
            lambda: Pairwise(*(NpyRows(path) for path in paths)),
            batch_size=_BATCH,
            num_workers=workers,
            budget_s=_LOADER_BUDGET_S,
        )
        calls[f"{workers} workers"] = lambda loaded=loaded: 2 * loaded()
    turn_by_turn(calls, 1)
    rates = turn_by_turn(calls, bench.repeats)
    usual = [max(a, b) for a, b in zip(rates["0 workers"], rates["2 workers"], strict=True)]
    yield Result("DataLoader over npy maps, the better of 0 and 2 workers", statistics.median(usual) / 1e6, "M rows/s")
    for name in feeds:
        ratio = median_ratio(rates[name], usual)
        value = statistics.median(rates[name]) / 1e6
        yield Result(f"{name} rows, planned, gathered, as float32", value, "M rows/s", ratio, "ours / DataLoader")


def measure_many(bench: Bench) -> Iterator[Result]:
    """Five seeds together and one by one."""
    small = TrainConfig(
        epochs=6, batch_size=64, projection_dim=96, n_heads=4, n_layers=1, ff_dim=192, device=bench.device
    )
    phantom = replace(small, batch_size=128, projection_dim=384, n_heads=12, ff_dim=512)
    paper = TrainConfig(epochs=4, device=bench.device)  # beside setting up five models at once, which is done once
    sizes = (
        ("96-d, 1 block, batch 64", small, 1280, 96),
        ("384-d, 1 block, batch 128", phantom, 1280, 384),
        ("the paper's, batch 1,024", paper, 4096, _DIM),
    )
    for name, config, n, dim in sizes:
        data, configs = random_pairs(bench.folder / name, n, dim), grid(config, {}, n_seeds=5)
        calls = {
            "together": bench.waits(partial(_train_together, bench, data, configs)),
            "one by one": bench.waits(partial(_train_one_by_one, bench, data, configs)),
        }
        turn_by_turn(calls, 1)
        times = turn_by_turn(calls, bench.repeats)
        goal = Goal("ratio", 1.05 if bench.device == "cpu" else 0.5, "<=")
        ratio = median_ratio(times["together"], times["one by one"])
        yield Result(f"5 seeds one by one: {name}", statistics.median(times["one by one"]), "s")
        yield Result(
            f"5 seeds together: {name}", statistics.median(times["together"]), "s", ratio, "together / one by one", goal
        )


def _train_together(bench: Bench, data: Data, configs: dict[str, TrainConfig]) -> None:
    train_many(*data, next(bench.runs), configs=configs)


def _train_one_by_one(bench: Bench, data: Data, configs: dict[str, TrainConfig]) -> None:
    for config in configs.values():
        train(*data, next(bench.runs), config=config)


def measure_minutes(bench: Bench) -> Iterator[Result]:
    """Absolute times, which mean something on a GPU alone."""
    if bench.device == "cpu":
        return
    manifest, image_store, text_store = random_pairs(bench.folder / "mimic", _PAIRS_OF_MIMIC, _DIM)
    for precision in ("float32", "bfloat16"):
        config = TrainConfig(device=bench.device, precision=precision)  # type: ignore[arg-type]
        result = train(manifest, image_store, text_store, next(bench.runs), config=config)
        spent = sum(entry["seconds"] for entry in result.history)
        rate = statistics.median(entry["pairs_per_s"] for entry in result.history)
        yield Result(f"50 epochs over {_PAIRS_OF_MIMIC:,} pairs, {precision}", spent, "s")
        yield Result(f"training, {precision}", rate / 1e6, "M pairs/s")


_PARTS: dict[str, Callable[[Bench], Iterator[Result]]] = {
    "step": measure_step,
    "epoch": measure_epoch,
    "data": measure_data,
    "many": measure_many,
    "minutes": measure_minutes,
}


@click.command()
@click.option("--pairs", type=click.IntRange(min=_BATCH), default=20_480, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--only", type=click.Choice(list(_PARTS)), multiple=True, help="One part; may be given again.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(pairs: int, repeats: int, only: tuple[str, ...], device: str, as_json: bool) -> None:
    """Measures stage two against its arithmetic and against the paper's way; prints one table."""
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
        bench = Bench(Path(folder), device, repeats, pairs)
        for part in only or _PARTS:
            click.echo(f"measuring {part} ...", err=True)
            results += _PARTS[part](bench)
    settings = {"pairs": pairs, "repeats": repeats, "device": device, **machine("numpy", "torch")}
    if as_json:
        click.echo(json.dumps({"settings": settings, "results": [r.as_json() for r in results]}, indent=2))
    else:
        click.echo(", ".join(f"{name} {value}" for name, value in settings.items()))
        click.echo(table(results))


if __name__ == "__main__":
    main()
