"""What goes out with an Adaptor, its page, and what comes in: checkpoints of the paper's own code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_MARKER = "projection.visual_projection.weight"
_BLOCKS = "adaptor_module.encoder."


def reference_weights(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """The weights of a checkpoint of the paper's code under our names, and how many blocks they have.

    Args:
        state_dict: its names, also with a prefix such as `model.` before all of them; others are ignored.

    Raises:
        KeyError: the state dict lacks a weight; the message names it.
    """
    before = next((key.removesuffix(_MARKER) for key in state_dict if key.endswith(_MARKER)), "")
    given = {key.removeprefix(before): value for key, value in state_dict.items() if key.startswith(before)}
    names = sorted({key.removeprefix(_BLOCKS).split(".")[0] for key in given if key.startswith(_BLOCKS)})
    numbered = all(name.isdigit() for name in names)  # the paper's code has no number where there is one block
    n_layers = len(names) if numbered else 1
    renamed = {
        "towers.image_projection.weight": _MARKER,
        "towers.text_projection.weight": "projection.text_projection.weight",
        "logit_scale": "logit_scale",
    }
    for i in range(n_layers):
        theirs = f"{_BLOCKS}{i}." if numbered else _BLOCKS
        for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"):
            renamed[f"towers.blocks.{i}.{name}"] = f"{theirs}attn.{name}"
        for layer in ("linear1", "linear2", "norm1", "norm2"):
            for kind in ("weight", "bias"):
                renamed[f"towers.blocks.{i}.{layer}.{kind}"] = f"{theirs}{layer}.{kind}"
    for ours, reference in renamed.items():
        if reference not in given:
            raise KeyError(f"the reference checkpoint lacks {reference!r}, expected for our {ours!r}")
    return {ours: given[reference] for ours, reference in renamed.items()}, n_layers


def model_card(config: Mapping[str, Any], n_parameters: int) -> str:
    """The page of an Adaptor: what it was trained on, and how to use it.

    Args:
        config: the Adaptor's settings.
    """
    settings = {name: value for name, value in config.items() if name != "encoders"}
    encoders = config["encoders"].items()
    trained_on = [f"- {of}: {e['name']}, fingerprint `{e['fingerprint']}`" for of, e in encoders]
    size = f"{n_parameters:,} trained parameters on top of frozen encoders"
    return "\n".join(
        [
            "---", "library_name: embedcache", "tags: [embedcache, adaptor]", "---", "",
            "# Adaptor", "",
            f"{size}. Method: *Freeze the backbones*, arXiv 2401.01179.", "",
            "Trained on the cached embeddings of", "", *(trained_on or ["- unknown encoders"]), "",
            "and of use with those alone: `embedcache` refuses any other by its fingerprint.", "",
            "```python", "adaptor = embedcache.Adaptor.from_pretrained(...)  # this repository or folder",
            "adaptor.encode_image(embeddings)  # unit vectors", "```", "",
            "Settings: " + ", ".join(f"{name} {value}" for name, value in settings.items()) + ".", "",
        ]
    )  # fmt: skip
