"""What a manifest's splits share, what is not there, and what metadata alone tells of the labels.

Shape notation: n rows of a manifest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from embedcache.data.files import content_digests, in_threads, present
from embedcache.data.manifest import SPLITS, Manifest
from embedcache.data.shortcuts import MOST_CLASSES, Shortcut, shortcuts
from embedcache.errors import InputError

_PAIRS = (("train", "valid"), ("train", "test"), ("valid", "test"))
_LEAKS = ("image", "patient", "study", "file")  # short readings repeat by nature, so equal reports are no leak
_LONG_NAME = 12  # characters: shorter names, such as 0001.png, come about twice by chance


@dataclass(frozen=True)
class Shared:
    """Something that stands on two sides.

    Args:
        kind: `image` (one path), `patient`, `study`, `file` (equal bytes), `report` (equal texts), `name` (of a file).
        left, right: the sides: splits, as `train`, or splits of datasets, as `nih:train`.
        n: how many of that kind stand on both.
        n_left, n_right: rows of either side that they concern.
    """

    kind: str
    left: str
    right: str
    n: int
    n_left: int
    n_right: int

    @property
    def is_leak(self) -> bool:
        """Whether it makes a score too good."""
        return self.kind in (*_LEAKS, "name")


@dataclass(frozen=True)
class Balance:
    """One label in one split: rows that have it, and rows of each class, whose names may be known."""

    label: str
    split: str
    n_known: int
    n_of_class: tuple[int, ...]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class AuditReport:
    """Counts over a manifest's splits.

    Args:
        name: the manifest's.
        split_rule: by which the splits were made; see `About`.
        n_rows, n_patients, n_studies: of each split; patients and studies that are named.
        n_without_patient: rows that do not name their patient.
        shared: what stands in two splits, for each two.
        n_shared: how many of each kind (as in `Shared`) stand in more than one split; a kind is absent if unknown.
        balance: labels in each split.
        missing: ids whose image is not there; None where nobody looked.
        shortcuts: what view, sex, age, site and source alone tell of the labels, the strongest first.
        n_compared: images whose files were compared; None where files were not.
    """

    name: str
    split_rule: str
    n_rows: dict[str, int]
    n_patients: dict[str, int]
    n_studies: dict[str, int]
    n_without_patient: int
    shared: tuple[Shared, ...]
    n_shared: dict[str, int]
    balance: tuple[Balance, ...]
    missing: tuple[str, ...] | None
    shortcuts: tuple[Shortcut, ...]
    n_compared: int | None

    @property
    def patients_known(self) -> bool:
        """Whether every row names its patient."""
        return self.n_without_patient == 0

    @property
    def leaks(self) -> bool:
        """Whether an image, a patient, a study or a file stands in two splits."""
        return any(found.is_leak for found in self.shared)

    @property
    def warning(self) -> str:
        """One line about what leaks, blank where nothing is known to."""
        return _warning(self.name, self.shared, self.n_rows)

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "patients_known": self.patients_known,
            "leaks": self.leaks,
            "missing": None if self.missing is None else list(self.missing),
        }

    def __str__(self) -> str:
        rows = ", ".join(f"{split} {n}" for split, n in self.n_rows.items())
        patients = f"{self.n_shared['patient']} patients" if self.patients_known else "patients unknown"
        files = f"{self.n_shared['file']} identical files" if self.n_compared is not None else "files not read"
        return f"{rows}; in more than one split: {patients}, {self.n_shared['report']} report texts, {files}"


def audit(manifest: Manifest, *, files: bool | Mapping[str, str | bytes], look: bool = True) -> AuditReport:
    """Counts what stands in more than one split; see `Manifest.audit`.

    Args:
        look: whether to look which images are there.
    """
    frame = manifest.frame
    members = {split: manifest.in_split(split) for split in SPLITS}
    shared: list[Shared] = []
    n_shared = {}
    digests = files if isinstance(files, Mapping) else files_of([manifest])[0] if files else None
    keys = _leak_keys(manifest, digests)
    keys["report"] = frame["report"].map(lambda text: " ".join(text.split()))
    for kind, values in keys.items():
        in_pairs, n_shared[kind] = _within(kind, values, members)
        shared += in_pairs
    return AuditReport(
        name=manifest.name,
        split_rule=manifest.about.split_rule,
        n_rows={split: int(rows.sum()) for split, rows in members.items()},
        n_patients={split: _distinct(frame["patient"][rows]) for split, rows in members.items()},
        n_studies={split: _distinct(frame["study"][rows]) for split, rows in members.items()},
        n_without_patient=int((frame["patient"] == "").sum()),
        shared=tuple(shared),
        n_shared=n_shared,
        balance=tuple(_balance(manifest, members)),
        missing=_missing(manifest) if look else None,
        shortcuts=tuple(shortcuts(manifest)),
        n_compared=None if digests is None else int(keys["file"].notna().sum()),
    )


def leak_warning(manifest: Manifest, files: Mapping[str, bytes]) -> str:
    """The warning of an audit, without the rest of it.

    Args:
        files: a digest for each id, as a store keeps them.
    """
    members = {split: manifest.in_split(split) for split in SPLITS}
    keys = _leak_keys(manifest, files)
    shared = [found for kind, values in keys.items() for found in _within(kind, values, members)[0]]
    return _warning(manifest.name, shared, {split: int(rows.sum()) for split, rows in members.items()})


def overlaps(manifests: Sequence[Manifest], files: Sequence[Mapping[str, str]] | None = None) -> list[Shared]:
    """What stands in two datasets, split by split.

    Patients are compared between datasets that name people of one register; images by the names of their files and, in
    a column `origin`, of those they were made from, if long enough to be nobody else's; files by their bytes.

    Args:
        files: digests of each manifest's files, as `files_of` gives them; None compares no files.
    """
    found: list[Shared] = []
    sides = [_sides(manifest) for manifest in manifests]
    for k, j in combinations(range(len(manifests)), 2):
        a, b = manifests[k], manifests[j]
        kinds = {"name": (_names(a), _names(b))}
        if a.about.patients_from and a.about.patients_from == b.about.patients_from:
            kinds["patient"] = (a.frame["patient"], b.frame["patient"])
        if files is not None:
            kinds["file"] = (a.frame["id"].map(files[k]), b.frame["id"].map(files[j]))
        for kind, (left, right) in kinds.items():
            found += _between(kind, a.name, sides[k], left, b.name, sides[j], right)
    return found


def unknown_overlaps(manifests: Sequence[Manifest]) -> list[str]:
    """A line for each two datasets that draw on one register's patients and do not both say whose images they are."""
    return [
        f"{a.name} and {b.name} both draw on the patients of {a.about.draws_on}, and which they share cannot be told: "
        f"not named in {' and '.join(m.name for m in (a, b) if m.about.patients_from != a.about.draws_on)}"
        for a, b in combinations(manifests, 2)
        if a.about.draws_on and a.about.draws_on == b.about.draws_on
        if not a.about.patients_from == b.about.patients_from == a.about.draws_on
    ]


