"""What a head is to tell: one label, several at once, or one of several classes.

Shape notation: m heads, n rows, t columns of labels, c outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from embedcache.data.labels import LABEL_PREFIX, Task
from embedcache.data.manifest import Manifest
from embedcache.errors import ManifestError
from embedcache.metrics.calibration import sigmoid


@dataclass(frozen=True)
class Target:
    """A task of classification.

    Args:
        name: of the label, or of the set of labels.
        task: `binary` (one output), `multi-label` (an output for each label) or `multi-class` (one for each class).
        labels: the manifest's labels that it reads, t of them.
        classes: what each output stands for, c of them: the label, each label, or each class.
    """

    name: str
    task: Task
    labels: tuple[str, ...]
    classes: tuple[str, ...]

    @classmethod
    def of(cls, manifest: Manifest, name: str) -> Target:
        """A label, or a set of labels, by its name.

        Raises:
            ManifestError: neither is there; names those that are.
        """
        sets = manifest.label_sets
        found = next((s for s in sets if s.name == name), None)
        found = found or next((s for s in sets if s.task == "multi-class" and s.labels == (name,)), None)
        if found is None and name in manifest.labels:  # one label out of a set of several
            return cls(name, "binary", (name,), (name,))
        if found is None:
            others = [s.name for s in sets if s.name not in manifest.labels]
            raise ManifestError(
                f"{manifest.name}: no label {name!r}; it has {', '.join(manifest.labels) or 'none'}"
                + (f", and the sets {', '.join(others)}" if others else "")
            )
        if found.task != "multi-class":
            return cls(name, found.task, found.labels, found.labels)
        values = manifest.label(found.labels[0])
        n_classes = max(int(np.nanmax(values, initial=0)) + 1, len(found.classes))
        names = (*found.classes, *map(str, range(len(found.classes), n_classes)))
        return cls(name, "multi-class", found.labels, names)

    @property
    def n_outputs(self) -> int:
        """c."""
        return len(self.classes)

    def values(self, manifest: Manifest) -> np.ndarray:
        """Labels of each row: 0, 1 or a class, NaN where blank, (n, t)."""
        return np.stack([manifest.label(label) for label in self.labels], axis=1)

    def completed(self, manifest: Manifest) -> Manifest:
        """Another dataset's manifest with a blank column for each label that it lacks, if it has any.

        Raises:
            ManifestError: it has none of them, or another value.
        """
        for label in set(self.labels) & set(manifest.labels):
            values = manifest.label(label)
            known = range(self.n_outputs) if self.task == "multi-class" else (0, 1)
            odd = sorted(set(values[~np.isnan(values)].tolist()) - set(known))
            if odd:
                raise ManifestError(
                    f"{manifest.name}: label {label!r} is {odd[0]:g}, expected one of {', '.join(map(str, known))}, as "
                    "where it was learnt; name a label map"
                )
        absent = [label for label in self.labels if label not in manifest.labels]
        if len(absent) == len(self.labels):
            raise ManifestError(
                f"{manifest.name}: has none of the labels {', '.join(self.labels)}; it has "
                f"{', '.join(manifest.labels) or 'none'}; name a label map"
            )
        return manifest.with_frame(manifest.frame.assign(**{LABEL_PREFIX + label: np.nan for label in absent}))

    def one_vs_rest(self, values: np.ndarray) -> np.ndarray:
        """Labels (n, t) as 0, 1 or NaN for each output, (n, c)."""
        if self.task != "multi-class":
            return values
        return np.where(np.isnan(values), np.nan, values == np.arange(self.n_outputs))

    def both_sides(self, values: np.ndarray) -> np.ndarray:
        """Which outputs are present in some rows and absent in others, (n, t) to (c,) bool."""
        sides = self.one_vs_rest(values)
        return (sides == 0).any(axis=0) & (sides == 1).any(axis=0)

    def known(self, values: np.ndarray) -> np.ndarray:
        """Which rows have any label, (n, t) to (n,) bool."""
        return ~np.isnan(values).all(axis=1)

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Logits (..., c) to probabilities: of each label by itself, or of classes that exclude each other."""
        if self.task == "multi-class":
            shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
            return shifted / shifted.sum(axis=-1, keepdims=True)
        return sigmoid(logits)

    def loss(self, logits: Tensor, y: Tensor, class_weights: Tensor) -> Tensor:
        """Cross-entropy of each head, its mean over the labels that are there.

        Args:
            logits: (m, n, c).
            y: labels, NaN where blank, (m, n, t).
            class_weights: of absent and present, (m, c, 2), or of each class, (m, c).

        Returns:
            (m,); 0 where no label is there.
        """
        there = ~y.isnan()
        if self.task == "multi-class":
            classes = y[..., 0].nan_to_num().long()
            each = F.cross_entropy(logits.movedim(-1, 1), classes, reduction="none") * class_weights.gather(1, classes)
            there = there[..., 0]
        else:
            each = F.binary_cross_entropy_with_logits(logits, y.nan_to_num(), reduction="none")
            each = each * torch.where(y == 1, class_weights[:, None, :, 1], class_weights[:, None, :, 0])
        over = tuple(range(1, each.ndim))
        return torch.where(there, each, 0).sum(over) / there.sum(over).clamp_min(1)

    def class_weights(self, values: np.ndarray, class_weight: str) -> np.ndarray:
        """How much a row of each class counts, as `loss` takes it for one head.

        Balanced, all classes count alike in sum: n / (number of classes x rows of the class), as in scikit-learn.

        Args:
            values: training labels, (n, t).
            class_weight: `none` or `balanced`.
        """
        if self.task == "multi-class":
            counts = np.array([(values[:, 0] == k).sum() for k in range(self.n_outputs)], np.float64)
        else:
            counts = np.stack([(values == 0).sum(axis=0), (values == 1).sum(axis=0)], axis=1).astype(np.float64)
        if class_weight != "balanced":
            return np.ones_like(counts)
        n, n_classes = counts.sum(axis=-1, keepdims=True), (counts > 0).sum(axis=-1, keepdims=True)
        return np.divide(n, n_classes * counts, out=np.ones_like(counts), where=counts > 0)
