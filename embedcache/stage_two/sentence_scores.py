"""Scores of images and texts sentence by sentence: each asks which of an image's tokens is most like it.

Shape notation: n images, l tokens of each, m texts, s sentences of all texts, p width of the shared space.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from embedcache.data.manifest import Manifest
from embedcache.data.reports import ReportPolicy, text_units
from embedcache.errors import JoinError, MissingIdsError, SettingsError, some_ids
from embedcache.stage_two.adaptor import Adaptor
from embedcache.stage_two.tensors import changed_texts, read_tokens, resident, width
from embedcache.store.store import Store

_COSINES_AT_ONCE = 2**26  # 256 MB of float32; of one image more, where its tokens and all sentences make more
_MOST_SCORES = 2**28  # 1 GB of float32
_NUMBERED = re.compile(r"(.*)#s[0-9]+", re.DOTALL)


@torch.inference_mode()
def sentence_scores(
    adaptor: Adaptor,
    images: Store,
    image_rows: np.ndarray,
    manifest: Manifest,
    texts: Store,
    sentences: Store,
    report_ids: Sequence[str],
) -> Tensor:
    """For each image and text the mean over its sentences of the best cosine with a token, (n, m) float32.

    Args:
        images: with tokens.
        image_rows: of the images, (n,).
        manifest: with the reports.
        texts: what the Adaptor was trained on; of the same text encoder.
        sentences: of the same reports, extracted under the unit `sentence`.
        report_ids: of the texts, (m,).

    Raises:
        SettingsError: no tokens, or more than 16,384 x 16,384 images and texts.
        JoinError: sentences of another text encoder, or of reports that changed since; an Adaptor of texts' tokens.
        MissingIdsError: reports without a sentence there.
    """
    width(images, "tokens")
    if len(image_rows) * len(report_ids) > _MOST_SCORES:
        raise SettingsError(
            f"{len(image_rows):,} images x {len(report_ids):,} texts: sentences are compared up to 16,384 x 16,384; "
            "take a smaller split, or leave the sentence store out"
        )
    if adaptor.encoders["text"].get("features") == "tokens":
        raise JoinError("the Adaptor was trained on the tokens of texts, and sentences are embeddings; leave them out")
    _check_same_encoder(texts, sentences)
    _check_texts(manifest, sentences)
    device = adaptor.logit_scale.device
    rows, of_text = _sentences_of(sentences, report_ids)
    said = adaptor.encode_text(resident(sentences, rows, str(device)))  # (s, p)
    owner = torch.from_numpy(of_text).to(device)
    counts = torch.bincount(owner, minlength=len(report_ids)).float()
    scores = torch.empty(len(image_rows), len(report_ids), device=device)
    n_tokens = images.layout.tokens.length or 1  # type: ignore[union-attr]  # width has seen them
    size = max(_COSINES_AT_ONCE // (n_tokens * len(rows)), 1)
    for start in range(0, len(image_rows), size):
        tokens = read_tokens(images, image_rows[start : start + size]).to(device).float()
        best = (adaptor.encode_image(tokens) @ said.T).amax(dim=1)  # (b, s)
        sums = torch.zeros(len(best), len(report_ids), device=device).index_add_(1, owner, best)
        scores[start : start + len(best)] = sums / counts
    return scores


def _sentences_of(store: Store, report_ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of all sentences of some reports, and the number of the report of each, (s,) both."""
    of_report: dict[str, list[int]] = {}
    for row, (key, view) in enumerate(zip(store.ids, store.views.tolist(), strict=True)):
        found = _NUMBERED.fullmatch(key)
        if view == 0:
            of_report.setdefault(key if found is None else found[1], []).append(row)
    missing = [i for i in report_ids if i not in of_report]
    if missing:
        raise MissingIdsError(
            f"{store.path}: {len(missing)} of {len(report_ids)} reports have no sentence there: {some_ids(missing)}; "
            "run 'embedcache extract' on this manifest with --report unit=sentence"
        )
    rows = [row for i in report_ids for row in of_report[i]]
    return np.array(rows, np.int64), np.repeat(np.arange(len(report_ids)), [len(of_report[i]) for i in report_ids])


def _check_texts(manifest: Manifest, sentences: Store) -> None:
    policy = ReportPolicy(**sentences.encoder["identity"]["report"])
    changed = changed_texts(sentences, text_units(manifest.reports(), policy))
    if changed:
        raise JoinError(
            f"{sentences.path}: {len(changed)} sentences of {manifest.name!r} are not the texts that were encoded: "
            f"{some_ids(changed)}; run 'embedcache extract' into another store"
        )


def _check_same_encoder(texts: Store, sentences: Store) -> None:
    """They may differ in what of a report is encoded, and in nothing else."""
    own, other = (dict(store.encoder.get("identity", {})) for store in (texts, sentences))
    if own.pop("report", None) is None or own != {k: v for k, v in other.items() if k != "report"}:
        raise JoinError(
            f"{sentences.path}: not of the text encoder of {texts.path}; extract the sentences with the same one, and "
            "--report unit=sentence"
        )
    unit = (other.get("report") or {}).get("unit")
    if unit != "sentence":
        raise JoinError(f"{sentences.path}: holds texts of the unit {unit!r}, expected sentences")
