"""A study on disk, so that its report can be made again from the run's directory alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from embedcache.comparing.settings import plain
from embedcache.comparing.study import Study, Task
from embedcache.data.manifest import Manifest
from embedcache.errors import RunNotFoundError, RunStateError
from embedcache.output import write_text
from embedcache.stage_two.config import TrainConfig
from embedcache.stage_two.probe_config import ProbeConfig
from embedcache.stage_two.retrieve_config import RetrieveConfig
from embedcache.stage_two.segment_config import SegmentConfig

_NAME = "study.json"
_STORES = ("images", "texts", "random", "prompts")
_CONFIGS = {"probe": ProbeConfig, "segment": SegmentConfig, "retrieve": RetrieveConfig}
_T = TypeVar("_T")


def write_study(study: Study) -> None:
    """Writes what the study is, beside the manifests that it keeps. It holds paths of this machine."""
    tasks = [
        {
            "name": task.name,
            "labels": list(task.labels),
            "zeroshot": task.zeroshot,
            "left_out": task.left_out,
            **{name: {k: str(path.resolve()) for k, path in getattr(task, name).items()} for name in _STORES},
            **{name: plain(getattr(task, name)) for name in _CONFIGS},
        }
        for task in study.tasks
    ]
    said = {"train": plain(study.train), "tasks": tasks}
    write_text(study.run_dir / _NAME, json.dumps(said, indent=1), mode=0o600)


def read_study(run_dir: Path) -> Study:
    """What `write_study` wrote.

    Raises:
        RunNotFoundError: no study there.
        RunStateError: a damaged file, or one of another version.
    """
    path = run_dir / _NAME
    if not path.is_file():
        raise RunNotFoundError(
            f"{run_dir}: no run of a recipe or of 'embedcache compare' there; name a directory such as "
            "runs/phantom/2026-01-31T12-00-00"
        )
    try:
        said = json.loads(path.read_text("utf-8"))
        tasks = [_task(run_dir, task) for task in said["tasks"]]
        return Study(tasks, run_dir, _config(TrainConfig, said["train"]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ValidationError) as error:
        raise RunStateError(f"{path}: cannot be read ({type(error).__name__}); run the recipe again") from error


def _task(run_dir: Path, said: dict[str, Any]) -> Task:
    rest: dict[str, Any] = {"labels": tuple(said["labels"]), "zeroshot": said["zeroshot"]}
    rest |= {name: {k: Path(path) for k, path in said[name].items()} for name in _STORES}
    rest |= {name: None if said[name] is None else _config(kind, said[name]) for name, kind in _CONFIGS.items()}
    manifest = Manifest.read(Study.data_file(run_dir, said["name"]))
    return Task(said["name"], manifest, left_out=int(said["left_out"]), **rest)


def _config(kind: type[_T], said: dict[str, Any]) -> _T:
    return TypeAdapter(kind).validate_python(said)
