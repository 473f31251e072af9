"""Open-i as NLM and as Kaggle publish it: reports in XML, in an archive, in tables; the real ones where there."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from embedcache.data.datasets.layout import Asked, Built, build
from embedcache.data.datasets.open_i import LAYOUT
from embedcache.data.sections import findings_and_impression
from embedcache.errors import DatasetError, ManifestError

SHARED = Path(__file__).parents[4] / "shared" / "data"
ASKED = Asked("patient", "", 0, 0.1, 0.2, {})
N = 30
SECTIONS = ("comparison", "indication", "findings", "impression")


def sections(k: int) -> dict[str, str]:
    """Report 4 has no findings, 5 no impression, 6 neither, 7 an indication alone."""
    said = {
        "comparison": "None.",
        "indication": f"Chest pain, case {k}.",
        "findings": f"Heart size is normal. LUNGS: clear, in case {k}; nothing  else.",
        "impression": f"1. No acute disease. 2. Case {k}.",
    }
    gone = {4: ["findings"], 5: ["impression"], 6: ["findings", "impression"], 7: [*SECTIONS[2:], "comparison"]}
    return {name: "" if name in gone.get(k, []) else text for name, text in said.items()}


def codes(k: int) -> list[str]:
    return {0: ["normal"], 1: ["Lung/hypoinflation", "Opacity/lung/base"], 2: ["No Indexing"]}[k % 3]


def images_of(k: int) -> list[str]:
    """Names without what comes before and behind them; report 8 has none, report 1 its number twice, as published."""
    return [] if k == 8 else [f"{k}_IM-{k:04d}-{view}001" for view in (3, 4)]


def xml(k: int) -> bytes:
    texts = "".join(f'<AbstractText Label="{n.upper()}">{t}</AbstractText>' for n, t in sections(k).items())
    majors = "".join(f"<major>{code}</major>" for code in codes(k))
    parents = "".join(f'<parentImage id="CXR{name}"><caption>x</caption></parentImage>' for name in images_of(k))
    return (
        f'<?xml version="1.0" encoding="utf-8"?>\n<eCitation>\n  <uId id="CXR{k}"/>\n  <MedlineCitation><Article>'
        f"<Abstract>{texts}</Abstract></Article></MedlineCitation>\n  <MeSH>{majors}<automatic>lung</automatic></MeSH>"
        f"{parents}</eCitation>"
    ).encode()


def nlm(root: Path, *, archive: bool = False, folder: str = "NLMCXR_png") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    if archive:
        with tarfile.open(root / "NLMCXR_reports.tgz", "w:gz") as file:
            for k in range(1, N + 1):
                entry = tarfile.TarInfo(f"ecgen-radiology/{k}.xml")
                entry.size = len(xml(k))
                file.addfile(entry, io.BytesIO(xml(k)))
    else:
        (root / "ecgen-radiology").mkdir()
        for k in range(1, N + 1):
            (root / f"ecgen-radiology/{k}.xml").write_bytes(xml(k))
    (root / folder).mkdir(exist_ok=True)
    for k in range(1, N + 1):
        for name in images_of(k):
            (root / folder / f"CXR{name}.png").touch()
    return root


def kaggle(root: Path) -> Path:
    (root / "images/images_normalized").mkdir(parents=True)
    reports, projections = (
        ["uid,MeSH,Problems,image,indication,comparison,findings,impression"],
        ["uid,filename,projection"],
    )
    for k in range(1, N + 1):
        said = sections(k)
        texts = ",".join(f'"{said[name]}"' for name in ("indication", "comparison", "findings", "impression"))
        reports.append(f"{k},{';'.join(codes(k))},x,Xray Chest PA and Lateral,{texts}")
        for name, view in zip(images_of(k), ("Frontal", "Lateral"), strict=False):
            projections.append(f"{k},{name}.dcm.png,{view}")
            (root / f"images/images_normalized/{name}.dcm.png").touch()
    (root / "indiana_reports.csv").write_text("\n".join(reports) + "\n")
    (root / "indiana_projections.csv").write_text("\n".join(projections) + "\n")
    return root


def built(root: Path) -> Built:
    return build(LAYOUT, root, ASKED)


def test_nlms_files(tmp_path: Path) -> None:
    made = built(nlm(tmp_path))
    manifest, frame = made.manifest, made.manifest.frame.set_index("id")
    assert (len(manifest), made.absent, made.extra) == (2 * (N - 1), (), ())
    row = frame.loc["CXR3_IM-0003-3001.png"]
    assert row["image"] == "NLMCXR_png/CXR3_IM-0003-3001.png"
    assert row[["study", "report_id", "patient", "view", "mesh"]].tolist() == ["CXR3", "CXR3", "3", "", "normal"]
    assert row["report"] == (
        "COMPARISON: None.\nINDICATION: Chest pain, case 3.\n"
        "FINDINGS: Heart size is normal. LUNGS: clear, in case 3; nothing else.\n"
        "IMPRESSION: 1. No acute disease. 2. Case 3."
    )
    assert list(dict.fromkeys(manifest.frame["study"])) == [f"CXR{k}" for k in range(1, N + 1) if k != 8]
    assert manifest.about.patients_from == "open-i"
    assert manifest.about.split_rule == "patient"
    assert (manifest.frame.groupby("study")["split"].nunique() == 1).all()
    assert any("paper counts as many as reports" in note for note in manifest.about.notes)
    assert f"1 of {N} reports have no image and were left out" in manifest.about.notes


def test_kaggles_tables(tmp_path: Path) -> None:
    made = built(kaggle(tmp_path))
    frame = made.manifest.frame.set_index("id")
    assert (len(frame), made.absent, made.extra) == (2 * (N - 1), (), ())
    row = frame.loc["3_IM-0003-4001.dcm.png"]
    assert row["image"] == "images/images_normalized/3_IM-0003-4001.dcm.png"
    assert row[["study", "report_id", "patient", "view"]].tolist() == ["3", "3", "3", "Lateral"]


def test_both_forms_say_the_same(tmp_path: Path) -> None:
    ours = ["patient", "report", "mesh", "label.normal"]
    theirs = [built(form(tmp_path / form.__name__)).manifest.frame[ours] for form in (nlm, kaggle)]
    left, right = (frame.drop_duplicates().reset_index(drop=True) for frame in theirs)
    assert left.equals(right)


def test_labels_say_whether_a_report_is_coded_normal(tmp_path: Path) -> None:
    manifest = built(nlm(tmp_path)).manifest
    frame = manifest.frame.drop_duplicates("study").set_index("study")
    np.testing.assert_equal(frame.loc[["CXR3", "CXR1", "CXR2"], "label.normal"].to_numpy(), [1, 0, np.nan])
    assert frame.loc["CXR1", "mesh"] == "Lung/hypoinflation;Opacity/lung/base"
    assert manifest.tasks == {"normal": "binary"}


def test_the_sections_are_found_again(tmp_path: Path) -> None:
    frame = built(nlm(tmp_path)).manifest.frame.drop_duplicates("study").set_index("study")
    for k in (3, 4, 5, 6):
        said = sections(k)
        found = findings_and_impression(frame.loc[f"CXR{k}", "report"])
        assert tuple(part.strip() for part in found) == (" ".join(said["findings"].split()), said["impression"])
    assert "FINDINGS" not in frame.loc["CXR4", "report"]
    assert frame.loc["CXR6", "report"] == "COMPARISON: None.\nINDICATION: Chest pain, case 6."


def test_a_report_whose_rest_would_be_taken_for_findings_is_blank(tmp_path: Path) -> None:
    manifest = built(nlm(tmp_path)).manifest
    assert (manifest.frame["report"][manifest.frame["study"] == "CXR7"] == "").all()
    assert f"2 of {N} reports have neither findings nor an impression" in manifest.about.notes
    assert any(note.startswith("1 of these are left blank") for note in manifest.about.notes)


def test_reports_are_read_out_of_the_archive(tmp_path: Path) -> None:
    folder, archive = nlm(tmp_path / "a"), nlm(tmp_path / "b", archive=True)
    assert built(archive).manifest.frame.equals(built(folder).manifest.frame)
    assert not (archive / "ecgen-radiology").exists()


@pytest.mark.parametrize("keep", [100, 0.5])
def test_an_archive_cut_short(tmp_path: Path, keep: float) -> None:
    path = nlm(tmp_path, archive=True) / "NLMCXR_reports.tgz"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep if keep > 1 else keep * len(data))])
    with pytest.raises(ManifestError, match=r"NLMCXR_reports\.tgz: cut short or damaged"):
        built(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "c">]><eCitation><uId id="CXR2"/></eCitation>',
            "document type",
        ),
        (xml(2)[:200], "not readable as XML"),
        (xml(2).replace(b"Heart", b"H\xe9art"), "not UTF-8 at byte"),
        ('<?xml version="1.0" encoding="utf-16"?><eCitation/>'.encode("utf-16"), "not UTF-8 at byte 0"),
        (b"<eCitation/>", "no <uId id=...>"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    (nlm(tmp_path) / "ecgen-radiology/2.xml").write_bytes(data)
    with pytest.raises(ManifestError, match=f"ecgen-radiology/2.xml: .*{message}"):
        built(tmp_path)


def test_images_without_a_report_and_images_that_are_absent(tmp_path: Path) -> None:
    kaggle(tmp_path)
    lines = (tmp_path / "indiana_reports.csv").read_text().splitlines()
    (tmp_path / "indiana_reports.csv").write_text("\n".join(lines[:-1]) + "\n")
    (tmp_path / "images/images_normalized/3_IM-0003-4001.dcm.png").unlink()
    made = built(tmp_path)
    assert f"2 images have no report, such as {N}_IM-{N:04d}-3001.dcm.png" in made.manifest.about.notes
    rows = made.manifest.frame[made.manifest.frame["study"] == str(N)]
    assert (rows["report"] == "").all()
    assert rows["label.normal"].isna().all()
    assert made.absent == ("images/images_normalized/3_IM-0003-4001.dcm.png",)


def test_a_report_twice_with_two_texts(tmp_path: Path) -> None:
    path = kaggle(tmp_path) / "indiana_reports.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[1], lines[2].replace("case 2", "case two")]) + "\n")
    with pytest.raises(ManifestError, match=r"indiana_reports\.csv: rows of '?2'? differ in indication"):
        built(tmp_path)
    path.write_text("\n".join([*lines, lines[1]]) + "\n")
    assert len(built(tmp_path).manifest) == 2 * (N - 1)


def test_a_spreadsheets_error_is_no_text(tmp_path: Path) -> None:
    path = kaggle(tmp_path) / "indiana_reports.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_text().replace('"Chest pain, case 3."', "#NAME?").encode())
    frame = built(tmp_path).manifest.frame.set_index("study")
    assert frame.loc["3", "report"].iloc[0].startswith("COMPARISON: None.\nFINDINGS: ")


def test_another_header_names_column_and_file(tmp_path: Path) -> None:
    path = kaggle(tmp_path) / "indiana_projections.csv"
    path.write_text(path.read_text().replace("projection\n", "view\n", 1))
    with pytest.raises(
        ManifestError, match=r"indiana_projections\.csv: no column projection; it has uid, filename, view"
    ):
        built(tmp_path)


def test_where_both_forms_are_there_the_images_decide(tmp_path: Path) -> None:
    kaggle(tmp_path)
    shutil.rmtree(tmp_path / "images")
    nlm(tmp_path, folder="flat")
    assert built(tmp_path).manifest.frame["id"].str.startswith("CXR").all()


def test_the_folder_of_the_reports_or_the_folder_above(tmp_path: Path) -> None:
    nlm(tmp_path / "open-i")
    (tmp_path / "other" / "folder").mkdir(parents=True)
    for named in (tmp_path, tmp_path / "open-i/ecgen-radiology"):
        assert len(built(named).manifest) == 2 * (N - 1)
    with pytest.raises(DatasetError, match="not a folder of the Indiana University chest radiographs"):
        built(tmp_path / "other" / "folder")


def test_the_real_tables_of_kaggle(tmp_path: Path) -> None:
    tables = [SHARED / "labels" / f"indiana_{name}.csv" for name in ("reports", "projections")]
    if not all(path.is_file() for path in tables):
        pytest.skip(f"indiana_reports.csv or indiana_projections.csv is not in {SHARED / 'labels'}")
    for path in tables:
        shutil.copy(path, tmp_path)
    draft = LAYOUT.read(tmp_path, ASKED)
    reports = draft.frame.drop_duplicates("study")
    assert (len(draft.frame), len(reports)) == (7_466, 3_851)
    assert draft.frame["view"].value_counts().to_dict() == {"Frontal": 3_818, "Lateral": 3_648}
    assert "25 of 3,851 reports have neither findings nor an impression" in draft.notes
    assert reports["label.normal"].sum() == 1_379
    assert reports["label.normal"].isna().sum() == 92  # No Indexing


def test_the_real_reports_of_nlm(tmp_path: Path) -> None:
    source = SHARED / "open_i_40" / "NLMCXR_reports.tgz"
    if not source.is_file():
        pytest.skip(f"{source} is not there")
    shutil.copy(source, tmp_path)
    draft = LAYOUT.read(tmp_path, ASKED)
    reports = draft.frame.drop_duplicates("study")
    assert (len(draft.frame), draft.frame["id"].nunique()) == (7_470, 7_470)
    assert "104 of 3,955 reports have no image and were left out" in draft.notes
    assert "28 of 3,955 reports have neither findings nor an impression" in draft.notes
    assert len(reports) == 3_955 - 104
    found = reports["report"].map(findings_and_impression)
    headed = [reports["report"].str.contains(f"(?:^|\n){name}: ") for name in ("FINDINGS", "IMPRESSION")]
    for k, there in enumerate(headed):  # each section is found again where it is, and nothing where it is not
        assert (found.str[k] != "").equals(there)
    for k, name in enumerate(("FINDINGS", "IMPRESSION")):  # to the end of their line
        whole = reports["report"].str.extract(rf"(?m)^{name}: (.*)$")[0].fillna("")
        assert (found.str[k].str.strip() == whole.str.strip()).all()
    assert draft.frame.loc[draft.frame["id"] == "CXR1_1_IM-0001-3001.png", "patient"].tolist() == ["1"]
