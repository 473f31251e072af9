"""Open-i, the chest radiographs and reports of Indiana University: as NLM publishes them, or as Kaggle does.

A report's text is its sections under their headings, one a line, so that `embedcache.data.sections` finds them again.
The collection names no patients. Its paper (Demner-Fushman et al., JAMIA 2016) counts 3,996 reports and 3,996 patients,
so each report is taken for a patient of its own.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd

from embedcache.data.datasets.layout import Asked, Draft, Layout
from embedcache.data.datasets.places import Images, any_file, one_file
from embedcache.data.labels import LabelSet
from embedcache.data.sections import findings_and_impression
from embedcache.data.tables import as_text, grouped_rows, read_csv, take
from embedcache.errors import ManifestError

_SECTIONS = ("comparison", "indication", "findings", "impression")
_NOT_CODED = ("", "No Indexing")
_FOLDERS = ("ecgen-radiology", "NLMCXR_reports/ecgen-radiology")
_ARCHIVE = "NLMCXR_reports.tgz"
_KAGGLES = ".dcm.png"  # how its images' names end
_SPREADSHEET = "#NAME?"  # what Kaggle's table has for texts such as '+PPD'


def _read(root: Path, asked: Asked) -> Draft:
    index = Images(root)
    notes = ["no patients are named; the collection's paper counts as many as reports, so each report counts as one"]
    table, place = any_file(root, "indiana_reports.csv"), _place_of_xml(root)
    if table is not None and (place is None or any(path.endswith(_KAGGLES) for path in index.paths)):
        reports, images = _kaggle(root, table)
        expected = "images/images_normalized/{}"
    else:
        reports, images = _nlm(place or root / _FOLDERS[0])
        expected = "NLMCXR_png/{}"
    alone = ~reports["study"].isin(images["study"])
    if alone.any():
        notes.append(f"{int(alone.sum()):,} of {len(reports):,} reports have no image and were left out")
    frame = images.merge(_settled(reports, notes), on="study", how="left")
    unread = frame["report"].isna()
    if unread.any():
        notes.append(f"{int(unread.sum()):,} images have no report, such as {frame['id'][unread].iloc[0]}")
        frame[["report", "mesh"]] = frame[["report", "mesh"]].fillna("")
    frame["report_id"] = frame["study"]
    frame["patient"] = frame["study"].str.removeprefix("CXR")
    frame["image"] = index.locate(frame["id"], expected=expected, notes=notes)
    return Draft(
        frame,
        label_sets=(LabelSet("normal", "binary", ("normal",)),),
        patients_from="open-i",
        notes=notes,
        images=index,
    )


def _settled(reports: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Study, text, codes and label of each report."""
    parts = {name: reports[name].replace(_SPREADSHEET, "").str.split().str.join(" ") for name in _SECTIONS}
    text = pd.Series("", reports.index, dtype=object)
    for name, part in parts.items():
        text = text + (f"{name.upper()}: " + part + "\n").where(part != "", "")
    text = text.str.removesuffix("\n")
    bare = (parts["findings"] == "") & (parts["impression"] == "")
    misread = text[bare].map(lambda report: any(findings_and_impression(report))).astype(bool)
    text[misread.index[misread]] = ""
    if bare.any():
        notes.append(f"{int(bare.sum()):,} of {len(reports):,} reports have neither findings nor an impression")
    if misread.any():
        notes.append(f"{int(misread.sum()):,} of these are left blank, as what they hold would be taken for findings")
    mesh = reports["mesh"].str.strip().str.replace(r"\s*;\s*", ";", regex=True)
    coded = mesh.where(~mesh.isin(_NOT_CODED))
    return pd.DataFrame(
        {
            "study": reports["study"],
            "report": text.astype(object),
            "mesh": mesh,
            "label.normal": (coded == "normal").astype("float64").where(coded.notna()),
        }
    )


def _kaggle(root: Path, path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    said = {"study": "uid", "mesh": "MeSH", **{name: name for name in _SECTIONS}}
    reports = grouped_rows(take(read_csv(path), path, said), path, same=["mesh", *_SECTIONS], key="study")
    path = one_file(root, "indiana_projections.csv")
    images = take(read_csv(path), path, {"id": "filename", "study": "uid", "view": "projection"})
    return reports, images


def _place_of_xml(root: Path) -> Path | None:
    """The folder of NLM's reports, else the archive of it."""
    return next((root / name for name in _FOLDERS if (root / name).is_dir()), any_file(root, _ARCHIVE))


def _nlm(place: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Reports and images of NLM's XML files, in the order of their numbers."""
    files = _archived(place) if place.is_file() else ((path, path.read_bytes()) for path in place.glob("*.xml"))
    read = sorted((_report(path, data) for path, data in files), key=lambda one: (len(one["study"]), one["study"]))
    if not read:
        raise ManifestError(f"{place}: no XML file in it; unpack {_ARCHIVE} again")
    columns = ["study", "mesh", *_SECTIONS]
    reports = grouped_rows(pd.DataFrame(read), place, same=[*columns[1:]], key="study")[columns]
    images = [(f"{name}.png", one["study"], "") for one in read for name in one["images"]]
    return reports, pd.DataFrame(images, columns=["id", "study", "view"], dtype=object)


def _archived(path: Path) -> Iterator[tuple[Path, bytes]]:
    """Names and bytes of an archive's XML files; nothing is unpacked."""
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.name.endswith(".xml") else None
                if file is not None:
                    yield path / member.name, file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ManifestError(f"{path}: cut short or damaged ({error}); download it again") from error


def _report(path: Path, data: bytes) -> Mapping[str, Any]:
    """One report: its number, codes, sections and the names of its images.

    Raises:
        ManifestError: not such a file, or it declares a document type, which can make a parser read without end.
    """
    text = as_text(data, path)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ManifestError(f"{path}: declares a document type or entities, which no file of NLM's does; replace it")
    try:
        tree = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ManifestError(f"{path}: not readable as XML ({error}); download it again") from error
    study = tree.find("uId")
    if study is None or not study.get("id"):
        raise ManifestError(f"{path}: no <uId id=...>; expected a report of NLM's collection")
    said = {part.get("Label", "").lower(): _text(part) for part in tree.iter("AbstractText")}
    return {
        "study": study.get("id"),
        "mesh": ";".join(filter(None, map(_text, tree.iterfind(".//MeSH/major")))),
        "images": _names(tree.iter("parentImage")),
        **{name: said.get(name, "") for name in _SECTIONS},
    }


def _text(element: ElementTree.Element) -> str:
    return "".join(element.itertext()).strip()


def _names(images: Iterable[ElementTree.Element]) -> list[str]:
    return [name for name in (image.get("id") for image in images) if name]


LAYOUT = Layout(
    name="open-i",
    title="the Indiana University chest radiographs of Open-i",
    tree="""\
ROOT/                                         as NLM publishes it
  ecgen-radiology/1.xml                       reports; or NLMCXR_reports.tgz, as it is
  NLMCXR_png/CXR1_1_IM-0001-3001.png          images (any folder below ROOT)
ROOT/                                         or as Kaggle does
  indiana_reports.csv                         uid, MeSH, ..., indication, comparison, findings, impression
  indiana_projections.csv                     uid, filename, projection
  images/images_normalized/1_IM-0001-4001.dcm.png
""",
    marks=("indiana_reports.csv", *_FOLDERS, _ARCHIVE),
    read=_read,
    folders=("images", "images_normalized", "NLMCXR_png", "ecgen-radiology"),
)
