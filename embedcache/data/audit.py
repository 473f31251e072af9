"""What stands on both sides of a split: patients, reports, files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from embedcache.data.manifest import SPLITS, Manifest
from embedcache.errors import InputError
from embedcache.fingerprint import digest_file


@dataclass(frozen=True)
class AuditReport:
    """Counts over a manifest's splits.

    Args:
        n_rows: rows of each split.
        patients_known: whether every row names its patient.
        shared_patients: patients in more than one split.
        shared_reports: distinct report texts in more than one split; short readings repeat by nature.
        shared_files: contents of image files in more than one split; -1 where files were not read.
    """

    n_rows: dict[str, int]
    patients_known: bool
    shared_patients: int
    shared_reports: int
    shared_files: int

    @property
    def leaks(self) -> bool:
        """Whether a patient or a file stands in two splits."""
        return self.shared_patients > 0 or self.shared_files > 0

    def __str__(self) -> str:
        rows = ", ".join(f"{split} {n}" for split, n in self.n_rows.items())
        patients = f"{self.shared_patients} patients" if self.patients_known else "patients unknown"
        files = "files not read" if self.shared_files < 0 else f"{self.shared_files} identical files"
        return f"{rows}; in more than one split: {patients}, {self.shared_reports} report texts, {files}"


def audit(manifest: Manifest, *, files: bool | Mapping[str, bytes]) -> AuditReport:
    """Counts what stands in more than one split; see `Manifest.audit`."""
    frame = manifest.frame
    splits = [frozenset(value.split("+")) - {""} for value in frame["split"]]

    def shared(keys: Iterable[str | bytes | None]) -> int:
        where: dict[str | bytes, set[str]] = defaultdict(set)
        for key, of_row in zip(keys, splits, strict=True):
            if key:
                where[key] |= of_row
        return sum(len(found) > 1 for found in where.values())

    digests: Iterable[str | bytes | None] | None = None
    if isinstance(files, Mapping):
        digests = map(files.get, frame["id"])
    elif files:
        digests = map(_digest_of(manifest), frame["image"])
    return AuditReport(
        n_rows={split: int(manifest.in_split(split).sum()) for split in SPLITS},
        patients_known=bool((frame["patient"] != "").all()),
        shared_patients=shared(frame["patient"]),
        shared_reports=shared(" ".join(report.split()) for report in frame["report"]),
        shared_files=shared(digests) if digests is not None else -1,
    )


def _digest_of(manifest: Manifest) -> Callable[[str], str | None]:
    def digest(image: str) -> str | None:
        try:
            path = manifest.path(image)
            return digest_file(path) if path.is_file() else None
        except (InputError, OSError):
            return None

    return digest
