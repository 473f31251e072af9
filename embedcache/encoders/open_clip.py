"""Models of open_clip, image and text side each as an encoder of its own.

Shape notation: b batch size, l tokens, d width.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from embedcache.encoders.base import EncoderOptions, Modality, quiet_transformers
from embedcache.encoders.checkpoint import HUB_PREFIX, Checkpoint
from embedcache.encoders.image import ImageModel
from embedcache.encoders.pooling import Output, block_index, square_grid
from embedcache.encoders.text import TextModel, TokenIds, report_length
from embedcache.encoders.timm import output_of_features, timm_output
from embedcache.encoders.tokenizing import Tokenize, tokenizer_identity
from embedcache.encoders.transforms import of_compose, paper_transform
from embedcache.errors import EncoderError
from embedcache.fingerprint import fingerprint

_CONFIG = "open_clip_config.json"
_HUB_NAMES = ("hf_model_name", "hf_tokenizer_name", "hf_model_pretrained", "timm_model_pretrained")


def load(
    location: str, modality: Modality | None, options: EncoderOptions, pins: Mapping[str, str]
) -> ImageModel | TextModel:
    """`MODEL/TAG` of open_clip's own list, `hf-hub:` with a name of the hub, or a local directory."""
    if modality is None:
        raise EncoderError(
            f"open_clip:{location}: has an image and a text side; give modality='image' or 'text' (--modality)"
        )
    checkpoint = Checkpoint.find("open_clip", _on_the_hub(location), options, pins)
    settings = checkpoint.json(_CONFIG).get("model_cfg")
    if not isinstance(settings, dict):
        raise EncoderError(f"{checkpoint.source}: no {_CONFIG} with a model_cfg; {checkpoint.remedy}")
    model = _create(checkpoint, settings, options)
    if modality == "image":
        return _image_model(checkpoint, settings, model, options)
    return _text_model(checkpoint, settings, model, options)


def _image_model(
    checkpoint: Checkpoint, settings: Mapping[str, Any], model: Any, options: EncoderOptions
) -> ImageModel:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    visual = model.visual
    compose = image_transform_v2(PreprocessCfg(**visual.preprocess_cfg), is_train=False)
    native = settings["vision_cfg"].get("image_size", 224)
    trunk = getattr(visual, "trunk", None)  # a timm model behind open_clip's adapter

    def forward(pixels: torch.Tensor) -> Output:
        if trunk is not None and options.layer is not None:
            return timm_output(trunk, pixels, options.layer, checkpoint.source)
        if trunk is not None:
            features = trunk.forward_features(pixels)
            output = output_of_features(trunk, features, pixels, checkpoint.source)
            projection = visual.head(trunk.forward_head(features))
            return Output(output.tokens, output.grid, output.cls, output.pooler, projection)
        return _native_image_output(visual, pixels, options.layer, checkpoint.source)

    vision = {key: value for key, value in settings["vision_cfg"].items() if key not in _HUB_NAMES}
    return ImageModel(
        source="open_clip",
        name=checkpoint.name,
        module=visual,
        forward=forward,
        transform=paper_transform() if options.transform == "paper" else of_compose(compose, checkpoint.source),
        config={
            "class": type(visual).__name__,
            "config": vision | {"quick_gelu": settings.get("quick_gelu", False), "embed_dim": settings["embed_dim"]},
        },
        pooling=None if options.layer is not None else "projection",
        native_size=(native, native) if isinstance(native, int) else (int(native[0]), int(native[1])),
        layer=options.layer,
        concurrent=True,
        libraries=("open_clip_torch", "timm", "torchvision"),
        notes=checkpoint.notes,
    )


def _native_image_output(visual: Any, pixels: torch.Tensor, layer: int | None, source: str) -> Output:
    """What open_clip's own image towers give; a ResNet's have a map and no class token."""
    is_vit = hasattr(visual, "class_embedding")
    n_blocks = len(visual.transformer.resblocks) if is_vit else 5
    arguments: dict[str, Any] = {"indices": [_index(layer, n_blocks, source)], "intermediates_only": layer is not None}
    if is_vit:
        arguments |= {"output_fmt": "NLC", "output_extra_tokens": True, "normalize_intermediates": layer is None}
    found = visual.forward_intermediates(pixels, **arguments)
    last = found["image_intermediates"][0]
    projection = found.get("image_features")
    if not is_vit:
        return Output(last.flatten(2).transpose(1, 2), (last.shape[2], last.shape[3]), projection=projection)
    grid = square_grid(last.shape[1], pixels.shape[2], pixels.shape[3], source)
    return Output(last, grid, found["image_intermediates_prefix"][0][:, 0], projection=projection)


