"""Running a recipe: data, stage one for every encoder, stage two for every pair, and the comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from embedcache import __version__
from embedcache.comparing.compare import Comparison, finish
from embedcache.comparing.run_folder import RunFolder, run_path, runs_below
from embedcache.comparing.settings import plain
from embedcache.comparing.steps import State
from embedcache.comparing.study import Study, Task
from embedcache.data.manifest import Manifest
from embedcache.errors import RecipeError, StoreNotFoundError
from embedcache.fingerprint import fingerprint
from embedcache.output import write_text
from embedcache.recipe.encode import Datasets, encode, prompt_store, task_store
from embedcache.recipe.schema import Recipe, TaskSection
from embedcache.stage_one.extract import ExtractReport
from embedcache.stage_two.tensors import input_digests

Say = Callable[[str], None]
RECIPE_NAME = "recipe.yaml"  # as it was resolved: `embedcache run` takes it


@dataclass(frozen=True)
class RunResult:
    """What a run left.

    Args:
        comparison: of all pairs of encoders, with the tables of their scores.
        reports: what stage one did for each store.
    """

    comparison: Comparison
    reports: list[ExtractReport]

    @property
    def run_dir(self) -> Path:
        """Holds `config.yaml`, the tables as csv, and a directory for each pair of encoders with its predictions."""
        return self.comparison.run_dir

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """Of all probes, with `label`, `image` and `text` encoder beside them: `scores`, `gains`, `calibration`,
        `subgroups`; where the recipe has them, `mask_scores`, `mask_gains`, `retrieval_scores`, `zeroshot_scores`.
        """
        return self.comparison.tables

    @property
    def scores(self) -> pd.DataFrame:
        """Of all probes."""
        return self.comparison.scores

    def to_json(self) -> dict[str, Any]:
        return {**self.comparison.to_json(), "extract": [report.to_json() for report in self.reports]}


def run_recipe(recipe: Recipe, *, run_dir: str | Path | None = None, say: Say = lambda line: None) -> RunResult:
    """Runs both stages of a recipe; what is done is not done again.

    Args:
        run_dir: where results go; by default the newest run of the same recipe that was stopped, else
            `runs/<recipe>/<time>`.
        say: called with a line about each step.

    Raises:
        RunStateError: the directory holds another run, or one that is under way.
    """
    identity = recipe_identity(recipe)
    with RunFolder(Path(run_dir) if run_dir else run_path(_parent(recipe), identity), identity) as folder:
        say(f"run       {folder.path}")
        data = Datasets.of(recipe)
        _check_exposures(recipe, data)
        reports = encode(recipe, data, say)
        study = _study(recipe, data, folder.path)
        folder.describe(_resolved(recipe, study))
        write_text(folder.path / RECIPE_NAME, yaml.safe_dump(_settings(recipe), sort_keys=False, allow_unicode=True))
        first = study.store(next(iter(study.tasks[0].images.values())))
        audit = data.home.audit(files=input_digests(first))  # as stage one read them: no second reading
        say(f"splits    {audit}")
        if audit.warning:
            say(f"warning   {audit.warning}")

        def of_stage_two(line: str) -> None:
            say(f"          {line.strip()}" if line.startswith(" ") else f"stage two {line}")

        for line in study.rows():
            say(f"rows      {line}")
        comparison = finish(study, _told(recipe), _weights(recipe), recipe.steps.hands(), folder.others(), of_stage_two)
        folder.finish()
    return RunResult(comparison, reports)


def planned_steps(recipe: Recipe, *, run_dir: str | Path | None = None) -> dict[str, State]:
    """What a run would do with each step of stage two, and with which it would have to wait for stage one."""
    data, parent = Datasets.of(recipe), _parent(recipe)
    folder = Path(run_dir) if run_dir else run_path(parent, recipe_identity(recipe))
    waiting: dict[str, State] = {step.name: "waits" for step in _study(recipe, data, folder, Task).steps()}
    try:
        study = _study(recipe, data, folder)
        whole = all(_is_whole(study, task) for task in study.tasks)
        return study.states(runs_below(folder.parent)) if whole else waiting
    except StoreNotFoundError:
        return waiting


def _is_whole(study: Study, task: Task) -> bool:
    """Whether every store accounts for all that it is to hold."""
    for paths, column in ((task.images, "id"), (task.texts, "report_id")):
        for store in map(study.store, paths.values()):
            known = {*store.ids, *(failure.id for failure in store.failures)}
            if not known.issuperset(task.manifest.frame[column]):
                return False
    return True


def recipe_identity(recipe: Recipe) -> str:
    """A fingerprint of all that a recipe asks for, without who does the work."""
    return fingerprint({"version": __version__, **_settings(recipe)})


def _settings(recipe: Recipe) -> dict[str, Any]:
    """A recipe as it was resolved, JSON-ready."""
    configs = {"train", "probe", "segment", "retrieve"}
    said = recipe.model_dump(mode="json", exclude={*configs, "steps", "tasks", "extract"})
    extract = recipe.extract.model_dump(mode="json")
    return {
        **said,
        "extract": {name: value for name, value in extract.items() if name not in recipe.extract.hands()},
        **{name: plain(getattr(recipe, name)) for name in sorted(configs)},
        "tasks": {name: _task_settings(task) for name, task in recipe.tasks.items()},
    }


def _task_settings(task: TaskSection) -> dict[str, Any]:
    said = task.model_dump(mode="json", exclude={"probe", "segment"})
    return {**said, "probe": plain(task.probe), "segment": plain(task.segment)}


def _resolved(recipe: Recipe, study: Study) -> dict[str, Any]:
    stores = {name: path for task in study.tasks for name, path in {**task.images, **task.texts}.items()}
    home = {**study.tasks[0].images, **study.tasks[0].texts}
    return {
        **_settings(recipe),
        "steps": recipe.steps.model_dump(mode="json"),
        "hands": recipe.extract.hands(),
        "fingerprints": {name: study.store(home.get(name, path)).fingerprint for name, path in stores.items()},
    }


def _parent(recipe: Recipe) -> Path:
    return Path("runs") / recipe.name


def _study(recipe: Recipe, data: Datasets, run_dir: Path, make: Callable[..., Task] = Task.over) -> Study:
    """The study of a recipe.

    Args:
        make: from a task's name, manifest and stores to the task.
    """
    images = {name: recipe.cache / name for name in recipe.encoders.image}
    texts = {name: recipe.cache / name for name in recipe.encoders.text}
    prompts = {name: prompt_store(recipe, name) for name in texts}

    def over(
        name: str, manifest: Manifest, stores: dict[str, Path], section: Recipe | TaskSection, **more: Any
    ) -> Task:
        twins = {image: twin for image in images if (twin := _random_like(recipe, image)) is not None}
        return make(
            name,
            manifest,
            stores,
            labels=tuple(section.labels),
            probe=section.probe,
            segment=section.segment,
            zeroshot=section.zeroshot,
            random={image: stores[twin] for image, twin in twins.items()},
            prompts=prompts,
            **more,
        )

    home = over(data.home.name, data.home, images, recipe, texts=texts, retrieve=recipe.retrieve)
    others = [
        over(
            name,
            manifest,
            {image: task_store(recipe, manifest, image) for image in images},
            recipe.tasks[name],
            texts={},
        )
        for name, manifest in data.tasks.items()
    ]
    return Study([home, *others], run_dir, recipe.train)


def _random_like(recipe: Recipe, image: str) -> str | None:
    """The recipe's encoder of random weights that has the architecture of another, where there is one."""
    source = recipe.encoders.image[image].source
    alike = (name for name, section in recipe.encoders.image.items() if section.random_like == source)
    return next(alike, None) if source is not None else None


def _check_exposures(recipe: Recipe, data: Datasets) -> None:
    """Refuses what is said of a dataset that the recipe does not have.

    Raises:
        RecipeError: names it, and those there are.
    """
    known = sorted({data.home.name, *data.tasks, *(manifest.name for manifest in data.tasks.values())})
    for name, section in recipe.encoders.by_name.items():
        for dataset in section.exposure:
            if dataset not in known:
                raise RecipeError(f"exposure of {name} to {dataset!r}, expected one of {', '.join(known)}")


def _told(recipe: Recipe) -> dict[tuple[str, str], str]:
    """What the recipe says of its encoders' exposure, by encoder and task."""
    datasets = {task: recipe.tasks[task].data for task in recipe.tasks}
    found: dict[tuple[str, str], str] = {}
    for name, section in recipe.encoders.by_name.items():
        for dataset, level in section.exposure.items():
            alike = [task for task, data in datasets.items() if getattr(data, "name", task) == dataset]
            found |= {(name, task): str(level) for task in {dataset, *alike}}
    return found


def _weights(recipe: Recipe) -> dict[str, str]:
    return {name: "random" for name, section in recipe.encoders.by_name.items() if section.is_random}
