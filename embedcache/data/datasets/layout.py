"""What the official layouts share: finding the root, the files and the columns, and making the manifest's splits.

A dataset's own module gives a `Layout`, whose `read` turns official tables into a `Draft`; the rest is done here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from embedcache.data.files import present
from embedcache.data.labels import LABEL_PREFIX, LabelSet
from embedcache.data.manifest import About, Manifest, groups
from embedcache.data.splits import patient_split, rarest_label, stratified_fractions
from embedcache.errors import DatasetError, ManifestError, SettingsError, some_ids

SplitRule = Literal["patient", "paper"]
IMAGE_SUFFIXES = (".dcm", ".dicom", ".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Option:
    """Something that can be said of one dataset beside its root.

    Args:
        kind: `path` (an existing file or folder), `flag`, `text` or `pairs` (`ours=theirs`, several times).
        choices: values that `text` may have; the first is meant where nothing is said.
    """

    name: str
    help: str
    kind: Literal["path", "flag", "text", "pairs"] = "text"
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asked:
    """What is asked of a dataset.

    Args:
        split: `patient` or `paper`.
        task: one of the layout's tasks.
        seed: of the `patient` splits.
        valid, test: their shares of the patients, where no official list says.
        options: values of the layout's options.
    """

    split: SplitRule
    task: str
    seed: int
    valid: float
    test: float
    options: Mapping[str, Any]


@dataclass
class Draft:
    """A dataset as its own module reads it.

    Args:
        frame: the manifest's columns, without `split`; `image` relative to the root. Absent images are left out later.
        label_sets: of its labels; the first is what splits and fractions are balanced by.
        split: of each row under the paper's rule, which is then final.
        fraction: the least published label fraction under which each row is used, NaN where none.
        official: the official list's split of each row, blank where it says nothing; test rows stay test.
        patients_from: the register of its patients.
        notes: what the user should know of the reading.
        extra: image files below the root that no table names; by default those in the folders of the listed ones.
    """

    frame: pd.DataFrame
    label_sets: tuple[LabelSet, ...] = ()
    split: pd.Series | np.ndarray | None = None
    fraction: np.ndarray | None = None
    official: pd.Series | np.ndarray | None = None
    patients_from: str = ""
    notes: list[str] = field(default_factory=list)
    extra: Sequence[str] | None = None


@dataclass(frozen=True)
class Layout:
    """A dataset as it is published.

    Args:
        name: what it is called on the command line.
        title: what it is called elsewhere.
        tree: its folders and files, as `--help` shows them.
        marks: patterns of which one matches below the root, and nowhere else near it; none where any folder will do.
        read: from the root to a draft.
        published: whether there is a `paper` split.
        tasks: kinds of use that differ in labels or published splits; the first is meant where nothing is said.
        options: what else can be said of it.
    """

    name: str
    title: str
    tree: str
    marks: tuple[str, ...]
    read: Callable[[Path, Asked], Draft]
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
            choices = known[name].choices
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
    found, note = find_root(layout, Path(root))
    draft = layout.read(found, asked)
    notes = ([note] if note else []) + draft.notes
    frame = _without_twins(draft, layout.name, notes)
    rule, frame["split"] = _splits(draft, frame, asked, notes)
    frame["fraction"] = _fractions(draft, frame, asked)
    there, beside = present(found, frame["image"].tolist())
    absent = tuple(frame["image"][~there])
    _note_absences(layout, found, absent, len(frame), notes)
    extra = tuple(beside if draft.extra is None else draft.extra)
    if extra:
        notes.append(f"{len(extra):,} image files are in no table, such as {extra[0]}")
    about = About(draft.label_sets, rule, draft.patients_from, tuple(notes))
    return Built(Manifest(frame[there], name=layout.name, root=found, about=about), absent, extra)


def find_root(layout: Layout, root: Path) -> tuple[Path, str]:
    """The dataset's folder: the one given, one inside it, or the one that it lies in; and a note where it is another.

    Raises:
        DatasetError: none of them is; shows the layout.
    """
    if not root.is_dir():
        raise DatasetError(f"{root}: no folder there; name the folder of {layout.title}")
    if not layout.marks or _marked(root, layout):
        return root, ""
    inside = [child for child in sorted(root.iterdir()) if child.is_dir() and _marked(child, layout)]
    if len(inside) > 1:
        names = ", ".join(child.name for child in inside)
        raise DatasetError(f"{root}: several folders of {layout.title} lie in it ({names}); name one of them")
    around = [root.resolve().parent] if _marked(root.resolve().parent, layout) else []
    for other, where in ((inside, "one level down"), (around, "one level up")):
        if other:
            return other[0], f"the dataset was found {where}, in {other[0].name}"
    holds = sorted(child.name for child in root.iterdir())
    raise DatasetError(
        f"{root}: not a folder of {layout.title}: {' or '.join(layout.marks)} is not in it, nor one level down or up; "
        f"it holds {', '.join(holds[:8]) or 'nothing'}{' ...' if len(holds) > 8 else ''}. Expected:\n{layout.tree}"
    )


def one_file(root: Path, *patterns: str, given: Path | None = None) -> Path:
    """The first file below the root that matches a pattern; gzipped or not.

    Args:
        given: the user's own, which is taken instead.

    Raises:
        DatasetError: there is none.
    """
    found = any_file(root, *patterns, given=given)
    if found is None:
        raise DatasetError(f"{root}: no {' or '.join(patterns)} (or .gz) in it; download it into this folder")
    return found


def any_file(root: Path, *patterns: str, given: Path | None = None) -> Path | None:
    """As `one_file`, None where there is none."""
    if given is not None:
        if not given.exists():
            raise DatasetError(f"{given}: not there; name an existing file")
        return given
    for pattern in patterns:
        for ending in (pattern, f"{pattern}.gz"):
            matches = sorted(path for path in root.glob(ending) if path.is_file())
            if matches:
                return matches[0]
    return None


def image_index(root: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """Every image file below a root by its name: its path relative to the root; however deep or flat it was unpacked.

    Of two files of one name the one that lies higher counts, then the first by path.

    Args:
        names: folders directly below the root to look into; by default all.
    """
    found: dict[str, str] = {}
    tops = [root] if names is None else [root / name for name in names]
    for path in sorted((path for top in tops for path in images_below(root, top)), key=lambda p: (p.count("/"), p)):
        found.setdefault(path.rpartition("/")[2], path)
    return found


def images_below(root: Path, top: Path | None = None) -> list[str]:
    """Every image file below a root, or one of its folders, by its path relative to the root; hidden ones aside."""
    paths = []
    for folder, below, files in os.walk(top or root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        inside = Path(folder).relative_to(root).as_posix()
        prefix = "" if inside == "." else inside + "/"
        paths += [
            prefix + name
            for name in sorted(files)
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        ]
    return paths


def located(ids: pd.Series, index: Mapping[str, str], *, suffixes: Sequence[str] = ("",), expected: str) -> pd.Series:
    """The path of each image: its name with one of the suffixes, as the index has it, else where it should be.

    Args:
        ids: file names, or their stems.
        expected: the official path, with `{}` for the id; what is absent is named by it.
    """
    found = ids.map(lambda name: next((index[name + s] for s in suffixes if name + s in index), None))
    return found.where(found.notna(), ids.map(expected.format)).astype(object)


def unlisted(index: Mapping[str, str], paths: pd.Series) -> list[str]:
    """Files of an index that no row names."""
    return sorted(set(index.values()) - set(paths))


def grouped_rows(frame: pd.DataFrame, path: Path, *, same: Sequence[str], key: str = "id") -> pd.DataFrame:
    """The first row of each id of a table that may say the same of an id more than once.

    Raises:
        ManifestError: rows of one id that differ in one of `same`.
    """
    for column in same:
        differing = frame.groupby(key, sort=False)[column].nunique() > 1
        if differing.any():
            raise ManifestError(
                f"{path}: rows of {some_ids(differing.index[differing])} differ in {column}; expected one value each"
            )
    return frame.drop_duplicates(key)


def _marked(folder: Path, layout: Layout) -> bool:
    return any(any(folder.glob(ending)) for mark in layout.marks for ending in (mark, f"{mark}.gz"))


def _without_twins(draft: Draft, name: str, notes: list[str]) -> pd.DataFrame:
    """The draft's table without rows that repeat another from end to end; what belongs to its rows goes along."""
    frame = draft.frame.reset_index(drop=True)
    if not frame["id"].is_unique:
        twin = frame.duplicated()
        if not twin.any() or not frame["id"][~twin].is_unique:
            again = frame["id"][frame["id"].duplicated()]
            raise ManifestError(f"{name}: rows under one id that differ: {some_ids(again)}; keep one of each")
        notes.append(f"{int(twin.sum()):,} rows repeat another and were left out, such as {frame['id'][twin].iloc[0]}")
        kept = ~twin.to_numpy()
        for part in ("split", "fraction", "official"):
            value = getattr(draft, part)
            setattr(draft, part, None if value is None else np.asarray(value)[kept])
        frame = frame[kept].reset_index(drop=True)
    return frame.copy()


