"""Sets of prompts: those of the package, those of a file, and every wrong one refused with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedcache.data.labels import CHEXPERT_LABELS
from embedcache.data.prompts import PromptSet, Wordings
from embedcache.errors import SettingsError


def test_the_sets_of_the_package_word_any_label() -> None:
    assert PromptSet.named("chexzero").wordings("Pleural_Effusion") == Wordings(
        ("pleural effusion",), ("no pleural effusion",)
    )
    assert PromptSet.named("chexzero").wordings("No Finding").negative == ("no no finding",)
    chexpert = PromptSet.named("chexpert")
    for label in CHEXPERT_LABELS:
        wordings = chexpert.wordings(label)
        assert len(wordings.positive) == len(wordings.negative) >= 3
        assert not any("no no" in text for text in (*wordings.positive, *wordings.negative))
    texts = chexpert.texts(["Edema"])
    assert texts["Edema/positive/02"] == "findings consistent with pulmonary edema"
    assert len(texts) == 8


def test_a_manifest_of_prompts_has_each_under_its_id() -> None:
    manifest = PromptSet.named("chexzero").manifest(["Edema", "opacity"])
    assert manifest.reports() == {
        "Edema/positive/00": "edema", "Edema/negative/00": "no edema",
        "opacity/positive/00": "opacity", "opacity/negative/00": "no opacity",
    }  # fmt: skip


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\ntemperature: 0.07\ntemplates:\n  - {positive: 'a {}', negative: 'without {}'}\n"
        "labels:\n  Effusion: fluid\n  Normal: {positive: clear, negative: [ill, sick], polarity: negative}\n"
    )
    found = PromptSet.named(path)
    assert found.temperature == 0.07
    assert found.wordings("Effusion") == Wordings(("a fluid",), ("without fluid",))
    assert found.wordings("Normal") == Wordings(("clear",), ("ill", "sick"), "negative")
    assert found.wordings("Normal").pairs == [((0,), (0, 1))]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a", "expected 'name' and any of labels"),
        ("name: a\nother: 3", "found"),
        ("name: a\ntemperature: 0", "temperature is 0, expected a number above 0"),
        ("name: a\ntemplates: [{positive: '{}', negative: none}]", "template 1 is"),
        ("name: a\ntemplates: [{positive: '{0.__class__}', negative: '{}'}]", "template 1 is"),
        ("name: a\ntemplates: 3", "templates is 3"),
        ("name: a\nlabels: [b]", "labels is ['b']"),
        ("name: a\nlabels: {x: {positive: [], negative: b}}", "label 'x': positive is []"),
        ("name: a\nlabels: {x: {positive: a}}", "label 'x' is"),
        ("name: a\nlabels: {x: {positive: a, negative: b, polarity: up}}", "polarity is 'up'"),
        ("name: [", "not YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as refused:
        PromptSet.named(path)
    assert str(path) in str(refused.value)
    assert said in str(refused.value)


def test_a_set_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(SettingsError, match="one of chexzero, chexpert"):
        PromptSet.named("chexzero2")
    bare = PromptSet("bare", 1.0, (), {})
    with pytest.raises(SettingsError, match="no templates, and no wording of 'Edema'"):
        bare.wordings("Edema")
