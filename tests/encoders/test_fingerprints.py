"""One change for each test: what must change an encoder's fingerprint, and what must not."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import embedcache
from embedcache.data.radiograph import DecodePolicy
from embedcache.data.reports import ReportPolicy
from embedcache.encoders import base
from embedcache.fingerprint import digest_arrays

Change = Callable[[Path], None]


def change_json(directory: Path, file: str, **fields: Any) -> None:
    path = directory / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def config(**fields: Any) -> Change:
    return lambda directory: change_json(directory, "config.json", **fields)


def processor(**fields: Any) -> Change:
    return lambda directory: change_json(directory, "preprocessor_config.json", **fields)


def weight_bit(name_part: str = "", file: str = "model.safetensors") -> Change:
    def flip(directory: Path) -> None:
        weights = load_file(directory / file)
        first = next(name for name in sorted(weights) if name_part in name and weights[name].dtype == torch.float32)
        weights[first].view(-1).view(torch.int32)[0] ^= 1
        save_file(weights, directory / file, metadata={"format": "pt"})

    return flip


def tokenizer(change: Callable[[dict[str, Any]], None]) -> Change:
    def write(directory: Path) -> None:
        content = json.loads((directory / "tokenizer.json").read_text())
        change(content)
        (directory / "tokenizer.json").write_text(json.dumps(content))

    return write


def swap_two_words(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    one, two = [word for word in vocabulary if not word.startswith("[")][-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]


def open_clip_config(part: str, **fields: Any) -> Change:
    def write(directory: Path) -> None:
        content = json.loads((directory / "open_clip_config.json").read_text())
        content[part] |= fields
        (directory / "open_clip_config.json").write_text(json.dumps(content))

    return write


def timm_config(**fields: Any) -> Change:
    def write(directory: Path) -> None:
        content = json.loads((directory / "config.json").read_text())
        content["pretrained_cfg"] |= fields
        (directory / "config.json").write_text(json.dumps(content))

    return write


def nothing(directory: Path) -> None:
    pass


def reorder(directory: Path) -> None:
    for path in directory.glob("*.json"):
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            path.write_text(json.dumps(dict(reversed(content.items())), indent=7))


def reorder_weights(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    save_file(dict(reversed(weights.items())), directory / "model.safetensors", metadata={"format": "pt"})


def shard_weights(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, directory / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "model.safetensors").unlink()


def age(directory: Path) -> None:
    for path in directory.iterdir():
        os.utime(path, (0, time.time() + 10**6))


# a checkpoint of the fixture `made`, what is changed in a copy of it, and options that differ
VIT, BERT, CLIP, TIMM, ST = "hf-image/vit", "hf-text/bert-pooler", "open_clip/native", "timm/vit", "hf-text/sentence"
MISSES: dict[str, tuple[str, Change, dict[str, Any]]] = {
    "one weight bit": (VIT, weight_bit(), {}),
    "a field of the config": (VIT, config(layer_norm_eps=1e-5), {}),
    "the activation": (VIT, config(hidden_act="relu"), {}),
    "mean": (VIT, processor(image_mean=[0.5, 0.4, 0.31]), {}),
    "std": (VIT, processor(image_std=[0.2, 0.3, 0.26]), {}),
    "interpolation": (VIT, processor(resample=2), {}),
    "resize": (VIT, processor(size={"shortest_edge": 40}), {}),
    "no crop but a squeeze": (VIT, processor(do_center_crop=False, size={"height": 32, "width": 32}), {}),
    "rescaling": (VIT, processor(rescale_factor=1 / 256), {}),
    "no normalisation": (VIT, processor(do_normalize=False), {}),
    "pooling": (VIT, nothing, {"pooling": "mean"}),
    "class token beside the mean": (VIT, nothing, {"pooling": "cls_mean"}),
    "layer": (VIT, nothing, {"layer": -1}),
    "compute dtype": (VIT, nothing, {"compute_dtype": "bfloat16"}),
    "input size": (VIT, nothing, {"image_size": 48}),
    "token grid": (VIT, nothing, {"token_grid": 2}),
    "the paper's transform": ("timm/resnet", nothing, {"transform": "paper"}),
    "reduced decoding": (VIT, nothing, {"decode": DecodePolicy(jpeg_min_side=100)}),
    "window": (VIT, nothing, {"decode": DecodePolicy(window=(40.0, 400.0))}),
    "intensity": (VIT, nothing, {"decode": DecodePolicy(intensity="max")}),
    "background of alpha": (VIT, nothing, {"decode": DecodePolicy(background=9)}),
    "EXIF rotation": (VIT, nothing, {"decode": DecodePolicy(exif_rotation=False)}),
    "bit depth": (VIT, nothing, {"decode": DecodePolicy(sixteen_bit="min-max")}),
    "frame": (VIT, nothing, {"decode": DecodePolicy(frame=0)}),
    "one weight bit of a text model": (BERT, weight_bit(), {}),
    "two words of the tokenizer": (BERT, tokenizer(swap_two_words), {}),
    "the tokenizer's normaliser": (BERT, lambda d: change_json(d, "tokenizer_config.json", do_lower_case=False), {}),
    "a special token": (BERT, tokenizer(lambda c: c["added_tokens"][0].update(normalized=True)), {}),
    "truncation side": (BERT, lambda d: change_json(d, "tokenizer_config.json", truncation_side="left"), {}),
    "max length": (BERT, nothing, {"max_length": 50}),
    "a text model's pooling": (BERT, nothing, {"pooling": "pooler"}),
    "what of a report is encoded": (BERT, nothing, {"report": ReportPolicy(unit="impression")}),
    "the rule of captions": (BERT, nothing, {"report": ReportPolicy(rule="paper")}),
    "one weight bit of a dense layer": (ST, weight_bit(file="2_Dense/model.safetensors"), {}),
    "lower case": (ST, lambda d: change_json(d, "sentence_bert_config.json", do_lower_case=True), {}),
    "a prompt": (
        ST,
        lambda d: change_json(
            d, "config_sentence_transformers.json", prompts={"q": "query: "}, default_prompt_name="q"
        ),
        {},
    ),
    "one weight bit of open_clip": (CLIP, weight_bit("visual", "open_clip_model.safetensors"), {}),
    "mean of open_clip": (CLIP, open_clip_config("preprocess_cfg", mean=[0.5, 0.4, 0.31]), {}),
    "interpolation of open_clip": (CLIP, open_clip_config("preprocess_cfg", interpolation="bilinear"), {}),
    "squash of open_clip": (CLIP, open_clip_config("preprocess_cfg", resize_mode="squash"), {}),
    "activation of open_clip": (CLIP, open_clip_config("model_cfg", quick_gelu=False), {}),
    "one weight bit of timm": (TIMM, weight_bit("blocks"), {}),
    "crop of timm": (TIMM, timm_config(crop_pct=0.8), {}),
    "std of timm": (TIMM, timm_config(std=[0.2, 0.2, 0.21]), {}),
    "one weight bit of torchxrayvision": ("xrv/densenet121-res224-nih", weight_bit("features"), {}),
}
HITS: dict[str, tuple[str, Change, dict[str, Any]]] = {
    "another place and name": (VIT, nothing, {}),
    "order of keys": (VIT, reorder, {}),
    "order of weights in the file": (VIT, reorder_weights, {}),
    "weights in two files": (VIT, shard_weights, {}),
    "times of files": (VIT, age, {}),
    "what the config says of versions": (
        VIT,
        config(transformers_version="0.0.1", _name_or_path="a/b", dtype=None),
        {},
    ),
    "names of classes for other tasks": (VIT, config(architectures=["ViTForImageClassification"]), {}),
    "a file beside it": (VIT, lambda d: (d / "README.md").write_text("hello"), {}),
    "code that nobody trusts": (VIT, lambda d: (d / "modeling.py").write_text("x = 1"), {}),
    "the decoding that is the default, named": (VIT, nothing, {"decode": DecodePolicy(jpeg_min_side=72)}),
    "order of keys of a text model": (BERT, reorder, {}),
    "the length that is the default, named": (BERT, nothing, {"max_length": 64}),
    "order of keys of open_clip": (CLIP, reorder, {}),
    "weights of the other side": (CLIP, weight_bit("token_embedding", "open_clip_model.safetensors"), {}),
    "classes of timm's classifier": (TIMM, weight_bit("head"), {}),
    "the device by another name": (VIT, nothing, {"device": "auto"}),
}


def fingerprint(checkpoint: str, directory: Path, **options: Any) -> str:
    prefix = checkpoint.partition("/")[0].removesuffix("-image").removesuffix("-text")
    if prefix == "open_clip":
        options["modality"] = "image"
    return embedcache.load_encoder(f"{prefix}:{directory}", **{"device": "cpu", **options}).fingerprint


def changed(made, tmp_path: Path, case: tuple[str, Change, dict[str, Any]]) -> tuple[str, str]:
    checkpoint, change, options = case
    library, _, name = checkpoint.partition("/")
    copy = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(made[library][name], copy)
    change(copy)
    return fingerprint(checkpoint, made[library][name]), fingerprint(checkpoint, copy, **options)


@pytest.mark.parametrize("case", MISSES)
def test_it_changes(made, tmp_path: Path, case: str) -> None:
    before, after = changed(made, tmp_path, MISSES[case])
    assert before != after


@pytest.mark.parametrize("case", HITS)
def test_it_stays(made, tmp_path: Path, case: str) -> None:
    if case == "the device by another name" and torch.cuda.is_available():
        pytest.skip("auto is another kind of device here")
    before, after = changed(made, tmp_path, HITS[case])
    assert before == after


def test_the_version_of_our_own_preparation_is_covered(made, monkeypatch) -> None:
    before = fingerprint(VIT, made["hf-image"]["vit"])
    monkeypatch.setattr(base, "PREPROCESSING_VERSION", base.PREPROCESSING_VERSION + 1)
    assert fingerprint(VIT, made["hf-image"]["vit"]) != before


@pytest.mark.parametrize("setting", [f.name for f in dataclasses.fields(DecodePolicy)])
def test_every_setting_of_decoding_is_in_the_record(made, setting: str) -> None:
    encoder = embedcache.load_encoder(f"hf:{made['hf-image']['vit']}", device="cpu")
    assert setting in encoder.record.identity["decode"]


REMOTE_CODE = """
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

