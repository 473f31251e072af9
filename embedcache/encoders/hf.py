"""Models of transformers: single encoders, and the image and text sides of checkpoints such as CLIP and SigLIP.

Shape notation: b batch size, l tokens, d width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from embedcache.encoders.base import EncoderOptions, Modality, Pooling, quiet_transformers
from embedcache.encoders.checkpoint import Checkpoint
from embedcache.encoders.image import ImageModel
from embedcache.encoders.pooling import Output, block_index, square_grid
from embedcache.encoders.sentence import SentenceModules, sentence_settings
from embedcache.encoders.text import TextModel, report_length
from embedcache.encoders.tokenizing import Tokenize, load_tokenizer, tokenizer_identity
from embedcache.encoders.transforms import ImageTransform, of_processor, paper_transform, processor_sizes
from embedcache.errors import EncoderError

# what a config says of files and versions, not of values
_CONFIG_NOT_VALUES = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "auto_map")
_CLASS_TOKENS = ("cls_token", "class_embedding")
_PREFIX_TOKENS = (*_CLASS_TOKENS, "register_tokens", "distillation_token")
# these have no class token but an attention that pools; their text sides read padding as they read words
_SIGLIP = ("siglip_vision_model", "siglip_text_model", "siglip2_text_model")
# checkpoints of a known architecture under a name of their own, which transformers would load by code from the hub
_OF_KNOWN_ARCHITECTURE = {"cxr-bert": "bert"}


class CxrBertProjection(torch.nn.Module):
    """The head that maps CXR-BERT's class token into the space of BioViL (Boecking et al. 2022)."""

    def __init__(self, width: int, projected: int) -> None:
        super().__init__()
        self.dense_to_hidden = torch.nn.Linear(width, projected)
        self.LayerNorm = torch.nn.LayerNorm(projected, eps=1e-12)
        self.dense_to_output = torch.nn.Linear(projected, projected)

    def forward(self, cls: torch.Tensor) -> torch.Tensor:
        return self.dense_to_output(self.LayerNorm(torch.nn.functional.gelu(self.dense_to_hidden(cls))))


def load(
    location: str, modality: Modality | None, options: EncoderOptions, pins: Mapping[str, str]
) -> ImageModel | TextModel:
    """A hub name, `name@revision` or a local directory in the transformers format."""
    checkpoint = Checkpoint.find("hf", location, options, pins)
    if (modality or _guess_modality(checkpoint)) == "image":
        return _load_image(checkpoint, options)
    return _load_text(checkpoint, options)


def _guess_modality(checkpoint: Checkpoint) -> Modality:
    """Image or text, by whether the model's config speaks of channels or of a vocabulary.

    Raises:
        EncoderError: both or neither.
    """
    config = _config(checkpoint)
    is_image, is_text = hasattr(config, "num_channels"), hasattr(config, "vocab_size")
    if _is_dual(config) or is_image == is_text:
        raise EncoderError(
            f"{checkpoint.source}: a {config.model_type} model takes images and texts; give modality='image' or 'text' "
            "(--modality)"
        )
    return "image" if is_image else "text"


def _load_image(checkpoint: Checkpoint, options: EncoderOptions) -> ImageModel:
    """An image model with its own image processor."""
    model, projection = _load_side(checkpoint, options, "image")
    prefix = [p for name, p in model.named_parameters() if name.split(".")[-1] in _PREFIX_TOKENS]
    n_prefix = sum(p.shape[1] if p.ndim == 3 else 1 for p in prefix)
    has_class_token = any(name.split(".")[-1] in _CLASS_TOKENS for name, _ in model.named_parameters())
    transform, native = _transform(checkpoint, options), _native_size(model)
    resized = native is not None and transform.output_shape(checkpoint.source)[1:] != native
    arguments = {"interpolate_pos_encoding": True} if resized and _takes_sizes_on_request(model) else {}

    def forward(pixels: torch.Tensor) -> Output:
        output = model(pixel_values=pixels, output_hidden_states=options.layer is not None, **arguments)
        sequence, cls = _at_layer(output, options, checkpoint), None
        if sequence.ndim == 4:  # a convolutional map (b, d, rows, columns)
            grid, cells = (sequence.shape[2], sequence.shape[3]), sequence.flatten(2).transpose(1, 2)
        else:
            cells = sequence[:, n_prefix:]
            cls = sequence[:, 0] if has_class_token else None
            grid = square_grid(cells.shape[1], pixels.shape[2], pixels.shape[3], checkpoint.source)
        pooler = getattr(output, "pooler_output", None) if options.layer is None else None
        projected = None if projection is None or pooler is None else projection(pooler)
        return Output(cells, grid, cls, pooler, projected)

    pooling: Pooling = "cls" if has_class_token else "pooler" if model.config.model_type in _SIGLIP else "mean"
    if options.layer is not None:
        pooling = "cls" if has_class_token else "mean"
    elif projection is not None:
        pooling = "projection"
    return ImageModel(
        source="hf",
        name=checkpoint.name,
        module=_together(model, projection),
        forward=forward,
        transform=transform,
        config=_architecture(model, checkpoint),
        pooling=pooling,
        native_size=native,
        layer=options.layer,
        concurrent=not options.trust_remote_code,
        libraries=("transformers", "torchvision"),
        notes=checkpoint.notes,
    )


