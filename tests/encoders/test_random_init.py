"""Random checkpoints: the same every time, and never mistaken for one another."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import embedcache
from embedcache.encoders.random_init import write_random_like, write_tiny
from embedcache.errors import EncoderError


def test_random_checkpoints_are_written_once_and_seeded(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_tiny("tiny-vit", tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    assert write_tiny("tiny-vit", tmp_path / "a", seed=0) == tmp_path / "a"
    with pytest.raises(EncoderError, match="another random checkpoint"):
        write_tiny("tiny-vit", tmp_path / "a", seed=1)
    with pytest.raises(EncoderError, match="expected one of tiny-vit"):
        write_tiny("huge-vit", tmp_path / "d", seed=1)


def test_a_tokenizer_of_the_reports_is_the_same_every_time(tmp_path: Path) -> None:
    reports = ["Clear lungs.", "An Opacity, clear.", "ABC cab."]
    code = (
        "import sys\nfrom pathlib import Path\nfrom embedcache.encoders.random_init import write_tiny\n"
        f"write_tiny('tiny-bert', Path(sys.argv[1]), seed=0, reports={reports})"
    )
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # unlike here, so that sets have another order
    elsewhere = {**os.environ, "PYTHONHASHSEED": seed}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "1")], check=True, env=elsewhere)
    write_tiny("tiny-bert", tmp_path / "2", seed=0, reports=reports)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / s).iterdir()} for s in ("1", "2"))
    assert first == second
    vocabulary = json.loads(first["tokenizer.json"])["model"]["vocab"]
    assert [vocabulary[piece] for piece in ("[PAD]", "[CLS]", "[SEP]")] == [0, 2, 3]
    assert {"clear", "lungs", "opacity", "##c"} <= set(vocabulary)


def test_random_like_keeps_all_but_the_weights(checkpoints: Path, tmp_path: Path, image_encoder) -> None:
    write_random_like(f"hf:{checkpoints / 'vit'}", tmp_path / "random", seed=5)
    random = embedcache.load_encoder(f"hf:{tmp_path / 'random'}", pooling="mean", device="cpu")
    ours, theirs = dict(random.record.identity), dict(image_encoder.record.identity)
    assert ours.pop("weights") != theirs.pop("weights")
    assert ours == theirs
    copy = tmp_path / "vit"
    shutil.copytree(checkpoints / "vit", copy)
    processor = copy / "preprocessor_config.json"
    processor.write_text(json.dumps({**json.loads(processor.read_text()), "image_mean": [0.1, 0.1, 0.1]}))
    with pytest.raises(EncoderError, match="holds another random checkpoint"):
        write_random_like(f"hf:{copy}", tmp_path / "random", seed=5)
    with pytest.raises(EncoderError, match="expected hf: and a local directory"):
        write_random_like("hf:some/name", tmp_path / "x", seed=0)
