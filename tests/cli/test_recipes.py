"""`embedcache demo`: its plan, what it prints, and a second time."""

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
        "steps.workers=1",
    )
    for word in ("--set", setting)
]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def steps_of_plan(output: str) -> dict[str, str]:
    """What a plan says of each step of stage two."""
    lines = output.split("stage two\n")[1].splitlines()
    return {name: state for line in lines for state, name in re.findall(r"^  (done|copied|to do) +(.*)$", line)}


STEPS = {
    f"{image} + tiny-bert: {step}"
    for image in ("tiny-vit", "tiny-resnet")
    for step in ("Adaptor", "probe effusion", "retrieval")
}


def test_a_plan_of_the_demo_makes_no_store_and_no_run(here: Path) -> None:
    planned = call("demo", "--plan", "--json", *SMALL)
    assert planned.exit_code == 0, planned.output
    assert set(json.loads(planned.stdout)) == {"tiny-vit", "tiny-resnet", "tiny-bert"}
    assert steps_of_plan(planned.stderr) == dict.fromkeys(STEPS, "to do")
    assert re.search(r"^in all: .*", planned.stderr, re.MULTILINE)
    assert [path.name for path in here.iterdir()] == ["cache"]
    assert {path.name for path in (here / "cache" / "phantom").iterdir()} == {"dataset", "checkpoints"}


def test_the_demo_ends_in_verdicts_and_a_report_and_is_done_the_second_time(here: Path) -> None:
    done = call("demo", *SMALL, "--run-dir", "runs/mine")
    assert done.exit_code == 0, done.output
    assert "auroc of effusion (linear, 100% of the labels, with tiny-bert): " in done.output
    run_dir = here / "runs" / "mine"
    page = run_dir / "report.html"
    assert str(page.relative_to(here)) in done.output
    assert "data:image/jpeg;base64," in page.read_text()  # drawn images are shown
    assert steps_of_plan(call("demo", *SMALL, "--run-dir", "runs/mine", "--plan").output) == dict.fromkeys(
        STEPS, "done"
    )
    made = [*run_dir.glob("*/adaptor.safetensors"), *run_dir.glob("*/probes/effusion/*.csv")]
    times = {path: path.stat().st_mtime_ns for path in made}
    assert len(times) >= 4
    said = json.loads(call("demo", *SMALL, "--run-dir", "runs/mine", "--json").stdout)
    assert Path(said["report"]).resolve() == page
    assert Path(said["run_dir"]).resolve() == run_dir
    assert {path: path.stat().st_mtime_ns for path in made} == times
