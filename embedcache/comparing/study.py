"""A study: pairs of encoders over their stores, an Adaptor for each, and the tasks that all of them are scored on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from embedcache import __version__
from embedcache.comparing.pair_steps import probe_pair, retrieve_pair, segment_pair, train_pair, zero_shot_pair
from embedcache.comparing.settings import plain
from embedcache.comparing.steps import Done, State, Step, Work, run_steps, states
from embedcache.data.image_files import read_regular
from embedcache.data.manifest import Manifest
from embedcache.data.masks import is_mask_path
from embedcache.data.prompts import PromptSet
from embedcache.device import count_cores, pick_device
from embedcache.errors import ManifestError, SettingsError, some_ids
from embedcache.fingerprint import digest_file, fingerprint
from embedcache.report.contents import TEXT_COLUMNS
from embedcache.report.plain_table import pair_name
from embedcache.resources import available_bytes
from embedcache.stage_two.adaptor import CONFIG, WEIGHTS
from embedcache.stage_two.config import OF_THE_MACHINE, SEEDS, TrainConfig
from embedcache.stage_two.kept import mask_folder, probe_folder
from embedcache.stage_two.probe_config import ProbeConfig
from embedcache.stage_two.probe_tables import TABLES
from embedcache.stage_two.retrieve_config import RetrieveConfig
from embedcache.stage_two.segment_config import SegmentConfig
from embedcache.stage_two.segment_tables import TABLES as MASK_TABLES
from embedcache.stage_two.zeroshot import ZeroShotConfig
from embedcache.store.store import Store, open_store
from embedcache.workers.chosen import Workers

_FILES = 1  # of what steps leave: raised where another version of it would not be understood
_N_LEFT_OUT = 10  # groups of training patients
_N_SEEDS = 3  # of Adaptors, at least
_PROCESS_BYTES = 1.5e9  # of a worker: torch and what a step computes


@dataclass(frozen=True, eq=False)
class Task:
    """A dataset that pairs are scored on, and how.

    Args:
        name: unlike any other's of the study.
        manifest: of the dataset; its rows that every store holds.
        images: store of each image encoder.
        texts: store of each text encoder; none where the dataset has no reports.
        labels: to probe.
        random: for an image encoder its architecture with random weights, over the same images.
        prompts: for each text encoder a store of the set's prompts.
        zeroshot: a set of prompts, or its file.
        left_out: rows of the dataset that some store lacks.
    """

    name: str
    manifest: Manifest
    images: Mapping[str, Path]
    texts: Mapping[str, Path] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    segment: SegmentConfig | None = None
    retrieve: RetrieveConfig | None = None
    zeroshot: str | None = None
    random: Mapping[str, Path] = field(default_factory=dict)
    prompts: Mapping[str, Path] = field(default_factory=dict)
    left_out: int = 0

    @classmethod
    def over(
        cls,
        name: str,
        manifest: Manifest,
        images: Mapping[str, Path],
        texts: Mapping[str, Path],
        *,
        allow_missing: bool = False,
        **how: Any,
    ) -> Task:
        """Over the rows that all stores hold; see `common_rows`.

        Raises:
            ManifestError: there are none.
        """
        every = {**images, **{f"random {name}": path for name, path in how.get("random", {}).items()}}
        kept, n_left_out = common_rows(manifest, every, texts, allow_missing=allow_missing)
        return cls(name, kept, images, texts, left_out=n_left_out, **how)

    @cached_property
    def digest(self) -> str:
        """A fingerprint of the manifest's table and facts, wherever its files lie."""
        frame = self.manifest.frame
        columns = {
            str(name): hashlib.sha256(pd.util.hash_pandas_object(frame[name].astype(object), index=False).to_numpy())
            for name in frame
        }
        return fingerprint(
            {
                "name": self.manifest.name,
                "columns": {name: digest.hexdigest() for name, digest in columns.items()},
                "about": json.loads(json.dumps(asdict(self.manifest.about))),
            }
        )

    @cached_property
    def mask_digest(self) -> str:
        """A fingerprint of its mask files."""
        total, manifest = hashlib.sha256(), self.manifest
        for text in manifest.frame.get("mask", pd.Series(dtype=object)):
            if isinstance(text, str) and is_mask_path(text):
                total.update(hashlib.sha256(read_regular(manifest.path(text))).digest())
        return total.hexdigest()


