"""Steps that are done where they have to be, and kept where they are done."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from embedcache.comparing.steps import NOTES_NAME, Step, Work, run_steps, states
from embedcache.errors import SettingsError, WorkerError
from embedcache.workers.chosen import Workers

HERE, TWO = Workers(), Workers(n=2)


def write(*, path: Path, text: str, calls: Path, device: str) -> list[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    (calls / f"{path.name}-{os.getpid()}-{len(list(calls.iterdir()))}").touch()
    return [f"wrote {text} on {device}"]


def fail(*, path: Path, text: str, calls: Path, device: str) -> list[str]:
    raise SettingsError("no such thing; choose another")


def die(*, path: Path, text: str, calls: Path, device: str) -> list[str]:
    (calls / f"died-{len(list(calls.iterdir()))}").touch()
    os._exit(3)


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    (tmp_path / "calls").mkdir()
    return tmp_path / "calls"


def step(calls: Path, run: Path, name: str, *needs: str, key: str = "k", function=write, text: str = "x") -> Step:
    folder = Path(name)
    work = Work(function, {"path": run / folder / name, "text": text, "calls": calls}, "cpu")
    return Step(name, folder, ("**/*",), needs, partial(str, f"{name}{key}"), work)


def done(calls: Path) -> list[str]:
    return sorted(path.name.split("-")[0] for path in calls.iterdir())


@pytest.mark.parametrize("workers", [HERE, TWO])
def test_each_is_done_once_and_after_what_it_needs(tmp_path: Path, calls: Path, workers: Workers) -> None:
    run = tmp_path / "run"
    steps = [
        step(calls, run, "a"),
        step(calls, run, "b", "a"),
        step(calls, run, "c", "a"),
        step(calls, run, "d", "b", "c"),
    ]
    said: list[str] = []
    found = run_steps(steps, run, workers, "cpu", say=said.append)
    assert done(calls) == ["a", "b", "c", "d"]
    order = [line.partition(":")[0] for line in said if not line.startswith(" ")]
    assert order[0] == "a"
    assert order[-1] == "d"
    assert found["b"].said == ("wrote x on cpu",)
    assert "  wrote x on cpu" in said
    assert os.getpid() in {int(path.name.split("-")[1]) for path in calls.iterdir()} or workers is TWO
    assert run_steps(steps, run, workers, "cpu", say=said.append).keys() == found.keys()
    assert done(calls) == ["a", "b", "c", "d"]
    assert "d: done before" in said


def test_a_changed_key_and_a_damaged_file_are_done_again(tmp_path: Path, calls: Path) -> None:
    run = tmp_path / "run"
    run_steps([step(calls, run, "a"), step(calls, run, "b")], run, HERE, "cpu")
    assert states([step(calls, run, "a"), step(calls, run, "b", key="other")], run) == {"a": "done", "b": "to do"}
    run_steps([step(calls, run, "a"), step(calls, run, "b", key="other", text="y")], run, HERE, "cpu")
    assert done(calls) == ["a", "b", "b"]
    (run / "a" / "a").write_text("z")
    run_steps([step(calls, run, "a"), step(calls, run, "b", key="other")], run, HERE, "cpu")
    assert done(calls) == ["a", "a", "b", "b"]
    assert (run / "a" / "a").read_text() == "x"
    (run / "b" / "b").unlink()
    assert states([step(calls, run, "b", key="other")], run) == {"b": "to do"}
    note = run / NOTES_NAME / "a.json"
    note.write_text(note.read_text()[:20])
    assert states([step(calls, run, "a")], run) == {"a": "to do"}


def test_what_another_run_has_done_is_copied(tmp_path: Path, calls: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run_steps([step(calls, first, "a")], first, HERE, "cpu")
    said: list[str] = []
    assert states([step(calls, second, "a")], second, [first]) == {"a": "elsewhere"}
    run_steps([step(calls, second, "a")], second, HERE, "cpu", others=[first], say=said.append)
    assert done(calls) == ["a"]
    assert said[0] == "a: as in first, copied"
    assert (second / "a" / "a").read_text() == "x"
    (first / "a" / "a").write_text("damaged")
    third = tmp_path / "third"
    run_steps([step(calls, third, "a")], third, HERE, "cpu", others=[first])
    assert done(calls) == ["a", "a"]
    assert (third / "a" / "a").read_text() == "x"


@pytest.mark.parametrize("workers", [HERE, TWO])
def test_a_failure_is_raised_and_what_was_done_is_kept(tmp_path: Path, calls: Path, workers: Workers) -> None:
    run = tmp_path / "run"
    steps = [step(calls, run, "a"), step(calls, run, "b", "a", function=fail)]
    with pytest.raises(SettingsError, match="no such thing; choose another"):
        run_steps(steps, run, workers, "cpu")
    assert states(steps, run) == {"a": "done", "b": "to do"}


def test_a_worker_that_dies_over_a_step_is_given_up(tmp_path: Path, calls: Path) -> None:
    run = tmp_path / "run"
    with (
        pytest.warns(UserWarning, match="a worker died"),
        pytest.raises(WorkerError, match="b: workers died 3 times over it"),
    ):
        run_steps([step(calls, run, "a"), step(calls, run, "b", function=die)], run, TWO, "cpu")
    assert done(calls) == ["a", "died", "died", "died"]
    assert states([step(calls, run, "a")], run) == {"a": "done"}


def test_what_was_begun_under_another_key_is_removed(tmp_path: Path, calls: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(SettingsError):
        run_steps([step(calls, run, "a", function=fail)], run, HERE, "cpu")
    (run / "a").mkdir()
    (run / "a" / "checkpoint").write_text("half way")
    with pytest.raises(SettingsError):
        run_steps([step(calls, run, "a", function=fail)], run, HERE, "cpu")
    assert (run / "a" / "checkpoint").exists()
    run_steps([step(calls, run, "a", key="other")], run, HERE, "cpu")
    assert not (run / "a" / "checkpoint").exists()


def test_a_copy_that_was_cut_off_or_is_not_what_was_noted_is_no_copy(tmp_path: Path, calls: Path, monkeypatch) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run_steps([step(calls, first, "a")], first, HERE, "cpu")
    (first / "a" / "later").write_text("no file of the step")

    def torn(source: Path, target: Path) -> None:
        target.write_text("torn")

    with monkeypatch.context() as patched:
        patched.setattr("embedcache.comparing.steps.shutil.copyfile", torn)
        run_steps([step(calls, second, "a", text="y")], second, HERE, "cpu", others=[first])
    assert (second / "a" / "a").read_text() == "y"  # done, as the copy was not what the note says
    third = tmp_path / "third"
    run_steps([step(calls, third, "a")], third, HERE, "cpu", others=[first])
    assert sorted(path.name for path in (third / "a").iterdir()) == ["a"]


def leave_nothing(*, path: Path, text: str, calls: Path, device: str) -> list[str]:
    return []


def test_a_step_that_leaves_no_file_is_not_done(tmp_path: Path, calls: Path) -> None:
    with pytest.raises(WorkerError, match=r"a: left no file in .*; every worker must see the files"):
        run_steps([step(calls, tmp_path, "a", function=leave_nothing)], tmp_path, HERE, "cpu")
