"""Steps that build on each other: done where they have to be, kept where they are done, several at once.

A step that is done leaves a note with its key, a fingerprint of all that determines its files, and their digests. It is
kept while both hold, whatever the time says. One that another run of the same kind has done is copied from there.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from embedcache.device import count_cores, use_cores
from embedcache.errors import WorkerError
from embedcache.fingerprint import digest_file
from embedcache.output import write_text
from embedcache.progress import Progress, hush
from embedcache.workers.chosen import Workers
from embedcache.workers.pools import Lost, open_pool

NOTES_NAME = ".steps"
_MOST_LOSSES = 3  # processes that may die over one step
_LOOK_EVERY_S = 1.0

State = Literal["done", "elsewhere", "to do", "waits"]


@dataclass(frozen=True)
class Work:
    """A function of this package and its arguments, to be called here or in a worker; gives lines to be said.

    Args:
        function: takes the arguments and `device`.
        cores: of torch; None leaves it alone.
    """

    function: Callable[..., Sequence[str]]
    arguments: Mapping[str, Any]
    device: str
    cores: int | None = None

    def on(self, device: str) -> Work:
        return replace(self, device=device)

    def anywhere(self) -> Work:
        return self.on(self.device.partition(":")[0])

    def here(self) -> Done:
        """Calls it."""
        started = time.monotonic()
        said = self.function(**self.arguments, device=self.device)
        return Done(tuple(said), time.monotonic() - started)

    def carry_out(self) -> Done:
        """Calls it in a worker process."""
        hush()
        if self.cores is not None:
            use_cores(self.cores)
        return self.here()


@dataclass(frozen=True)
class Done:
    """What became of a step: what it said, and how long it took where it was done."""

    said: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Step:
    """One step.

    Args:
        name: unlike any other's of the run.
        folder: its files lie there, below the run's directory.
        patterns: of what in the folder is its own.
        needs: names of steps that must be done before.
        key: gives a fingerprint of all that determines its files; asked once its needs are done.
    """

    name: str
    folder: Path
    patterns: tuple[str, ...]
    needs: tuple[str, ...]
    key: Callable[[], str] = field(repr=False)
    work: Work = field(repr=False)

    def files(self, run_dir: Path) -> list[Path]:
        """What it has left, in order; what a killed process was about to write is none of it."""
        found = [path for pattern in self.patterns for path in (run_dir / self.folder).glob(pattern)]
        return sorted(path for path in found if path.is_file() and path.suffix != ".tmp")


def run_steps(
    steps: Sequence[Step],
    run_dir: Path,
    workers: Workers,
    device: str,
    *,
    others: Iterable[Path] = (),
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Done]:
    """Does what is not done yet; gives what each step said.

    Args:
        steps: none before what it needs.
        others: directories of other runs, in which the same steps may be done.
        device: of this machine that the work is meant for.

    Raises:
        WorkerError: processes die over a step again and again; and whatever a step raises. What is done stays done.
    """
    done: dict[str, Done] = {}
    with Progress(f"steps of {run_dir}", total=len(steps), unit="step") as progress:

        def end(step: Step, what: Done, how: str) -> None:
            done[step.name] = what
            say(f"{step.name}: {how}")
            for line in what.said:
                say(f"  {line}")
            progress.advance()

        todo = list(steps)
        run = _Here(run_dir) if workers.are_here(device) else _Pool(run_dir, workers, device)
        with run:
            while todo or run.n_under_way:
                for step in [step for step in todo if all(name in done for name in step.needs)]:
                    if not run.has_room:
                        break
                    todo.remove(step)
                    key = step.key()
                    kept = _noted(run_dir, step, key)
                    found = None if kept else _elsewhere(others, step, key)
                    copied = None if found is None else _copied(found, run_dir, step, key)
                    if kept is not None:
                        end(step, kept, "done before")
                    elif found is not None and copied is not None:
                        end(step, copied, f"as in {found[0].name}, copied")
                    else:
                        _begin(run_dir, step, key)
                        run.begin(step, key)
                for step, what in run.ended():
                    end(step, what, f"{what.seconds:.1f} s")
    return done


def states(steps: Sequence[Step], run_dir: Path, others: Iterable[Path] = ()) -> dict[str, State]:
    """What `run_steps` would do with each step, as far as can be known before the first is begun."""
    found: dict[str, State] = {}
    for step in steps:
        if any(found[name] not in ("done", "elsewhere") for name in step.needs):
            found[step.name] = "waits"
            continue
        try:
            key = step.key()
        except OSError:  # its needs are done in another run's directory
            found[step.name] = "waits"
            continue
        if _noted(run_dir, step, key):
            found[step.name] = "done"
        else:
            found[step.name] = "elsewhere" if _elsewhere(others, step, key) else "to do"
    return found


class _Here:
    """One step after the other, in this process."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._begun: list[tuple[Step, str]] = []

    @property
    def n_under_way(self) -> int:
        return len(self._begun)

    @property
    def has_room(self) -> bool:
        return not self._begun

    def begin(self, step: Step, key: str) -> None:
        self._begun.append((step, key))

    def ended(self) -> list[tuple[Step, Done]]:
        found = [(step, _note(self._run_dir, step, key, step.work.here())) for step, key in self._begun]
        self._begun.clear()
        return found

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


