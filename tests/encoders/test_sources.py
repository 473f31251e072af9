"""Every source's embeddings and tokens are those of its library's own documented call on the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import REPORTS
from PIL import Image

import embedcache
from embedcache.data.radiograph import DecodePolicy
from embedcache.data.reports import ReportPolicy
from embedcache.errors import EncoderError

AS_THEY_ARE = ReportPolicy(unit="report")


def check_equal(got: np.ndarray, expected: torch.Tensor | np.ndarray) -> None:
    """Largest difference under 1e-5, and every row's cosine above 0.99999."""
    expected = np.asarray(expected, dtype=np.float32)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() < 1e-5
    rows, same = got.reshape(len(got), -1), expected.reshape(len(got), -1)
    cosine = (rows * same).sum(1) / (np.linalg.norm(rows, axis=1) * np.linalg.norm(same, axis=1))
    assert cosine.min() > 0.99999


def run_images(source: str, images: list[Path], **options: Any) -> tuple[Any, np.ndarray, np.ndarray]:
    encoder = embedcache.load_encoder(source, device="cpu", decode=DecodePolicy(), **options)
    encoded = encoder.encode([encoder.prepare(path) for path in images], tokens=True)
    assert encoded.embeddings.shape == (len(images), encoder.dim)
    assert encoded.tokens.shape == (len(images), np.prod(encoder.token_grid), encoder.token_dim)
    return encoder, encoded.embeddings, encoded.tokens


def run_texts(source: str, **options: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
    encoder = embedcache.load_encoder(source, device="cpu", report=AS_THEY_ARE, **options)
    encoded = encoder.encode([encoder.prepare(text) for text in REPORTS], tokens=True)
    assert encoded.embeddings.shape == (len(REPORTS), encoder.dim)
    assert encoded.lengths.max() == encoded.tokens.shape[1]
    return encoder, encoded.embeddings, encoded.tokens, encoded.lengths


def opened(images: list[Path]) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in images]


# transformers


@pytest.mark.parametrize(
    ("name", "n_prefix"),
    [("vit", 1), ("dinov2", 1), ("dinov2-registers", 5), ("dinov3", 5), ("swin", 0), ("convnext", None)],
)
def test_image_models_of_transformers(made, images: list[Path], name: str, n_prefix: int | None) -> None:
    from transformers import AutoImageProcessor, AutoModel

    directory = made["hf-image"][name]
    processor, model = AutoImageProcessor.from_pretrained(directory), AutoModel.from_pretrained(directory).eval()
    with torch.inference_mode():
        output = model(**processor(opened(images), return_tensors="pt"), output_hidden_states=True)
    last = output.last_hidden_state
    cells = last.flatten(2).transpose(1, 2) if n_prefix is None else last[:, n_prefix:]
    encoder, embeddings, tokens = run_images(f"hf:{directory}", images)
    check_equal(embeddings, last[:, 0] if n_prefix else cells.mean(1))
    check_equal(tokens, cells)
    assert encoder.record.identity["pooling"] == ("cls" if n_prefix else "mean")
    check_equal(run_images(f"hf:{directory}", images, pooling="mean")[1], cells.mean(1))
    check_equal(run_images(f"hf:{directory}", images, pooling="pooler")[1], output.pooler_output.flatten(1))
    if n_prefix:
        both = torch.cat([last[:, 0], cells.mean(1)], dim=1)
        check_equal(run_images(f"hf:{directory}", images, pooling="cls_mean")[1], both)
        first_block = output.hidden_states[1]
        check_equal(run_images(f"hf:{directory}", images, layer=1)[1], first_block[:, 0])
        check_equal(run_images(f"hf:{directory}", images, layer=-2)[2], first_block[:, n_prefix:])


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_both_sides_of_dual_checkpoints(made, images: list[Path], name: str) -> None:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    directory = made["hf-towers"][name]
    model, tokenizer = AutoModel.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)
    processor = AutoImageProcessor.from_pretrained(directory)
    padding = {"padding": "max_length", "max_length": 64} if name == "siglip" else {"padding": True}
    words = tokenizer(REPORTS, return_tensors="pt", **padding)
    given = {"input_ids": words["input_ids"]} if name == "siglip" else dict(words)
    given.pop("token_type_ids", None)
    with torch.inference_mode():
        pixels = processor(opened(images), return_tensors="pt")["pixel_values"]
        image, text = model.get_image_features(pixels), model.get_text_features(**given)
    encoder, embeddings, tokens = run_images(f"hf:{directory}", images, modality="image")
    check_equal(embeddings, image.pooler_output)
    check_equal(tokens, image.last_hidden_state[:, 0 if name == "siglip" else 1 :])
    assert encoder.record.identity["pooling"] == ("pooler" if name == "siglip" else "projection")
    _, embeddings, tokens, lengths = run_texts(f"hf:{directory}", modality="text")
    check_equal(embeddings, text.pooler_output)
    for k, length in enumerate(lengths):
        check_equal(tokens[k : k + 1, :length], text.last_hidden_state[k : k + 1, :length])
    with pytest.raises(EncoderError, match="takes images and texts; give modality='image' or 'text'"):
        embedcache.load_encoder(f"hf:{directory}")


