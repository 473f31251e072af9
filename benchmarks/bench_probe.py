"""How fast probes are, as ratios against what a user would do without them, in this one run.

    python benchmarks/bench_probe.py                         everything, about fifty minutes on 2 cores
    python benchmarks/bench_probe.py --only bootstrap --json one part, as JSON
    python benchmarks/bench_probe.py --device cuda           the heads on a GPU

The parts, by the name that `--only` takes:

    heads      three label fractions x five seeds of the MLP head on 18,678 x 768 for 50 epochs at batch 512, as RSNA
               has them, validated after each epoch: together, against our own code one by one, and a plain torch loop
    encoder    the same, against running a ViT-S over the images in every epoch as the paper's code does; that is
               measured on a few images and multiplied, and would take weeks
    bootstrap  2,000 draws of AUROC on 25,000 rows of 8,000 patients, against a loop over scikit-learn, of which a few
               draws are measured and multiplied

What is compared runs turn by turn within each repeat; `value` is the median over the repeats, `ratio` the median of the
ratios within each repeat.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from functools import cached_property

import click
import numpy as np
import torch
import torch.nn.functional as F
from measuring import Goal, Result, machine, median_ratio, seconds, shown, turn_by_turn, waited
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from embedcache.data.splits import label_subset
from embedcache.metrics.classification import Ranking
from embedcache.metrics.intervals import PatientDraws, bootstrap
from embedcache.stage_two.head_fits import Fit, fit_heads
from embedcache.stage_two.heads import HeadConfig
from embedcache.stage_two.targets import Target

_TRAIN, _VALID, _TEST, _DIM = 18_678, 4_003, 4_003, 768
_FRACTIONS, _SEEDS, _EPOCHS = (0.01, 0.1, 1.0), 5, 50
_TARGET = Target("pneumonia", "binary", ("pneumonia",), ("pneumonia",))
_ROWS, _PATIENTS, _DRAWS, _DRAWS_OF_LOOP = 25_000, 8_000, 2_000, 40
_IMAGES = 32


class Heads:
    """Features with a faint signal, and fifteen heads to fit on them."""

    def __init__(self, device: str, epochs: int) -> None:
        self.device = device
        self.config = HeadConfig(
            epochs=epochs, min_steps=0, batch_size=512, lr=5e-5, weight_decay=1e-4, restarts_by="epoch"
        )

    @cached_property
    def y(self) -> np.ndarray:
        return (np.random.default_rng(0).random(_TRAIN + _VALID + _TEST) < 0.22).astype(np.float64)

    @cached_property
    def x(self) -> Tensor:
        noise = torch.randn(len(self.y), _DIM, generator=torch.Generator().manual_seed(0))
        return (noise + 0.05 * torch.from_numpy(self.y).float()[:, None]).to(self.device)

    @cached_property
    def fits(self) -> list[Fit]:
        y, valid = self.y[:, None], np.arange(_TRAIN, _TRAIN + _VALID)
        rows = [label_subset(self.y[:_TRAIN], f, seed=seed) for f in _FRACTIONS for seed in range(_SEEDS)]
        return [Fit(r, y[r], seed=k % _SEEDS, watched=valid, watched_labels=y[valid]) for k, r in enumerate(rows)]

    @property
    def asked(self) -> np.ndarray:
        return np.arange(_TRAIN + _VALID, len(self.y))

    def together(self) -> None:
        self._fit(self.fits)

    def one_by_one(self) -> None:
        for fit in self.fits:
            self._fit([fit])

    def plain(self) -> None:
        """Each by itself, as a script of torch would have it: a Sequential, its batches gathered by index."""
        x, y = self.x, torch.from_numpy(self.y).float().to(self.device)
        valid = torch.arange(_TRAIN, _TRAIN + _VALID, device=self.device)
        for fit in self.fits:
            torch.manual_seed(fit.seed)
            head = nn.Sequential(
                nn.Dropout(0.1), nn.Linear(_DIM, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU(), nn.Dropout(0.1),
                nn.Linear(512, 1),
            ).to(self.device)  # fmt: skip
            optimizer = torch.optim.AdamW(head.parameters(), lr=5e-5, weight_decay=1e-4)
            rows = torch.from_numpy(fit.rows).to(self.device)
            for _ in range(self.config.epochs):
                head.train()
                for part in rows[torch.randperm(len(rows), device=self.device)].split(512):
                    loss = F.binary_cross_entropy_with_logits(head(x[part])[:, 0], y[part])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                with torch.no_grad():
                    F.binary_cross_entropy_with_logits(head.eval()(x[valid])[:, 0], y[valid]).item()

    def _fit(self, fits: list[Fit]) -> None:
        fit_heads("mlp", self.x, fits, target=_TARGET, config=self.config, class_weight="none", asked=self.asked)

    def images_of_the_papers_way(self) -> int:
        """Images that an encoder sees if it runs in every epoch, in training and in validation."""
        return self.config.epochs * sum(len(f.rows) + _VALID for f in self.fits)


def heads(device: str, repeats: int, epochs: int) -> Iterator[Result]:
    """Together, one by one, and plain."""
    work = Heads(device, epochs)
    work._fit([Fit(f.rows, f.labels, f.seed) for f in work.fits[:1]])  # memory and libraries are ready
    calls = {"together": work.together, "one by one": work.one_by_one, "plain torch, one by one": work.plain}
    found = turn_by_turn({name: seconds(waited(call, device)) for name, call in calls.items()}, repeats)
    for name, times in found.items():
        goal = Goal("ratio", 1.05, "<=") if name == "one by one" else None
        yield Result(
            f"15 MLP heads, {epochs} epochs: {name}",
            statistics.median(times),
            "s",
            None if name == "together" else median_ratio(found["together"], times),
            "" if name == "together" else f"together / {name}",
            goal,
        )


def encoder(device: str, repeats: int, epochs: int) -> Iterator[Result]:
    """The heads together, against an encoder that runs in every epoch."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=224)).eval().to(device)
    images, work = torch.randn(_IMAGES, 3, 224, 224, device=device), Heads(device, epochs)

    @torch.inference_mode()
    def encode() -> None:
        model(images)

    encode()
    calls = {"heads": work.together, "images": encode}
    found = turn_by_turn({name: seconds(waited(call, device)) for name, call in calls.items()}, repeats)
    per_image = [t / _IMAGES for t in found["images"]]
    hours = [t * work.images_of_the_papers_way() / 3600 for t in per_image]
    yield Result("ViT-S/14 at 224, random weights, one image", statistics.median(per_image) * 1000, "ms")
    yield Result(
        f"an encoder in each of {epochs} epochs of 15 heads, multiplied from {_IMAGES} images",
        statistics.median(hours),
        "h",
        median_ratio([h * 3600 for h in hours], found["heads"]),
        "that / heads on cached embeddings, together",
    )


