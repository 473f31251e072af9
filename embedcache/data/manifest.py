"""The manifest: one row per image, joined to everything else by id."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from embedcache.data.labels import LABEL_PREFIX, LabelSet
from embedcache.data.splits import FRACTIONS
from embedcache.data.tables import read_csv
from embedcache.errors import InputError, ManifestError, some_ids
from embedcache.ids import unusable_ids
from embedcache.output import write_whole

if TYPE_CHECKING:
    from embedcache.data.audit import AuditReport

SPLITS = ("train", "valid", "test")
TEXT_COLUMNS = (
    "id",
    "image",
    "report",
    "report_id",
    "patient",
    "study",
    "split",
    "view",
    "sex",
    "site",
    "source",
)
_KNOWN_COLUMNS = (*TEXT_COLUMNS, "age", "acquired", "mask")
_PARQUET_KEY = b"embedcache"


@dataclass(frozen=True)
class About:
    """What a manifest knows of itself beside its rows; kept in its Parquet file.

    Args:
        label_sets: labels that make one task together, or whose classes have names.
        split_rule: `patient` (no patient on two sides), `exam` (the same of exams, as the patients are unknown),
            `paper` (the published rule, leaks and all), or blank.
        patients_from: the register that `patient` names people of, such as `nih`: patients of two datasets are the same
            people only if they come from one register.
        draws_on: a register whose people are among this dataset's, even where it does not say which.
        notes: what was found while the manifest was made: absent files, rows left out.
    """

    label_sets: tuple[LabelSet, ...] = ()
    split_rule: Literal["", "patient", "exam", "paper"] = ""
    patients_from: str = ""
    draws_on: str = ""
    notes: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> About:
        """From what `dataclasses.asdict` gave; what a newer version added is left aside."""
        return cls(
            tuple(map(LabelSet.from_json, said.get("label_sets", ()))),
            said.get("split_rule", ""),
            said.get("patients_from", ""),
            said.get("draws_on", ""),
            tuple(said.get("notes", ())),
        )


class Manifest:
    """A dataset's table: one row per image.

    Columns: `id` (unique str), `image` (path below `root`), `report` (text), `report_id` (equal for images that
    share a report; defaults to `id`), `patient`, `study`, `split` (`train`, `valid`, `test`, or several joined
    with `+`), `view`, `sex`, `age` (years), `site`, `source`, `acquired`, `mask` (see `embedcache.data.masks`),
    `fraction` (the least label fraction under which a training row is used), and labels `label.<name>` (0, 1, blank,
    or an integer class). Other columns are kept.

    Args:
        frame: the table; it is checked and copied.
        name: the dataset's name.
        root: the directory that `image` and `mask` are relative to.
        about: label sets, the rule of the splits, and other facts.

    Raises:
        ManifestError: a missing column, a duplicate or empty id, two texts under one `report_id`, an unknown
            split, a label that is no number.
    """

    def __init__(self, frame: pd.DataFrame, *, name: str, root: str | Path, about: About | None = None) -> None:
        self.name = name
        self.root = Path(root)
        self.about = about or About()
        self.frame = _checked(frame, name)
        absent = sorted({label for found in self.about.label_sets for label in found.labels} - set(self.labels))
        if absent:
            raise ManifestError(
                f"{name}: a label set names {', '.join(map(repr, absent))}, for which there is no column 'label.<name>'"
            )

    def __len__(self) -> int:
        return len(self.frame)

    def __repr__(self) -> str:
        return f"Manifest({self.name!r}, {len(self)} rows, labels {self.labels})"

    @classmethod
    def read(
        cls,
        path: str | Path,
        *,
        name: str | None = None,
        root: str | Path | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> Manifest:
        """Reads a Parquet or CSV manifest; nothing in it is guessed: blank means blank, ids are text.

        Args:
            name: the dataset's name; by default what the file says, else its stem.
            root: where images lie; by default what the file says, else its directory.
            columns: the file's column for each of the manifest's, where they differ.

        Raises:
            ManifestError: not there, not readable, or not a manifest.
        """
        path = Path(path)
        if not path.is_file():
            raise ManifestError(f"{path}: no manifest there; make one, or name another file")
        if path.suffix == ".parquet":
            frame, said = _read_parquet(path)
        elif path.name.endswith((".csv", ".csv.gz")):
            frame, said = read_csv(path), {}
        else:
            raise ManifestError(f"{path}: suffix {path.suffix!r}, expected .parquet or .csv")
        if columns:
            absent = sorted(set(columns.values()) - set(frame.columns))
            if absent:
                raise ManifestError(f"{path}: no column {', '.join(absent)}; it has {', '.join(frame.columns)}")
            taken = frame.assign(**{ours: frame[theirs] for ours, theirs in columns.items()})
            frame = taken.drop(columns=[c for c in set(columns.values()) - set(columns) if c not in _KNOWN_COLUMNS])
        base = path.parent / said["root"] if "root" in said else path.parent
        about = About.from_json(said.get("about", {}))
        return cls(frame, name=name or said.get("name", path.stem), root=root or base, about=about)

    def write(self, path: str | Path) -> None:
        """Writes Parquet, whole or not at all; the root is kept relative to the file.

        Raises:
            ManifestError: another suffix than `.parquet`.
            OutputError: it cannot be written there.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = Path(path)
        check_suffix(path)
        said = {
            "name": self.name,
            "root": os.path.relpath(self.root.resolve(), path.parent.resolve()),
            "task": self.tasks,
            "about": asdict(self.about),
        }
        table = pa.Table.from_pandas(self.frame, preserve_index=False)
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), _PARQUET_KEY: json.dumps(said)})
        write_whole(path, lambda temporary: pq.write_table(table, temporary))

    @property
    def labels(self) -> list[str]:
        """Names of the labels, without their prefix."""
        return [c.removeprefix(LABEL_PREFIX) for c in self.frame.columns if c.startswith(LABEL_PREFIX)]

    @property
    def label_sets(self) -> list[LabelSet]:
        """Labels by the task they make: the sets that were named, then each other label as a set of its own."""
        named = list(self.about.label_sets)
        in_sets = {label for found in named for label in found.labels}
        alone = [label for label in self.labels if label not in in_sets]
        return named + [
            LabelSet(label, "multi-class" if (self.label(label) > 1).any() else "binary", (label,)) for label in alone
        ]

    @property
    def tasks(self) -> dict[str, str]:
        """The kind of task of each label set: `binary`, `multi-label` or `multi-class`."""
        return {found.name: found.task for found in self.label_sets}

    def label(self, name: str) -> np.ndarray:
        """Values of one label, (n,) float64, NaN where blank.

        Raises:
            ManifestError: no such label; names those there are.
        """
        if name not in self.labels:
            raise ManifestError(f"{self.name}: no label {name!r}; it has {', '.join(self.labels) or 'none'}")
        return self.frame[LABEL_PREFIX + name].to_numpy(np.float64)

    def in_split(self, split: str) -> np.ndarray:
        """Which rows are in a split, (n,) bool; a row may be in several."""
        if split not in SPLITS:
            raise ManifestError(f"split {split!r}, expected one of {', '.join(SPLITS)}")
        values, codes = np.unique(self.frame["split"].to_numpy(object), return_inverse=True)
        return np.array([split in value.split("+") for value in values], bool)[codes]

    def with_frame(self, frame: pd.DataFrame, **about: Any) -> Manifest:
        """The manifest with another table; `about` changes its facts of that name."""
        return Manifest(frame, name=self.name, root=self.root, about=replace(self.about, **about))

    def in_fraction(self, fraction: float) -> np.ndarray:
        """Which rows the column `fraction` gives to a label fraction, (n,) bool.

        Raises:
            ManifestError: there is no such column, or it holds no such fraction.
        """
        smallest = pd.to_numeric(self.frame.get("fraction", pd.Series(dtype=float)), errors="coerce")
        if not (smallest == fraction).any() and not (fraction in FRACTIONS and (smallest <= fraction).any()):
            there = ", ".join(f"{value:g}" for value in sorted(smallest.dropna().unique())) or "none"
            raise ManifestError(
                f"{self.name}: no label fraction {fraction:g} in its column 'fraction', which has {there}"
            )
        return (smallest <= fraction).to_numpy()

    def groups(self) -> np.ndarray:
        """What intervals resample, (n,) object: each row's patient, else its study's, else its study, else its id."""
        return groups(self.frame)

    def reports(self) -> dict[str, str]:
        """The text of each distinct `report_id`, in order of first appearance."""
        first = self.frame.drop_duplicates("report_id")
        return dict(zip(first["report_id"], first["report"], strict=True))

    def path(self, relative: str) -> Path:
        """An input's file, which must lie inside `root`, symlinks resolved.

        Raises:
            InputError: blank, outside the root, or not there.
        """
        return path_below(self.root, relative)

    def audit(self, *, files: bool | Mapping[str, bytes] = True) -> AuditReport:
        """Counts what stands in several splits: images, patients, studies, equal reports, identical files.

        Args:
            files: whether to compare the image files (few are read to their end), or a digest for each id, as a store
                keeps them.
        """
        from embedcache.data.audit import audit

        return audit(self, files=files)