@dataclass(frozen=True)
class Pair:
    """An image encoder and a text encoder; a blank text encoder leaves the embeddings without an Adaptor."""

    image: str
    text: str

    @property
    def name(self) -> str:
        return pair_name(self.image, self.text)

    @property
    def folder(self) -> Path:
        """The pair's, within the run's directory."""
        return Path(f"{self.image}+{self.text}" if self.text else self.image)


class Study:
    """Pairs, tasks, and the directory that holds what becomes of them.

    Args:
        tasks: the first is of the dataset that Adaptors are trained on.
        run_dir: gets a folder for each pair, and what all of them give as tables.
        train: how Adaptors are trained.
    """

    def __init__(self, tasks: Sequence[Task], run_dir: Path, train: TrainConfig) -> None:
        names = [task.name for task in tasks]
        if len(set(names)) < len(names):
            raise SettingsError(f"tasks {', '.join(names)}: one stands there twice; give each a name of its own")
        home = tasks[0]
        self.pairs = [Pair(image, text) for image, text in product(home.images, home.texts or [""])]
        self.tasks = [_with_groups(task) for task in tasks] if len(self.pairs) > 1 else tasks
        self.run_dir, self.train = run_dir, self._seeded(train)
        self._opened: dict[Path, Store] = {}

    def _seeded(self, train: TrainConfig) -> TrainConfig:
        """With as many seeds as heads have, three at least, unless a number was chosen: pairs are to be compared."""
        if train.n_seeds is not None or len(self.pairs) < 2 or not any(pair.text for pair in self.pairs):
            return train
        n_runs = [_N_SEEDS]
        for task in self.tasks:
            n_runs += [task.probe.n_seeds] if task.labels else []
            n_runs += [task.segment.n_seeds] if task.segment is not None else []
        return replace(train, n_seeds=max(n_runs))

    def store(self, path: Path) -> Store:
        """A store, opened once."""
        if path not in self._opened:
            self._opened[path] = open_store(path)
        return self._opened[path]

    def n_adaptors(self, pair: Pair) -> int:
        """Trainings of the pair's Adaptor; 0 where it has none."""
        return len(self.train.trainings) if pair.text else 0

    def folder(self, task: Task, pair: Pair) -> Path:
        """Where a task of a pair leaves its results, within the run's directory."""
        return pair.folder if task is self.tasks[0] else pair.folder / "tasks" / quote(task.name, safe=" ")

    def data_path(self, task: Task) -> Path:
        """Where the run keeps a task's manifest."""
        return self.data_file(self.run_dir, task.name)

    @staticmethod
    def data_file(run_dir: Path, task: str) -> Path:
        """Where a run keeps the manifest of a task."""
        return run_dir / "data" / f"{quote(task, safe=' ')}.parquet"

    def rows(self) -> list[str]:
        """How many rows of each task are used, in words."""
        return [f"{t.name}: {len(t.manifest):,} that every store has, {t.left_out:,} left out" for t in self.tasks]

    def steps(self) -> list[Step]:
        """All that is done, in an order in which it can be."""
        device = pick_device(self.train.device)
        trained = [self._training(pair, device) for pair in self.pairs if pair.text]
        return trained + [
            step for task in self.tasks for pair in self.pairs for step in self._of_task(task, pair, device)
        ]

    def states(self, others: Iterable[Path] = ()) -> dict[str, State]:
        """What `run` would do with each step."""
        return states(self.steps(), self.run_dir, others)

    def run(
        self,
        workers: Workers,
        *,
        others: Iterable[Path] = (),
        say: Callable[[str], None] = lambda line: None,
    ) -> dict[str, Done]:
        """Does what is not done yet; gives what each step said.

        Args:
            workers: by whom; see `fitting` for a number of processes.
            others: directories of other runs, in which the same steps may be done.
        """
        folder = self.run_dir / "data"
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)  # reports are in it
        for task in self.tasks:
            task.manifest.write(self.data_path(task))
        return run_steps(self.steps(), self.run_dir, workers, pick_device(self.train.device), others=others, say=say)

    def fitting(self, workers: Workers) -> Workers:
        """With a number of processes that this machine has cores and memory for, where none was chosen."""
        device = pick_device(self.train.device)
        if workers.n is not None or workers.backend != "local" or device != "cpu":
            return workers
        largest = max(self.store(path).n_bytes for task in self.tasks for path in task.images.values())
        n_adaptors = max(self.n_adaptors(pair) for pair in self.pairs)
        n_held = max(n_adaptors, 3) if n_adaptors else 0  # prompts hold what each gives, a probe three such at a time
        adapted = 4 * n_held * self.train.projection_dim * max(len(task.manifest) for task in self.tasks)
        n = min(count_cores(), len(self.steps()), int(available_bytes() / (2 * largest + adapted + _PROCESS_BYTES)))
        return Workers(workers.backend, workers.address, max(n, 1), workers.n_threads)

    def _training(self, pair: Pair, device: str) -> Step:
        task = self.tasks[0]
        arguments = {
            "data": self.data_path(task).absolute(),
            "image": task.images[pair.image].absolute(),
            "text": task.texts[pair.text].absolute(),
            "folder": (self.run_dir / pair.folder).absolute(),
            "config": self.train,
        }

        def key() -> str:
            stores = [self.store(task.images[pair.image]), self.store(task.texts[pair.text])]
            return _key("train", task, self.train, stores)

        patterns = "*", f"{SEEDS}/*/*"
        return Step(_training_name(pair), pair.folder, patterns, (), key, Work(train_pair, arguments, device))

    def _of_task(self, task: Task, pair: Pair, device: str) -> list[Step]:
        """What is scored of a pair on a dataset."""
        folder, image = self.folder(task, pair), task.images[pair.image]
        data, random = self.data_path(task), task.random.get(pair.image)
        adaptor = self.run_dir / pair.folder if pair.text else None
        text = task.texts.get(pair.text)
        found: list[Step] = []

        def add(what: str, where: Path, function: Any, config: Any, stores: Sequence[Path | None], **more: Any) -> None:
            of_files = {"data": data, "image": image, "adaptor": adaptor, "folder": self.run_dir / where, **more}
            arguments = {  # workers may be started elsewhere
                name: value.absolute() if isinstance(value, Path) else value for name, value in of_files.items()
            }

            def key() -> str:
                opened = [None if path is None else self.store(path) for path in (image, *stores)]
                said = [f"{name}={value}" for name, value in more.items() if name in ("label", "labels", "prompts")]
                of_files = [task.mask_digest] if what == "masks" else []
                of_files += [repr(PromptSet.named(str(task.zeroshot)))] if what == "zero-shot" else []
                return _key(what, task, config, opened, [*said, *of_files, *self._adaptor_digests(adaptor)])

            needs = (_training_name(pair),) if pair.text else ()
            on = "" if task is self.tasks[0] else f"{task.name}: "
            work = Work(function, {**arguments, "config": config}, device)
            found.append(Step(f"{pair.name}: {on}{what}", where, ("**/*",), needs, key, work))

        for label in task.labels:
            where = probe_folder(folder, label)
            add(f"probe {label}", where, probe_pair, task.probe, (text, random), label=label, text=text, random=random)
        if task.segment is not None:
            add("masks", mask_folder(folder), segment_pair, task.segment, (random,), random=random)
        if task.retrieve is not None and text is not None:
            add("retrieval", folder / "retrieval", retrieve_pair, task.retrieve, (text,), text=text, labels=task.labels)
        if task.zeroshot is not None and pair.text:
            store, config = task.prompts[pair.text], ZeroShotConfig()
            add(
                "zero-shot", folder / "zeroshot", zero_shot_pair, config, (store,),
                prompt_store=store, prompts=task.zeroshot, labels=task.labels,
            )  # fmt: skip
        return found

    def _adaptor_digests(self, adaptor: Path | None) -> list[str]:
        """Of a pair's Adaptors."""
        folders = [] if adaptor is None else [adaptor / name for name in self.train.trainings]
        return [digest_file(folder / name) for folder in folders for name in (WEIGHTS, CONFIG)]

    def tables(self) -> dict[str, pd.DataFrame]:
        """What all pairs' tasks left, by name: of probes as they are, of others with a prefix.

        Columns `image`, `text` and, where there are several datasets, `data` say of what a row is.
        """
        parts: dict[str, list[pd.DataFrame]] = {}

        def add(name: str, path: Path, task: Task, pair: Pair, **more: str) -> None:
            named = {"image": pair.image, "text": pair.text, **({"data": task.name} if len(self.tasks) > 1 else {})}
            parts.setdefault(name, []).append(read_table(path).assign(**more, **named))

        for task, pair in product(self.tasks, self.pairs):
            folder = self.run_dir / self.folder(task, pair)
            for label, name in product(task.labels, TABLES):
                add(name, probe_folder(folder, label) / f"{name}.csv", task, pair, label=label)
            if task.segment is not None:
                for name in MASK_TABLES:
                    add(f"mask_{name}", mask_folder(folder) / f"{name}.csv", task, pair)
            if task.retrieve is not None and pair.text in task.texts:
                add("retrieval_scores", folder / "retrieval" / "scores.csv", task, pair)
            if task.zeroshot is not None and pair.text:
                add("zeroshot_scores", folder / "zeroshot" / "scores.csv", task, pair)
        return {name: pd.concat(some, ignore_index=True) for name, some in parts.items()}


