"""Joining a manifest with its stores by id, and the resident tensors that training gathers from.

Shape notation: n pairs, d_image and d_text embedding widths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from embedcache.data.manifest import Manifest
from embedcache.data.reports import ReportPolicy, changed_reports, report_text
from embedcache.errors import InputError, JoinError, MissingIdsError, SettingsError, some_ids
from embedcache.store.store import Store, open_store


def opened(store: Store | str | Path) -> Store:
    """A store as given, or opened from its path."""
    return store if isinstance(store, Store) else open_store(store)


@dataclass(frozen=True)
class Join:
    """Rows of a manifest with their rows in the stores, verified by id.

    Args:
        rows: positions in the manifest's frame, (n,) int64.
        image_rows: rows of the image store, (n,) int64.
        text_rows: rows of the text store, (n,) int64; None without a text store.
        n_failed: manifest rows left out because stage one recorded a failure for their image or report.
        missing: ids of manifest rows left out because a store does not account for their image or report.
    """

    rows: np.ndarray
    image_rows: np.ndarray
    text_rows: np.ndarray | None
    n_failed: int
    missing: tuple[str, ...] = ()

    def notes(self, name: str) -> list[str]:
        """What is to be known of scores on images of a manifest of this name."""
        failed = f"{name}: {self.n_failed} images left out, as stage one could not read them"
        return [failed] if self.n_failed else []


def join(
    manifest: Manifest, image_store: Store, text_store: Store | None = None, *, allow_missing: bool = False
) -> Join:
    """Finds each manifest row's image and report by id.

    Rows whose input failed in stage one are left out and counted; an id that no store accounts for is an error.

    Args:
        allow_missing: leave those out too, and name them.

    Raises:
        JoinError: a store of the wrong modality, stores of another dataset, or reports that changed since.
        MissingIdsError: ids that a store neither holds nor records as failed.
    """
    frame = manifest.frame
    image_ids, report_ids = frame["id"].tolist(), frame["report_id"].tolist()
    usable, missing = _held(image_store, image_ids, "image", manifest.name, allow_missing)
    if text_store is not None:
        has_text, lacks_text = _held(text_store, report_ids, "text", manifest.name, allow_missing)
        usable, missing = usable & has_text, missing | lacks_text
    rows = np.flatnonzero(usable)
    text_rows = None
    if text_store is not None:
        text_rows = text_store.rows([report_ids[r] for r in rows])
        _check_reports(manifest, text_store)
    return Join(
        rows,
        image_store.rows([image_ids[r] for r in rows]),
        text_rows,
        n_failed=int((~usable & ~missing).sum()),
        missing=tuple(image_ids[r] for r in np.flatnonzero(missing)),
    )


def _held(
    store: Store, ids: Sequence[str], modality: str, dataset: str, allow_missing: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Which ids have a row, and which the store does not account for."""
    if store.modality != modality:
        raise JoinError(f"{store.path}: a store of modality {store.modality!r}, expected {modality!r}")
    held = store.find(ids) >= 0
    failed = {f.id for f in store.failures}
    unknown = np.array([not there and i not in failed for i, there in zip(ids, held, strict=True)], bool)
    missing = [ids[k] for k in np.flatnonzero(unknown).tolist()]
    if missing and len(missing) == len(ids):
        raise JoinError(
            f"{store.path}: holds none of the {len(ids)} ids of dataset {dataset!r} (it has {some_ids(store.ids, 2)}, "
            f"the manifest {some_ids(ids, 2)}): a store of another dataset; name this dataset's store"
        )
    if missing and not allow_missing:
        raise MissingIdsError(
            f"{store.path}: {len(missing)} of {len(ids)} {modality} ids are neither embedded nor recorded as failed: "
            f"{some_ids(missing)}; run 'embedcache extract' with this manifest and this store, or leave them out "
            "('embedcache train --allow-missing')"
        )
    return held, unknown


def _check_reports(manifest: Manifest, store: Store) -> None:
    changed = changed_texts(store, manifest.reports())
    if changed:
        raise JoinError(
            f"{store.path}: {len(changed)} reports of {manifest.name!r} are not the texts that were encoded: "
            f"{some_ids(changed)}; give changed reports new ids, or run 'embedcache extract' into another store"
        )


def changed_texts(store: Store, texts: Mapping[str, str]) -> list[str]:
    """Ids under which a store was made from other texts; ids that it lacks, and inputs that it does not know, pass."""
    return changed_reports(texts.items(), dict(zip(store.ids, store.input_digests, strict=True)))