def groups(frame: pd.DataFrame) -> np.ndarray:
    """The patient of each row, else of another row of its study, else its study, else its id, (n,) object."""
    found = ("id:" + frame["id"]).to_numpy(object)
    patient = frame["patient"].to_numpy(object) if "patient" in frame else np.full(len(frame), "", object)
    if "study" in frame:
        study = frame["study"].to_numpy(object)
        found = np.where(study == "", found, "study:" + study)
        named = pd.Series(patient, study)[(patient != "") & (study != "")]
        lent = pd.Series(study).map(named[~named.index.duplicated()]).astype(object).fillna("").to_numpy(object)
        patient = np.where(patient == "", lent, patient)
    return np.where(patient == "", found, "patient:" + patient)


def path_below(root: Path, relative: str) -> Path:
    """A file that must lie inside `root`, symlinks resolved.

    Raises:
        InputError: blank, outside the root, or not there.
    """
    if not relative or "\0" in relative:
        raise InputError("no-path", "no path given" if not relative else "a path with a NUL character")
    root = root.resolve()
    try:
        path = (root / relative).resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:  # a symlink loop is a RuntimeError in Python 3.11
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise InputError("missing", f"no file at its path below the root ({reason})") from error
    if not path.is_relative_to(root):
        raise InputError("outside-root", "its path leads outside the manifest's root")
    return path


