"""The package as a whole: light imports, the wall at run time, one fingerprint pinned."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import embedcache


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300, check=False
    )


def test_import_loads_neither_torch_nor_the_rest() -> None:
    done = run_python(
        "import sys, embedcache\n"
        "heavy = {'torch', 'transformers', 'pandas', 'h5py', 'numpy'} & set(sys.modules)\n"
        "print(sorted(heavy))"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_help_loads_no_torch() -> None:
    done = run_python(
        "import sys\nfrom click.testing import CliRunner\nfrom embedcache.cli import main\n"
        "result = CliRunner().invoke(main, ['--help'])\nprint(result.exit_code, 'torch' in sys.modules)"
    )
    assert done.stdout.split() == ["0", "False"], done.stderr


def test_every_public_name_is_there() -> None:
    for name in embedcache.__all__:
        assert getattr(embedcache, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        embedcache.no_such_name  # noqa: B018


def test_stage_two_runs_without_encoder_libraries(tmp_path: Path) -> None:
    """Both stages meet in the store alone: training and probing with the libraries of stage one unimportable."""
    code = """
import sys
for name in ("transformers", "open_clip", "timm", "torchvision", "PIL"):
    sys.modules[name] = None
import numpy as np, pandas as pd, embedcache
from embedcache.stage_two.heads import HeadConfig
from pathlib import Path
root = Path(sys.argv[1])
rng = np.random.default_rng(0)
n = 60
label = np.arange(n) % 2
frame = pd.DataFrame({
    "id": [f"i{k}" for k in range(n)], "image": "x.png", "report": [f"report {k}" for k in range(n)],
    "split": ["train", "train", "valid", "test"] * 15, "label.y": rng.permutation(label),
})
manifest = embedcache.Manifest(frame, name="made", root=root)
ids = frame["id"].tolist()
image = embedcache.save_store(root / "image", ids, rng.normal(size=(n, 16)).astype(np.float32))
text = embedcache.save_store(root / "text", ids, rng.normal(size=(n, 12)).astype(np.float32), modality="text")
config = embedcache.TrainConfig(epochs=2, batch_size=8, projection_dim=24, ff_dim=32)
embedcache.train(manifest, image, text, root / "run", config=config)
probed = embedcache.probe(manifest, image, label="y", run_dir=root / "run", text_store=text,
    config=embedcache.ProbeConfig(n_seeds=1, n_draws=20, head=HeadConfig(epochs=1, min_steps=5)))
print(len(probed.scores))
"""
    done = run_python(code, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 5 * 2 * 3 * 7  # settings, heads, fractions, metrics