def _splits(draft: Draft, frame: pd.DataFrame, asked: Asked, notes: list[str]) -> tuple[Any, np.ndarray]:
    if draft.split is not None:
        return "paper", np.asarray(draft.split, object)
    known = "patient" in frame and bool((frame["patient"] != "").all())
    if not known:
        some = "no row names" if "patient" not in frame or (frame["patient"] == "").all() else "some rows do not name"
        notes.append(f"patients unknown: {some} its patient, so a patient may stand on two sides of the split 'exam'")
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
        return draft.fraction
    train = frame["split"].map(lambda split: "train" in split.split("+")).to_numpy(bool)
    return stratified_fractions(_strata(draft, frame), train, seed=asked.seed)


def _note_absences(layout: Layout, root: Path, absent: Sequence[str], n: int, notes: list[str]) -> None:
    if n == 0:
        raise DatasetError(f"{root}: the tables of {layout.title} list no image; are they the official files?")
    if len(absent) == n:
        raise DatasetError(
            f"{root}: none of the {n:,} images that the tables list is there, such as {absent[0]}; unpack the images "
            f"below this folder. Expected:\n{layout.tree}"
        )
    if absent:
        notes.append(f"{len(absent):,} of {n:,} listed images are absent and were left out, such as {absent[0]}")