def _text_model(checkpoint: Checkpoint, settings: Mapping[str, Any], model: Any, options: EncoderOptions) -> TextModel:
    import open_clip

    text = getattr(model, "text", None)
    context = int(settings["text_cfg"].get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH))
    max_length = report_length(context, options.max_length, checkpoint.source)
    with quiet_transformers(), checkpoint.loading("tokenizer"):
        tokenizer = open_clip.get_tokenizer(f"local-dir:{checkpoint.directory}", context_length=max_length)
    ids_of, identity, pad_id = _tokenizing(tokenizer, max_length, checkpoint)
    has_bert = text is not None and hasattr(text, "config")  # a model of transformers
    if text is None:
        model.visual, model.logit_scale, model.logit_bias = None, None, None  # what is left is the text side

    def forward(ids: torch.Tensor, mask: torch.Tensor) -> Output:
        if has_bert:
            return _bert_output(text, ids, options.layer, checkpoint.source)
        return _native_text_output(model if text is None else text, ids, options.layer, checkpoint.source)

    described = {key: value for key, value in settings["text_cfg"].items() if key not in _HUB_NAMES}
    if text is not None and has_bert:
        own = text.config.to_dict()
        described["model"] = {k: v for k, v in own.items() if k not in ("_name_or_path", "transformers_version")}
    return TextModel(
        source="open_clip",
        name=checkpoint.name,
        module=model if text is None else text,
        forward=forward,
        tokenize=ids_of,
        pad_id=pad_id,
        config={
            "class": type(text if text is not None else model).__name__,
            "config": described | {"quick_gelu": settings.get("quick_gelu", False), "embed_dim": settings["embed_dim"]},
            "tokenizer": identity,
        },
        max_length=max_length,
        pad_to=None if has_bert else context,
        pooling="mean" if options.layer is not None else "projection",
        layer=options.layer,
        concurrent=True,
        libraries=("open_clip_torch", "transformers", "tokenizers"),
        notes=checkpoint.notes,
    )


def _bert_output(text: Any, ids: torch.Tensor, layer: int | None, source: str) -> Output:
    """What open_clip's adapter of transformers gives, its steps one by one."""
    mask = (ids != text.config.pad_token_id).long()
    output = text.transformer(input_ids=ids, attention_mask=mask, output_hidden_states=layer is not None)
    if layer is not None:
        tokens = output.hidden_states[1:][_index(layer, len(output.hidden_states) - 1, source)]
        return Output(tokens, cls=tokens[:, 0])
    pooled = text.pooler(output, mask)
    tokens = output.last_hidden_state
    return Output(tokens, cls=tokens[:, 0], pooler=pooled, projection=text.proj(pooled))


def _native_text_output(text: Any, ids: torch.Tensor, layer: int | None, source: str) -> Output:
    """What open_clip's own text towers give; the first token of a causal one has seen nothing: no class token."""
    whole = hasattr(text, "encode_text")  # of a CLIP the model itself is the text side
    blocks = text.transformer.resblocks
    index, last = [_index(layer, len(blocks), source)], layer is None
    if whole:
        found = text.forward_intermediates(
            text=ids, text_indices=index, normalize_intermediates=last, normalize=False, text_output_fmt="NLC"
        )
    else:
        found = text.forward_intermediates(ids, indices=index, normalize_intermediates=last, output_fmt="NLC")
    return Output(found["text_intermediates"][0], projection=found["text_features"] if last else None)


def _tokenizing(tokenizer: Any, max_length: int, checkpoint: Checkpoint) -> tuple[Any, dict[str, Any], int]:
    """Text to token ids, the tokenizer's identity, and its padding.

    Raises:
        EncoderError: a tokenizer whose content cannot be hashed, or that draws tokens at random.
    """
    clean = getattr(tokenizer, "clean_fn", str)
    cleaning = clean.__name__
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is not None:
        if getattr(tokenizer, "tokenizer_mode", "") or getattr(tokenizer, "strip_sep_token", False):
            raise EncoderError(f"{checkpoint.source}: its tokenizer has a mode of its own, which is not read here")
        plain = Tokenize(inner, max_length)
        identity = tokenizer_identity(inner, checkpoint.source) | {"clean": cleaning}
        return (lambda text: plain(clean(text))), identity, int(inner.pad_token_id or 0)
    if getattr(tokenizer, "reduction_fn", None) is not None:
        raise EncoderError(f"{checkpoint.source}: its tokenizer drops tokens at random, which no cache can hold")
    start, end = tokenizer.sot_token_id, tokenizer.eot_token_id

    def ids_of(text: str) -> TokenIds:
        words = tokenizer.encode(clean(text))
        kept = words[: max_length - 2]
        return TokenIds([start, *kept, end], len(words) - len(kept))

    content = {"vocabulary": tokenizer.encoder, "merges": [list(pair) for pair in tokenizer.bpe_ranks]}
    return ids_of, {"content": fingerprint(content), "truncation_side": "right", "clean": cleaning}, 0


def _index(layer: int | None, n_blocks: int, source: str) -> int:
    """The block's index from 0; None is the last."""
    return n_blocks - 1 if layer is None else block_index(layer, n_blocks, source)


def _on_the_hub(location: str) -> str:
    """The hub repository of one of open_clip's own names and tags; directories and hub names as they are."""
    import open_clip

    if Path(location).expanduser().is_dir() or location.startswith((HUB_PREFIX, ".", "/", "~")):
        return location
    name, _, tag = location.partition("/")
    repository = os.path.split(open_clip.get_pretrained_cfg(name, tag).get("hf_hub", ""))[0]
    if not repository:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise EncoderError(f"open_clip:{location}: no such name and tag on the hub; tags of {name!r}: {tags}")
    return repository


def _create(checkpoint: Checkpoint, settings: Mapping[str, Any], options: EncoderOptions) -> Any:
    """The whole model with its weights loaded strictly."""
    import open_clip

    checkpoint.needs_pickle()
    text = dict(settings.get("text_cfg", {}))
    if "hf_model_name" in text and "model_type" in checkpoint.json("config.json"):
        # the text model's own config lies beside the weights, and its weights are among those of the whole
        text |= {"hf_model_name": str(checkpoint.directory), "hf_model_pretrained": False}
    with quiet_transformers(), checkpoint.loading("model"):
        return open_clip.create_model(
            f"local-dir:{checkpoint.directory}",
            force_image_size=options.image_size,
            weights_only=True,
            require_pretrained=True,
            **({"text_cfg": text} if "hf_model_name" in text else {}),
        )
