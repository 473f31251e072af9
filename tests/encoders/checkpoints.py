"""Small random checkpoints of every source library, written as that library writes them."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from embedcache.encoders.base import quiet_transformers
from embedcache.encoders.random_init import write_tiny

REPORTS = ["The lungs are clear.", "Heart size is normal. There is an opacity in the left lower zone.", "Normal."]
SIDE = 32  # input size of the small image models
_VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": SIDE,
    "patch_size": 8, "initializer_range": 0.3,
}  # fmt: skip
_TEXT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


def write_images_of_hf(root: Path) -> dict[str, Path]:
    """Image models of transformers: with and without class token, registers and position embeddings."""
    import transformers as t

    models = {
        "vit": t.ViTModel(t.ViTConfig(**_VISION), add_pooling_layer=True),
        "dinov2": t.Dinov2Model(t.Dinov2Config(**_VISION)),
        "dinov2-registers": t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**_VISION, num_register_tokens=4)),
        "dinov3": t.DINOv3ViTModel(t.DINOv3ViTConfig(**_VISION, num_register_tokens=4)),
        "swin": t.SwinModel(
            t.SwinConfig(image_size=64, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[1, 2], window_size=4)
        ),
        "convnext": t.ConvNextModel(t.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])),
    }
    for name, model in models.items():
        side = 64 if name in ("swin", "convnext") else SIDE
        model.save_pretrained(root / name)
        t.BitImageProcessor(
            size={"shortest_edge": side + 4}, crop_size={"height": side, "width": side},
            image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.25],
        ).save_pretrained(root / name)  # fmt: skip
    return {name: root / name for name in models}


def write_towers_of_hf(root: Path, tokenizer: Path) -> dict[str, Path]:
    """CLIP and SigLIP of transformers, both sides with BERT's tokenizer; and a CLIP image side alone."""
    import transformers as t

    words = t.AutoTokenizer.from_pretrained(tokenizer)
    ids = {"pad_token_id": words.pad_token_id, "bos_token_id": words.cls_token_id, "eos_token_id": words.sep_token_id}
    text = {**{k: v for k, v in _TEXT.items() if k != "initializer_range"}, "vocab_size": len(words), **ids}
    vision = {k: v for k, v in _VISION.items() if k != "initializer_range"}
    clip = t.CLIPModel(t.CLIPConfig(vision_config=vision, text_config=text, projection_dim=16))
    clip.save_pretrained(root / "clip")
    t.SiglipModel(t.SiglipConfig(vision_config=vision, text_config=text)).save_pretrained(root / "siglip")
    t.CLIPVisionModelWithProjection(t.CLIPVisionConfig(**vision, projection_dim=16)).save_pretrained(
        root / "clip-vision"
    )
    for name in ("clip", "siglip"):
        words.save_pretrained(root / name)
        t.SiglipImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(root / name)
    t.SiglipImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(root / "clip-vision")
    return {name: root / name for name in ("clip", "siglip", "clip-vision")}