def draws(device: str, repeats: int, epochs: int) -> Iterator[Result]:
    """A clustered bootstrap of AUROC."""
    rng = np.random.default_rng(0)
    patient = rng.integers(0, _PATIENTS, _ROWS)
    y = (rng.random(_ROWS) < 0.2).astype(np.int64)
    scores = rng.normal(size=_ROWS) + y

    def ours() -> None:
        bootstrap(Ranking.of(y, scores).auroc, PatientDraws(patient, _DRAWS, seed=0))

    def loop() -> float:
        rows_of = np.split(np.argsort(patient, kind="stable"), np.cumsum(np.bincount(patient))[:-1])
        known = [rows for rows in rows_of if len(rows)]
        start = time.perf_counter()
        for _ in range(_DRAWS_OF_LOOP):
            chosen = np.concatenate([known[k] for k in rng.integers(0, len(known), len(known))])
            roc_auc_score(y[chosen], scores[chosen])
        return (time.perf_counter() - start) * _DRAWS / _DRAWS_OF_LOOP

    found = turn_by_turn({"ours": seconds(ours), "loop": loop}, repeats)
    yield Result("2,000 clustered draws of AUROC, 25,000 rows", statistics.median(found["ours"]), "s")
    yield Result(
        f"the same, a loop over scikit-learn, multiplied from {_DRAWS_OF_LOOP} draws",
        statistics.median(found["loop"]),
        "s",
        median_ratio(found["loop"], found["ours"]),
        "loop / ours",
        Goal("ratio", 20),
    )


PARTS = {"heads": heads, "encoder": encoder, "bootstrap": draws}


@click.command()
@click.option("--only", type=click.Choice(list(PARTS)), multiple=True)
@click.option("--device", default="cpu")
@click.option("--repeats", type=click.IntRange(min=1), default=3)
@click.option("--epochs", type=click.IntRange(min=1), default=_EPOCHS)
@click.option("--json", "as_json", is_flag=True)
def main(only: tuple[str, ...], device: str, repeats: int, epochs: int, as_json: bool) -> None:
    """Measures and prints."""
    results = [result for name in only or PARTS for result in PARTS[name](device, repeats, epochs)]
    click.echo(shown(results, machine("torch", "numpy", "scikit-learn"), as_json))


if __name__ == "__main__":
    main()
