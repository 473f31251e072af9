"""What there is to encode: an input for each id, and how it is made ready; small enough to send to another process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from embedcache.data.manifest import Manifest, path_below
from embedcache.data.reports import ReportPolicy, report_text, text_units
from embedcache.data.views import ViewPolicy
from embedcache.encoders.base import Encoder, Modality, Prepared
from embedcache.errors import InputError
from embedcache.store.catalogue import PlannedShard


@dataclass(frozen=True)
class Samples:
    """The inputs of one extraction.

    Args:
        inputs: by id: of an image its path below `root`, of a text the report or sentence itself.
        root: the directory that images must lie in.
        policy: what of a report is encoded.
        n_views: views of each, the plain one included.
    """

    modality: Modality
    inputs: Mapping[str, str]
    root: Path
    policy: ReportPolicy
    n_views: int = 1
    view_policy: ViewPolicy = field(default_factory=ViewPolicy)

    @classmethod
    def of(
        cls, manifest: Manifest, encoder: Encoder, n_views: int = 1, view_policy: ViewPolicy | None = None
    ) -> Samples:
        """Every image, or every distinct report or sentence, of a manifest."""
        policy = getattr(encoder, "report_policy", ReportPolicy(unit="report"))
        if encoder.modality == "text":
            inputs = text_units(manifest.reports(), policy)
        else:
            inputs = dict(zip(manifest.frame["id"], manifest.frame["image"], strict=True))
        return cls(encoder.modality, inputs, manifest.root.resolve(), policy, n_views, view_policy or ViewPolicy())

    def __len__(self) -> int:
        return len(self.inputs)

    def of_shards(self, shards: Iterable[PlannedShard]) -> Samples:
        """The same for the ids of some shards alone."""
        return replace(self, inputs={i: self.inputs[i] for shard in shards for i in shard.ids})

    def prepare(self, encoder: Encoder, sample_id: str) -> Sequence[Prepared]:
        """One sample made ready: its views, the plain one first.

        Raises:
            InputError: it cannot be used.
        """
        sample = self.path(sample_id) if self.modality == "image" else self.inputs[sample_id]
        if self.n_views == 1:
            return [encoder.prepare(sample)]
        return encoder.prepare_views(sample, self.n_views, self.view_policy)

    def path(self, sample_id: str) -> Path:
        """The file of an image.

        Raises:
            InputError: not there, or outside the root.
        """
        return path_below(self.root, self.inputs[sample_id])

    def groups(self, ids: Sequence[str]) -> list[list[str]]:
        """Ids that bear the same text together, in the order in which each text comes first; every image alone.

        Texts are compared as they are encoded. Images are not read here: that would read the whole dataset.
        """
        if self.modality == "image":
            return [[i] for i in ids]
        groups: dict[bytes, list[str]] = {}
        for i in ids:
            try:
                key = hashlib.sha256(report_text(self.inputs[i], self.policy).encode("utf-8")).digest()
            except InputError:
                key = b"unusable " + i.encode("utf-8", "surrogatepass")
            groups.setdefault(key, []).append(i)
        return list(groups.values())
