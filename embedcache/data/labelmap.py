"""Label maps: the labels of one dataset read as another's, to score a head on a dataset it was not trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import yaml

from embedcache.data.labels import LABEL_PREFIX, LabelSet
from embedcache.data.manifest import Manifest
from embedcache.errors import LabelMapError
from embedcache.strict_yaml import StrictLoader

Match = Literal["exact", "broader", "drop"]


@dataclass(frozen=True)
class LabelMap:
    """How the labels of one dataset read as another's, to score a head trained on the other.

    Args:
        source: dataset whose labels are read.
        target: dataset whose labels they become.
        labels: for each source label, its target and how they match: `exact`; `broader`, where the target means more
            than the source, so that a present source is a present target and an absent one says nothing; or `drop`.
    """

    source: str
    target: str
    labels: Mapping[str, tuple[str, Match]]

    @classmethod
    def read(cls, path: str | Path) -> LabelMap:
        """Reads a `labelmap.yaml`.

        ```yaml
        from: nih
        to: chexpert
        labels:
          Effusion: {to: Pleural Effusion, match: exact}
          Infiltration: {to: Lung Opacity, match: broader}
          Hernia: drop
        ```

        Raises:
            LabelMapError: not there, not YAML, or not of that form; says where.
        """
        path = Path(path)
        try:
            said = StrictLoader(path.read_text("utf-8")).get_single_data()
        except OSError as error:
            raise LabelMapError(f"{path}: cannot be read ({error.strerror})") from error
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise LabelMapError(f"{path}: not YAML in UTF-8 ({error})") from error
        form = "expected 'from' and 'to' (names of datasets) and 'labels'"
        if not isinstance(said, dict) or set(said) != {"from", "to", "labels"} or not isinstance(said["labels"], dict):
            raise LabelMapError(f"{path}: found {list(said) if isinstance(said, dict) else said!r}, {form}")
        labels = {str(name): _entry(path, str(name), entry) for name, entry in said["labels"].items()}
        return cls(str(said["from"]), str(said["to"]), labels)

    def apply(self, manifest: Manifest) -> Manifest:
        """The manifest with the target's labels in place of its own.

        A target is present where any of its sources is; absent where all of its exact sources are, and it has one.

        Raises:
            LabelMapError: a label of the manifest that the map does not name, or the other way about; one with classes.
        """
        unnamed = sorted(set(manifest.labels) - set(self.labels))
        unknown = sorted(set(self.labels) - set(manifest.labels))
        if unnamed or unknown:
            raise LabelMapError(
                f"the label map of {self.source} does not fit {manifest.name}: "
                + "; ".join(
                    f"{what} {', '.join(map(repr, names))}"
                    for what, names in (("it does not name", unnamed), ("the manifest has no", unknown))
                    if names
                )
                + ". Name every label, with 'drop' for those to leave out"
            )
        classes = [
            s.name for s in manifest.label_sets if s.task == "multi-class" and self.labels[s.labels[0]][1] != "drop"
        ]
        if classes:
            raise LabelMapError(
                f"{manifest.name}: {', '.join(classes)} has classes, and a map is of labels present or absent; "
                "drop it, or give each class a label of its own"
            )
        kept = manifest.frame.drop(columns=[LABEL_PREFIX + name for name in manifest.labels])
        targets = list(dict.fromkeys(target for target, match in self.labels.values() if match != "drop"))
        for target in targets:
            sources = [(name, match) for name, (to, match) in self.labels.items() if to == target and match != "drop"]
            kept[LABEL_PREFIX + target] = _united([(manifest.label(name), match) for name, match in sources])
        return manifest.with_frame(kept, label_sets=(LabelSet(self.target, "multi-label", tuple(targets)),))


def _entry(path: Path, name: str, entry: object) -> tuple[str, Match]:
    if entry == "drop":
        return "", "drop"
    if isinstance(entry, dict) and set(entry) == {"to", "match"} and entry["match"] in ("exact", "broader"):
        target = entry["to"]
        if isinstance(target, str) and target:
            return target, entry["match"]
    raise LabelMapError(
        f"{path}: label {name!r} is {entry!r}, expected 'drop' or {{to: <label>, match: exact}} or match: broader"
    )


def _united(sources: Sequence[tuple[np.ndarray, Match]]) -> np.ndarray:
    present = np.any([values == 1 for values, _ in sources], axis=0)
    exact = [values == 0 for values, match in sources if match == "exact"]
    absent = np.all(exact, axis=0) if exact else np.zeros(len(present), bool)
    return np.where(present, 1.0, np.where(absent, 0.0, np.nan))
