"""Stage one of a recipe: every encoder over its data, over that of its tasks, and over its prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedcache.data.manifest import Manifest
from embedcache.data.prompts import PromptSet
from embedcache.encoders.base import Encoder
from embedcache.encoders.load import load_encoder
from embedcache.encoders.random_init import write_random_like, write_tiny
from embedcache.errors import RecipeError
from embedcache.recipe.data import make_manifest, single_labels, task_manifests
from embedcache.recipe.schema import EncoderSection, Recipe, TaskSection
from embedcache.stage_one.estimate import Estimate
from embedcache.stage_one.extract import ExtractReport, extract, plan_extraction

Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Datasets:
    """What a recipe encodes.

    Args:
        home: its data, which Adaptors are trained on.
        tasks: those of its tasks, by their names.
    """

    home: Manifest
    tasks: dict[str, Manifest]

    @classmethod
    def of(cls, recipe: Recipe) -> Datasets:
        """Reads, or draws, all of them.

        Raises:
            ManifestError, RecipeError: see `make_manifest`.
        """
        return cls(make_manifest(recipe), task_manifests(recipe))


def encode_recipe(
    recipe: Recipe, *, part: tuple[int, int] | None = None, say: Say = lambda line: None
) -> list[ExtractReport]:
    """Stage one of a recipe alone, or a part of it; gives what became of each store.

    Args:
        part: (i, n) does the i-th of n parts of every store's plan.
    """
    return encode(recipe, Datasets.of(recipe), say, part)


def plan_recipe(recipe: Recipe, *, part: tuple[int, int] | None = None) -> dict[str, Estimate]:
    """What stage one of a recipe would take, for each store by its name; draws the data where it is not there.

    Args:
        part: (i, n) for the i-th of n parts of every store's plan alone.
    """
    data, found = Datasets.of(recipe), {}
    for name, encoder in _encoders(recipe, data.home):
        for manifest, store, how in _stores(recipe, data, name, encoder.modality):
            found[str(store.relative_to(recipe.cache))] = plan_extraction(manifest, encoder, store, part=part, **how)
    return found


def encode(recipe: Recipe, data: Datasets, say: Say, part: tuple[int, int] | None = None) -> list[ExtractReport]:
    """Runs every encoder over everything it is wanted for; what stores hold is not encoded again."""
    for manifest in (data.home, *data.tasks.values()):
        say(f"data      {manifest.name}: {len(manifest)} images, {len(manifest.reports())} reports")
        for note in manifest.about.notes:
            say(f"          {note}")
    sections, reports = recipe.encoders.by_name, []
    of_part = "" if part is None else f" part {part[0]}/{part[1]}:"
    for name, encoder in _encoders(recipe, data.home):
        weights = ", random weights: it has learnt nothing" if sections[name].is_random else ""
        for manifest, store, how in _stores(recipe, data, name, encoder.modality):
            report = extract(manifest, encoder, store, part=part, **how)
            of_task = "" if manifest is data.home else f" on {manifest.name}"
            say(
                f"stage one {name}{of_task} ({encoder.modality}, {encoder.dim}-d{weights}):{of_part} encoded "
                f"{report.n_embedded}, present {report.n_present}, failed {report.n_failed} of {report.n_asked}, "
                f"{report.seconds:.1f} s"
            )
            for failure in report.failures[:5]:
                say(f"          failed {failure.id!r}: {failure.reason}: {failure.message}")
            if report.failures:
                say("          to try failed inputs again: --set extract.retry_failed=true")
            reports.append(report)
        if encoder.modality == "text" and part is None:
            for said in _encode_prompts(recipe, data, name, encoder):
                say(f"          {said}")
    return reports


def prompt_store(recipe: Recipe, text: str) -> Path:
    """Where the prompts of a text encoder lie."""
    return recipe.cache / "prompts" / text


def task_store(recipe: Recipe, manifest: Manifest, image: str) -> Path:
    """Where an encoder's images of a task's dataset lie; tasks of one dataset share them."""
    return recipe.cache / "tasks" / manifest.name / image


def _stores(
    recipe: Recipe, data: Datasets, name: str, modality: str
) -> Iterator[tuple[Manifest, Path, dict[str, Any]]]:
    """What an encoder is run over, where it goes, and how; tasks of one dataset fill one store."""
    hands = recipe.extract.hands()
    yield data.home, recipe.cache / name, recipe.extract.content(modality) | hands
    segmented = {data.tasks[task].name for task, section in recipe.tasks.items() if section.segment is not None}
    for manifest in data.tasks.values() if modality == "image" else ():
        content = recipe.extract.content(modality, tokens=manifest.name in segmented)
        yield manifest, task_store(recipe, manifest, name), content | hands


def _encode_prompts(recipe: Recipe, data: Datasets, name: str, encoder: Encoder) -> Iterator[str]:
    asked: list[tuple[Recipe | TaskSection, Manifest]] = [(recipe, data.home)]
    asked += [(recipe.tasks[task], manifest) for task, manifest in data.tasks.items()]
    for section, manifest in asked:
        if section.zeroshot is None:
            continue
        prompts = PromptSet.named(section.zeroshot).manifest(single_labels(manifest, section.labels))
        written = extract(prompts, encoder, prompt_store(recipe, name), **recipe.extract.hands())
        if written.failures:
            first = written.failures[0]
            raise RecipeError(
                f"{name}: {len(written.failures)} prompts of {section.zeroshot!r} cannot be encoded ({first.id!r}: "
                f"{first.message}); word them otherwise, or change what it reads of a report (encoders.text.{name}"
                ".report)"
            )
        yield f"{name}: {len(prompts)} prompts of {section.zeroshot}"


def _encoders(recipe: Recipe, manifest: Manifest) -> Iterator[tuple[str, Encoder]]:
    """Every encoder by its name, one after the other: they need not be in memory together."""
    for modality, sections in (("image", recipe.encoders.image), ("text", recipe.encoders.text)):
        for name, section in sections.items():
            source = _source(recipe, manifest, name, section)
            yield name, load_encoder(source, modality="image" if modality == "image" else "text", **section.options())


def _source(recipe: Recipe, manifest: Manifest, name: str, section: EncoderSection) -> str:
    checkpoint = recipe.cache / "checkpoints" / name
    if section.tiny is not None:
        reports = list(manifest.reports().values()) if section.tiny == "tiny-bert" else []
        return f"hf:{write_tiny(section.tiny, checkpoint, seed=section.seed, reports=reports)}"
    if section.random_like is not None:
        like = section.random_like.replace("{data.root}", str(recipe.data.root))
        return f"hf:{write_random_like(like, checkpoint, seed=section.seed)}"
    return str(section.source).replace("{data.root}", str(recipe.data.root))