def input_digests(store: Store) -> dict[str, bytes]:
    """The digest of each id's input as stage one read it; ids of unknown inputs are left out."""
    return {i: digest.tobytes() for i, digest in zip(store.ids, store.input_digests, strict=True) if digest.any()}


def resident(store: Store, rows: np.ndarray, device: str) -> Tensor:
    """Rows of a store as one float32 tensor on the device, (len(rows), d); each value is touched once.

    Raises:
        JoinError: a row that is not finite or zero throughout; the message names its id.
    """
    return read_rows(store, rows).to(device).float()


def width(store: Store, features: str) -> int:
    """d, of a store's `embeddings` or `tokens`.

    Raises:
        SettingsError: tokens of a store that has none.
    """
    if features == "embeddings":
        return store.layout.dim
    if store.layout.tokens is None:
        raise SettingsError(f"{store.path}: holds no tokens; train on embeddings, or extract with --tokens")
    return store.layout.tokens.dim


def read_rows(store: Store, rows: np.ndarray) -> Tensor:
    """Embeddings of some rows as they are stored, (len(rows), d): float16, bfloat16 or float32.

    Raises:
        JoinError: as of `resident`.
    """
    values = torch.from_numpy(store.gather(rows))
    check_fit(store, rows, fit_rows(values))
    return values.bfloat16() if store.layout.dtype == "bfloat16" else values


def read_tokens(store: Store, rows: np.ndarray) -> Tensor:
    """Tokens of some rows as they are stored, (len(rows), l, d); of a store whose rows have equally many.

    Raises:
        JoinError: as of `resident`.
    """
    values = torch.from_numpy(np.ascontiguousarray(store.tokens[rows]))
    check_fit(store, rows, fit_rows(values.flatten(0, 1)).view(values.shape[:2]).all(dim=1))
    return values.bfloat16() if store.layout.dtype == "bfloat16" else values


def fit_rows(values: Tensor) -> Tensor:
    """Which rows are finite and not zero throughout, (m, d) to (m,) bool.

    Without its sign, a float's bits are an integer that is ordered as the values are, with 0 at the bottom and infinity
    and NaN on top: one pass tells both.
    """
    integer = {2: torch.int16, 4: torch.int32}[values.element_size()]
    bits = torch.iinfo(integer).max
    infinity = int(torch.tensor([torch.inf], dtype=values.dtype).view(integer))
    largest = (values.view(integer) & bits).amax(dim=1)
    return (largest > 0) & (largest < infinity)


def check_fit(store: Store, rows: np.ndarray, fit: Tensor) -> None:
    """Refuses rows that nothing can be learnt from.

    Args:
        rows: (m,) row numbers.
        fit: whether each is of use, (m,) bool.

    Raises:
        JoinError: names their ids.
    """
    if not bool(fit.all()):
        bad = np.flatnonzero(~fit.cpu().numpy())
        raise JoinError(
            f"{store.path}: rows that are not finite or zero throughout under ids "
            f"{some_ids(store.ids[rows[b]] for b in bad)}; run 'embedcache verify {store.path}', or leave them out"
        )


def text_codes(manifest: Manifest, rows: np.ndarray, store: Store) -> np.ndarray:
    """A number for each distinct text as it was encoded, (len(rows),) int64: equal texts are positives of each other.

    What of a report was encoded is in the store's record: two captions may be equal where the reports are not. Where
    the embeddings were made elsewhere, it is the whole report, and one that stage one would refuse is equal to itself
    alone.
    """
    policy = _policy_of(store)
    reports = manifest.reports()
    report_ids = manifest.frame["report_id"].to_numpy()[rows]
    keys: dict[str, str] = {}
    for report_id in dict.fromkeys(report_ids):
        try:
            keys[report_id] = f"text {report_text(reports[report_id], policy)}"
        except InputError:
            keys[report_id] = f"id {report_id}"
    numbers = {key: k for k, key in enumerate(dict.fromkeys(keys.values()))}
    return np.array([numbers[keys[report_id]] for report_id in report_ids], np.int64)


def _policy_of(store: Store) -> ReportPolicy:
    said = store.encoder.get("identity", {}).get("report")
    return ReportPolicy(**said) if isinstance(said, dict) else ReportPolicy(unit="report")
