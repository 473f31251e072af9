"""What there is to encode: an input for each id, and how it is made ready; small enough to send to another process."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from embedcache.data.manifest import Manifest, path_below
from embedcache.data.reports import ReportPolicy, report_text, text_units
from embedcache.data.views import ViewPolicy
from embedcache.encoders.base import Encoder, Modality, Prepared
from embedcache.errors import InputError, ManifestError, SettingsError
from embedcache.store.catalogue import PlannedShard

_Item = TypeVar("_Item")

_MOST_LOOKS = 1000  # for an image that is there


@dataclass(frozen=True)
class Samples:
    """The inputs of one extraction.

    Args:
        inputs: by id: of an image its path below `root`, of a text the report or sentence itself.
        root: the directory that images must lie in.
        policy: what of a report is encoded.
        n_views: views of each, the plain one included.
        witness: an image that was there when the work was planned: where it is gone, so are the data, and that they
            are is no failure of each image. None where none was found.
    """

    modality: Modality
    inputs: Mapping[str, str]
    root: Path
    policy: ReportPolicy
    n_views: int = 1
    view_policy: ViewPolicy = field(default_factory=ViewPolicy)
    witness: str | None = None

    @classmethod
    def of(
        cls, manifest: Manifest, encoder: Encoder, n_views: int = 1, view_policy: ViewPolicy | None = None
    ) -> Samples:
        """Every image, or every distinct report or sentence, of a manifest.

        Raises:
            SettingsError: views of single sentences, which are all alike.
        """
        policy = getattr(encoder, "report_policy", ReportPolicy(unit="report"))
        if encoder.modality == "text" and policy.unit == "sentence" and n_views > 1:
            raise SettingsError(f"{n_views} views of single sentences are all alike; take one, or another unit")
        if encoder.modality == "text":
            inputs = text_units(manifest.reports(), policy)
        else:
            inputs = dict(zip(manifest.frame["id"], manifest.frame["image"], strict=True))
        root = manifest.root.absolute()  # not resolved: another machine may mount the same place elsewhere
        return cls(encoder.modality, inputs, root, policy, n_views, view_policy or ViewPolicy())

    def __len__(self) -> int:
        return len(self.inputs)

    def of_shards(self, shards: Iterable[PlannedShard]) -> Samples:
        """The same for the ids of some shards alone."""
        return replace(self, inputs={i: self.inputs[i] for shard in shards for i in shard.ids})

    def prepare(self, encoder: Encoder, sample_id: str) -> Sequence[Prepared]:
        """One sample made ready: its views, the plain one first.

        Raises:
            InputError: it cannot be used.
            ManifestError: see `check_data`.
        """
        try:
            sample = self.path(sample_id) if self.modality == "image" else self.inputs[sample_id]
            if self.n_views == 1:
                return [encoder.prepare(sample)]
            return encoder.prepare_views(sample, self.n_views, self.view_policy)
        except InputError as error:
            if error.reason in ("missing", "unreadable"):
                self.check_data()
            raise

    def check_data(self) -> None:
        """Refuses to go on where not one image but all of them are gone: a disk that is not mounted.

        Raises:
            ManifestError: the root, or the image that was there before, is not there.
        """
        if self.witness is not None and not _is_there(self.root / self.witness):
            raise ManifestError(
                f"{self.root / self.witness}: not there, but it was when the work was planned; see that "
                f"{self.root} is mounted here, and run the same command again: no image was recorded as missing"
            )

    def witnessed(self, ids: Sequence[str], before: Collection[str]) -> Samples:
        """The same with an image that is there, before any of them is encoded.

        Args:
            ids: what is to do.
            before: ids that were encoded earlier, whose images were there.

        Raises:
            ManifestError: none of those that were looked at, all over the dataset, is there.
        """
        if self.modality == "text" or not ids:
            return self
        looked_at = [*spread([i for i in self.inputs if i in before], _MOST_LOOKS), *spread(ids, _MOST_LOOKS)]
        for i in looked_at:
            try:
                self.path(i)
            except InputError as error:
                if error.reason != "missing":  # it is there, or its path was never good
                    continue
            else:
                return replace(self, witness=self.inputs[i])
        missing = [i for i in looked_at if self.inputs[i]]
        if not missing:
            return self
        raise ManifestError(
            f"{self.root}: none of the {len(looked_at)} images looked at is there, first {self.inputs[missing[0]]!r}; "
            "expected the manifest's images below it: mount the data, or name another root"
        )

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


def spread(items: Sequence[_Item], most: int) -> Sequence[_Item]:
    """A few from all over, in order."""
    n = min(len(items), most)
    return [items[k * len(items) // n] for k in range(n)]


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a mount that is stale, a disk that gives errors
        return False