def files_of(manifests: Sequence[Manifest]) -> list[dict[str, str]]:
    """A digest of each manifest's image files by id, equal where the files are, within and between the manifests.

    Files that cannot be read have none; a file that no other can equal has one that is no other's.
    """
    paths = [path for manifest in manifests for path in _paths(manifest)]
    digests = content_digests(paths)
    alone = [None if path is None else f"alone {k}" for k, path in enumerate(paths)]
    own = [digest or other for digest, other in zip(digests, alone, strict=True)]
    ends = np.cumsum([0, *map(len, manifests)])
    return [
        {i: digest for i, digest in zip(manifest.frame["id"], own[a:b], strict=True) if digest is not None}
        for manifest, (a, b) in zip(manifests, pairwise(ends), strict=True)
    ]


def _warning(name: str, shared: Sequence[Shared], n_rows: Mapping[str, int]) -> str:
    found = [s for s in shared if s.is_leak]
    if not found:
        return ""
    worst = max(found, key=lambda s: (s.right == "test", s.n_right))
    how = f"are in {worst.left} too" if worst.kind == "image" else f"share their {worst.kind} with {worst.left}"
    return (
        f"{name}: {worst.n_right:,} of {n_rows[worst.right]:,} {worst.right} images {how}: "
        f"scores on {worst.right} are too good"
    )


