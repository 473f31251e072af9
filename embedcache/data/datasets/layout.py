"""What the official layouts share: what a dataset says of itself, and how its rows become a manifest with splits.

A dataset's own module gives a `Layout`, whose `read` turns official tables into a `Draft`; the rest is done here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from embedcache.data.datasets.places import Images, find_root, leads_out
from embedcache.data.files import present
from embedcache.data.labels import LABEL_PREFIX, LabelSet
from embedcache.data.manifest import About, Manifest, groups
from embedcache.data.splits import patient_split, rarest_label, stratified_fractions
from embedcache.errors import DatasetError, ManifestError, SettingsError, some_ids

SplitRule = Literal["patient", "paper"]
SPLIT_NAMES = {  # what folders and archives of splits are called
    "train": "train",
    "training": "train",
    "valid": "valid",
    "val": "valid",
    "validation": "valid",
    "test": "test",
}
_TYPES: dict[str, Any] = {"path": (str, Path), "flag": bool, "text": str, "pairs": Mapping}
_WORDS = {"path": "a path", "flag": "true or false", "text": "a text", "pairs": "<ours>: <theirs> for each column"}


@dataclass(frozen=True)
class Option:
    """Something that can be said of one dataset beside its root.

    Args:
        kind: `path` (an existing file or folder), `flag`, `text` or `pairs` (`ours=theirs`, several times).
        choices: values that `text` may have.
    """

    name: str
    help: str
    kind: Literal["path", "flag", "text", "pairs"] = "text"
    choices: tuple[str, ...] = ()


UNCERTAIN = Option(
    "uncertain",
    "What uncertain labels count as; by default ignore, under --split paper paper.",
    choices=("ignore", "zeros", "ones", "paper"),
)


@dataclass(frozen=True)
class Asked:
    """What is asked of a dataset.

    Args:
        split: `patient` or `paper`.
        task: one of the layout's tasks; blank for the first.
        seed: of the `patient` splits.
        valid, test: their shares of the patients, where no official list says.
        options: values of the layout's options.
    """

    split: SplitRule = "patient"
    task: str = ""
    seed: int = 0
    valid: float = 0.1
    test: float = 0.2
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def uncertain(self) -> str:
        """What uncertain labels count as; see `UNCERTAIN`."""
        return self.options.get("uncertain") or ("paper" if self.split == "paper" else "ignore")


@dataclass
class Draft:
    """A dataset as its own module reads it.

    Args:
        frame: the manifest's columns, without `split`; `image` relative to the root. Absent images are left out later.
        label_sets: of its labels; the first is what splits and fractions are balanced by.
        split: of each row under the paper's rule, which is then final.
        fraction: the least published label fraction under which each row is used, NaN where none.
        official: the official list's split of each row, or blank. Its test and valid rows stay so; all others, those of
            training too, are dealt out by patient.
        patients_from: the register of its patients.
        notes: what the user should know of the reading.
        name: of the manifest; by default the layout's.
        rule: of the splits, where `split` is given.
        images: those below the root; by default the folders of the listed ones are looked into.
        aside: images that the tables list and the published rule leaves out.
        draws_on: a register whose patients are among this dataset's, whether it says which they are or not.
    """

    frame: pd.DataFrame
    label_sets: tuple[LabelSet, ...] = ()
    split: pd.Series | np.ndarray | None = None
    fraction: pd.Series | np.ndarray | None = None
    official: pd.Series | np.ndarray | None = None
    patients_from: str = ""
    notes: list[str] = field(default_factory=list)
    name: str = ""
    rule: Literal["", "paper"] = "paper"
    images: Images | None = None
    aside: Sequence[str] = ()
    draws_on: str = ""


@dataclass(frozen=True)
class Layout:
    """A dataset as it is published.

    Args:
        name: what it is called on the command line.
        title: what it is called elsewhere.
        tree: its folders and files, as `--help` shows them.
        marks: patterns of which one matches below the root; none where any folder will do.
        read: from the root to a draft.
        folders: patterns of the names of folders that it consists of: given one of them, the root is the folder around.
        published: whether there is a `paper` split.
        tasks: kinds of use that differ in labels or published splits; the first is meant where nothing is said.
        options: what else can be said of it.
    """

    name: str
    title: str
    tree: str
    marks: tuple[str, ...]
    read: Callable[[Path, Asked], Draft]
    folders: tuple[str, ...] = ()
    published: bool = False
    tasks: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()

    def check(self, task: str | None, options: Mapping[str, Any]) -> None:
        """Refuses a task or options that the dataset does not have.

        Raises:
            DatasetError, SettingsError: what was asked for and what there is.
        """
        if task is not None and task not in self.tasks:
            there = f"one of {', '.join(self.tasks)}" if self.tasks else "none, as it has one kind of use"
            raise DatasetError(f"{self.name}: task {task!r}, expected {there}")
        known = {option.name: option for option in self.options}
        for name, value in options.items():
            if name not in known:
                raise SettingsError(f"{self.name} has no option {name!r}; it has {', '.join(known) or 'none'}")
            kind, choices = known[name].kind, known[name].choices
            if value is not None and not isinstance(value, _TYPES[kind]):
                raise SettingsError(f"{self.name}: {name} {value!r}, expected {_WORDS[kind]}")
            if choices and value is not None and value not in choices:
                raise SettingsError(f"{self.name}: {name} {value!r}, expected one of {', '.join(choices)}")


@dataclass(frozen=True)
class Built:
    """A dataset's manifest, and what stayed out of it.

    Args:
        absent: images that the tables list and that are not there.
        extra: image files that are there and that no table lists.
    """

    manifest: Manifest
    absent: tuple[str, ...]
    extra: tuple[str, ...]


def build(layout: Layout, root: str | Path, asked: Asked) -> Built:
    """Reads a dataset and makes its splits; opens no image.

    Raises:
        DatasetError: not that dataset, none of its images is there, or it has no such split or task.
        ManifestError: a table that is not as it is published.
    """
    if asked.split not in get_args(SplitRule):
        raise SettingsError(f"split {asked.split!r}, expected one of {', '.join(get_args(SplitRule))}")
    if asked.split == "paper" and not layout.published:
        raise DatasetError(f"{layout.name}: no published split is known for it; use the split 'patient'")
    found, note = find_root(
        Path(root), title=layout.title, marks=layout.marks, folders=layout.folders, tree=layout.tree
    )
    draft = layout.read(found, asked)
    notes = ([note] if note else []) + draft.notes
    frame = _without_twins(draft, layout.name, notes)
    rule, frame["split"] = _splits(draft, frame, asked, notes)
    frame["fraction"] = _fractions(draft, frame, asked)
    there, extra = _there(layout, found, frame["image"].tolist(), draft)
    absent = tuple(frame["image"][~there])
    if absent:
        notes.append(
            f"{len(absent):,} of {len(frame):,} listed images are absent and were left out, such as {absent[0]}"
        )
    if extra:
        notes.append(f"{len(extra):,} image files are in no table, such as {extra[0]}")
    about = About(draft.label_sets, rule, draft.patients_from, draft.draws_on, tuple(notes))
    return Built(Manifest(frame[there], name=draft.name or layout.name, root=found, about=about), absent, tuple(extra))


def _there(layout: Layout, root: Path, images: list[str], draft: Draft) -> tuple[np.ndarray, list[str]]:
    """Which images are there, and what else is.

    Raises:
        DatasetError: the tables list none, none is there, or the way to some leads out of the root.
    """
    if not images:
        raise DatasetError(f"{root}: the tables of {layout.title} list no image; are they the official files?")
    tops = {"/".join(image.split("/")[:depth]) for image in images for depth in (1, 2)} - set(images)
    links = sorted(folder for folder in tops if leads_out(root, folder))
    there, beside = present(root, [*images, *draft.aside])
    there = there[: len(images)]
    if not there.all() and draft.images is not None:
        links += draft.images.links_out
    if links:
        raise DatasetError(
            f"{root / links[0]}: a link to a place outside ROOT, where stage one does not follow; put the tables "
            "beside the images, or bind the folder there by other means than a link"
        )
    if not there.any():
        raise DatasetError(
            f"{root}: none of the {len(images):,} images that the tables list is there, such as {images[0]}; unpack "
            f"the images below this folder. Expected:\n{layout.tree}"
        )
    return there, beside if draft.images is None else draft.images.unlisted([*images, *draft.aside])


def _without_twins(draft: Draft, name: str, notes: list[str]) -> pd.DataFrame:
    """The draft's table without rows that repeat another from end to end; what belongs to its rows goes along."""
    frame = draft.frame.reset_index(drop=True)
    if frame["id"].is_unique:
        return frame.copy()
    parts = [part for part in ("split", "fraction", "official") if getattr(draft, part) is not None]
    twin = frame.assign(**{f"its {part}": np.asarray(getattr(draft, part)) for part in parts}).duplicated().to_numpy()
    if not frame["id"][~twin].is_unique:
        again = frame["id"][~twin]
        raise ManifestError(
            f"{name}: rows under one id that differ: {some_ids(again[again.duplicated()])}; keep one of each"
        )
    notes.append(f"{int(twin.sum()):,} rows repeat another and were left out, such as {frame['id'][twin].iloc[0]}")
    for part in parts:
        setattr(draft, part, np.asarray(getattr(draft, part))[~twin])
    return frame[~twin].reset_index(drop=True)


