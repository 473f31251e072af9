from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from embedcache import Manifest, load_dataset
from embedcache.data.labelmap import LabelMap
from embedcache.data.labels import CHEXPERT_LABELS
from embedcache.errors import LabelMapError

MAP = """
from: nih
to: chexpert
labels:
  Effusion: {to: Pleural Effusion, match: exact}
  Infiltration: {to: Lung Opacity, match: broader}
  Consolidation: {to: Lung Opacity, match: broader}
  Mass: {to: Lung Lesion, match: exact}
  Nodule: {to: Lung Lesion, match: broader}
  Hernia: drop
"""
_ = np.nan


def nih(root: Path) -> Manifest:
    said = {
        "Effusion": [1, 0, _, 0],
        "Infiltration": [1, 0, 0, _],
        "Consolidation": [0, 0, 1, _],
        "Mass": [0, 0, 1, _],
        "Nodule": [1, 0, 0, 1],
        "Hernia": [0, 1, 0, 0],
    }
    labels = {f"label.{name}": values for name, values in said.items()}
    return Manifest(pd.DataFrame({"id": list("abcd"), "image": list("abcd"), **labels}), name="nih", root=root)


def test_labels_of_one_dataset_as_anothers(tmp_path: Path) -> None:
    (tmp_path / "labelmap.yaml").write_text(MAP)
    mapped = LabelMap.read(tmp_path / "labelmap.yaml").apply(nih(tmp_path))
    assert mapped.labels == ["Pleural Effusion", "Lung Opacity", "Lung Lesion"]
    assert mapped.tasks == {"chexpert": "multi-label"}
    np.testing.assert_array_equal(mapped.label("Pleural Effusion"), [1, 0, _, 0])
    # an absent infiltration does not say that there is no opacity at all
    np.testing.assert_array_equal(mapped.label("Lung Opacity"), [1, _, 1, _])
    np.testing.assert_array_equal(mapped.label("Lung Lesion"), [1, 0, 1, 1])
    assert mapped.frame["id"].tolist() == list("abcd")
    labels = LabelMap.read(tmp_path / "labelmap.yaml").labels
    both = LabelMap("nih", "chexpert", {**labels, "Nodule": ("Lung Lesion", "exact")})
    one_unknown = nih(tmp_path).frame.assign(**{"label.Mass": [0, 0, 1, _]})
    one_unknown["label.Nodule"] = [_, 0, 0, 1]
    found = both.apply(Manifest(one_unknown, name="nih", root=tmp_path)).label("Lung Lesion")
    np.testing.assert_array_equal(found, [_, 0, 1, 1])  # absent where all of its exact sources are


def test_classes_are_not_mapped(tmp_path: Path) -> None:
    frame = pd.DataFrame({"id": ["a", "b"], "image": ["a", "b"], "label.covidx": [1, 2]})
    with pytest.raises(LabelMapError, match="covidx has classes"):
        LabelMap("covidx", "x", {"covidx": ("Pneumonia", "exact")}).apply(Manifest(frame, name="m", root=tmp_path))


def test_the_map_in_the_docs_fits_nih(tmp_path: Path) -> None:
    path = Path(__file__).resolve().parents[2] / "docs" / "labelmaps" / "nih-to-chexpert.yaml"
    (tmp_path / "images").mkdir()
    (tmp_path / "images/00000001_000.png").touch()
    (tmp_path / "Data_Entry_2017_v2020.csv").write_text(
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position\n"
        "00000001_000.png,Mass|Effusion,0,1,57,M,PA\n"
    )
    mapped = LabelMap.read(path).apply(load_dataset("nih", tmp_path))
    assert set(mapped.labels) < set(CHEXPERT_LABELS)
    row = mapped.frame.iloc[0]
    assert row[["label.Lung Lesion", "label.Pleural Effusion", "label.Edema"]].tolist() == [1, 1, 0]
    assert np.isnan(row["label.Lung Opacity"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MAP.replace("  Hernia: drop\n", ""), "it does not name 'Hernia'"),
        (MAP + "  Oedema: drop\n", "the manifest has no 'Oedema'"),
        (MAP.replace("match: exact", "match: narrower", 1), r"label 'Effusion' is .*expected 'drop' or \{to"),
        (MAP.replace("from: nih\n", ""), r"found \['to', 'labels'\], expected 'from' and 'to'"),
        ("- a", r"found \['a'\], expected"),
        ("a: [", "not YAML"),
        (MAP.replace("to: Pleural Effusion", "to: "), "label 'Effusion' is"),
        (MAP + "  Hernia: drop\n", "duplicate key 'Hernia'"),
        (MAP + "  1: drop\n", "the manifest has no '1'"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "labelmap.yaml").write_text(text)
    with pytest.raises(LabelMapError, match=message):
        LabelMap.read(tmp_path / "labelmap.yaml").apply(nih(tmp_path))