def _load_text(checkpoint: Checkpoint, options: EncoderOptions) -> TextModel:
    """A text model with its own tokenizer, and with its own sentence modules unless a pooling or layer is named."""
    sentence = SentenceModules.read(checkpoint) if options.pooling is None and options.layer is None else None
    model, projection = _load_side(checkpoint, options, "text")
    tokenizer = load_tokenizer(checkpoint)
    probe = tokenizer("a")
    if any(probe.get("token_type_ids", [])):
        raise EncoderError(f"{checkpoint.source}: its tokenizer gives single texts token types, which is not read here")
    has_class_token = tokenizer.cls_token_id is not None and probe["input_ids"][0] == tokenizer.cls_token_id
    reads_padding = model.config.model_type in _SIGLIP
    authors_length, lower_case = sentence_settings(checkpoint)
    limit = min(tokenizer.model_max_length, _positions(model))
    if tokenizer.vocab_size > model.config.vocab_size:
        raise EncoderError(
            f"{checkpoint.source}: the tokenizer has {tokenizer.vocab_size} words, the model "
            f"{model.config.vocab_size}; they do not belong together"
        )
    max_length = report_length(limit, options.max_length, checkpoint.source, authors=authors_length)

    def forward(ids: torch.Tensor, mask: torch.Tensor) -> Output:
        given = {} if reads_padding else {"attention_mask": mask}
        output = model(input_ids=ids, output_hidden_states=options.layer is not None, **given)
        tokens = _at_layer(output, options, checkpoint)
        cls = tokens[:, 0] if has_class_token else None
        pooler = getattr(output, "pooler_output", None) if options.layer is None else None
        pooled = cls if isinstance(projection, CxrBertProjection) else pooler
        projected = None if projection is None or pooled is None else projection(pooled)
        return Output(tokens, cls=cls, pooler=pooler, projection=projected)

    pooling: Pooling = "mean" if sentence is None else sentence.pooling
    if options.layer is None and not isinstance(projection, CxrBertProjection):
        pooling = "projection" if projection is not None else "pooler" if reads_padding else pooling
    return TextModel(
        source="hf",
        name=checkpoint.name,
        module=_together(model, projection, None if sentence is None else sentence.head),
        forward=forward,
        tokenize=Tokenize(
            tokenizer, max_length, prefix="" if sentence is None else sentence.prompt, lower_case=lower_case
        ),
        pad_id=tokenizer.pad_token_id or 0,
        config={
            **_architecture(model, checkpoint),
            "tokenizer": tokenizer_identity(tokenizer, checkpoint.source) | {"lower_case": lower_case},
            "sentence": None if sentence is None else sentence.identity,
        },
        max_length=max_length,
        pad_to=limit if reads_padding else None,
        pooling=pooling,
        head=None if sentence is None else sentence.head,
        layer=options.layer,
        concurrent=not options.trust_remote_code,
        libraries=("transformers", "tokenizers"),
        notes=checkpoint.notes,
    )


def _config(checkpoint: Checkpoint) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    plain = checkpoint.json("config.json")
    known = _OF_KNOWN_ARCHITECTURE.get(str(plain.get("model_type")))
    with quiet_transformers(), checkpoint.loading("config.json"):
        if known and not checkpoint.trust_remote_code:
            return CONFIG_MAPPING[known](**{k: v for k, v in plain.items() if k not in ("model_type", "auto_map")})
        return AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=checkpoint.trust_remote_code)


def _is_dual(config: Any) -> bool:
    return hasattr(config, "vision_config") and hasattr(config, "text_config")


def _load_side(
    checkpoint: Checkpoint, options: EncoderOptions, modality: Modality
) -> tuple[Any, torch.nn.Module | None]:
    """The model of one modality, with every weight from the checkpoint, and its projection into a shared space.

    Raises:
        EncoderError: a weight that is used is not in the checkpoint and would be random.
    """
    config = _config(checkpoint)
    if getattr(config, "is_encoder_decoder", False):
        raise EncoderError(f"{checkpoint.source}: a {config.model_type} model decodes too; give a pure encoder")
    whole, missing = _load_whole(checkpoint, config)
    side, others = ("vision_model", "text_") if modality == "image" else ("text_model", ("vision_", "visual_"))
    model = getattr(whole, side, None)
    if _is_dual(config):
        if model is None:
            raise EncoderError(f"{checkpoint.source}: a {config.model_type} model has no {side} to be taken alone")
        missing = [key for key in missing if not key.startswith(others)]
    names = ("visual_projection", "vision_projection") if modality == "image" else ("text_projection",)
    projection = next((p for name in names if (p := getattr(whole, name, None)) is not None), None)
    model = whole if model is None else model
    if options.pooling == "projection" and _model_type(checkpoint) == "cxr-bert":
        projection = _cxr_bert_projection(checkpoint, config)
    if options.pooling != "pooler":
        missing = [key for key in missing if not key.startswith("pooler.")]
        pooler = getattr(model, "pooler", None)
        if pooler is not None and any(True for _ in pooler.parameters()):
            model.pooler = None  # not used, and often random
    if missing:
        remedy = (
            "choose pooling cls or mean"
            if all(key.startswith("pooler.") for key in missing)
            else "use a checkpoint of the whole model"
        )
        shown = ", ".join(missing[:4]) + (" and more" if len(missing) > 4 else "")
        raise EncoderError(f"{checkpoint.source}: the checkpoint lacks {shown}, which would be random; {remedy}")
    return model, projection