class OwnConfig(PreTrainedConfig):
    model_type = "own"

class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.conv = torch.nn.Conv2d(3, 4, 8, stride=8)
        self.post_init()

    def forward(self, pixel_values, output_hidden_states=False):
        return BaseModelOutput(last_hidden_state=self.conv(pixel_values))
"""


def test_trusted_code_is_covered(tmp_path: Path, made) -> None:
    """Code beside the weights runs only when it is asked for, and then its content counts."""
    copy = tmp_path / "own"
    shutil.copytree(made["hf-image"]["vit"], copy)
    code = REMOTE_CODE
    (copy / "own_code.py").write_text(code)
    auto_map = {"AutoConfig": "own_code.OwnConfig", "AutoModel": "own_code.OwnModel"}
    described = {"auto_map": auto_map, "model_type": "own", "architectures": ["OwnModel"], "num_channels": 3}
    (copy / "config.json").write_text(json.dumps(described))
    save_file({"conv.weight": torch.ones(4, 3, 8, 8), "conv.bias": torch.ones(4)}, copy / "model.safetensors")

    def load() -> Any:
        return embedcache.load_encoder(f"hf:{copy}", modality="image", device="cpu", trust_remote_code=True)

    with pytest.raises(embedcache.EmbedCacheError, match=r"cannot load its config.json"):
        embedcache.load_encoder(f"hf:{copy}", modality="image", device="cpu")
    first = load()
    assert first.record.identity["model"]["code"].keys() == {"own_code.py"}
    (copy / "own_code.py").write_text(code + "# changed\n")
    assert load().fingerprint != first.fingerprint
    change_json(copy, "config.json", auto_map={**auto_map, "AutoModel": "some/where--own_code.OwnModel"})
    with pytest.raises(
        embedcache.EmbedCacheError, match=r"code of another repository \(some/where--own_code.OwnModel\)"
    ):
        load()


OWN = """
import torch
from embedcache.encoders.image import ImageModel
from embedcache.encoders.pooling import Output
from embedcache.encoders.transforms import of_compose
from torchvision.transforms import Compose, Normalize, Resize, ToTensor

