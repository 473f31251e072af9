"""Image models of timm with the transform that their own pre-training configuration describes.

Shape notation: b batch size, l tokens, d width.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from embedcache.encoders.base import EncoderOptions, Modality
from embedcache.encoders.checkpoint import HUB_PREFIX, Checkpoint
from embedcache.encoders.image import ImageModel
from embedcache.encoders.pooling import Output, block_index, square_grid
from embedcache.encoders.transforms import of_compose, paper_transform
from embedcache.errors import EncoderError


def load(location: str, modality: Modality | None, options: EncoderOptions, pins: Mapping[str, str]) -> ImageModel:
    """A model name of timm, `hf-hub:` with a name of the hub, or a local directory with config.json and weights."""
    if modality == "text":
        raise EncoderError(f"timm:{location}: timm has image models only, modality 'text' was asked for")
    checkpoint = Checkpoint.find("timm", _on_the_hub(location), options, pins)
    model, native = _create(checkpoint, options)
    own = paper_transform() if options.transform == "paper" else of_compose(_compose(model, options), checkpoint.source)
    described = checkpoint.json("config.json")
    return ImageModel(
        source="timm",
        name=checkpoint.name,
        module=model,
        forward=lambda pixels: timm_output(model, pixels, options.layer, checkpoint.source),
        transform=own,
        config={
            "class": type(model).__name__,
            "config": {key: described.get(key) for key in ("architecture", "model_args", "global_pool")},
        },
        pooling="mean" if options.layer is not None else "pooler",
        native_size=native,
        layer=options.layer,
        concurrent=True,
        libraries=("timm", "torchvision"),
        notes=checkpoint.notes,
    )


def timm_output(model: Any, pixels: torch.Tensor, layer: int | None, source: str) -> Output:
    """What a timm model gives: its own pooling (before any classifier), class token and cells."""
    if layer is not None:
        return _at_layer(model, pixels, layer, source)
    return output_of_features(model, model.forward_features(pixels), pixels, source)


def output_of_features(model: Any, features: torch.Tensor, pixels: torch.Tensor, source: str) -> Output:
    """The same from what `forward_features` gave: (b, l, d), or a map with channels first or last."""
    pooled = model.forward_head(features, pre_logits=True)
    pooler = pooled if pooled.ndim == 2 else None  # some towers pool behind the model
    if features.ndim == 4:
        channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        by_channel = features.permute(0, 3, 1, 2) if channels_last else features  # (b, d, rows, columns)
        grid = (by_channel.shape[2], by_channel.shape[3])
        return Output(by_channel.flatten(2).transpose(1, 2), grid, pooler=pooler)
    if features.ndim != 3:
        return Output(pooler=pooler)
    cells = features[:, getattr(model, "num_prefix_tokens", 0) :]
    cls = features[:, 0] if getattr(model, "cls_token", None) is not None else None
    grid = square_grid(cells.shape[1], pixels.shape[2], pixels.shape[3], source)
    return Output(cells, grid, cls, pooler)


def _at_layer(model: Any, pixels: torch.Tensor, layer: int, source: str) -> Output:
    index = block_index(layer, len(model.feature_info), source)
    has_prefix = getattr(model, "num_prefix_tokens", 0) > 0
    arguments = {"return_prefix_tokens": True} if has_prefix else {}
    found = model.forward_intermediates(
        pixels, indices=[index], norm=False, output_fmt="NCHW", intermediates_only=True, **arguments
    )[0]
    by_channel, prefix = found if has_prefix else (found, None)
    grid = (by_channel.shape[2], by_channel.shape[3])
    cls = prefix[:, 0] if prefix is not None and getattr(model, "cls_token", None) is not None else None
    return Output(by_channel.flatten(2).transpose(1, 2), grid, cls)


def _on_the_hub(location: str) -> str:
    """The hub repository of a model name of timm; directories and hub names as they are."""
    import timm

    if Path(location).expanduser().is_dir() or location.startswith((HUB_PREFIX, ".", "/", "~")):
        return location
    if not timm.is_model(location.partition(".")[0]):
        close = difflib.get_close_matches(location.partition(".")[0], timm.list_models(), n=3)
        raise EncoderError(
            f"timm:{location}: no such model; did you mean {' or '.join(close) or 'hf-hub:' + location}?"
        )
    tags = timm.list_pretrained(location.partition(".")[0] + "*")
    config = timm.get_pretrained_cfg(location) if "." not in location or location in tags else None
    if config is None or not config.hf_hub_id:
        raise EncoderError(f"timm:{location}: no weights of that name on the hub; there are {', '.join(tags[:5])}")
    return str(config.hf_hub_id)


def _create(checkpoint: Checkpoint, options: EncoderOptions) -> tuple[Any, tuple[int, int] | None]:
    """The model, its weights loaded strictly (a missing one is an error, never a random layer), and its native size."""
    import timm

    if checkpoint.needs_pickle():
        raise EncoderError(
            f"{checkpoint.source}: timm models are read from safetensors only; convert it once with 'embedcache "
            f"encoders --convert {checkpoint.source} --out DIRECTORY'"
        )
    with checkpoint.loading("model"):
        model = timm.create_model(f"local-dir:{checkpoint.directory}", pretrained=True)
        model.reset_classifier(0)
        has_positions = getattr(model, "pos_embed", None) is not None
        native = tuple(model.patch_embed.img_size) if has_positions and hasattr(model, "patch_embed") else None
        if options.image_size is not None and hasattr(model, "set_input_size"):
            model.set_input_size(img_size=options.image_size)  # interpolates position embeddings
    return model, None if native is None else (int(native[0]), int(native[1]))


def _compose(model: Any, options: EncoderOptions) -> Any:
    from timm.data import create_transform, resolve_model_data_config

    args = {} if options.image_size is None else {"img_size": options.image_size}
    return create_transform(**resolve_model_data_config(model, args=args), is_training=False)