def write_texts_of_hf(root: Path, tokenizer: Path) -> dict[str, Path]:
    """Text models of transformers with BERT's tokenizer."""
    import transformers as t

    words = t.AutoTokenizer.from_pretrained(tokenizer)
    common = {**_TEXT, "vocab_size": len(words), "pad_token_id": words.pad_token_id}
    ends = {"cls_token_id": words.cls_token_id, "sep_token_id": words.sep_token_id,
            "bos_token_id": words.cls_token_id, "eos_token_id": words.sep_token_id}  # fmt: skip
    models = {
        "bert-pooler": t.BertModel(t.BertConfig(**common)),
        "modernbert": t.ModernBertModel(t.ModernBertConfig(**common, **ends, global_attn_every_n_layers=2)),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        words.save_pretrained(root / name)
    return {name: root / name for name in models}


def write_cxr_bert(root: Path, tokenizer: Path) -> Path:
    """A checkpoint as BiomedVLP-CXR-BERT's: BERT's weights, a projection, and names that ask for code from the hub."""
    import transformers as t

    words = t.AutoTokenizer.from_pretrained(tokenizer)
    config = t.BertConfig(**{**_TEXT, "vocab_size": len(words), "pad_token_id": words.pad_token_id})
    bert = t.BertModel(config, add_pooling_layer=False)
    head = torch.nn.ModuleDict(
        {"dense_to_hidden": torch.nn.Linear(32, 16), "LayerNorm": torch.nn.LayerNorm(16, eps=1e-12),
         "dense_to_output": torch.nn.Linear(16, 16)}
    )  # fmt: skip
    weights = {f"bert.{k}": v for k, v in bert.state_dict().items()}
    weights |= {f"cls_projection_head.{k}": v for k, v in head.state_dict().items()}
    words.save_pretrained(root)
    save_file({k: v.contiguous() for k, v in weights.items()}, root / "model.safetensors", metadata={"format": "pt"})
    auto_map = {"AutoConfig": "configuration_cxrbert.CXRBertConfig", "AutoModel": "modeling_cxrbert.CXRBertModel"}
    described = {**config.to_dict(), "model_type": "cxr-bert", "projection_size": 16, "auto_map": auto_map}
    (root / "config.json").write_text(json.dumps({**described, "architectures": ["CXRBertModel"]}))
    settings = json.loads((root / "tokenizer_config.json").read_text())
    named = {"tokenizer_class": "CXRBertTokenizer", "auto_map": {"AutoTokenizer": ["x.CXRBertTokenizer", None]}}
    (root / "tokenizer_config.json").write_text(json.dumps({**settings, **named}))
    return root


def write_sentence(root: Path, bert: Path, *, dense: bool = True) -> Path:
    """A sentence-transformers checkpoint: class token, a dense layer with tanh, normalisation."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    transformer = Transformer(str(bert), max_seq_length=24)
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="cls")
    between = [Dense(in_features=pooling.get_embedding_dimension(), out_features=10)] if dense else []
    SentenceTransformer(modules=[transformer, pooling, *between, Normalize()], device="cpu").save(str(root))
    return root


def write_open_clip(root: Path, bert: Path) -> dict[str, Path]:
    """Checkpoints of open_clip: its own towers, a text side without causal mask, a ResNet, and one as BiomedCLIP."""
    vit = {"image_size": SIDE, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    words = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    timm_vit = {
        "timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False, "timm_pool": "",
        "timm_proj": "linear", "image_size": 224,
    }  # fmt: skip
    of_hf = {
        "hf_model_name": "made/bert", "hf_tokenizer_name": "made/bert", "hf_proj_type": "mlp",
        "hf_pooler_type": "cls_last_hidden_state_pooler", "context_length": 100,
    }  # fmt: skip
    made = {
        "native": {"vision_cfg": vit, "text_cfg": words, "quick_gelu": True},
        "custom": {"vision_cfg": vit, "text_cfg": {**words, "no_causal_mask": True}, "custom_text": True},
        "resnet": {
            "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
            "text_cfg": words,
        },
        "biomed": {"vision_cfg": timm_vit, "text_cfg": of_hf},
    }
    for name, settings in made.items():
        _write_one_open_clip(root / name, settings, bert)
    for file in bert.iterdir():
        if file.suffix in (".json", ".txt"):
            shutil.copyfile(file, root / "biomed" / file.name)
    return {name: root / name for name in made}


def _write_one_open_clip(directory: Path, settings: dict[str, Any], bert: Path) -> None:
    import open_clip
    from open_clip.model import CustomTextCLIP

    directory.mkdir(parents=True)
    preprocess = {
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.25],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    written = {"model_cfg": {"embed_dim": 16, **settings}, "preprocess_cfg": preprocess}
    (directory / "open_clip_config.json").write_text(json.dumps(written))
    building = copy.deepcopy(written["model_cfg"])
    of_hf = "hf_model_name" in building["text_cfg"]
    if of_hf:
        building["text_cfg"] |= {"hf_model_name": str(bert), "hf_model_pretrained": False}
    model = (CustomTextCLIP if building.pop("custom_text", False) or of_hf else open_clip.CLIP)(**building)
    save_file(
        {k: v.clone().contiguous() for k, v in model.state_dict().items()}, directory / "open_clip_model.safetensors"
    )


def write_timm(root: Path) -> dict[str, Path]:
    """Checkpoints of timm in its `local-dir:` format: a ViT with registers, a ViT, Swin (channels last), a ResNet."""
    import timm
    from timm.models import save_for_hf

    small = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": SIDE}
    made = {
        "vit": ("vit_tiny_patch16_224", {**small, "patch_size": 8}),
        "registers": ("vit_small_patch14_reg4_dinov2", {**small, "patch_size": 8}),
        "swin": (
            "swin_tiny_patch4_window7_224",
            {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "img_size": 56},
        ),
        "resnet": ("resnet10t", {}),
    }  # fmt: skip
    for name, (architecture, arguments) in made.items():
        side = arguments.get("img_size", 64)
        model = timm.create_model(architecture, pretrained=False, num_classes=5, **arguments)
        model.pretrained_cfg |= {"input_size": (3, side, side), "crop_pct": 0.875, "num_classes": 5}
        save_for_hf(model, str(root / name), model_args=arguments, safe_serialization=True)
    return {name: root / name for name in made}


def write_xrv(root: Path) -> dict[str, Path]:
    """Checkpoints of torchxrayvision as `embedcache encoders --convert` writes them."""
    import torchvision
    from torchxrayvision import autoencoders, models

    resnet = torchvision.models.resnet50(num_classes=18)
    resnet.conv1 = torch.nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
    made = {
        "101-elastic": autoencoders.ResNetAE101(),
        "densenet121-res224-nih": models.DenseNet(num_classes=18),
        "resnet50-res512-all": resnet,
    }
    for name, model in made.items():
        (root / name).mkdir(parents=True)
        weights = {k: v.clone().contiguous() for k, v in model.state_dict().items()}
        save_file(weights, root / name / "model.safetensors")
        (root / name / "config.json").write_text(json.dumps({"weights": name}))
    return {name: root / name for name in made}


def write_bert(root: Path) -> Path:
    """A small BERT with a tokenizer of the reports."""
    return write_tiny("tiny-bert", root, seed=0, reports=REPORTS)


def write_all(root: Path) -> dict[str, dict[str, Path]]:
    """Everything above, by source library and name."""
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(0)
        bert = write_bert(root / "bert")
        texts = {"bert": bert, **write_texts_of_hf(root / "texts", bert)}
        texts |= {"cxr-bert": write_cxr_bert(root / "cxr-bert", bert), "sentence": write_sentence(root / "st", bert)}
        return {
            "hf-image": write_images_of_hf(root / "images"),
            "hf-towers": write_towers_of_hf(root / "towers", bert),
            "hf-text": texts,
            "open_clip": write_open_clip(root / "open_clip", bert),
            "timm": write_timm(root / "timm"),
            "xrv": write_xrv(root / "xrv"),
        }
