"""How many parameters are trained: an Adaptor's against end-to-end training of the encoders below it."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch

from embedcache.errors import JoinError
from embedcache.stage_two.adaptor import Adaptor, count_parameters
from embedcache.stage_two.config import TrainConfig
from embedcache.stage_two.tensors import width
from embedcache.store.store import Store


def parameter_table(stores: Sequence[Store], config: TrainConfig) -> pd.DataFrame:
    """A row for every pair of an image store and a text store.

    Args:
        config: the Adaptor that would be trained on them.

    Returns:
        `image` and `text` encoder; `trained`: of the Adaptor; `frozen`: of both encoders, as their records say, NA
        where a record does not; `total`; `end_to_end`: what training both encoders with a linear projection each would
        train; `fewer`: the share of those that is not trained.

    Raises:
        JoinError: no store of a modality.
    """
    by_modality = {m: [store for store in stores if store.modality == m] for m in ("image", "text")}
    for modality, found in by_modality.items():
        if not found:
            raise JoinError(f"no {modality} store among {', '.join(str(store.path) for store in stores)}; name one")
    rows = []
    for image in by_modality["image"]:
        for text in by_modality["text"]:
            with torch.device("meta"):  # shapes alone
                trained = count_parameters(Adaptor.of_config(image, text, config))
            known = [store.encoder.get("notes", {}).get("parameters") for store in (image, text)]
            frozen = None if None in known else sum(known)
            projections = config.projection_dim * (width(image, config.image) + width(text, config.text)) + 1
            end_to_end = None if frozen is None else frozen + projections
            rows.append(
                {
                    "image": image.encoder.get("name", "external"),
                    "text": text.encoder.get("name", "external"),
                    "trained": trained,
                    "frozen": frozen,
                    "total": None if frozen is None else frozen + trained,
                    "end_to_end": end_to_end,
                    "fewer": None if end_to_end is None else 1 - trained / end_to_end,
                }
            )
    counts = ("trained", "frozen", "total", "end_to_end")
    return pd.DataFrame(rows).astype({**dict.fromkeys(counts, "Int64"), "fewer": "Float64"})
