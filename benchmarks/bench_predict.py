"""What an answer for a new image costs over the bare encoder, warm and from the start of a process.

    python benchmarks/bench_predict.py [--json]            ViT-S, 512 px PNG and 2,500 x 3,000 JPEG, about five minutes
    python benchmarks/bench_predict.py --device cuda

Warm: `Predictor.predict` on many files and on one, against the encoder alone on inputs that are ready, and against
preparing each file and then encoding it, one after the other. Cold: the command `embedcache predict` on one file,
against a script that loads the same checkpoint with transformers and encodes the same file. Weights are random, the
Adaptor is of the paper's size. `value` is the median over the repeats, `ratio` the median of the ratios within each.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import numpy as np
from bench_extract import FILES, draw, vit
from measuring import Result, machine, median_ratio, seconds, shown, turn_by_turn, waited

import embedcache
from embedcache import Manifest, Predictor, ProbeConfig, TrainConfig
from embedcache.encoders.base import Encoder
from embedcache.stage_two.heads import HeadConfig

BATCH = 16
_BARE = """
import sys
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
model = AutoModel.from_pretrained(sys.argv[1], add_pooling_layer=False).eval().to(sys.argv[3])
processor = AutoImageProcessor.from_pretrained(sys.argv[1])
with torch.inference_mode():
    pixels = processor(Image.open(sys.argv[2]).convert("RGB"), return_tensors="pt")["pixel_values"]
    print(model(pixels.to(sys.argv[3])).last_hidden_state[0, 0].sum().item())
"""


@click.command()
@click.option("--model", type=click.Choice(["ViT-Tiny", "ViT-S"]), default="ViT-S")
@click.option("--n", type=click.IntRange(min=24), default=64, help="Images.")
@click.option("--device", default="cpu")
@click.option("--repeats", type=click.IntRange(min=1), default=5)
@click.option("--json", "as_json", is_flag=True)
def main(model: str, n: int, device: str, repeats: int, as_json: bool) -> None:
    """Measures and prints."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        checkpoint = vit(place, model)
        encoder = embedcache.load_encoder(f"hf:{checkpoint}", device=device)
        for kind, (shape, suffix) in FILES.items():
            manifest = draw(place / suffix, shape, suffix, n)
            run_dir = _run(manifest, encoder, place / f"{suffix}-run")
            files = [manifest.path(image) for image in manifest.frame["image"]]
            results += _warm(Predictor(run_dir, encoder=encoder), encoder, files, kind, device, repeats)
            results += _cold(run_dir, checkpoint, files[0], kind, device, repeats)
    about = machine("torch", "transformers") | {"model": model, "batch": BATCH, "device": device}
    click.echo(shown(results, about, as_json))


def _run(manifest: Manifest, encoder: Encoder, place: Path) -> Path:
    """A run with an Adaptor of the paper's size and an MLP head; labels are drawn."""
    rng, n = np.random.default_rng(0), len(manifest)
    frame = manifest.frame.assign(
        split=np.array(["train", "train", "valid", "test"])[np.arange(n) % 4],
        report=[f"report {k}" for k in range(n)],
        **{"label.y": rng.integers(0, 2, n)},
    )
    labelled = Manifest(frame, name="drawn", root=manifest.root)
    embedcache.extract(labelled, encoder, place / "image")
    texts = rng.normal(size=(n, 768)).astype(np.float32)
    text = embedcache.save_store(place / "text", labelled.frame["report_id"].tolist(), texts, modality="text")
    embedcache.train(labelled, place / "image", text, place / "run", config=TrainConfig(epochs=1, batch_size=16))
    config = ProbeConfig(
        heads=("mlp",),
        fractions=(1.0,),
        n_seeds=1,
        n_draws=10,
        controls=(),
        head=HeadConfig(epochs=1, min_steps=10),
    )
    probed = embedcache.probe(labelled, place / "image", label="y", run_dir=place / "run", config=config)
    probed.write(place / "run" / "probes" / "y")
    return place / "run"


def _warm(
    predictor: Predictor, encoder: Encoder, files: list[Path], kind: str, device: str, repeats: int
) -> list[Result]:
    ready = [encoder.prepare(file) for file in files]

    def alone(n: int) -> None:
        for start in range(0, n, BATCH):
            encoder.encode(ready[start : min(start + BATCH, n)])

    def one_by_one(n: int) -> None:
        for start in range(0, n, BATCH):
            encoder.encode([encoder.prepare(file) for file in files[start : min(start + BATCH, n)]])

    results = []
    for n, words in ((len(files), "many"), (1, "one")):
        calls = {
            "predict": lambda n=n: predictor.predict(files[:n], batch_size=BATCH),
            "the encoder alone, inputs ready": lambda n=n: alone(n),
            "prepare, then encode": lambda n=n: one_by_one(n),
        }
        for call in calls.values():
            call()
        timed = {name: seconds(waited(call, device)) for name, call in calls.items()}
        found = turn_by_turn(timed, repeats)
        for name, times in found.items():
            of = None if name == "predict" else median_ratio(found["predict"], times)
            results.append(
                Result(
                    f"{kind}, warm, {words}: {name}",
                    statistics.median(times) / n * 1000,
                    "ms an image",
                    of,
                    "" if of is None else "predict / that",
                )
            )
    return results


def _cold(run_dir: Path, checkpoint: Path, file: Path, kind: str, device: str, repeats: int) -> list[Result]:
    def command(*arguments: object) -> None:
        subprocess.run([sys.executable, *map(str, arguments)], check=True, capture_output=True)

    calls = {
        "predict": lambda: command("-m", "embedcache", "predict", run_dir, file, "--device", device),
        "transformers alone": lambda: command("-c", _BARE, checkpoint, file, device),
    }
    for call in calls.values():
        call()
    found = turn_by_turn({name: seconds(call) for name, call in calls.items()}, repeats)
    ratio = median_ratio(found["predict"], found["transformers alone"])
    return [
        Result(
            f"{kind}, cold, one: {name}",
            statistics.median(times),
            "s",
            None if name == "predict" else ratio,
            "" if name == "predict" else "predict / that",
        )
        for name, times in found.items()
    ]


if __name__ == "__main__":
    main()
