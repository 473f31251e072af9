"""MIMIC-CXR: radiographs as JPEG (MIMIC-CXR-JPG) and the free-text reports of MIMIC-CXR."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from embedcache.data.datasets.layout import UNCERTAIN, Asked, Draft, Layout, Option
from embedcache.data.datasets.places import Images, any_file, one_file
from embedcache.data.files import in_threads, present
from embedcache.data.labels import CHEXPERT_LABELS, LABEL_PREFIX, LabelSet, resolve_uncertain
from embedcache.data.reports import caption
from embedcache.data.sections import findings_and_impression
from embedcache.data.tables import Names, as_text, grouped_rows, numbers, read_csv, read_text, take
from embedcache.errors import DatasetError, ManifestError

_LABELLERS = ("chexpert", "negbio")
_SPLITS = {"train": "train", "validate": "valid", "test": "test"}
_SPELT: dict[str, Names] = {"Lung Opacity": ("Lung Opacity", "Airspace Opacity")}  # as 2.1.0's test set calls it
_LOOKED_AT = 500  # rows by which it is told how the images were unpacked


def _read(root: Path, asked: Asked) -> Draft:
    path = one_file(root, "mimic-cxr-2.*-metadata.csv")
    rows = take(
        read_csv(path),
        path,
        {"id": "dicom_id", "patient": "subject_id", "study": "study_id", "view": "ViewPosition"},
        optional={"date": "StudyDate", "time": "StudyTime"},
    )
    notes: list[str] = []
    rows = rows.drop_duplicates().merge(_split(root), on="id", how="left", validate="many_to_one")
    unplaced = rows["official"].isna()
    if unplaced.any():
        notes.append(f"{int(unplaced.sum()):,} images are in no split of the official list and were left out")
        rows = rows[~unplaced]
    rows = rows.reset_index(drop=True)
    rows["acquired"] = _moments(rows.pop("date"), rows.pop("time"))
    study = "p" + rows["patient"].str.slice(0, 2) + "/p" + rows["patient"] + "/s" + rows["study"]
    rows["image"] = _images(root, study, rows["id"], notes)
    rows, sets = _labelled(root, rows, asked, notes)
    rows["study"] = "s" + rows["study"]
    rows["report_id"] = rows["study"]
    rows["report"] = _reports(root, study, asked.options.get("reports"), notes)
    official = rows.pop("official")
    draft = Draft(rows, label_sets=sets, official=official, patients_from="mimic-cxr", notes=notes)
    if asked.split == "paper":
        _publish(draft)
    return draft


def _split(root: Path) -> pd.DataFrame:
    path = one_file(root, "mimic-cxr-2.*-split.csv")
    rows = take(read_csv(path), path, {"id": "dicom_id", "official": "split"})
    unknown = sorted(set(rows["official"]) - set(_SPLITS))
    if unknown:
        raise ManifestError(f"{path}: split {', '.join(map(repr, unknown))}, expected one of {', '.join(_SPLITS)}")
    rows = grouped_rows(rows, path, same=["official"])
    return rows.assign(official=rows["official"].map(_SPLITS))


def _moments(dates: pd.Series, times: pd.Series) -> pd.Series:
    """ISO 8601 from `21800506` and `213014.531`; the dates are shifted into the future, patient by patient."""
    day = dates.str.slice(0, 4) + "-" + dates.str.slice(4, 6) + "-" + dates.str.slice(6, 8)
    clock = times.str.partition(".")[0].str.zfill(6)
    moment = day + "T" + clock.str.slice(0, 2) + ":" + clock.str.slice(2, 4) + ":" + clock.str.slice(4, 6)
    return moment.where(dates.str.len() == 8, "")


def _images(root: Path, study: pd.Series, ids: pd.Series, notes: list[str]) -> pd.Series:
    """Paths as the images were unpacked: as published, without `files/`, or all in one folder."""
    nested = [prefix + study + "/" + ids + ".jpg" for prefix in ("files/", "")]
    sample = slice(None, None, max(len(ids) // _LOOKED_AT, 1))
    for paths in nested:
        if present(root, paths[sample].tolist())[0].any():
            return paths
    return Images(root).locate(ids, suffixes=(".jpg",), expected=nested[0], notes=notes)


def _labelled(
    root: Path, rows: pd.DataFrame, asked: Asked, notes: list[str]
) -> tuple[pd.DataFrame, tuple[LabelSet, ...]]:
    labeller = asked.options.get("labels") or _LABELLERS[0]
    path = any_file(root, f"mimic-cxr-2.*-{labeller}.csv")
    if path is None:
        if asked.split == "paper" or asked.options.get("labels"):
            raise DatasetError(f"{root}: no mimic-cxr-2.0.0-{labeller}.csv in it; download it into this folder")
        return rows, ()
    labels = _labels(path, asked.uncertain)
    if asked.options.get("radiologists"):
        read = _labels(one_file(root, "mimic-cxr-2.1.*-test-set-labeled.csv"), asked.uncertain)
        of_test = set(rows["study"][rows["official"] == "test"])
        labels = pd.concat([labels[~labels["study"].isin(of_test)], read[read["study"].isin(of_test)]])
        unread = len(of_test - set(read["study"]))
        if unread:
            notes.append(f"{unread:,} test studies were not labelled by radiologists, and their labels are blank")
    rows = rows.merge(labels, on="study", how="left", validate="many_to_one")
    return rows, (LabelSet("chexpert", "multi-label", CHEXPERT_LABELS),)


def _labels(path: Path, policy: str) -> pd.DataFrame:
    """Labels of each study, a row for each."""
    names: dict[str, Names] = {name: _SPELT.get(name, name) for name in CHEXPERT_LABELS}
    said = take(read_csv(path), path, {"study": "study_id", **names})
    values = pd.DataFrame({LABEL_PREFIX + name: numbers(said[name], path) for name in CHEXPERT_LABELS})
    said = grouped_rows(values.assign(study=said["study"]), path, same=list(values), key="study")
    return pd.DataFrame({"study": said["study"], **resolve_uncertain(said, CHEXPERT_LABELS, policy)})


def _reports(root: Path, study: pd.Series, given: Path | None, notes: list[str]) -> pd.Series:
    """The report of each row's study, one text for all its images; blank where there is none."""
    studies = study.drop_duplicates().tolist()
    place = _place_of_reports(root, given, studies)
    if place is None:
        notes.append("no reports were found: name the folder or zip file of MIMIC-CXR's reports with --reports")
        return pd.Series("", study.index, dtype=object)
    texts = _from_zip(place, studies) if place.is_file() else _from_folder(place, studies)
    absent = [name for name, text in zip(studies, texts, strict=True) if text is None]
    if absent:
        notes.append(f"{len(absent):,} of {len(studies):,} studies have no report, such as {absent[0]}")
    by_study = dict(zip(studies, (text or "" for text in texts), strict=True))
    return study.map(by_study).astype(object)


