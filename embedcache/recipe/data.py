"""The manifests of a recipe: that of its data, and those of its tasks."""

from __future__ import annotations

from collections.abc import Sequence

from embedcache.data.datasets.load import load_dataset
from embedcache.data.datasets.phantom import make_phantom
from embedcache.data.manifest import Manifest
from embedcache.data.prompts import PromptSet
from embedcache.data.splits import patient_split
from embedcache.errors import RecipeError
from embedcache.recipe.schema import DatasetData, PhantomData, Recipe, TableData, TaskSection
from embedcache.stage_two.mask_targets import has_mask
from embedcache.stage_two.targets import Target


def make_manifest(recipe: Recipe) -> Manifest:
    """The manifest of a recipe's data, with splits by patient where it asks for them.

    Raises:
        ManifestError: the table lacks one of the recipe's labels, or its masks; it should cost no hour of encoding.
        RecipeError: prompts for a label with classes.
    """
    manifest = _read_or_draw(recipe.data, recipe.name)
    _check(manifest, recipe, "")
    return manifest


def task_manifests(recipe: Recipe) -> dict[str, Manifest]:
    """Those of its tasks, by their names.

    Raises:
        ManifestError, RecipeError: as `make_manifest`.
    """
    found = {}
    for name, task in recipe.tasks.items():
        found[name] = _read_or_draw(task.data, name)
        _check(found[name], task, f"tasks.{name}.")
    return found


def single_labels(manifest: Manifest, labels: Sequence[str]) -> list[str]:
    """The labels that prompts are asked for: of sets each of theirs."""
    return [name for label in labels for name in Target.of(manifest, label).classes]


def _check(manifest: Manifest, asked: Recipe | TaskSection, where: str) -> None:
    targets = [Target.of(manifest, label) for label in asked.labels]
    if asked.segment is not None:
        has_mask(manifest)
    if asked.zeroshot is not None:
        with_classes = [target.name for target in targets if target.task == "multi-class"]
        if with_classes:
            raise RecipeError(
                f"{where}zeroshot: label {with_classes[0]!r} has classes, and no pair of prompts; leave one out"
            )
        PromptSet.named(asked.zeroshot).texts(single_labels(manifest, asked.labels))


def _read_or_draw(data: PhantomData | TableData | DatasetData, name: str) -> Manifest:
    if isinstance(data, PhantomData):
        return make_phantom(data.root, data.config)
    if isinstance(data, DatasetData):
        return load_dataset(
            data.name,
            data.root,
            split=data.split,
            task=data.task,
            seed=data.seed,
            valid=data.valid,
            test=data.test,
            **data.options,
        )
    manifest = Manifest.read(data.root / data.table, name=name, root=data.root, columns=data.columns)
    if data.split is None:
        return manifest
    if (manifest.frame["split"] != "").any():
        raise RecipeError(
            f"{data.root / data.table}: the table has splits of its own; take data.split out of the recipe"
        )
    frame = manifest.frame.copy()
    frame["split"] = patient_split(
        manifest.groups(),
        manifest.label(data.split.by),
        valid=data.split.valid,
        test=data.split.test,
        seed=data.split.seed,
    )
    return Manifest(frame, name=manifest.name, root=manifest.root)
