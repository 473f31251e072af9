"""The catalogue: complete rows, and nothing unknown that reads as none."""

from __future__ import annotations

import re

import pytest

import embedcache
from embedcache.encoders.catalogue import CATALOGUE, DATASETS, EXPOSURES
from embedcache.encoders.load import SOURCES
from embedcache.errors import EncoderError

PAPERS = ("resnet-ae", "dinov2-s", "dinov2-b", "swin-base", "bert", "biobert", "clinicalbert", "pubmedbert", "cxrbert")


def test_the_papers_encoders_are_there_with_its_pooling() -> None:
    pooled = {name: CATALOGUE[name].pooling for name in PAPERS}
    assert pooled == {
        "resnet-ae": "pooler", "dinov2-s": "cls", "dinov2-b": "cls", "swin-base": "first",
        **dict.fromkeys(("bert", "biobert", "clinicalbert", "pubmedbert", "cxrbert"), "pooler"),
    }  # fmt: skip
    assert [CATALOGUE[name].dim for name in PAPERS[:4]] == [512, 384, 768, 1024]


def test_at_least_fifteen_more() -> None:
    assert len(set(CATALOGUE) - set(PAPERS)) >= 15


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_row_is_complete(name: str) -> None:
    entry = CATALOGUE[name]
    assert entry.source.partition(":")[0] in SOURCES
    assert tuple(entry.exposure) == DATASETS
    assert set(entry.exposure.values()) <= set(EXPOSURES)
    assert min(len(entry.licence), len(entry.said), len(entry.note)) > 2
    assert entry.dim > 0 < entry.input_size
    for digest in entry.pins.values():
        assert re.fullmatch(r"[0-9a-f]{64}", digest)
        assert re.search(r"@[0-9a-f]{40}$", entry.source)  # a pinned file is of a pinned revision
    shown = "\n".join(entry.lines())
    for dataset in DATASETS:
        assert re.search(rf"{dataset} +{entry.exposure[dataset]} ", shown)


@pytest.mark.parametrize("name", CATALOGUE)
def test_what_was_drawn_from_a_seen_set_is_not_none(name: str) -> None:
    """RSNA and SIIM are drawn from NIH, COVIDx in part from RSNA."""
    exposure, touched = CATALOGUE[name].exposure, {"seen", "train_only", "partial", "derived"}
    if exposure["nih"] in touched:
        assert {exposure[d] for d in ("rsna", "siim", "covidx")} <= touched | {"unknown"}
    if exposure["rsna"] in touched:
        assert exposure["covidx"] in touched | {"unknown"}
    if exposure["nih"] == "unknown":
        assert "none" not in {exposure[d] for d in ("rsna", "siim", "covidx")}


def test_words_of_exposure() -> None:
    assert CATALOGUE["dinov2-s"].exposed() == "unknown of all"
    assert CATALOGUE["resnet50"].exposed() == "none of all"
    assert CATALOGUE["xrv-densenet-nih"].exposed().startswith("seen nih; derived rsna covidx siim; none")


def test_a_short_name_fixes_the_modality() -> None:
    with pytest.raises(EncoderError, match="minilm: an encoder of texts, modality 'image' was asked for"):
        embedcache.load_encoder("minilm", modality="image")
