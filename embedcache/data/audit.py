"""What a manifest's splits share, what is not there, and what metadata alone tells of the labels.

Shape notation: n rows of a manifest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from embedcache.data.files import content_digests, present
from embedcache.data.manifest import SPLITS, Manifest
from embedcache.data.shortcuts import Shortcut, shortcuts
from embedcache.errors import InputError

_PAIRS = (("train", "valid"), ("train", "test"), ("valid", "test"))
_LEAKS = ("image", "patient", "study", "file")  # short readings repeat by nature, so equal reports are no leak
_LONG_NAME = 12  # characters: shorter names, such as 0001.png, come about twice by chance


@dataclass(frozen=True)
class Shared:
    """Something that stands on two sides.

    Args:
        kind: `image` (the row itself), `patient`, `study`, `file` (equal bytes), `report` (equal texts) or `name`.
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
        files_read: whether files were compared.
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
    files_read: bool

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
        files = f"{self.n_shared['file']} identical files" if self.files_read else "files not read"
        return f"{rows}; in more than one split: {patients}, {self.n_shared['report']} report texts, {files}"


def audit(manifest: Manifest, *, files: bool | Mapping[str, bytes], look: bool = True) -> AuditReport:
    """Counts what stands in more than one split; see `Manifest.audit`.

    Args:
        look: whether to look which images are there.
    """
    frame = manifest.frame
    members = {split: manifest.in_split(split) for split in SPLITS}
    shared: list[Shared] = []
    n_shared = {}
    keys = _leak_keys(manifest, files)
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
        files_read=files is not False,
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


def overlaps(manifests: Sequence[Manifest], *, files: bool = True) -> list[Shared]:
    """What stands in two datasets, split by split.

    Patients are compared between datasets that name people of one register; images by the names of their files and, in
    a column `origin`, of those they were made from, if long enough to be nobody else's; files by their bytes.
    """
    digests = _digests_of(manifests) if files else [None] * len(manifests)
    found: list[Shared] = []
    for (a, a_digests), (b, b_digests) in combinations(list(zip(manifests, digests, strict=True)), 2):
        one_register = (a.about.patients_from or a.name) == (b.about.patients_from or b.name)
        kinds: dict[str, tuple[Iterable[Any], Iterable[Any]]] = {
            "patient": (a.frame["patient"], b.frame["patient"]) if one_register else ((), ()),
            "name": (_names(a), _names(b)),
        }
        if a_digests is not None and b_digests is not None:
            kinds["file"] = a_digests, b_digests
        for kind, (left, right) in kinds.items():
            found += _between(kind, a, pd.Series(left, dtype=object), b, pd.Series(right, dtype=object))
    return found


def _warning(name: str, shared: Sequence[Shared], n_rows: Mapping[str, int]) -> str:
    found = [s for s in shared if s.is_leak]
    if not found:
        return ""
    worst = max(found, key=lambda s: (s.right == "test", s.n_right))
    return (
        f"{name}: {worst.n_right:,} of {n_rows[worst.right]:,} {worst.right} images share their {worst.kind} with "
        f"{worst.left}: scores on {worst.right} are too good"
    )


def _leak_keys(manifest: Manifest, files: bool | Mapping[str, bytes]) -> dict[str, pd.Series]:
    """What must not be the same on two sides, for each row; blank where unknown."""
    frame = manifest.frame
    keys = {"image": frame["id"], "patient": frame["patient"], "study": frame["study"]}
    if isinstance(files, Mapping):
        keys["file"] = frame["id"].map(files)
    elif files:
        keys["file"] = pd.Series(content_digests(_paths(manifest)), dtype=object)
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


def _between(kind: str, a: Manifest, left: pd.Series, b: Manifest, right: pd.Series) -> list[Shared]:
    left, right = left[left.notna() & (left != "")], right[right.notna() & (right != "")]
    common = left[left.isin(right)].unique()
    left, right = left[left.isin(common)], right[right.isin(common)]
    found = []
    for a_split in (*SPLITS, ""):
        for b_split in (*SPLITS, ""):
            mine, theirs = left[_side(a, a_split, left)], right[_side(b, b_split, right)]
            both = set(mine) & set(theirs)
            if both:
                left_name, right_name = f"{a.name}:{a_split or 'no split'}", f"{b.name}:{b_split or 'no split'}"
                n_mine, n_theirs = mine[mine.isin(both)].index.nunique(), theirs[theirs.isin(both)].index.nunique()
                found.append(Shared(kind, left_name, right_name, len(both), n_mine, n_theirs))
    return found


def _side(manifest: Manifest, split: str, values: pd.Series) -> np.ndarray:
    rows = manifest.in_split(split) if split else (manifest.frame["split"] == "").to_numpy()
    return rows[values.index]


def _names(manifest: Manifest) -> pd.Series:
    """Stems of the image files, and of those they were made from; a row with both has two entries."""
    names = [manifest.frame["image"]]
    if "origin" in manifest.frame:
        names.append(manifest.frame["origin"].fillna(""))
    stems = pd.concat(names).astype(object).str.rpartition("/")[2].str.replace(r"\.[A-Za-z]+$", "", regex=True)
    return stems[stems.str.len() >= _LONG_NAME]


def _digests_of(manifests: Sequence[Manifest]) -> list[pd.Series]:
    paths = [_paths(manifest) for manifest in manifests]
    digests = content_digests([path for of_one in paths for path in of_one])
    ends = np.cumsum([0, *map(len, paths)])
    return [pd.Series(digests[a:b], dtype=object) for a, b in pairwise(ends)]


def _paths(manifest: Manifest) -> list[Path | None]:
    def path(image: str) -> Path | None:
        try:
            return manifest.path(image)
        except InputError:
            return None

    return [path(image) for image in manifest.frame["image"]]


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
        for split, rows in members.items():
            here = values[rows & known].astype(np.int64)
            yield Balance(label, split, len(here), tuple(np.bincount(here, minlength=n_classes).tolist()), classes)
