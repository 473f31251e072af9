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


def test_a_slow_start_makes_no_long_wait(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    """Ten seconds until the first ten of a hundred are done, then ten a second; in the end the rate is over all."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress("encoding", total=100, unit="image") as counter:
        for second in (10.0, 20.0):
            now[0] = second
            counter.advance(10 if second == 10.0 else 40, "encoder waited 3%, 2 failed")
        now[0] = 25.0
        counter.advance(50)
    assert capsys.readouterr().err.splitlines() == [
        "encoding: 10/100 image, 1.0 image/s, 90 s left, encoder waited 3%, 2 failed",
        "encoding: 50/100 image, 4.0 image/s, 12 s left, encoder waited 3%, 2 failed",
        "encoding: 100/100 image, 4.0 image/s, encoder waited 3%, 2 failed",
    ]
