"""MIMIC-CXR: radiographs as JPEG (MIMIC-CXR-JPG) and the free-text reports of MIMIC-CXR."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from embedcache.data.datasets.layout import Asked, Draft, Layout, Option, any_file, image_index, one_file
from embedcache.data.files import in_threads, present
from embedcache.data.labels import CHEXPERT_LABELS, LABEL_PREFIX, LabelSet, resolve_uncertain
from embedcache.data.reports import caption
from embedcache.data.sections import findings_and_impression
from embedcache.data.splits import published_fractions
from embedcache.data.tables import numbers, read_csv, take
from embedcache.errors import DatasetError, ManifestError

_LABELLERS = ("chexpert", "negbio")
_SPLITS = {"train": "train", "validate": "valid", "test": "test"}
_LOOKED_AT = 500  # rows by which it is told how the images were unpacked


def _read(root: Path, asked: Asked) -> Draft:
    path = one_file(root, "mimic-cxr-2.*-metadata.csv", "*/mimic-cxr-2.*-metadata.csv")
    rows = take(
        read_csv(path),
        path,
        {"id": "dicom_id", "patient": "subject_id", "study": "study_id", "view": "ViewPosition"},
        optional={"date": "StudyDate", "time": "StudyTime"},
    )
    notes: list[str] = []
    rows = rows.merge(_split(root), on="id", how="left")
    unplaced = rows["official"].isna()
    if unplaced.any():
        notes.append(f"{int(unplaced.sum()):,} images are in no split of the official list and were left out")
        rows = rows[~unplaced]
    if asked.split == "paper":
        rows = rows[rows["view"].isin(["PA", "AP"])]
    rows = rows.reset_index(drop=True)
    rows["acquired"] = _moments(rows.pop("date"), rows.pop("time"))
    study = "p" + rows["patient"].str.slice(0, 2) + "/p" + rows["patient"] + "/s" + rows["study"]
    rows["image"] = _images(root, study, rows["id"])
    rows, sets = _labelled(root, rows, asked)
    rows["study"] = "s" + rows["study"]
    rows["report_id"] = rows["study"]
    rows["report"] = _reports(root, study, asked.options.get("reports"), notes)
    official = rows.pop("official")
    draft = Draft(rows, label_sets=sets, official=official, patients_from="mimic-cxr", notes=notes)
    if asked.split == "paper":
        _publish(draft)
    return draft


def _split(root: Path) -> pd.DataFrame:
    path = one_file(root, "mimic-cxr-2.*-split.csv", "*/mimic-cxr-2.*-split.csv")
    rows = take(read_csv(path), path, {"id": "dicom_id", "official": "split"})
    unknown = sorted(set(rows["official"]) - set(_SPLITS))
    if unknown:
        raise ManifestError(f"{path}: split {', '.join(map(repr, unknown))}, expected one of {', '.join(_SPLITS)}")
    return rows.assign(official=rows["official"].map(_SPLITS)).drop_duplicates()


def _moments(dates: pd.Series, times: pd.Series) -> pd.Series:
    """ISO 8601 from `21800506` and `213014.531`; the dates are shifted into the future, patient by patient."""
    day = dates.str.slice(0, 4) + "-" + dates.str.slice(4, 6) + "-" + dates.str.slice(6, 8)
    clock = times.str.partition(".")[0].str.zfill(6)
    moment = day + "T" + clock.str.slice(0, 2) + ":" + clock.str.slice(2, 4) + ":" + clock.str.slice(4, 6)
    return moment.where(dates.str.len() == 8, "")


def _images(root: Path, study: pd.Series, ids: pd.Series) -> pd.Series:
    """Paths as the images were unpacked: as published, without `files/`, or all in one folder."""
    nested = [prefix + study + "/" + ids + ".jpg" for prefix in ("files/", "")]
    sample = slice(None, None, max(len(ids) // _LOOKED_AT, 1))
    for paths in nested:
        if present(root, paths[sample].tolist())[0].any():
            return paths
    index = image_index(root)
    found = (ids + ".jpg").map(index)
    return found.where(found.notna(), nested[0])


def _labelled(root: Path, rows: pd.DataFrame, asked: Asked) -> tuple[pd.DataFrame, tuple[LabelSet, ...]]:
    labeller = asked.options.get("labels") or _LABELLERS[0]
    path = any_file(root, f"mimic-cxr-2.*-{labeller}.csv", f"*/mimic-cxr-2.*-{labeller}.csv")
    if path is None:
        if asked.split == "paper":
            raise DatasetError(f"{root}: no mimic-cxr-2.0.0-{labeller}.csv in it; download it into this folder")
        return rows, ()
    table = read_csv(path)
    said = take(table, path, {"study": "study_id", **{name: name for name in CHEXPERT_LABELS}})
    policy = asked.options.get("uncertain") or ("paper" if asked.split == "paper" else "ignore")
    values = pd.DataFrame({LABEL_PREFIX + name: numbers(said[name], path) for name in CHEXPERT_LABELS})
    labels = pd.DataFrame({"study": said["study"], **resolve_uncertain(values, CHEXPERT_LABELS, policy)})
    rows = rows.merge(labels.drop_duplicates("study"), on="study", how="left")
    return rows, (LabelSet("chexpert", "multi-label", CHEXPERT_LABELS),)


def _reports(root: Path, study: pd.Series, given: Path | None, notes: list[str]) -> pd.Series:
    """The report of each row's study, one text for all its images; blank where there is none."""
    studies = study.drop_duplicates()
    place = _place_of_reports(root, given, studies.iloc[0]) if len(studies) else None
    if place is None:
        notes.append("no reports were found: name the folder or zip file of MIMIC-CXR's reports with --reports")
        return pd.Series("", study.index, dtype=object)
    texts = _from_zip(place, studies.tolist()) if place.is_file() else _from_folder(place, studies.tolist())
    absent = sum(text is None for text in texts)
    if absent:
        notes.append(
            f"{absent:,} of {len(studies):,} studies have no report, such as {studies.iloc[texts.index(None)]}"
        )
    by_study = dict(zip(studies, (text or "" for text in texts), strict=True))
    return study.map(by_study).astype(object)