class _Pool:
    """As many steps at once as there are workers."""

    def __init__(self, run_dir: Path, workers: Workers, device: str) -> None:
        self._run_dir = run_dir
        self._context = open_pool(workers, device, on_any=device == "cpu")
        self._cores = max(count_cores() // (workers.n or 1), 1) if workers.backend == "local" else None
        self._under_way: dict[Any, tuple[Step, str]] = {}
        self._losses: Counter[str] = Counter()

    @property
    def n_under_way(self) -> int:
        return len(self._under_way)

    @property
    def has_room(self) -> bool:
        return len(self._under_way) < self._pool.n_workers

    def begin(self, step: Step, key: str) -> None:
        self._under_way[self._pool.submit(replace(step.work, cores=self._cores))] = step, key

    def ended(self) -> list[tuple[Step, Done]]:
        if not self._under_way:
            time.sleep(_LOOK_EVERY_S)  # no worker of the cluster is there yet
            return []
        found = []
        for ended in list(self._pool.ended(self._under_way, _LOOK_EVERY_S)):
            step, key = self._under_way.pop(ended)
            try:
                found.append((step, _note(self._run_dir, step, key, self._pool.delivery(ended))))
            except Lost as lost:
                self._losses[step.name] += lost.begun
                if self._losses[step.name] >= _MOST_LOSSES:
                    raise WorkerError(
                        f"{step.name}: workers died {_MOST_LOSSES} times over it, the last with {lost}; look for "
                        "memory that runs out, or take fewer workers"
                    ) from lost
                warnings.warn(f"{step.name}: a worker died ({lost}); it is done again")
                self.begin(step, key)
        return found

    def __enter__(self) -> None:
        self._pool = self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


def _note_path(run_dir: Path, step: Step) -> Path:
    return run_dir / NOTES_NAME / f"{quote(step.name, safe=' +,()')}.json"


def _note(run_dir: Path, step: Step, key: str, done: Done) -> Done:
    """Writes down that a step is done; the last thing that is done of it."""
    digests = {str(path.relative_to(run_dir / step.folder)): digest_file(path) for path in step.files(run_dir)}
    if not digests:
        raise WorkerError(
            f"{step.name}: left no file in {run_dir / step.folder}; every worker must see the files of this machine"
        )
    said = {"step": step.name, "key": key, "files": digests, "said": done.said, "seconds": done.seconds}
    write_text(_note_path(run_dir, step), json.dumps(said, indent=1))
    return done


def _begin(run_dir: Path, step: Step, key: str, *, copying: bool = False) -> None:
    """Notes that a step is begun; from here on its files are not what a note of before says.

    What was begun under the same key is gone on with; files of another key, of a copy, or of a step that was done and
    is damaged are removed.
    """
    path, known = _note_path(run_dir, step), None
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        said = json.loads(path.read_text("utf-8"))
        known = None if said.get("copying") or "files" in said else said["key"]
    if known != key or copying:
        for file in step.files(run_dir):
            file.unlink(missing_ok=True)
    write_text(path, json.dumps({"step": step.name, "key": key, "copying": copying}))


def _noted(run_dir: Path, step: Step, key: str) -> Done | None:
    """What a step that is done said; None where it is not, or its files are not what they were."""
    try:
        said = json.loads(_note_path(run_dir, step).read_text("utf-8"))
        if said["key"] != key:
            return None
        for name, digest in said["files"].items():
            if digest_file(run_dir / step.folder / name) != digest:
                return None
        return Done(tuple(said["said"]), float(said["seconds"]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _elsewhere(others: Iterable[Path], step: Step, key: str) -> tuple[Path, Done] | None:
    """Another run that has done the step."""
    for other in others:
        done = _noted(other, step, key)
        if done is not None:
            return other, done
    return None


def _copied(found: tuple[Path, Done], run_dir: Path, step: Step, key: str) -> Done | None:
    """Takes a step over from another run; None where its files are not what they were by now."""
    other, done = found
    _begin(run_dir, step, key, copying=True)
    try:
        for name, digest in json.loads(_note_path(other, step).read_text("utf-8"))["files"].items():
            target = run_dir / step.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(other / step.folder / name, target)
            if digest_file(target) != digest:
                return None
    except (OSError, ValueError, LookupError):
        return None
    return _note(run_dir, step, key, done)
