"""A small run of a recipe with everything in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedcache.recipe.read import read_recipe
from embedcache.recipe.run import RunResult, run_recipe

RECIPE = """\
name: small
cache: {root}/cache
data: {{kind: phantom, root: {root}/dataset, config: {{n_images: 120, size: 64}}}}
encoders:
  image:
    vit: {{tiny: tiny-vit, pooling: mean}}
    again: {{tiny: tiny-vit, pooling: mean, seed: 3}}
  text:
    bert: {{tiny: tiny-bert}}
extract: {{tokens: image}}
train: {{epochs: 2, batch_size: 32, projection_dim: 24, ff_dim: 32}}
labels: [effusion, opacity]
probe: {{heads: [linear], n_seeds: 2, n_draws: 50, fractions: [0.2, 1.0], head: {{epochs: 1, min_steps: 5}}}}
segment: {{decoders: [linear], size: 16, fractions: [1.0], n_seeds: 2, n_draws: 50, epochs: 2, min_steps: 20, lr: 0.1}}
retrieve: {{n_draws: 50}}
zeroshot: chexpert
steps: {{workers: 1}}
"""


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    root = tmp_path_factory.mktemp("reported")
    recipe: Path = root / "small.yaml"
    recipe.write_text(RECIPE.format(root=root))
    return run_recipe(read_recipe(recipe), run_dir=root / "runs" / "1")
