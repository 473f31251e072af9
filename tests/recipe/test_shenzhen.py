"""What real radiographs prove: where the gain with few labels comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedcache.recipe.read import read_recipe
from embedcache.recipe.run import run_recipe

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data" / "shenzhen"


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="shared/data/shenzhen is not here")
def test_text_as_label_explains_the_gain_with_few_labels(tmp_path: Path) -> None:
    """A reading says normal if and only if the label is 0: labels read off texts do what the Adaptor does, and more."""
    recipe = read_recipe(
        ROOT / "pipelines" / "shenzhen.yaml",
        [f"data.root={REAL}", f"cache={tmp_path / 'cache'}", "probe.fractions=[0.01]", "probe.heads=[linear]"],
    )
    del recipe.encoders.image["vit-tiny-random"]
    gains = run_recipe(recipe, run_dir=tmp_path / "run").tables["gains"].set_index("control")
    print(gains[["value", "low", "high", "p_value"]])
    assert gains.loc["no-adaptor", "value"] > 0.05
    assert gains.loc["untrained-adaptor", "value"] > 0.05
    assert gains.loc["text-as-label", "value"] < 0
    assert gains.loc["metadata-only", "value"] > 0.2
