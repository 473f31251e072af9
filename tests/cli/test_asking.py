"""Commands on masks, retrieval and prompts: what they print, write and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from calling import call

import embedcache
from embedcache import Adaptor, Manifest

N = 60


@pytest.fixture
def made(tmp_path: Path) -> dict[str, Path]:
    """A manifest with reports, masks and a label, both stores, and a run directory."""
    rng = np.random.default_rng(0)
    ids, y = [f"i{k:02d}" for k in range(N)], rng.integers(0, 2, N)
    cells = rng.random((N, 4, 4)) < 0.3 * y[:, None, None]
    masks = [
        "boxes:40x40:" + ";".join(f"{x * 10},{r * 10},10,10" for r, x in zip(*np.nonzero(cell), strict=True))
        for cell in cells
    ]
    frame = pd.DataFrame(
        {
            "id": ids,
            "image": [f"{i}.png" for i in ids],
            "report": [f"report {k}" for k in range(N)],
            "split": ["train", "train", "valid", "test"] * (N // 4),
            "mask": masks,
            "label.y": y,
        }
    )
    Manifest(frame, name="made", root=tmp_path).write(tmp_path / "m.parquet")
    tokens = rng.normal(size=(N, 16, 8)).astype(np.float32)
    tokens[..., 0] += 4 * cells.reshape(N, 16)
    image = embedcache.save_store(tmp_path / "image", ids, tokens.mean(1), tokens=tokens)
    text = embedcache.save_store(tmp_path / "text", ids, tokens.mean(1), modality="text")
    encoders = {
        m: {"name": m, "fingerprint": s.encoder_fingerprint, "features": "embeddings"}
        for m, s in (("image", image), ("text", text))
    }
    Adaptor(8, 8, kind="identity", encoders=encoders).save_pretrained(tmp_path / "run")
    names = {"manifest": "m.parquet", "image": "image", "text": "text", "run": "run"}
    return {name: tmp_path / file for name, file in names.items()}


def test_segment_prints_its_tables_and_writes_them(made: dict[str, Path], tmp_path: Path) -> None:
    quick = [
        "--set=decoders=linear", "--set=size=8", "--set=fractions=1.0", "--set=n_seeds=1", "--set=n_draws=50",
        "--set=epochs=2",
    ]  # fmt: skip
    done = call("segment", made["manifest"], made["image"], *quick, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    for said in ("masks (test 15,", "Dice on positives", "empty mask", "mean-mask", "gain of masks over each control"):
        assert said in done.output
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "scores.csv", "gains.csv", "images.parquet", "decoder-linear.safetensors"
    }  # fmt: skip
    said = json.loads(call("segment", made["manifest"], made["image"], *quick, "--json").stdout)
    assert {row["metric"] for row in said["scores"]} >= {"dice", "dice_on_positives", "empty_mask_dice", "iou"}
    wrong = call("segment", made["manifest"], made["image"], "--protocol", "paper-siim")
    assert wrong.exit_code == 2
    assert "64 x 64 to 896; found 4 x 4 tokens" in wrong.output


def test_retrieve_prints_chance_beside_recall(made: dict[str, Path], tmp_path: Path) -> None:
    asked = ("retrieve", made["manifest"], made["image"], made["text"], "--run-dir", made["run"], "--label", "y")
    done = call(*asked, "--set", "at=1,5", "--set", "n_draws=50", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    for said in (
        "image to report: 15 queries among 15",
        "recall@5",
        "median_rank",
        "precision@1 of y",
        "chance",
        "one order for all",
    ):
        assert said in done.output
    assert len(pd.read_parquet(tmp_path / "out" / "matches.parquet")) == 2 * 15 * 10
    said = json.loads(call(*asked, "--json").stdout)
    best = [r for r in said["scores"] if r["metric"] == "recall@1" and not r["control"]]
    assert [r["value"] for r in best] == [1.0, 1.0]


def test_prompts_are_written_encoded_and_asked(made: dict[str, Path], tmp_path: Path) -> None:
    done = call("prompts", "chexzero", "--label", "y", "-o", tmp_path / "prompts.parquet")
    assert done.exit_code == 0, done.output
    assert "2 prompts; encode them with 'embedcache extract" in done.output
    assert Manifest.read(tmp_path / "prompts.parquet").reports() == {"y/positive/00": "y", "y/negative/00": "no y"}
    asked = ("zeroshot", made["manifest"], made["image"], made["text"], "--run-dir", made["run"], "--label", "y")
    missing = call(*asked)
    assert missing.exit_code == 2
    assert "2 of 2 prompts are not there" in missing.output
    prompts = embedcache.save_store(
        tmp_path / "p", ["y/positive/00", "y/negative/00"], np.eye(2, 8, dtype=np.float32), modality="text"
    )
    adaptor = Adaptor.from_pretrained(made["run"])
    adaptor.config["encoders"]["text"]["fingerprint"] = prompts.encoder_fingerprint
    adaptor.save_pretrained(tmp_path / "again")
    asked = (
        "zeroshot",
        made["manifest"],
        made["image"],
        tmp_path / "p",
        "--run-dir",
        tmp_path / "again",
        "--label",
        "y",
    )
    done = call(*asked, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "zero-shot by prompts" in done.output
    assert len(pd.read_parquet(tmp_path / "out" / "predictions.parquet")) == 15
    said = json.loads(call(*asked, "--json").stdout)
    assert {row["metric"] for row in said["scores"]} == {"auroc", "average_precision"}
    assert said["wordings"][0]["negative"] == "no y"