def _splits(draft: Draft, frame: pd.DataFrame, asked: Asked, notes: list[str]) -> tuple[Any, np.ndarray]:
    known = "patient" in frame and bool((frame["patient"] != "").all())
    if not known:
        some = "no row names" if "patient" not in frame or (frame["patient"] == "").all() else "some rows do not name"
        notes.append(f"patients unknown: {some} its patient, so a patient may stand on two sides")
    if draft.split is not None:
        return draft.rule, np.asarray(draft.split, object)
    of_row, strata = groups(frame), _strata(draft, frame)
    split = np.asarray(draft.official if draft.official is not None else np.full(len(frame), ""), object).copy()
    has_test, has_valid = bool((split == "test").any()), bool((split == "valid").any())
    fixed = ["test"] * has_test + ["valid"] * has_valid
    open_rows = ~pd.Series(split).isin(fixed).to_numpy()
    split[open_rows] = patient_split(
        of_row[open_rows],
        strata[open_rows],
        valid=0 if has_valid else asked.valid,
        test=0 if has_test else asked.test,
        seed=asked.seed,
    )
    for name in fixed:
        taken = pd.Series(of_row).isin(of_row[split == name]).to_numpy() & (split != name)
        if taken.any():
            split[taken] = ""
            notes.append(f"{int(taken.sum()):,} rows have no split, as their patients are in the official {name} list")
    return "patient" if known else "exam", split


def _strata(draft: Draft, frame: pd.DataFrame) -> np.ndarray:
    if not draft.label_sets:
        return np.zeros(len(frame))
    first = draft.label_sets[0]
    labels = frame[[LABEL_PREFIX + label for label in first.labels]].to_numpy(np.float64)
    return labels[:, 0] if first.task == "multi-class" else rarest_label(labels).astype(np.float64)


def _fractions(draft: Draft, frame: pd.DataFrame, asked: Asked) -> np.ndarray:
    if draft.fraction is not None:
        return np.asarray(draft.fraction, np.float64)
    train = frame["split"].map(lambda split: "train" in split.split("+")).to_numpy(bool)
    return stratified_fractions(_strata(draft, frame), train, seed=asked.seed)
