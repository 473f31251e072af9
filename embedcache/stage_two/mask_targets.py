"""Masks of samples as decoders learn from them: in the frame that the encoder saw, packed to bits.

Shape notation: n samples, v views, m masks that are not empty, b samples of a batch, H and W pixels of a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedcache.data.frames import Frame, frame_steps
from embedcache.data.manifest import Manifest
from embedcache.data.masks import Size, mask_size, read_mask
from embedcache.data.views import Placement, ViewPolicy, drawn_view
from embedcache.device import count_cores
from embedcache.errors import InputError, ManifestError, SettingsError, some_ids
from embedcache.progress import Progress
from embedcache.store.store import Store


@dataclass(frozen=True, eq=False)
class MaskTargets:
    """Masks of n samples in v views.

    Args:
        size: H and W.
        bits: those that are not empty, packed along their pixels, (m, ceil(H W / 8)) uint8.
        place: of each sample and view in `bits`; -1 for an empty one, (n, v) int64.
        areas: pixels of each, (n, v) int64.
        lost: which masks are not empty and leave nothing in the plain frame, as they lie outside it or are smaller than
            half a pixel, (n,) bool.
    """

    size: Size
    bits: np.ndarray
    place: np.ndarray
    areas: np.ndarray
    lost: np.ndarray

    def take(self, samples: np.ndarray, views: np.ndarray | int = 0) -> Tensor:
        """Masks of some samples, (b, H, W) uint8 of 0 and 1, on the host."""
        place = self.place[samples, views]
        there = place >= 0
        flat = np.zeros((len(place), self.size[0] * self.size[1]), np.uint8)
        flat[there] = np.unpackbits(self.bits[place[there]], axis=1, count=flat.shape[1])
        return torch.from_numpy(flat.reshape(-1, *self.size))

    def mean(self, samples: np.ndarray) -> np.ndarray:
        """How often each pixel is in the plain masks of some samples, (H, W) float64."""
        sums = np.zeros(self.size[0] * self.size[1])
        place = self.place[samples, 0]
        for part in np.array_split(place[place >= 0], max(len(place) // 256, 1)):
            sums += np.unpackbits(self.bits[part], axis=1, count=len(sums)).sum(axis=0)
        return (sums / len(samples)).reshape(self.size)


def has_mask(manifest: Manifest) -> np.ndarray:
    """Which rows say what their mask is, be it empty, (rows,) bool.

    Raises:
        ManifestError: no row does.
    """
    known = np.array([bool(text.strip()) for text in _texts(manifest)], bool)
    if not known.any():
        raise ManifestError(
            f"{manifest.name}: no row has a mask; fill the column 'mask' with paths, boxes or runs "
            "(docs/datasets.md), or use a dataset that has masks"
        )
    return known


def read_targets(manifest: Manifest, rows: np.ndarray, store: Store, size: Size, *, n_views: int = 1) -> MaskTargets:
    """Reads and places the masks of some rows, in threads.

    Args:
        rows: positions in the manifest's frame, (n,), each with a mask.
        store: whose encoder says in which frame, and whose inputs say where further views lie.
        n_views: views of each, the plain one included.

    Raises:
        ManifestError: masks that cannot be read; names all of them.
        SettingsError: a transform, or views, of which it is not known where they leave a pixel.
    """
    texts, ids = _texts(manifest)[rows], manifest.frame["id"].to_numpy()[rows]
    placed = _placing(store, ids.tolist(), n_views)

    def read(k: int) -> tuple[bool, list[np.ndarray]] | InputError:
        try:
            mask = _mask(texts[k], manifest)
        except InputError as error:
            return error
        return bool(mask.any()), [np.packbits(of_view) for of_view in placed(k, mask, size)]

    bits: list[np.ndarray] = []
    place, areas, bad = np.full((len(rows), n_views), -1), np.zeros((len(rows), n_views), np.int64), {}
    lost = np.zeros(len(rows), bool)
    with (
        ThreadPoolExecutor(count_cores(), "masks") as pool,
        Progress("reading masks", total=len(rows), unit="mask") as progress,
    ):
        for k, found in enumerate(pool.map(read, range(len(rows)))):
            progress.advance()
            if isinstance(found, InputError):
                bad[str(ids[k])] = found
                continue
            for view, packed in enumerate(found[1]):
                areas[k, view] = np.bitwise_count(packed).sum()
                if areas[k, view]:
                    place[k, view] = len(bits)
                    bits.append(packed)
            lost[k] = found[0] and not areas[k, 0]
    if bad:
        first = next(iter(bad))
        raise ManifestError(
            f"{manifest.name}: {len(bad)} of {len(rows)} masks cannot be read: {some_ids(bad)}; the first: "
            f"{bad[first]}; mend them, or leave them blank"
        )
    n_bytes = -(-size[0] * size[1] // 8)
    return MaskTargets(size, np.stack(bits) if bits else np.empty((0, n_bytes), np.uint8), place, areas, lost)


def _texts(manifest: Manifest) -> np.ndarray:
    """What each row says of its mask, blank where it says nothing, (rows,) object."""
    if "mask" not in manifest.frame:
        return np.full(len(manifest), "", object)
    return manifest.frame["mask"].fillna("").astype(str).to_numpy(object)


def _mask(text: str, manifest: Manifest) -> np.ndarray:
    """The pixels of a mask in its own size; an empty one that is written as text is not drawn large."""
    size = mask_size(text)
    if size is not None and text.endswith(":"):
        return np.zeros(size, bool)
    return read_mask(text, manifest.root)


def _placing(store: Store, ids: Sequence[str], n_views: int) -> Callable[[int, np.ndarray, Size], list[np.ndarray]]:
    """A function of a sample's number and mask that gives the mask in the frame of each view."""
    steps = frame_steps(store.encoder)
    policy = _view_policy(store) if n_views > 1 else None
    digests = store.input_digests[store.rows(ids)] if policy else None

    def placed(k: int, mask: np.ndarray, size: Size) -> list[np.ndarray]:
        own = (mask.shape[0], mask.shape[1])
        if not mask.any():
            return [np.zeros(size, bool)] * n_views
        placements: list[Placement | None] = [None]
        if policy is not None and digests is not None:
            digest = digests[k].tobytes()
            placements += [drawn_view(own, digest, view, policy).placement for view in range(1, n_views)]
        return [Frame.of(steps, own, placement).of_mask(mask, size) for placement in placements]

    return placed


def _view_policy(store: Store) -> ViewPolicy:
    said: Any = store.layout.view_policy
    if said is None:
        raise SettingsError(f"{store.path}: does not say how its views were drawn; use views 'first'")
    return ViewPolicy(**said)
