"""The worked examples run as they are written, and print what they say they print."""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from embedcache.cli import main

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "examples.md"
SMALLER = " ".join(
    f"--set {setting}"
    for setting in (
        "data.config.n_images=160", "data.config.size=64", "train.epochs=2", "probe.n_draws=50", "segment.n_draws=50",
        "segment.epochs=1", "segment.size=16", "train.n_seeds=2", "probe.n_seeds=2", "segment.n_seeds=2",
        "probe.head.epochs=1", "probe.head.min_steps=10", "steps.workers=1",
    )
)  # fmt: skip
_NUMBER = re.compile(r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Example:
    """A command, and the lines that the page says it prints; `...` stands for lines that are left out."""

    command: str
    printed: tuple[str, ...]


def examples() -> list[Example]:
    """Every command of the page's blocks `console`, in order."""
    found: list[Example] = []
    for block in re.findall(r"```console\n(.*?)```", PAGE.read_text(), re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            lines = part.splitlines()
            n = next(k for k, line in enumerate(lines) if not line.endswith("\\")) + 1
            command = " ".join(line.rstrip("\\").strip() for line in lines[:n])
            found.append(Example(command, tuple(line for line in lines[n:] if line.strip())))
    return found


def run(command: str, folder: Path) -> str:
    """What a command prints, run by a shell in a folder."""
    words = command.replace("embedcache ", f"{sys.executable} -m embedcache ", 1)
    done = subprocess.run(
        ["bash", "-c", words], cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_command_of_the_examples_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a smaller phantom, in this process: what is printed has the same words, and other numbers."""
    monkeypatch.chdir(tmp_path)
    commands = examples()
    assert len(commands) >= 8
    for example in commands:
        is_whole = example.command.startswith("embedcache demo ")
        words = shlex.split(f"{example.command} {SMALLER}" if is_whole else example.command)
        assert words[0] == "embedcache"
        done = CliRunner().invoke(main, words[1:])
        assert done.exit_code == 0, f"{example.command}\n{done.output}"
        printed = done.stdout
        there = {" ".join(_NUMBER.sub("#", line).split()) for line in printed.splitlines()}
        headings = [line for line in example.printed if line != "..." and not _NUMBER.search(line)]
        for line in headings:
            assert " ".join(line.split()) in there, f"{example.command}\n{line}\nis not in\n{printed}"


@pytest.mark.slow
def test_the_examples_print_what_they_say(tmp_path: Path) -> None:
    """In full: the numbers too, but for times, and for what another processor's last bits change."""
    for example in examples():
        lines = iter(run(example.command, tmp_path).splitlines())
        for expected in example.printed:
            if expected == "...":
                continue
            assert any(_alike(expected, line) for line in lines), f"{example.command}\n{expected}"


def _alike(expected: str, line: str) -> bool:
    if _NUMBER.sub("#", expected).split() != _NUMBER.sub("#", line).split():
        return False
    if re.search(r"\d s$|seconds|runs/", expected):
        return True
    return all(
        a == b or ("." in a and math.isclose(float(a), float(b), rel_tol=0.02, abs_tol=0.02))
        for a, b in zip(_NUMBER.findall(expected), _NUMBER.findall(line), strict=True)
    )
