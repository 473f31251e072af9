"""`embedcache demo` and `embedcache run`: their plan, what they print, and a second time."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from calling import call

SMALL = [
    word
    for setting in (
        "data.config.n_images=100", "data.config.size=64", "train.epochs=1", "train.n_seeds=2", "labels=[effusion]",
        "probe.n_seeds=2", "probe.fractions=[1.0]", "probe.n_draws=50", "segment=null", "zeroshot=null",
    )
    for word in ("--set", setting)
]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_plan_of_the_demo_makes_nothing_but_its_dataset(here: Path) -> None:
    planned = call("demo", "--plan", "--json", *SMALL)
    assert planned.exit_code == 0, planned.output
    assert set(json.loads(planned.stdout)) == {"tiny-vit", "tiny-resnet", "tiny-bert"}
    steps = re.findall(r"^  to do +(.*)$", planned.stderr, re.MULTILINE)
    assert "tiny-vit + tiny-bert: Adaptor" in steps
    assert "tiny-resnet + tiny-bert: probe effusion" in steps
    assert re.search(r"^in all: .*", planned.stderr, re.MULTILINE)
    assert not (here / "runs").exists()
    assert not list(here.glob("cache/phantom/*/shard-*"))


def test_the_demo_ends_in_verdicts_and_a_report_and_is_done_the_second_time(here: Path) -> None:
    done = call("demo", *SMALL, "--run-dir", "runs/mine")
    assert done.exit_code == 0, done.output
    assert "auroc of effusion (linear, 100% of the labels, with tiny-bert): " in done.output
    page = here / "runs" / "mine" / "report.html"
    assert str(page.relative_to(here)) in done.output
    assert "data:image/jpeg;base64," in page.read_text()  # drawn images are shown
    again = call("demo", *SMALL, "--run-dir", "runs/mine", "--json")
    said = json.loads(again.stdout)
    assert Path(said["report"]).resolve() == page
    assert Path(said["run_dir"]).resolve() == page.parent
    planned = call("demo", *SMALL, "--run-dir", "runs/mine", "--plan")
    stage_two = planned.output.split("stage two\n")[1].splitlines()
    assert len(stage_two) == 6
    assert all(line.startswith("  done ") for line in stage_two)
