"""What each stored dtype costs: the embeddings of a float32 store rounded to it, against themselves.

    python benchmarks/stored_dtypes.py cache/shenzhen-f32/vit-tiny --manifest samples.parquet --label tuberculosis

`relative error` is the distance from the float32 row over its length, `neighbour` how often the nearest other row by
cosine stays the same. With a manifest and a label, the AUROC of the linear probe without Adaptor stands beside them.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np

import embedcache
from embedcache.store.layout import STORED_DTYPES


def _neighbours(values: np.ndarray) -> np.ndarray:
    """The nearest other row of each row by cosine, (n,)."""
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    similar = unit @ unit.T
    np.fill_diagonal(similar, -np.inf)
    return similar.argmax(axis=1)


def _auroc(store: Path, manifest: Path, label: str) -> float:
    """Linear probe at all labels, without Adaptor."""
    config = embedcache.ProbeConfig(heads=("linear",), fractions=(1.0,), controls=())
    scores = embedcache.probe(embedcache.Manifest.read(manifest), store, label=label, config=config).scores
    return float(scores[scores["metric"] == "auroc"]["value"].iloc[0])


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--manifest", type=click.Path(path_type=Path))
@click.option("--label")
@click.option("--json", "as_json", is_flag=True)
def main(store: Path, manifest: Path | None, label: str | None, as_json: bool) -> None:
    """Compares stored dtypes on the embeddings of STORE."""
    opened = embedcache.open_store(store)
    exact = np.asarray(opened.embeddings, np.float32)
    nearest = _neighbours(exact)
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in STORED_DTYPES:
            path = Path(folder) / dtype
            rounded = embedcache.save_store(path, opened.ids, exact, modality=opened.modality, store_dtype=dtype)
            values = np.asarray(rounded.embeddings, np.float32)
            length = np.linalg.norm(exact, axis=1)
            error = np.linalg.norm(values - exact, axis=1) / length
            cosine = (values * exact).sum(axis=1) / (length * np.linalg.norm(values, axis=1))
            row = {
                "dtype": dtype,
                "bytes a row": rounded.raw.nbytes // len(rounded) + (4 if rounded.scales is not None else 0),
                "mean relative error": float(error.mean()),
                "largest": float(error.max()),
                "smallest cosine": float(cosine.min()),
                "neighbour kept": float((_neighbours(values) == nearest).mean()),
            }
            if manifest is not None and label is not None:
                row["auroc"] = _auroc(path, manifest, label)
            table.append(row)
    if as_json:
        click.echo(json.dumps(table))
        return
    click.echo("  ".join(f"{name:>20}" for name in table[0]))
    for row in table:
        click.echo(
            "  ".join(f"{value:>20.6g}" if isinstance(value, float) else f"{value:>20}" for value in row.values())
        )


if __name__ == "__main__":
    main()