def check_suffix(path: Path) -> None:
    """Refuses to write a manifest under a name by which it could not be read.

    Raises:
        ManifestError: another suffix than `.parquet`.
    """
    if path.suffix != ".parquet":
        raise ManifestError(f"{path}: suffix {path.suffix!r}, expected .parquet; write {path.stem}.parquet")


def is_made_here(path: Path) -> bool:
    """Whether a table is a manifest that `Manifest.write` wrote."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return path.suffix == ".parquet" and _PARQUET_KEY in (pq.read_schema(path).metadata or {})
    except (pa.ArrowException, OSError):
        return False


def _read_parquet(path: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(f"{path}: not a readable Parquet file ({type(error).__name__}: {error})") from error
    said = (table.schema.metadata or {}).get(_PARQUET_KEY)
    return table.to_pandas(), json.loads(said) if said else {}


def _checked(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    frame = frame.copy().reset_index(drop=True)
    missing = [column for column in ("id", "image") if column not in frame]
    if missing:
        raise ManifestError(
            f"{name}: no column {', '.join(missing)}; it has {', '.join(map(str, frame.columns)) or 'none'}"
        )
    if "report_id" not in frame:
        frame["report_id"] = frame["id"]
    for column in TEXT_COLUMNS:
        given = frame[column] if column in frame else pd.Series("", frame.index, dtype=object)
        frame[column] = _as_text(given, name, column)
    frame["report_id"] = frame["report_id"].where(frame["report_id"] != "", frame["id"])
    _check_ids(frame["id"], name)
    _check_characters(frame["report_id"], name)
    _check_reports(frame, name)
    unknown = sorted({p for value in frame["split"].unique() for p in value.split("+")} - {*SPLITS, ""})
    if unknown:
        raise ManifestError(f"{name}: unknown split {', '.join(map(repr, unknown))}, expected {', '.join(SPLITS)}")
    for column in frame.columns:
        if str(column).startswith(LABEL_PREFIX):
            frame[column] = _as_label(frame[column], frame["id"], name)
    return frame


def _as_text(values: pd.Series, name: str, column: str) -> pd.Series:
    """Text as it stands, byte for byte; what is absent becomes blank, what is no text is refused."""
    blank = values.isna()
    wrong = ~blank & ~values.map(lambda v: isinstance(v, str)).astype(bool)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise ManifestError(
            f"{name}: row {row}, column {column}: {type(values[row]).__name__} {values[row]!r}, expected text; "
            f"convert the column with .astype(str) where that keeps every character"
        )
    return values.astype(object).where(~blank, "")


def _check_ids(ids: pd.Series, name: str) -> None:
    _check_characters(ids, name)
    twice = ids.duplicated(keep="first")
    if twice.any():
        second = int(np.flatnonzero(twice)[0])
        first = int(np.flatnonzero(ids == ids[second])[0])
        raise ManifestError(
            f"{name}: id {ids[second]!r} stands in rows {first} and {second} (counted from 0), and "
            f"{int(twice.sum())} row(s) in all repeat an id; every image needs an id of its own"
        )


def _check_characters(ids: pd.Series, name: str) -> None:
    unusable = unusable_ids(ids)
    if unusable:
        row, fault = unusable[0]
        raise ManifestError(f"{name}: row {row}: the {ids.name} {fault}; {len(unusable)} row(s) in all have such ids")


def _check_reports(frame: pd.DataFrame, name: str) -> None:
    texts = frame.groupby("report_id", sort=False)["report"].nunique()
    several = texts.index[texts > 1]
    if len(several):
        raise ManifestError(
            f"{name}: report_id {some_ids(several)}: more than one text under one report_id; "
            "give each text a report_id of its own"
        )


def _as_label(values: pd.Series, ids: pd.Series, name: str) -> pd.Series:
    blank = values.isna() | (values.astype(str).str.strip() == "")
    numbers = pd.to_numeric(values.where(~blank), errors="coerce")
    wrong = ~blank & (numbers.isna() | (numbers % 1 != 0) | (numbers < 0))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise ManifestError(
            f"{name}: {values.name} of id {ids[row]!r} is {values[row]!r}, expected 0, 1, an integer class or blank"
        )
    return numbers.astype(np.float64)