def test_one_side_of_a_dual_model_has_the_fingerprint_of_its_own_weights_alone(made, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    copy = tmp_path / "clip"
    shutil.copytree(made["hf-towers"]["clip"], copy)
    weights = load_file(copy / "model.safetensors")
    name = next(k for k in weights if k.startswith("text_model.encoder"))
    weights[name].view(-1).view(torch.int32)[0] ^= 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})

    def fingerprint(directory: Path, modality: str) -> str:
        return embedcache.load_encoder(f"hf:{directory}", modality=modality, device="cpu").fingerprint

    original = made["hf-towers"]["clip"]
    assert fingerprint(copy, "image") == fingerprint(original, "image")
    assert fingerprint(copy, "text") != fingerprint(original, "text")


def test_a_clip_image_side_that_was_saved_alone(made, images: list[Path]) -> None:
    from transformers import AutoImageProcessor, CLIPVisionModelWithProjection

    directory = made["hf-towers"]["clip-vision"]
    processor, model = (
        AutoImageProcessor.from_pretrained(directory),
        CLIPVisionModelWithProjection.from_pretrained(directory),
    )
    with torch.inference_mode():
        output = model.eval()(**processor(opened(images), return_tensors="pt"))
    check_equal(run_images(f"hf:{directory}", images)[1], output.image_embeds)


@pytest.mark.parametrize("name", ["bert", "bert-pooler", "modernbert"])
def test_text_models_of_transformers(made, name: str) -> None:
    from transformers import AutoModel, AutoTokenizer

    directory = made["hf-text"][name]
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModel.from_pretrained(directory).eval()
    inputs = tokenizer(REPORTS, padding=True, return_tensors="pt")
    if name == "modernbert":
        inputs.pop("token_type_ids", None)
    with torch.inference_mode():
        output = model(**inputs, output_hidden_states=True)
    mask = inputs["attention_mask"].unsqueeze(-1)
    _, embeddings, tokens, lengths = run_texts(f"hf:{directory}")
    check_equal(embeddings, (output.last_hidden_state * mask).sum(1) / mask.sum(1))
    np.testing.assert_array_equal(lengths, inputs["attention_mask"].sum(1))
    for k, length in enumerate(lengths):
        check_equal(tokens[k : k + 1, :length], output.last_hidden_state[k : k + 1, :length])
    check_equal(run_texts(f"hf:{directory}", pooling="cls")[1], output.last_hidden_state[:, 0])
    first = output.hidden_states[1]
    check_equal(run_texts(f"hf:{directory}", layer=1)[1], (first * mask).sum(1) / mask.sum(1))
    if name == "bert-pooler":
        check_equal(run_texts(f"hf:{directory}", pooling="pooler")[1], output.pooler_output)


@pytest.mark.parametrize("own", [True, False])
def test_sentence_encoders_equal_sentence_transformers(made, own: bool) -> None:
    """The small checkpoint has a dense layer and normalises; all-MiniLM-L6-v2 has its published weights."""
    from sentence_transformers import SentenceTransformer

    from embedcache.encoders.catalogue import CATALOGUE

    source = f"hf:{made['hf-text']['sentence']}" if own else CATALOGUE["minilm"].local_source()
    expected = SentenceTransformer(source.removeprefix("hf:"), device="cpu").encode(REPORTS)
    encoder, embeddings, *_ = run_texts(source if own else "minilm")
    check_equal(embeddings, expected)
    assert encoder.record.identity["max_length"] == (24 if own else 112)
    raw = run_texts(source, pooling="cls" if own else "mean")
    assert raw[0].record.identity["model"]["sentence"] is None
    if not own:  # normalisation takes the length away and nothing else
        check_equal(raw[1] / np.linalg.norm(raw[1], axis=1, keepdims=True), expected)


