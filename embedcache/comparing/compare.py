"""Comparing encoders by their stores: the same rows, heads and seeds, and what of the differences is real."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from embedcache.comparing.costs import encoders_table
from embedcache.comparing.differences import Exposures, differences, unfair, verdicts
from embedcache.comparing.exposure import Exposed
from embedcache.comparing.run_folder import WORDS_NAME, RunFolder, run_path
from embedcache.comparing.settings import plain
from embedcache.comparing.study import Study, Task, read_table
from embedcache.comparing.study_file import write_study
from embedcache.data.manifest import Manifest
from embedcache.errors import RunNotFoundError, SettingsError
from embedcache.fingerprint import fingerprint
from embedcache.output import write_tables, write_text
from embedcache.stage_two.config import TrainConfig
from embedcache.stage_two.leaks import leak_words
from embedcache.stage_two.probe_config import ProbeConfig
from embedcache.stage_two.retrieve_config import RetrieveConfig
from embedcache.stage_two.segment_config import SegmentConfig
from embedcache.stage_two.targets import Target
from embedcache.store.store import open_store
from embedcache.workers.chosen import Workers

Stores = Sequence[str | Path] | Mapping[str, str | Path]
Say = Callable[[str], None]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_WORDS, _TABLES = ("verdicts", "warnings", "notes"), ("differences", "encoders")


@dataclass(frozen=True, eq=False)
class Comparison:
    """Encoders on the same rows.

    Args:
        run_dir: holds it all; `embedcache report` makes a page of it.
        tables: scores of all pairs: of probes by their names (`scores`, `gains`, ..), of others with a prefix.
        differences: a row for each comparison, see `COLUMNS`: how much `a` exceeds `b`, and which is really better.
        encoders: what each costs and has seen.
        verdicts: a sentence on each comparison, what is real first.
        warnings: leaks, and comparisons that are not fair.
        notes: rows that are left out, and what steps said.
    """

    run_dir: Path
    tables: dict[str, pd.DataFrame]
    differences: pd.DataFrame
    encoders: pd.DataFrame
    verdicts: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def scores(self) -> pd.DataFrame:
        """Of all probes."""
        return self.tables["scores"]

    @classmethod
    def read(cls, run_dir: Path) -> Comparison:
        """That of a run which is finished.

        Raises:
            RunNotFoundError: there is none.
        """
        if not (run_dir / WORDS_NAME).is_file():
            raise RunNotFoundError(f"{run_dir}: no finished comparison there; run its command again, and it goes on")
        words = json.loads((run_dir / WORDS_NAME).read_text("utf-8"))
        tables = {path.stem: read_table(path) for path in sorted(run_dir.glob("*.csv"))}
        of_pairs = {name: tables.pop(name) for name in _TABLES}
        return cls(run_dir, tables, **of_pairs, **{name: tuple(words[name]) for name in _WORDS})

    def to_json(self) -> dict[str, Any]:
        of_tables = {**self.tables, "differences": self.differences, "encoders": self.encoders}
        return {
            "run_dir": str(self.run_dir),
            **{name: json.loads(table.to_json(orient="records")) for name, table in of_tables.items()},
            "verdicts": list(self.verdicts),
            "warnings": list(self.warnings),
            "notes": list(self.notes),
        }


def compare(
    manifest: Manifest,
    image_stores: Stores,
    run_dir: str | Path | None = None,
    *,
    labels: Sequence[str] = (),
    text_stores: Stores = (),
    random_stores: Mapping[str, str | Path] | None = None,
    train: TrainConfig | None = None,
    probe: ProbeConfig | None = None,
    segment: SegmentConfig | None = None,
    retrieve: RetrieveConfig | None = None,
    exposure: Mapping[str, str] | None = None,
    workers: Workers | None = None,
    say: Say = lambda line: None,
) -> Comparison:
    """Scores every image encoder, with every text encoder, on the rows that all stores have, and compares them.

    With text stores an Adaptor is trained for each pair and applied; without, embeddings are probed as they are.
    A comparison that was stopped goes on where it was; what is done is not done again.

    Args:
        image_stores: two at least, or two text stores; encoders are called as the mapping or the stores are.
        run_dir: gets all results; by default the newest run of the same comparison that was stopped, else
            `runs/<manifest>/<time>`.
        labels: of the manifest, or sets of them; by default all of them.
        random_stores: for some image encoders a store through random weights, for the control `random-encoder`.
        segment, retrieve: also learn masks, or find reports; not by default.
        exposure: of encoders to this dataset, by name, where the catalogue does not know; see `EXPOSURES`.
        workers: who does the work; by default as many processes as cores and memory allow.

    Raises:
        ManifestError: no row that all stores have, or no such label.
        SettingsError: fewer than two pairs, encoders of one name, or a store of the wrong modality.
        RunStateError: the directory holds another comparison, or one that is under way.
    """
    images, texts = named_stores(image_stores), named_stores(text_stores)
    randoms = named_stores(random_stores or {})
    _check(images, texts, randoms, exposure or {})
    if retrieve is not None and not texts:
        raise SettingsError("retrieval is between images and reports: name text stores as well (--text)")
    labels, unusable = _usable_labels(manifest, labels)
    if not labels and segment is None and retrieve is None:
        raise SettingsError(f"{manifest.name}: no label to probe; name one, or ask for masks or retrieval")
    task = Task.over(
        manifest.name,
        manifest,
        images,
        texts,
        allow_missing=True,
        labels=labels,
        probe=probe or ProbeConfig(),
        segment=segment,
        retrieve=retrieve,
        random=randoms,
    )
    study = Study([task], Path(), train or TrainConfig())
    told = {(name, task.name): level for name, level in (exposure or {}).items()}
    settings = {
        "labels": list(labels),
        "stores": {name: study.store(path).content for name, path in {**images, **texts}.items()},
        "random": {name: study.store(path).content for name, path in randoms.items()},
        "exposure": dict(exposure or {}),
        **{name: plain(config) for name, config in _configs(study).items()},
    }
    identity = fingerprint({"data": task.digest, "images": list(images), "texts": list(texts), **settings})
    parent = Path("runs") / quote(manifest.name, safe=" ")
    with RunFolder(Path(run_dir) if run_dir else run_path(parent, identity), identity) as folder:
        study.run_dir = folder.path
        paths = {name: str(path) for name, path in {**images, **texts, **randoms}.items()}
        folder.describe({"compare": manifest.name, **settings, "paths": paths})
        for label in unusable:
            say(f"label {label} is left out: it lacks a class in training or test")
        for line in study.rows():
            say(f"rows {line}")
        comparison = finish(study, told, {}, workers or Workers(), folder.others(), say)
        folder.finish()
    return comparison


def finish(
    study: Study,
    exposure: Mapping[tuple[str, str], str],
    weights: Mapping[str, str],
    workers: Workers,
    others: Sequence[Path],
    say: Say,
) -> Comparison:
    """Does all steps of a study, compares its pairs, and writes the tables.

    Args:
        exposure: what a user says of encoders and tasks, by their names.
        weights: `random` for encoders whose weights were drawn.
        others: directories of other runs, in which the same steps may be done.
    """
    exposures = _exposures(study, exposure, weights)
    done = study.run(study.fitting(workers), others=others, say=say)
    write_study(study)
    tables = study.tables()
    found = differences(study, exposures)
    encoders = encoders_table(study, exposures, weights)
    write_tables(
        study.run_dir,
        {f"{name}.csv": table for name, table in {**tables, "differences": found, "encoders": encoders}.items()},
    )
    left_out = [
        f"{task.name}: {task.left_out} of {task.left_out + len(task.manifest)} rows left out: not every store has them"
        for task in study.tasks
        if task.left_out
    ]
    said = [f"{name}: {line}" for name, what in done.items() for line in what.said]
    leaks = [leak_words(task.manifest, study.store(next(iter(task.images.values()))), None, ()) for task in study.tasks]
    comparison = Comparison(
        study.run_dir,
        tables,
        found,
        encoders,
        tuple(verdicts(found, exposures)),
        tuple(dict.fromkeys([*filter(None, leaks), *unfair(found, exposures)])),
        (*left_out, *_trained_once(study), *said),
    )
    words = {name: list(getattr(comparison, name)) for name in _WORDS}
    write_text(study.run_dir / WORDS_NAME, json.dumps(words, indent=1, ensure_ascii=False))
    return comparison


def _trained_once(study: Study) -> list[str]:
    if len(study.pairs) < 2 or not any(study.n_adaptors(pair) == 1 for pair in study.pairs):
        return []
    return ["each pair's Adaptor was trained once: what another training of it would change is in no interval"]


def named_stores(stores: Stores) -> dict[str, Path]:
    """Stores by the name of their encoder: that of the mapping, else of the directory or file.

    Raises:
        SettingsError: two of one name.
    """
    if isinstance(stores, Mapping):
        return {name: Path(path) for name, path in stores.items()}
    paths = [Path(path) for path in stores]
    names = [path.resolve().stem if path.is_file() else path.resolve().name for path in paths]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        listed = ", ".join(str(path) for path, name in zip(paths, names, strict=True) if name in twice)
        raise SettingsError(f"stores {listed} have one name; give each its own as NAME=PATH")
    return dict(zip(names, paths, strict=True))


def _usable_labels(manifest: Manifest, asked: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """Labels that can be probed, before the first Adaptor is trained: those asked for, else all that can be.

    Returns:
        With labels that nobody asked for and that lack a class in training or test.

    Raises:
        ManifestError: a label asked for is not there.
        SettingsError: it is asked for twice.
    """
    if len(set(asked)) < len(asked):
        raise SettingsError(f"labels {', '.join(asked)}: one stands there twice")
    names = list(asked) or [found.name for found in manifest.label_sets]
    usable = []
    for name in names:
        target = Target.of(manifest, name)
        values = target.values(manifest)
        sides = [target.both_sides(values[manifest.in_split(split)]).any() for split in ("train", "test")]
        if asked or all(sides):
            usable.append(name)
    return tuple(usable), [name for name in names if name not in usable]


def _check(
    images: Mapping[str, Path], texts: Mapping[str, Path], randoms: Mapping[str, Path], exposure: Mapping[str, str]
) -> None:
    """Refuses what makes no comparison.

    Raises:
        SettingsError: says what, and what was expected.
    """
    if len(images) * max(len(texts), 1) < 2 or not images:
        raise SettingsError(f"{len(images)} image stores and {len(texts)} text stores, expected two pairs at least")
    both = sorted(set(images) & set(texts))
    if both:
        raise SettingsError(f"{', '.join(both)} names an image and a text encoder; give each its own as NAME=PATH")
    odd = sorted(name for name in (*images, *texts) if not _NAME.fullmatch(name))
    if odd:
        raise SettingsError(
            f"encoder name {odd[0]!r}, expected letters, digits, '.', '_' and '-'; give one as NAME=PATH"
        )
    strange = sorted(set(randoms) - set(images))
    if strange:
        raise SettingsError(f"random weights for {', '.join(strange)}, and image encoders are {', '.join(images)}")
    for modality, paths in (("image", [*images.values(), *randoms.values()]), ("text", texts.values())):
        for path in paths:
            found = open_store(path).modality
            if found != modality:
                raise SettingsError(f"{path}: a store of modality {found!r}, expected {modality!r}")
    unknown = sorted(set(exposure) - {*images, *texts})
    if unknown:
        raise SettingsError(f"exposure of {', '.join(unknown)}, and encoders are {', '.join([*images, *texts])}")
    for name, level in exposure.items():
        Exposed.told(level, name)


def _configs(study: Study) -> dict[str, Any]:
    task = study.tasks[0]
    return {"train": study.train, "probe": task.probe, "segment": task.segment, "retrieve": task.retrieve}


def _exposures(study: Study, told: Mapping[tuple[str, str], str], weights: Mapping[str, str]) -> Exposures:
    """What every encoder has seen of every task's dataset: as a user says, else as its weights or the catalogue do."""
    found = {}
    for task in study.tasks:
        for name, path in {**task.images, **study.tasks[0].texts}.items():
            if (name, task.name) in told:
                found[name, task.name] = Exposed.told(told[name, task.name], name)
            elif weights.get(name) == "random":
                found[name, task.name] = Exposed.drawn()
            else:
                found[name, task.name] = Exposed.of(study.store(path).encoder, task.manifest.name)
    return found