def _place_of_reports(root: Path, given: Path | None, studies: Sequence[str]) -> Path | None:
    """The folder below which `p10/p10000032/s50414267.txt` and so on lie, or the zip file; by some hundred studies."""
    sample = studies[:: max(len(studies) // _LOOKED_AT, 1)]

    def holds(folder: Path) -> bool:
        return any(present(folder, [f"{study}.txt" for study in sample])[0])

    if given is not None:
        if given.is_file():
            return given
        folders = [given, given / "files", given / "mimic-cxr-reports" / "files"]
        found = next(filter(holds, folders), None)
        if found is None:
            raise DatasetError(
                f"{given}: no zip file, nor a folder with files/{sample[0]}.txt; name MIMIC-CXR's reports"
            )
        return found
    around = [
        place / name for place in (root, root.parent) for name in ("mimic-cxr-reports/files", "mimic-cxr-reports")
    ]
    zips = [folder / "mimic-cxr-reports.zip" for folder in (root, root.parent)]
    found = next(filter(holds, [root / "files", *around, root]), None)
    return found or next((path for path in zips if path.is_file()), None)


def _from_folder(place: Path, studies: Sequence[str]) -> list[str | None]:
    def text(study: str) -> str | None:
        path = place / f"{study}.txt"
        return read_text(path) if path.exists() else None

    return in_threads(text, studies)


def _from_zip(path: Path, studies: Sequence[str]) -> list[str | None]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = {
                name.removeprefix("mimic-cxr-reports/").removeprefix("files/"): name for name in archive.namelist()
            }
            found = [names.get(f"{study}.txt") for study in studies]
            return [as_text(archive.read(name), path / name) if name else None for name in found]
    except (zipfile.BadZipFile, OSError, EOFError, zlib.error) as error:
        raise ManifestError(f"{path}: not a readable zip file of reports ({error}); download it again") from error


def _publish(draft: Draft) -> None:
    """The published pre-training rows: frontal images whose report gives a caption; test counts as valid.

    Of the published code's sections 54 studies with a form of their own are absent, whose list is not at hand.
    """
    frame = draft.frame
    frontal = frame["view"].isin(["PA", "AP"]).to_numpy()
    distinct = frame["report"][frontal].drop_duplicates()
    kept = dict(zip(distinct, map(_has_caption, distinct), strict=True))
    used = frontal & frame["report"].map(kept).fillna(False).to_numpy(bool)
    if not used.any():
        raise DatasetError(
            "mimic-cxr: no frontal image has a report of three words, of which the published split consists; name "
            "MIMIC-CXR's reports with --reports"
        )
    draft.notes.append(
        f"{int((frontal & ~used).sum()):,} frontal images have no report of three words and were left out"
    )
    draft.aside = frame["image"][~used].tolist()
    draft.split = np.where(np.asarray(draft.official, object) == "train", "train", "valid").astype(object)[used]
    draft.frame, draft.official = frame[used].reset_index(drop=True), None


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
  mimic-cxr-2.1.0-test-set-labeled.csv  optional: radiologists' labels of test studies, with --radiologists
  files/p10/p10000032/s50414267/<dicom_id>.jpg
  files/p10/p10000032/s50414267.txt     reports: here, in mimic-cxr-reports/files/ in or beside ROOT,
                                        in mimic-cxr-reports.zip, or where --reports says
""",
    marks=("mimic-cxr-2.*-metadata.csv",),
    read=_read,
    folders=("files", "p1[0-9]"),
    published=True,
    options=(
        Option("reports", "MIMIC-CXR's reports: a folder or mimic-cxr-reports.zip.", "path"),
        Option("labels", "Whose labels; by default chexpert.", choices=_LABELLERS),
        UNCERTAIN,
        Option("radiologists", "On the test split, radiologists' labels: those of 2.1.0's test set.", "flag"),
    ),
)
