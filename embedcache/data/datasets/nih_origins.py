"""Which NIH image an image of RSNA's challenge was made from, by RSNA's own list."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from embedcache.data.datasets.layout import Option
from embedcache.data.tables import read_text
from embedcache.errors import ManifestError, some_ids

MAPPING = "pneumonia-challenge-dataset-mappings_2018.json"
MAPPING_OPTION = Option("mapping", f"RSNA's {MAPPING}, where it lies elsewhere.", "path")


def read_origins(path: Path, exams: pd.Series) -> pd.DataFrame:
    """`id` of each of the exams, `origin` (the NIH image) and `patient` (of NIH).

    Raises:
        ManifestError: not that file, or it lacks some of the exams: half a mapping would hide leaks.
    """
    try:
        said = json.loads(read_text(path))
        found = pd.DataFrame(
            {"id": [entry["subset_img_id"] for entry in said], "origin": [entry["img_id"] for entry in said]}
        )
        image = found["origin"].str.removesuffix(".png")
    except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
        raise ManifestError(
            f"{path}: not RSNA's mapping ({type(error).__name__}: {error}); expected a list of entries with "
            "'subset_img_id' and 'img_id'"
        ) from error
    lacking = sorted(set(exams) - set(found["id"]))
    if lacking:
        raise ManifestError(f"{path}: no entry for {some_ids(lacking)}; download the mapping again")
    return found.assign(origin=image + ".png", patient=image.str.partition("_")[0]).drop_duplicates("id")
