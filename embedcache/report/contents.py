"""What the report of a run shows, as plain tables and words; whoever reads the run fills it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

TEXT_COLUMNS = (  # of all tables of a run: in these a blank is a word
    "control", "head", "metric", "class", "label", "test", "choice", "method", "attribute", "group", "decoder",
    "direction", "data", "image", "text", "task", "setting", "a", "b", "fairness", "verdict", "a_image", "a_text",
    "b_image", "b_text", "name", "modality", "model", "weights", "exposure", "said",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class EmbeddingMap:
    """Where the test images lie, in two dimensions.

    Args:
        encoder: name of the image encoder.
        label: by which the points are coloured.
        points: (n, 2).
        values: of the label, (n,); NaN where it is blank.
        classes: names of the values 0, 1, ..
        how: in words, how the two dimensions came about.
    """

    encoder: str
    label: str
    points: np.ndarray
    values: np.ndarray
    classes: tuple[str, ...]
    how: str


@dataclass(frozen=True)
class Found:
    """One text that an image's query found, with the cosine's rank, from 1."""

    rank: int
    id: str
    text: str
    is_own: bool


@dataclass(frozen=True)
class RetrievalExample:
    """An image, and which texts were found for it.

    Args:
        pair: image and text encoder.
        query: the image's id.
        own_text: its own report.
        own_rank: where its own report stands, from 1.
        found: the first of all texts.
        picture: a data URI of a thumbnail; blank without images.
    """

    pair: tuple[str, str]
    query: str
    own_text: str
    own_rank: int
    n_texts: int
    found: tuple[Found, ...]
    picture: str = ""


@dataclass(frozen=True)
class MaskExample:
    """An image with the true and the predicted mask drawn in.

    Args:
        dice: of this image.
        picture: a data URI, the true mask outlined and the predicted one tinted; blank without images.
    """

    pair: tuple[str, str]
    decoder: str
    id: str
    dice: float
    true_pixels: int
    predicted_pixels: int
    picture: str = ""


@dataclass(frozen=True, eq=False)
class Contents:
    """Everything on the page. Texts may come from strangers' files: whoever shows them escapes them.

    Args:
        name: of the run.
        made: when and where, in words.
        data: what was compared on, in words, a line each: images, patients, splits, what was left out.
        verdicts: which differences are real, a sentence each.
        warnings: leaks, unequal exposure, collapse: what makes scores unfit to be believed.
        notes: rows that were left out, and what steps said.
        tables: as the run holds them: `scores`, `gains`, `calibration`, `subgroups`, `mask_scores`, `mask_gains`,
            `retrieval_scores`, `zeroshot_scores`; any may be absent.
        differences: a row for each two compared: `data`, `task`, `label`, `setting` (head or decoder, and labels),
            `metric`, `a`, `b`, `value` (a - b), `low`, `high`, `p_value`, `p_adjusted`, `method`, `fairness`,
            `verdict`.
        encoders: a row for each: `name`, `modality`, `model`, `weights` (`learnt` or `random`), `dim`, `parameters`,
            `disk_bytes`, `seconds_per_1000`, `exposure` (to the test data), `said` (where that is said).
        curves: a row for each epoch of each Adaptor: `image`, `text`, `epoch`, `train_loss`, `valid_loss`.
        audit: facts of the splits: `fact`, `value`.
        provenance: fingerprints, versions, settings: `what`, `value`.
        commands: that repeat the run.
        has_images: whether pictures of patients may be shown.
    """

    name: str
    made: str
    data: Sequence[str]
    verdicts: Sequence[str]
    warnings: Sequence[str]
    notes: Sequence[str]
    tables: Mapping[str, pd.DataFrame]
    differences: pd.DataFrame
    encoders: pd.DataFrame
    curves: pd.DataFrame
    audit: Sequence[tuple[str, str]]
    provenance: Sequence[tuple[str, str]]
    commands: Sequence[str]
    maps: Sequence[EmbeddingMap] = field(default=())
    retrieval: Sequence[RetrievalExample] = field(default=())
    masks: Sequence[MaskExample] = field(default=())
    has_images: bool = False