def _leak_keys(manifest: Manifest, files: Mapping[str, Any] | None) -> dict[str, pd.Series]:
    """What must not be the same on two sides, for each row; blank where unknown."""
    frame = manifest.frame
    keys = {"image": frame["image"], "patient": frame["patient"], "study": frame["study"]}
    if files is not None:
        keys["file"] = frame["id"].map(files)
    return keys


def _within(kind: str, keys: pd.Series, members: Mapping[str, np.ndarray]) -> tuple[list[Shared], int]:
    codes, known = pd.factorize(keys.where(keys != "", None))
    inside = {split: np.bincount(codes[rows & (codes >= 0)], minlength=len(known)) for split, rows in members.items()}
    found = []
    for left, right in _PAIRS:
        both = (inside[left] > 0) & (inside[right] > 0)
        if both.any():
            n_left, n_right = int(inside[left][both].sum()), int(inside[right][both].sum())
            found.append(Shared(kind, left, right, int(both.sum()), n_left, n_right))
    n_sides = np.sum([counts > 0 for counts in inside.values()], axis=0)
    return found, int((n_sides > 1).sum())


def _sides(manifest: Manifest) -> dict[str, np.ndarray]:
    """Which rows are in each split, and in none."""
    members = {split: manifest.in_split(split) for split in SPLITS}
    return {**members, "no split": (manifest.frame["split"] == "").to_numpy()}


def _between(
    kind: str,
    a: str,
    a_sides: Mapping[str, np.ndarray],
    left: pd.Series,
    b: str,
    b_sides: Mapping[str, np.ndarray],
    right: pd.Series,
) -> Iterator[Shared]:
    left, right = left[left.notna() & (left != "")], right[right.notna() & (right != "")]
    common = left[left.isin(right)].unique()
    left, right = left[left.isin(common)], right[right.isin(common)]
    for a_split, a_rows in a_sides.items():
        mine = left[a_rows[left.index]]
        for b_split, b_rows in b_sides.items():
            theirs = right[b_rows[right.index]]
            both = set(mine) & set(theirs)
            if both:
                n_mine, n_theirs = mine[mine.isin(both)].index.nunique(), theirs[theirs.isin(both)].index.nunique()
                yield Shared(kind, f"{a}:{a_split}", f"{b}:{b_split}", len(both), n_mine, n_theirs)


def _names(manifest: Manifest) -> pd.Series:
    """Stems of the image files, and of those they were made from; a row with both has two entries.

    Stems that are short, or that the dataset itself has more than once, are blank: they name no image.
    """
    stems = [_stem(manifest.frame["image"])]
    if "origin" in manifest.frame:
        stems.append(_stem(manifest.frame["origin"].fillna("")))
    return pd.concat([stem.mask(stem.duplicated(keep=False) | (stem.str.len() < _LONG_NAME), "") for stem in stems])


def _stem(paths: pd.Series) -> pd.Series:
    return paths.astype(object).str.rpartition("/")[2].str.replace(r"\.[A-Za-z]+$", "", regex=True)


def _paths(manifest: Manifest) -> list[Path | None]:
    """Each image's file; None where it is missing or out of the root."""

    def path(image: str) -> Path | None:
        try:
            return manifest.path(image)
        except InputError:
            return None

    return in_threads(path, manifest.frame["image"].tolist())


def _missing(manifest: Manifest) -> tuple[str, ...]:
    there, _ = present(manifest.root, manifest.frame["image"].tolist())
    return tuple(manifest.frame["id"][~there])


def _distinct(values: pd.Series) -> int:
    return int(values[values != ""].nunique())


def _balance(manifest: Manifest, members: Mapping[str, np.ndarray]) -> Iterable[Balance]:
    for label, classes in ((label, found.classes) for found in manifest.label_sets for label in found.labels):
        values = manifest.label(label)
        known = ~np.isnan(values)
        n_classes = max(int(values[known].max(initial=1)) + 1, 2)
        if n_classes > MOST_CLASSES:
            continue
        for split, rows in members.items():
            here = values[rows & known].astype(np.int64)
            yield Balance(label, split, len(here), tuple(np.bincount(here, minlength=n_classes).tolist()), classes)