def build():
    torch.manual_seed({seed})
    module = torch.nn.Conv2d(3, 6, 8, stride=8)
    transform = of_compose(Compose([Resize((16, 16)), ToTensor(), Normalize([0.5] * 3, [0.5] * 3)]), "own")
    def forward(pixels):
        cells = module(pixels)
        return Output(cells.flatten(2).transpose(1, 2), (cells.shape[2], cells.shape[3]), pooler=cells.amax((2, 3)))
    return ImageModel(module=module, forward=forward, transform=transform, config={{"note": {note!r}}})

not_a_function = 3

def wrong():
    return "a string"
"""


def test_an_encoder_of_the_users_own(tmp_path: Path, images: list[Path], monkeypatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    fingerprints = {}
    cases = {"a": (0, "x", ""), "same": (0, "x", ""), "weights": (1, "x", ""), "config": (0, "y", ""),
             "code": (0, "x", "# edited\n")}  # fmt: skip
    for case, (seed, note, more) in cases.items():
        (tmp_path / "own_encoder.py").write_text(OWN.format(seed=seed, note=note) + more)
        sys.modules.pop("own_encoder", None)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        encoder = embedcache.load_encoder("py:own_encoder:build", device="cpu")
        fingerprints[case] = encoder.fingerprint
    assert fingerprints["a"] == fingerprints["same"]
    assert len(set(fingerprints.values())) == 4
    encoded = encoder.encode([encoder.prepare(path) for path in images], tokens=True)
    assert encoded.tokens.shape == (len(images), 4, 6)
    assert encoder.record.identity["source"] == "py"
    for name, message in (
        ("py:own_encoder", "expected py:package.module:factory"),
        ("py:nowhere_at_all:build", "no module 'nowhere_at_all'.*PYTHONPATH"),
        ("py:own_encoder:missing", "has no function 'missing'"),
        ("py:own_encoder:not_a_function", "has no function 'not_a_function'"),
        ("py:own_encoder:wrong", "gave a str, expected .*ImageModel"),
    ):
        with pytest.raises(embedcache.EmbedCacheError, match=message):
            embedcache.load_encoder(name)
    with pytest.raises(embedcache.EmbedCacheError, match="layer cannot be chosen here"):
        embedcache.load_encoder("py:own_encoder:build", layer=1)
    sys.modules.pop("own_encoder")


def test_weights_are_hashed_faster_than_a_disk_gives_them() -> None:
    """350 MB of weights in under a second is the goal; here beside a plain SHA-256 of as many bytes."""
    import hashlib

    model = torch.nn.ParameterList([torch.randn(1024, 1024) for _ in range(16)])  # 64 MiB
    raw = b"\1" * (64 * 2**20)
    ours, plain = [], []
    for _ in range(3):
        start = time.perf_counter()
        base.digest_weights(model)
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        hashlib.sha256(raw).digest()
        plain.append(time.perf_counter() - start)
    assert min(ours) < 2 * min(plain)  # a ratio: no copy, no second pass


def test_weights_of_any_dtype_and_shape_have_a_digest() -> None:
    module = torch.nn.Module()
    for k, dtype in enumerate((torch.float32, torch.bfloat16, torch.int64, torch.bool)):
        module.register_buffer(f"b{k}", torch.ones(2, 3, dtype=dtype))
    module.register_buffer("empty", torch.ones(0, 3))
    module.register_buffer("scalar", torch.tensor(1.5))
    digest = base.digest_weights(module)
    module.b1[1, 2] = 2
    assert base.digest_weights(module) != digest
    assert len(digest_arrays([])) == 64


def test_the_example_of_the_docs_works(tmp_path: Path, images: list[Path], monkeypatch) -> None:
    import re

    import torchvision

    page = (Path(__file__).parents[2] / "docs" / "encoders.md").read_text("utf-8")
    code = re.search(r"```python\n# my_encoders.py\n(.*?)```", page, re.DOTALL)
    assert code is not None
    (tmp_path / "my_encoders.py").write_text(code[1])
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    encoder = embedcache.load_encoder("py:my_encoders:resnet", device="cpu")
    encoded = encoder.encode([encoder.prepare(path) for path in images], tokens=True)
    assert encoded.embeddings.shape == (len(images), 512)
    assert encoded.tokens.shape == (len(images), 49, 512)