def _load_whole(checkpoint: Checkpoint, config: Any) -> tuple[Any, list[str]]:
    """The model that the checkpoint holds, and the names of its weights that the checkpoint does not hold."""
    import transformers

    if (checkpoint.directory / "adapter_config.json").is_file():
        raise EncoderError(
            f"{checkpoint.source}: holds an adapter, not a whole model; merge it once with peft's merge_and_unload() "
            "and save_pretrained()"
        )
    pickled = checkpoint.needs_pickle()
    named = checkpoint.json("config.json").get("architectures") or [""]
    with_projection = str(named[0]).endswith("ModelWithProjection")
    loader = getattr(transformers, named[0], None) if with_projection else None
    if _model_type(checkpoint) in _OF_KNOWN_ARCHITECTURE and not checkpoint.trust_remote_code:
        loader = transformers.MODEL_MAPPING[type(config)]
    with quiet_transformers(), checkpoint.loading("model"):
        model, info = (loader or transformers.AutoModel).from_pretrained(
            checkpoint.directory,
            config=config,
            use_safetensors=not pickled,
            trust_remote_code=checkpoint.trust_remote_code,
            output_loading_info=True,
            dtype=torch.float32,
        )
    return model, sorted({*info["missing_keys"], *info["mismatched_keys"]})


def _model_type(checkpoint: Checkpoint) -> str:
    return str(checkpoint.json("config.json").get("model_type"))


def _cxr_bert_projection(checkpoint: Checkpoint, config: Any) -> CxrBertProjection:
    """Reads the head that transformers leaves out when it takes the checkpoint for the plain BERT that it is."""
    weights = checkpoint.weights()
    prefix = "cls_projection_head."
    head = CxrBertProjection(config.hidden_size, int(config.projection_size))
    with checkpoint.loading(f"projection ({prefix}*)"):
        head.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    return head


def _architecture(model: Any, checkpoint: Checkpoint) -> dict[str, Any]:
    config = {key: value for key, value in model.config.to_dict().items() if key not in _CONFIG_NOT_VALUES}
    return {"class": type(model).__name__, "config": config, "code": checkpoint.code()}


def _together(*modules: torch.nn.Module | None) -> torch.nn.Module:
    """All weights that are used, as one module to be hashed and frozen."""
    return torch.nn.ModuleList([module for module in modules if module is not None])


def _at_layer(output: Any, options: EncoderOptions, checkpoint: Checkpoint) -> torch.Tensor:
    """The last hidden state, or the output of block `layer`: counted from 1, or from -1 backwards."""
    if options.layer is None:
        return output.last_hidden_state
    blocks = output.hidden_states[1:]  # before them stand the embeddings
    return blocks[block_index(options.layer, len(blocks), checkpoint.source)]


def _transform(checkpoint: Checkpoint, options: EncoderOptions) -> ImageTransform:
    if options.transform == "paper":
        return paper_transform()
    from transformers import AutoImageProcessor

    with quiet_transformers(), checkpoint.loading("preprocessor_config.json"):
        processor = AutoImageProcessor.from_pretrained(
            checkpoint.directory, trust_remote_code=checkpoint.trust_remote_code
        )
    if options.image_size is not None:
        sizes = processor_sizes(processor.to_dict(), options.image_size, checkpoint.source)
        with quiet_transformers(), checkpoint.loading("preprocessor_config.json"):
            processor = type(processor).from_pretrained(checkpoint.directory, **sizes)
    return of_processor(processor, checkpoint.source)


def _native_size(model: Any) -> tuple[int, int] | None:
    """The size that the model's position embeddings are for; None where it has none."""
    has_positions = any("position_embedding" in name for name, _ in model.named_parameters())
    size = getattr(model.config, "image_size", None)
    if not has_positions or size is None:
        return None
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _takes_sizes_on_request(model: Any) -> bool:
    """Whether the model interpolates its position embeddings only where it is told to."""
    import inspect

    return "interpolate_pos_encoding" in inspect.signature(type(model).forward).parameters


def _positions(model: Any) -> int:
    """Most positions of a text."""
    embeddings = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(embeddings, "padding_idx", None)  # RoBERTa counts positions from behind its padding index
    return getattr(model.config, "max_position_embeddings", 10**9) - (padding + 1 if padding is not None else 0)