def _place_of_reports(root: Path, given: Path | None, study: str) -> Path | None:
    """The folder that `p10/...` lies in, or the zip file."""
    if given is not None:
        inner = [given, given / "files", given / "mimic-cxr-reports" / "files"]
        found = next((folder for folder in inner if (folder / study[:3]).is_dir()), None)
        if found is None and not zipfile.is_zipfile(given):
            raise DatasetError(
                f"{given}: neither a zip file nor a folder with files/{study}.txt; name MIMIC-CXR's reports"
            )
        return found or given
    around = [root, root / "mimic-cxr-reports", root.parent / "mimic-cxr-reports"]
    zips = [folder / "mimic-cxr-reports.zip" for folder in (root, root.parent)]
    for folder in [*(place / "files" for place in around), *around[1:], root]:
        patient = folder / study.rpartition("/")[0]
        if patient.is_dir() and any(patient.glob("*.txt")):
            return folder
    return next((path for path in zips if path.is_file()), None)


def _from_folder(place: Path, studies: Sequence[str]) -> list[str | None]:
    def text(study: str) -> str | None:
        path = place / f"{study}.txt"
        try:
            return path.read_bytes().decode("utf-8")
        except FileNotFoundError:
            return None
        except UnicodeDecodeError as error:
            raise ManifestError(f"{path}: not UTF-8 at byte {error.start}; download it again") from None

    return in_threads(text, studies)


def _from_zip(path: Path, studies: Sequence[str]) -> list[str | None]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = {
                name.removeprefix("mimic-cxr-reports/").removeprefix("files/"): name for name in archive.namelist()
            }
            found = (names.get(f"{study}.txt") for study in studies)
            return [archive.read(name).decode("utf-8") if name else None for name in found]
    except (zipfile.BadZipFile, UnicodeDecodeError, OSError) as error:
        raise ManifestError(f"{path}: not a readable zip file of reports ({error}); download it again") from error


def _publish(draft: Draft) -> None:
    """The published pre-training rows: frontal images whose report gives a caption; test counts as valid."""
    frame = draft.frame.reset_index(drop=True)
    distinct = frame["report"].drop_duplicates()
    kept = dict(zip(distinct, map(_has_caption, distinct), strict=True))
    used = frame["report"].map(kept).to_numpy(bool)
    draft.notes.append(f"{int((~used).sum()):,} frontal images have no report of three words and were left out")
    split = np.where(np.asarray(draft.official, object) == "train", "train", "valid").astype(object)[used]
    frame = frame[used].reset_index(drop=True)
    train = np.flatnonzero(split == "train")
    fraction = np.full(len(frame), np.nan)
    fraction[train] = published_fractions(train)
    draft.frame, draft.split, draft.fraction, draft.official = frame, split, fraction, None


def _has_caption(report: str) -> bool:
    if not report:
        return False
    findings, impression = findings_and_impression(report)
    return caption(impression, findings, rule="paper") is not None


LAYOUT = Layout(
    name="mimic-cxr",
    title="MIMIC-CXR-JPG 2.0.0 or 2.1.0",
    tree="""\
ROOT/
  mimic-cxr-2.0.0-metadata.csv.gz       all tables as .csv or .csv.gz
  mimic-cxr-2.0.0-split.csv.gz
  mimic-cxr-2.0.0-chexpert.csv.gz       optional, as is mimic-cxr-2.0.0-negbio.csv.gz: labels
  files/p10/p10000032/s50414267/<dicom_id>.jpg
  files/p10/p10000032/s50414267.txt     reports: here, in mimic-cxr-reports/files/ in or beside ROOT,
                                        in mimic-cxr-reports.zip, or where --reports says
""",
    marks=("mimic-cxr-2.*-metadata.csv",),
    read=_read,
    published=True,
    options=(
        Option("reports", "MIMIC-CXR's reports: a folder or mimic-cxr-reports.zip.", "path"),
        Option("labels", "Whose labels.", choices=_LABELLERS),
        Option("uncertain", "What uncertain labels count as.", choices=("ignore", "zeros", "ones", "paper")),
    ),
)