def test_cxr_bert_needs_no_code_from_the_hub(made) -> None:
    """Its checkpoint asks for code; it is a BERT with one more head, which its authors apply to the class token."""
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel, BertTokenizerFast

    directory = made["hf-text"]["cxr-bert"]
    weights = load_file(directory / "model.safetensors")
    model = BertModel(BertConfig.from_json_file(directory / "config.json"), add_pooling_layer=False).eval()
    model.load_state_dict({k.removeprefix("bert."): v for k, v in weights.items() if k.startswith("bert.")})
    inputs = BertTokenizerFast.from_pretrained(directory)(REPORTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        cls = model(**inputs).last_hidden_state[:, 0]
        head = {k.removeprefix("cls_projection_head."): v for k, v in weights.items()}
        hidden = torch.nn.functional.linear(cls, head["dense_to_hidden.weight"], head["dense_to_hidden.bias"])
        hidden = torch.nn.functional.gelu(hidden)
        normed = torch.nn.functional.layer_norm(hidden, (16,), head["LayerNorm.weight"], head["LayerNorm.bias"], 1e-12)
        projected = torch.nn.functional.linear(normed, head["dense_to_output.weight"], head["dense_to_output.bias"])
    check_equal(run_texts(f"hf:{directory}", pooling="cls")[1], cls)
    check_equal(run_texts(f"hf:{directory}", pooling="projection")[1], projected)
    with pytest.raises(EncoderError, match=r"lacks pooler\..*would be random"):
        embedcache.load_encoder(f"hf:{directory}", pooling="pooler")


# open_clip


@pytest.mark.parametrize("name", ["native", "custom", "resnet", "biomed"])
def test_both_sides_of_open_clip(made, images: list[Path], name: str) -> None:
    import open_clip

    directory = made["open_clip"][name]
    bert = str(made["hf-text"]["bert"])
    extra = {}
    if name == "biomed":
        import json

        text = json.loads((directory / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
        extra = {"text_cfg": {**text, "hf_model_name": bert, "hf_model_pretrained": False}}
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{directory}", **extra)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{directory}")
    model.eval()
    with torch.inference_mode():
        pixels = torch.stack([preprocess(Image.open(path)) for path in images])
        image, text = model.encode_image(pixels), model.encode_text(tokenizer(REPORTS))
    source = f"open_clip:{directory}"
    encoder, embeddings, tokens = run_images(source, images, modality="image")
    check_equal(embeddings, image)
    assert encoder.dim == 16
    with torch.inference_mode():
        if name in ("native", "custom"):
            model.visual.output_tokens = True
            check_equal(tokens, model.visual.ln_post(_raw_tokens(model.visual, pixels))[:, 1:])
        elif name == "biomed":
            check_equal(tokens, model.visual.trunk.forward_features(pixels)[:, 1:])
    _, embeddings, tokens, lengths = run_texts(source, modality="text")
    check_equal(embeddings, text)
    if name == "biomed":
        with torch.inference_mode():
            ids = tokenizer(REPORTS)
            states = model.text.transformer(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
        for k, length in enumerate(lengths):
            check_equal(tokens[k : k + 1, :length], states[k : k + 1, :length])
    with pytest.raises(EncoderError, match="has an image and a text side; give modality="):
        embedcache.load_encoder(source)


def _raw_tokens(visual: Any, pixels: torch.Tensor) -> torch.Tensor:
    return visual.transformer(visual._embeds(pixels))


# timm


@pytest.mark.parametrize("name", ["vit", "registers", "swin", "resnet"])
def test_timm(made, images: list[Path], name: str) -> None:
    import timm

    directory = made["timm"][name]
    model = timm.create_model(f"local-dir:{directory}", pretrained=True, num_classes=0).eval()
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    with torch.inference_mode():
        pixels = torch.stack([transform(image) for image in opened(images)])
        pooled, features = model(pixels), model.forward_features(pixels)
    cells = {
        "vit": lambda: features[:, 1:],
        "registers": lambda: features[:, 5:],
        "swin": lambda: features.flatten(1, 2),
        "resnet": lambda: features.flatten(2).transpose(1, 2),
    }[name]()
    _, embeddings, tokens = run_images(f"timm:{directory}", images)
    check_equal(embeddings, pooled)
    check_equal(tokens, cells)
    check_equal(run_images(f"timm:{directory}", images, pooling="mean")[1], cells.mean(1))
    check_equal(run_images(f"timm:{directory}", images, pooling="first")[1], cells[:, 0])
    with torch.inference_mode():
        first = model.forward_intermediates(pixels, indices=[0], norm=False, intermediates_only=True)[0]
    check_equal(run_images(f"timm:{directory}", images, layer=1)[2], first.flatten(2).transpose(1, 2))


# torchxrayvision


@pytest.mark.parametrize("name", ["101-elastic", "densenet121-res224-nih", "resnet50-res512-all"])
def test_torchxrayvision(made, images: list[Path], name: str) -> None:
    import torchvision
    import torchxrayvision as xrv
    from safetensors.torch import load_file

    directory = made["xrv"][name]
    weights = load_file(directory / "model.safetensors")
    side = 512 if name.startswith("resnet") else 224
    grey = [path for path in images if Image.open(path).mode == "L"]
    steps = [xrv.datasets.XRayCenterCrop(), xrv.datasets.XRayResizer(side)]
    transform = torchvision.transforms.Compose(steps)
    pixels = torch.stack([torch.from_numpy(transform(xrv.utils.load_image(str(path)))) for path in grey])
    with torch.inference_mode():
        if name == "101-elastic":
            model = xrv.autoencoders.ResNetAE101().eval()
            model.load_state_dict(weights)
            cells = model.encode(pixels)
            pooled = cells.mean((2, 3))
            assert pooled.shape[1] == 512
        elif name.startswith("densenet"):
            model = xrv.models.DenseNet(num_classes=18).eval()
            model.load_state_dict(weights)
            pooled, cells = model.features2(pixels), torch.nn.functional.relu(model.features(pixels))
        else:
            resnet = torchvision.models.resnet50(num_classes=18)
            resnet.conv1 = torch.nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
            resnet.load_state_dict(weights)
            model = xrv.models.ResNet.__new__(xrv.models.ResNet)
            torch.nn.Module.__init__(model)
            model.model = resnet
            pooled, cells = model.eval().features(pixels), None
    _, embeddings, tokens = run_images(f"xrv:{directory}", grey)
    check_equal(embeddings, pooled)
    if cells is not None:
        check_equal(tokens, cells.flatten(2).transpose(1, 2))


# what pooling and resolution do


def test_tokens_are_pooled_to_a_coarser_grid(made, images: list[Path]) -> None:
    source = f"hf:{made['hf-image']['dinov2']}"
    native = run_images(source, images)
    encoder, _, coarse = run_images(source, images, token_grid=2)
    assert native[0].token_grid == (4, 4)
    assert encoder.token_grid == (2, 2)
    cells = native[2].reshape(len(images), 2, 2, 2, 2, -1).mean((2, 4)).reshape(len(images), 4, -1)
    np.testing.assert_allclose(coarse, cells, atol=1e-6)
    assert encoder.fingerprint != native[0].fingerprint
    with pytest.raises(EncoderError, match="token_grid 9 x 9, the model has a grid of 4 x 4"):
        embedcache.load_encoder(source, token_grid=9)


@pytest.mark.parametrize("source", ["hf-image/dinov2", "hf-image/vit", "timm/vit", "open_clip/native"])
def test_another_resolution_interpolates_position_embeddings_and_says_so(made, images: list[Path], source: str) -> None:
    library, _, name = source.partition("/")
    prefix = library.removesuffix("-image")
    options = {"modality": "image"} if prefix == "open_clip" else {}
    encoder, _, tokens = run_images(f"{prefix}:{made[library][name]}", images, image_size=48, **options)
    assert encoder.record.identity["input_size"] == [48, 48]
    assert encoder.record.identity["position_embeddings"] == {"native_size": [32, 32], "interpolated": True}
    assert tokens.shape[1] == 36
    native = run_images(f"{prefix}:{made[library][name]}", images, **options)[0]
    assert native.record.identity["position_embeddings"] == {"native_size": [32, 32], "interpolated": False}
    assert native.fingerprint != encoder.fingerprint


def test_interpolated_position_embeddings_equal_the_librarys_own(made, images: list[Path]) -> None:
    from transformers import AutoImageProcessor, AutoModel

    directory = made["hf-image"]["vit"]
    sizes = {"size": {"shortest_edge": 54}, "crop_size": {"height": 48, "width": 48}}
    processor = AutoImageProcessor.from_pretrained(directory, **sizes)  # 36 to 32 as before, times 1.5
    model = AutoModel.from_pretrained(directory).eval()
    with torch.inference_mode():
        output = model(**processor(opened(images), return_tensors="pt"), interpolate_pos_encoding=True)
    check_equal(run_images(f"hf:{directory}", images, image_size=48)[1], output.last_hidden_state[:, 0])


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("hf-image/convnext", {"pooling": "cls"}, "the model has no class token; choose pooling mean or pooler"),
        ("hf-image/dinov2", {"pooling": "projection"}, "the model has no projection; choose pooling"),
        ("hf-image/dinov2", {"layer": 3}, r"layer 3, the model has blocks 1 to 2 \(or -1 to -2\)"),
        ("hf-image/dinov2", {"layer": 1, "pooling": "pooler"}, "pooling pooler belongs to the last layer"),
        ("hf-image/dinov2", {"max_length": 9}, "max_length 9 was given for an encoder of images"),
        ("hf-image/dinov2", {"transform": "paper", "image_size": 99}, "transform 'paper' gives 224 x 224"),
        ("hf-text/bert", {"image_size": 99}, "image_size 99 was given for an encoder of texts"),
        ("hf-text/bert", {"max_length": 4000}, "max_length 4000, the model takes 3 to 128"),
        ("hf-image/dinov2", {"pooling": "max"}, "pooling 'max', expected one of cls"),
        ("timm/vit", {"layer": 5}, r"layer 5, the model has blocks 1 to 2"),
        ("timm/vit", {"modality": "text"}, "timm has image models only"),
        ("xrv/101-elastic", {"layer": 1}, "last features only"),
    ],
)
def test_what_an_encoder_does_not_have_is_refused(made, source: str, options: dict, message: str) -> None:
    library, _, name = source.partition("/")
    prefix = library.removesuffix("-image").removesuffix("-text")
    with pytest.raises(EncoderError, match=message):
        embedcache.load_encoder(f"{prefix}:{made[library][name]}", device="cpu", **options)


@pytest.mark.parametrize("side", ["clip", "siglip"])
def test_a_text_has_the_same_embedding_in_any_batch(made, side: str) -> None:
    source = f"hf:{made['hf-towers'][side]}"
    encoder = embedcache.load_encoder(source, modality="text", device="cpu")
    prepared = [encoder.prepare(text) for text in REPORTS]
    together = encoder.encode(prepared).embeddings
    for k, one in enumerate(prepared):
        np.testing.assert_allclose(encoder.encode([one]).embeddings[0], together[k], atol=1e-5)


def test_truncation_is_counted(made) -> None:
    for source in (f"hf:{made['hf-text']['bert']}", f"open_clip:{made['open_clip']['native']}"):
        whole = embedcache.load_encoder(source, modality="text", device="cpu", report=AS_THEY_ARE)
        short = embedcache.load_encoder(source, modality="text", device="cpu", report=AS_THEY_ARE, max_length=6)
        full, cut = whole.prepare(REPORTS[1]), short.prepare(REPORTS[1])
        assert full.n_truncated == 0
        assert cut.n_tokens == 6
        assert cut.n_truncated == full.n_tokens - 6


# pre-trained weights on real radiographs, where they lie beside this checkout

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real radiographs and encoders are not beside this checkout")
@pytest.mark.parametrize("name", ["vit-tiny-imagenet-timm", "mobilenetv2-imagenet-timm", "vit-tiny-imagenet-hf"])
def test_pretrained_encoders_on_real_radiographs(name: str) -> None:
    import timm
    from transformers import AutoImageProcessor, AutoModel

    radiographs = [
        *sorted((SHARED / "shenzhen").rglob("*.png"))[:3],
        *sorted((SHARED / "open_i_40").rglob("*.png"))[:3],
    ]
    directory = SHARED / "encoders" / name
    with torch.inference_mode():
        if name.endswith("hf"):
            processor, model = (
                AutoImageProcessor.from_pretrained(directory),
                AutoModel.from_pretrained(directory).eval(),
            )
            expected = model(**processor(opened(radiographs), return_tensors="pt")).last_hidden_state[:, 0]
        else:
            model = timm.create_model(f"local-dir:{directory}", pretrained=True, num_classes=0).eval()
            transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
            expected = model(torch.stack([transform(image) for image in opened(radiographs)]))
    check_equal(run_images(f"{'hf' if name.endswith('hf') else 'timm'}:{directory}", radiographs)[1], expected)
