"""Prompts for zero-shot classification: for each label what speaks for it and what against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import yaml

from embedcache.data.manifest import Manifest
from embedcache.errors import SettingsError
from embedcache.strict_yaml import StrictLoader

SETS = ("chexzero", "chexpert")
Side = Literal["positive", "negative"]


@dataclass(frozen=True)
class Wordings:
    """Prompts of one label.

    Args:
        positive, negative: texts; where both are as many, they are pairs of one wording each.
        polarity: `positive`, where positive prompts speak for the label, or `negative`, where they speak against it.
    """

    positive: tuple[str, ...]
    negative: tuple[str, ...]
    polarity: Side = "positive"

    @property
    def pairs(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Each single wording: numbers of its positive and negative prompts; all others' where they make no pairs."""
        if len(self.positive) == len(self.negative):
            return [((k,), (k,)) for k in range(len(self.positive))]
        return [((k,), tuple(range(len(self.negative)))) for k in range(len(self.positive))]


@dataclass(frozen=True)
class PromptSet:
    """Prompts by label.

    Args:
        temperature: of the softmax over the pair of similarities.
        templates: wordings for a label that has a phrase alone, `{}` in them stands for it.
        labels: phrases or wordings; of a label that is not among them its own name, in lower case, is the phrase.
    """

    name: str
    temperature: float
    templates: tuple[tuple[str, str], ...]
    labels: Mapping[str, str | Wordings]

    @classmethod
    def named(cls, name: str | Path) -> PromptSet:
        """A set of this package (`chexzero`, `chexpert`), or the file of one's own.

        ```yaml
        name: mine
        temperature: 1.0
        templates:
          - {positive: "{}", negative: "no {}"}
        labels:
          Effusion: pleural effusion
          No Finding: {positive: [clear lungs], negative: [abnormal lungs], polarity: positive}
        ```

        Raises:
            SettingsError: no such set or file, or one that is not of this form; says where.
        """
        if str(name) in SETS:
            text = resources.files("embedcache.data").joinpath(f"prompt_sets/{name}.yaml").read_text("utf-8")
        else:
            try:
                text = Path(name).read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise SettingsError(
                    f"{name}: no set of prompts that can be read ({type(error).__name__}); expected a YAML file, or "
                    f"one of {', '.join(SETS)}"
                ) from error
        return cls._parsed(text, str(name))

    def wordings(self, label: str) -> Wordings:
        """The prompts of a label.

        Raises:
            SettingsError: the set has no templates, and no wording of this label.
        """
        said = self.labels.get(label, label.replace("_", " ").lower())
        if isinstance(said, Wordings):
            return said
        if not self.templates:
            raise SettingsError(f"prompts {self.name!r}: no templates, and no wording of {label!r}; write one of both")
        positive, negative = zip(*self.templates, strict=True)
        return Wordings(tuple(t.format(said) for t in positive), tuple(t.format(said) for t in negative))

    def texts(self, labels: Sequence[str]) -> dict[str, str]:
        """Every prompt of some labels by an id that tells whose it is."""
        return {
            prompt_id(label, side, k): text
            for label in labels
            for side in ("positive", "negative")
            for k, text in enumerate(getattr(self.wordings(label), side))
        }

    def manifest(self, labels: Sequence[str]) -> Manifest:
        """The prompts of some labels as reports, for stage one to encode; there are no images."""
        texts = self.texts(labels)
        frame = pd.DataFrame({"id": list(texts), "image": list(texts), "report": list(texts.values())})
        return Manifest(frame, name=f"prompts-{self.name}", root=".")

    @classmethod
    def _parsed(cls, text: str, where: str) -> PromptSet:
        try:
            said = StrictLoader(text).get_single_data()
        except (yaml.YAMLError, RecursionError) as error:
            raise SettingsError(f"{where}: not YAML ({error})") from error
        known = {"name", "temperature", "templates", "labels"}
        if not isinstance(said, dict) or not {"name"} <= set(said) <= known:
            found = list(said) if isinstance(said, dict) else said
            raise SettingsError(f"{where}: found {found!r}, expected 'name' and any of {', '.join(sorted(known))}")
        temperature = said.get("temperature", 1.0)
        if not isinstance(temperature, int | float) or not temperature > 0:
            raise SettingsError(f"{where}: temperature is {temperature!r}, expected a number above 0")
        templates, labels = said.get("templates") or [], said.get("labels") or {}
        for name, value, kind in (("templates", templates, list), ("labels", labels, dict)):
            if not isinstance(value, kind):
                raise SettingsError(f"{where}: {name} is {value!r}, expected a {kind.__name__}")
        for k, template in enumerate(templates):
            if not _is_template(template):
                raise SettingsError(
                    f"{where}: template {k + 1} is {template!r}, expected 'positive' and 'negative', each a text with "
                    "one {} for the finding"
                )
        worded = {str(k): _wordings(v, f"{where}: label {k!r}") for k, v in labels.items()}
        pairs = tuple((t["positive"], t["negative"]) for t in templates)
        return cls(str(said["name"]), float(temperature), pairs, worded)


def _is_template(said: Any) -> bool:
    """Whether it is a pair of texts with one place each, and no other field that `format` would look for."""
    if not isinstance(said, dict) or set(said) != {"positive", "negative"}:
        return False
    return all(
        isinstance(t, str) and t.count("{}") == 1 and not set("{}") & set(t.replace("{}", "")) for t in said.values()
    )


def prompt_id(label: str, side: str, k: int) -> str:
    """The id of a label's k-th positive or negative prompt."""
    return f"{label}/{side}/{k:02d}"


def _wordings(said: Any, where: str) -> str | Wordings:
    if isinstance(said, str) and said.strip():
        return said
    form = "expected a phrase, or 'positive' and 'negative' (texts each), and 'polarity' (positive or negative)"
    if not isinstance(said, dict) or not {"positive", "negative"} <= set(said) <= {"positive", "negative", "polarity"}:
        raise SettingsError(f"{where} is {said!r}, {form}")
    sides = []
    for side in ("positive", "negative"):
        texts = [said[side]] if isinstance(said[side], str) else said[side]
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise SettingsError(f"{where}: {side} is {said[side]!r}, {form}")
        sides.append(tuple(texts))
    if said.get("polarity", "positive") not in ("positive", "negative"):
        raise SettingsError(f"{where}: polarity is {said['polarity']!r}, {form}")
    return Wordings(sides[0], sides[1], said.get("polarity", "positive"))