def common_rows(
    manifest: Manifest, images: Mapping[str, Path], texts: Mapping[str, Path], *, allow_missing: bool = False
) -> tuple[Manifest, int]:
    """The rows whose image every image store holds and whose report every text store holds, and how many are left out.

    Args:
        allow_missing: leave out too what a store neither holds nor records as failed; else that is for the join to say.

    Raises:
        ManifestError: there are none.
    """
    frame = manifest.frame
    keep = pd.Series(True, index=frame.index)
    for paths, column in ((images, "id"), (texts, "report_id")):
        for path in paths.values():
            store, ids = open_store(path), frame[column].tolist()
            lacking = pd.Series(store.find(ids) < 0, index=frame.index)
            if not allow_missing:
                lacking &= frame[column].isin({failure.id for failure in store.failures})
            keep &= ~lacking
    if not keep.any():
        stores = ", ".join(str(path) for path in (*images.values(), *texts.values()))
        raise ManifestError(
            f"{manifest.name}: of its {len(frame)} rows ({some_ids(frame['id'])}) none is in all of {stores}; extract "
            "them from this manifest"
        )
    n_left_out = int((~keep).sum())
    return (manifest.with_frame(frame[keep]) if n_left_out else manifest), n_left_out


def read_table(path: Path) -> pd.DataFrame:
    """A table of scores as it was written: blank words are words, other blanks are NaN."""
    columns = pd.read_csv(path, nrows=0).columns
    kinds: Any = {name: str for name in columns if name in TEXT_COLUMNS}
    blank: Any = {name: [""] for name in columns if name not in TEXT_COLUMNS}
    return pd.read_csv(path, dtype=kinds, keep_default_na=False, na_values=blank)


def _with_groups(task: Task) -> Task:
    """With groups of training patients left out in turn, unless their number was chosen: pairs are to be compared."""
    return (
        task if task.probe.n_left_out is not None else replace(task, probe=replace(task.probe, n_left_out=_N_LEFT_OUT))
    )


def _training_name(pair: Pair) -> str:
    return f"{pair.name}: Adaptor"


def _key(what: str, task: Task, config: Any, stores: Sequence[Store | None], more: Sequence[str] = ()) -> str:
    settings = {name: value for name, value in plain(config).items() if name not in OF_THE_MACHINE}
    return fingerprint(
        {
            "what": what,
            "version": __version__,
            "files": _FILES,
            "data": task.digest,
            "config": settings,
            "stores": [None if store is None else store.content for store in stores],
            "more": list(more),
        }
    )
