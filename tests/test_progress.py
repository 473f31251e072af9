from __future__ import annotations

import pytest

from embedcache import progress
from embedcache.progress import Progress


def test_off_a_terminal_it_prints_plain_lines_and_the_end_once(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    with Progress("counting", total=2, unit="sheep") as counter:
        counter.advance()
        counter.advance(note="1 black")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("counting: 1/2 sheep, ")
    assert lines[1].endswith("sheep/s, 1 black")


def test_on_a_terminal_it_draws_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with Progress("counting", total=2, unit="sheep") as counter:
        counter.advance(2)
    assert "2/2" in capsys.readouterr().err
