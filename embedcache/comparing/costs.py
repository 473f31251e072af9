"""What each encoder costs and has seen, to stand beside the scores."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd

from embedcache.comparing.differences import Exposures
from embedcache.comparing.study import Study
from embedcache.store.pace import read_pace


def encoders_table(study: Study, exposures: Exposures, weights: Mapping[str, str]) -> pd.DataFrame:
    """A row for each encoder: `name`, `modality`, `model`, `weights`, `dim`, `parameters`, `disk_bytes`,
    `seconds_per_1000` (samples, where they were encoded on this machine), `exposure`, `said`.

    What no store says is NaN.

    Args:
        weights: `random` for encoders whose weights were drawn; others are `learnt`.
    """
    home, rows = study.tasks[0], []
    for modality, stores in (("image", home.images), ("text", home.texts)):
        for name, path in stores.items():
            store = study.store(path)
            everywhere = [(task.images if modality == "image" else task.texts).get(name) for task in study.tasks]
            pace, said = read_pace(path), store.encoder
            of_tasks = {task.name: exposures[name, task.name] for task in study.tasks}
            rows.append(
                {
                    "name": name,
                    "modality": modality,
                    "model": str(said.get("name", "external")),
                    "weights": weights.get(name, "learnt"),
                    "dim": store.layout.dim,
                    "parameters": said.get("notes", {}).get("parameters", math.nan),
                    "disk_bytes": sum(study.store(other).n_bytes for other in everywhere if other is not None),
                    "seconds_per_1000": math.nan if pace is None else pace.seconds_per_1000,
                    "exposure": "; ".join(
                        exposed.level if len(of_tasks) == 1 else f"{data}: {exposed.level}"
                        for data, exposed in of_tasks.items()
                    ),
                    "said": "; ".join(sorted({exposed.said for exposed in of_tasks.values() if exposed.said})),
                }
            )
    return pd.DataFrame(rows)
