"""Running a recipe: data, stage one for every encoder, stage two for every pair, one table."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from embedcache.data.datasets.load import load_dataset
from embedcache.data.datasets.phantom import make_phantom
from embedcache.data.manifest import Manifest
from embedcache.data.prompts import PromptSet
from embedcache.data.splits import patient_split
from embedcache.encoders.base import Encoder
from embedcache.encoders.load import load_encoder
from embedcache.encoders.random_init import write_random_like, write_tiny
from embedcache.errors import RecipeError
from embedcache.recipe.schema import DatasetData, EncoderSection, PhantomData, Recipe
from embedcache.stage_one.estimate import Estimate
from embedcache.stage_one.extract import ExtractReport, extract, plan_extraction
from embedcache.stage_two.adaptor import count_parameters
from embedcache.stage_two.kept import mask_folder, probe_folder
from embedcache.stage_two.mask_targets import has_mask
from embedcache.stage_two.probe import probe
from embedcache.stage_two.probe_tables import TABLES
from embedcache.stage_two.retrieve import retrieve
from embedcache.stage_two.segment import segment
from embedcache.stage_two.segment_tables import TABLES as MASK_TABLES
from embedcache.stage_two.targets import Target
from embedcache.stage_two.tensors import input_digests
from embedcache.stage_two.train import train
from embedcache.stage_two.zeroshot import zero_shot
from embedcache.store.store import open_store

Say = Callable[[str], None]


@dataclass(frozen=True)
class RunResult:
    """What a run left.

    Args:
        run_dir: holds `config.yaml`, the tables as csv, and a directory for each pair of encoders with its predictions.
        tables: of all probes, with `label`, `image` and `text` encoder beside them: `scores`, `gains`, `calibration`,
            `subgroups`; where the recipe has them, `mask_scores`, `mask_gains`, `retrieval_scores`, `zeroshot_scores`.
        reports: what stage one did for each store.
    """

    run_dir: Path
    tables: dict[str, pd.DataFrame]
    reports: list[ExtractReport]

    @property
    def scores(self) -> pd.DataFrame:
        """Of all probes."""
        return self.tables["scores"]

    def to_json(self) -> dict[str, Any]:
        return {
            "run_dir": str(self.run_dir),
            **{name: json.loads(table.to_json(orient="records")) for name, table in self.tables.items()},
            "extract": [report.to_json() for report in self.reports],
        }


def run_recipe(recipe: Recipe, *, run_dir: str | Path | None = None, say: Say = lambda line: None) -> RunResult:
    """Runs both stages of a recipe; what the stores hold already is not encoded again.

    Args:
        run_dir: where results go; by default `runs/<recipe>/<time>`.
        say: called with a line about each step.
    """
    run_dir = Path(run_dir or Path("runs") / recipe.name / time.strftime("%Y-%m-%dT%H-%M-%S"))
    run_dir.mkdir(parents=True, exist_ok=True)
    manifest = make_manifest(recipe)
    reports = _stage_one(recipe, manifest, say)
    _write_config(recipe, run_dir)
    first = open_store(recipe.cache / next(iter(recipe.encoders.image)))
    audit = manifest.audit(files=input_digests(first))  # as stage one read them: no second reading
    say(f"splits    {audit}")
    if audit.warning:
        say(f"warning   {audit.warning}")
    parts: dict[str, list[pd.DataFrame]] = {}
    for image in recipe.encoders.image:
        for text in recipe.encoders.text:
            for name, table in _stage_two(recipe, manifest, run_dir, image, text, say):
                parts.setdefault(name, []).append(table.assign(image=image, text=text))
                pd.concat(parts[name], ignore_index=True).to_csv(run_dir / f"{name}.csv", index=False)
    return RunResult(run_dir, {name: pd.concat(some, ignore_index=True) for name, some in parts.items()}, reports)


def encode_recipe(
    recipe: Recipe, *, part: tuple[int, int] | None = None, say: Say = lambda line: None
) -> list[ExtractReport]:
    """Stage one of a recipe alone, or a part of it; gives what became of each store.

    Args:
        part: (i, n) does the i-th of n parts of every store's plan.
    """
    return _stage_one(recipe, make_manifest(recipe), say, part)


def plan_recipe(recipe: Recipe, *, part: tuple[int, int] | None = None) -> dict[str, Estimate]:
    """What stage one of a recipe would take, for each encoder by name; draws the data where it is not there.

    Args:
        part: (i, n) for the i-th of n parts of every store's plan alone.
    """
    manifest = make_manifest(recipe)
    hands = recipe.extract.hands()
    return {
        name: plan_extraction(
            manifest, encoder, recipe.cache / name, part=part, **recipe.extract.content(encoder.modality), **hands
        )
        for name, encoder in _encoders(recipe, manifest)
    }


def make_manifest(recipe: Recipe) -> Manifest:
    """The recipe's manifest, with splits by patient where it asks for them.

    Raises:
        ManifestError: the table lacks one of the recipe's labels, or its masks; it should cost no hour of encoding.
        RecipeError: prompts for a label with classes.
    """
    manifest = _read_or_draw(recipe)
    targets = [Target.of(manifest, label) for label in recipe.labels]
    if recipe.segment is not None:
        has_mask(manifest)
    if recipe.zeroshot is not None:
        with_classes = [target.name for target in targets if target.task == "multi-class"]
        if with_classes:
            raise RecipeError(f"zeroshot: label {with_classes[0]!r} has classes, and no pair of prompts; leave one out")
        PromptSet.named(recipe.zeroshot).texts(_prompted(recipe, manifest))
    return manifest


def _prompted(recipe: Recipe, manifest: Manifest) -> list[str]:
    """The single labels that prompts are asked for."""
    return [name for label in recipe.labels for name in Target.of(manifest, label).classes]


def _read_or_draw(recipe: Recipe) -> Manifest:
    data = recipe.data
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
    manifest = Manifest.read(data.root / data.table, name=recipe.name, root=data.root, columns=data.columns)
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


def _encoders(recipe: Recipe, manifest: Manifest) -> Iterator[tuple[str, Encoder]]:
    """Every encoder by its name, one after the other: they need not be in memory together."""
    for modality, sections in (("image", recipe.encoders.image), ("text", recipe.encoders.text)):
        for name, section in sections.items():
            source = _source(recipe, manifest, name, section)
            yield name, load_encoder(source, modality="image" if modality == "image" else "text", **section.options())


def _stage_one(
    recipe: Recipe, manifest: Manifest, say: Say, part: tuple[int, int] | None = None
) -> list[ExtractReport]:
    say(f"data      {manifest.name}: {len(manifest)} images, {len(manifest.reports())} reports")
    for note in manifest.about.notes:
        say(f"          {note}")
    sections, reports = {**recipe.encoders.image, **recipe.encoders.text}, []
    of_part = "" if part is None else f" part {part[0]}/{part[1]}:"
    for name, encoder in _encoders(recipe, manifest):
        content, hands = recipe.extract.content(encoder.modality), recipe.extract.hands()
        report = extract(manifest, encoder, recipe.cache / name, part=part, **content, **hands)
        weights = ", random weights: it has learnt nothing" if sections[name].is_random else ""
        say(
            f"stage one {name} ({encoder.modality}, {encoder.dim}-d{weights}):{of_part} encoded {report.n_embedded}, "
            f"present {report.n_present}, failed {report.n_failed} of {report.n_asked}, {report.seconds:.1f} s"
        )
        for failure in report.failures[:5]:
            say(f"          failed {failure.id!r}: {failure.reason}: {failure.message}")
        if report.failures:
            say("          to try failed inputs again: --set extract.retry_failed=true")
        reports.append(report)
        if encoder.modality == "text" and recipe.zeroshot is not None and part is None:
            prompts = PromptSet.named(recipe.zeroshot).manifest(_prompted(recipe, manifest))
            written = extract(prompts, encoder, recipe.cache / "prompts" / name, **recipe.extract.hands())
            if written.failures:
                first = written.failures[0]
                raise RecipeError(
                    f"{name}: {len(written.failures)} prompts of {recipe.zeroshot!r} cannot be encoded ({first.id!r}: "
                    f"{first.message}); word them otherwise, or change what it reads of a report (encoders.text.{name}"
                    ".report)"
                )
            say(f"          {name}: {len(prompts)} prompts of {recipe.zeroshot}")
    return reports


def _source(recipe: Recipe, manifest: Manifest, name: str, section: EncoderSection) -> str:
    checkpoint = recipe.cache / "checkpoints" / name
    if section.tiny is not None:
        reports = list(manifest.reports().values()) if section.tiny == "tiny-bert" else []
        return f"hf:{write_tiny(section.tiny, checkpoint, seed=section.seed, reports=reports)}"
    if section.random_like is not None:
        like = section.random_like.replace("{data.root}", str(recipe.data.root))
        return f"hf:{write_random_like(like, checkpoint, seed=section.seed)}"
    return str(section.source).replace("{data.root}", str(recipe.data.root))


def _stage_two(
    recipe: Recipe, manifest: Manifest, run_dir: Path, image: str, text: str, say: Say
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Trains a pair of encoders' Adaptor, and gives the tables of what is done with it by name."""
    image_store, text_store = open_store(recipe.cache / image), open_store(recipe.cache / text)
    pair_dir = pair_folder(run_dir, image, text)
    started = time.monotonic()
    trained = train(manifest, image_store, text_store, pair_dir, config=recipe.train)
    best = trained.history[trained.best_epoch]
    say(
        f"stage two {image} + {text}: Adaptor of {count_parameters(trained.adaptor):,} parameters on "
        f"{trained.n_train} pairs, best epoch {trained.best_epoch + 1} of {len(trained.history)} "
        f"(validation loss {best['valid_loss']:.3f}), {time.monotonic() - started:.1f} s"
    )
    random = _random_like(recipe, image)
    random_store = None if random is None else recipe.cache / random
    for label in recipe.labels:
        probed = probe(
            manifest,
            image_store,
            label=label,
            run_dir=pair_dir,
            text_store=text_store,
            random_store=random_store,
            config=recipe.probe,
        )
        probed.write(probe_folder(pair_dir, label))
        for note in probed.notes:
            say(f"          {label}: {note}")
        yield from ((name, getattr(probed, name).assign(label=label)) for name in TABLES)
    say(f"          probed {', '.join(recipe.labels)}, {time.monotonic() - started:.1f} s in all")
    if recipe.segment is not None:
        masks = segment(manifest, image_store, run_dir=pair_dir, random_store=random_store, config=recipe.segment)
        masks.write(mask_folder(pair_dir))
        for note in (*masks.notes, *filter(None, [masks.warning])):
            say(f"          masks: {note}")
        say(f"          learnt masks, {time.monotonic() - started:.1f} s in all")
        yield from ((f"mask_{name}", getattr(masks, name)) for name in MASK_TABLES)
    if recipe.retrieve is not None:
        found = retrieve(manifest, image_store, text_store, pair_dir, labels=recipe.labels, config=recipe.retrieve)
        found.write(pair_dir / "retrieval")
        for note in (*found.notes, *filter(None, [found.warning])):
            say(f"          retrieval: {note}")
        yield "retrieval_scores", found.scores
    if recipe.zeroshot is not None:
        prompted = zero_shot(
            manifest,
            image_store,
            recipe.cache / "prompts" / text,
            pair_dir,
            prompts=recipe.zeroshot,
            labels=recipe.labels,
        )
        prompted.write(pair_dir / "zeroshot")
        for note in (*prompted.notes, *filter(None, [prompted.warning])):
            say(f"          zero-shot: {note}")
        yield "zeroshot_scores", prompted.scores


def pair_folder(run_dir: Path, image: str, text: str) -> Path:
    """The run directory of a pair of encoders within a recipe's."""
    return run_dir / f"{image}+{text}"


def _random_like(recipe: Recipe, image: str) -> str | None:
    """The recipe's encoder of random weights that has the architecture of another, where there is one."""
    source = recipe.encoders.image[image].source
    alike = (name for name, section in recipe.encoders.image.items() if section.random_like == source)
    return next(alike, None) if source is not None else None


def _write_config(recipe: Recipe, run_dir: Path) -> None:
    names = [*recipe.encoders.image, *recipe.encoders.text]
    stores = {name: open_store(recipe.cache / name) for name in names}
    resolved = {
        **recipe.model_dump(mode="json", exclude={"train", "probe", "segment", "retrieve", "data"}),
        "data": recipe.data.model_dump(mode="json"),
        "train": asdict(recipe.train),
        "probe": json.loads(json.dumps(asdict(recipe.probe))),
        "segment": None if recipe.segment is None else json.loads(json.dumps(asdict(recipe.segment))),
        "retrieve": None if recipe.retrieve is None else json.loads(json.dumps(asdict(recipe.retrieve))),
        "fingerprints": {name: store.fingerprint for name, store in stores.items()},
    }
    (run_dir / "config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False), "utf-8")
