"""Encoders from transformers: the library's own values, and a fingerprint that notices changes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import embedcache
from embedcache.encoders.base import torch_dtype
from embedcache.encoders.catalogue import CATALOGUE, _source
from embedcache.encoders.random_init import write_random_like, write_tiny
from embedcache.errors import DeviceError, EncoderError, InputError

REPORTS = ["The lungs are clear.", "Heart size is normal. There is an opacity in the left lower zone."]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    paths = []
    for k, size in enumerate([(200, 150), (64, 64), (128, 300)]):
        paths.append(root / f"{k}.png")
        Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)).save(paths[-1])
    return paths


@pytest.mark.parametrize(
    ("kind", "pooling"), [("vit", "cls"), ("vit", "mean"), ("resnet", "mean"), ("resnet", "pooler")]
)
def test_images_equal_the_librarys_own_call(checkpoints: Path, images: list[Path], kind: str, pooling: str) -> None:
    from transformers import AutoImageProcessor, AutoModel

    processor = AutoImageProcessor.from_pretrained(checkpoints / kind)
    model = AutoModel.from_pretrained(checkpoints / kind).eval()
    with torch.inference_mode():
        opened = [Image.open(path).convert("RGB") for path in images]
        output = model(**processor(opened, return_tensors="pt"))
    tokens = output.last_hidden_state
    expected = {
        "cls": lambda: tokens[:, 0],
        "mean": lambda: tokens.flatten(2).mean(2) if tokens.ndim == 4 else tokens.mean(1),
        "pooler": lambda: output.pooler_output.flatten(1),
    }[pooling]().numpy()
    encoder = embedcache.load_encoder(f"hf:{checkpoints / kind}", pooling=pooling, device="cpu")
    got = encoder.encode([encoder.prepare(path) for path in images]).embeddings
    assert got.shape == (3, encoder.dim)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_texts_equal_the_librarys_own_call() -> None:
    """all-MiniLM-L6-v2 with its published weights: masked mean over real tokens."""
    from transformers import AutoModel, AutoTokenizer

    encoder = embedcache.load_encoder("minilm", device="cpu")
    location = _source(CATALOGUE["minilm"]).removeprefix("hf:")
    tokenizer, model = AutoTokenizer.from_pretrained(location), AutoModel.from_pretrained(location).eval()
    with torch.inference_mode():
        inputs = tokenizer(REPORTS, padding=True, return_tensors="pt")
        tokens, mask = model(**inputs).last_hidden_state, inputs["attention_mask"].unsqueeze(-1)
        expected = ((tokens * mask).sum(1) / mask.sum(1)).numpy()
    got = encoder.encode([encoder.prepare(text) for text in REPORTS]).embeddings
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert encoder.dim == 384
    assert encoder.record.identity["max_length"] == 256  # as its authors set it


def test_the_default_pooling_of_an_image_model_is_one_that_it_has(checkpoints: Path) -> None:
    assert embedcache.load_encoder(f"hf:{checkpoints / 'vit'}", device="cpu").record.identity["pooling"] == "cls"
    assert embedcache.load_encoder(f"hf:{checkpoints / 'resnet'}", device="cpu").record.identity["pooling"] == "mean"
    with pytest.raises(EncoderError, match="no class token; choose pooling mean or pooler"):
        embedcache.load_encoder(f"hf:{checkpoints / 'resnet'}", pooling="cls")


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_text_does_not_depend_on_its_neighbours(checkpoints: Path, tmp_path: Path, pooling: str) -> None:
    copy = tmp_path / "bert"
    shutil.copytree(checkpoints / "bert", copy)
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, "padding_side": "left"}))
    encoder = embedcache.load_encoder(f"hf:{copy}", pooling=pooling, device="cpu")
    short, long = (encoder.prepare(text) for text in REPORTS)
    alone, together = encoder.encode([short]).embeddings[0], encoder.encode([short, long]).embeddings[0]
    np.testing.assert_allclose(alone, together, atol=1e-5)


def test_the_longest_text_fits_where_positions_start_behind_padding(tmp_path: Path, checkpoints: Path) -> None:
    from transformers import AutoTokenizer, RobertaConfig, RobertaModel

    tokenizer = AutoTokenizer.from_pretrained(checkpoints / "bert")
    tokenizer.model_max_length = 10**30
    tokenizer.save_pretrained(tmp_path / "roberta")
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=34, pad_token_id=1, type_vocab_size=2,
    )  # fmt: skip
    RobertaModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "roberta")
    encoder = embedcache.load_encoder(f"hf:{tmp_path / 'roberta'}", device="cpu")
    assert encoder.record.identity["max_length"] == 32
    longest = encoder.prepare("the lungs are clear " * 50)
    assert np.isfinite(encoder.encode([longest]).embeddings).all()


def test_text_lengths_and_truncation(checkpoints: Path) -> None:
    encoder = embedcache.load_encoder(f"hf:{checkpoints / 'bert'}", max_length=8, device="cpu")
    short, long = (encoder.prepare(text) for text in REPORTS)
    assert short.n_tokens <= long.n_tokens == 8
    with pytest.raises(InputError, match="empty"):
        encoder.prepare("  ")
    with pytest.raises(EncoderError, match="max_length 4000, the model takes 3 to 128"):
        embedcache.load_encoder(f"hf:{checkpoints / 'bert'}", max_length=4000)


def test_it_is_frozen(image_encoder) -> None:
    model = image_encoder._model
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_the_record_is_json_and_names_no_path(image_encoder, checkpoints: Path) -> None:
    text = json.dumps(image_encoder.record.to_json())
    assert str(checkpoints) not in text
    assert image_encoder.record.name == "hf:vit"


# what changes the fingerprint, and what must not


def change_config(directory: Path, **fields: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_processor(directory: Path, **fields: object) -> None:
    path = directory / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def flip_weight_bit(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    first = next(iter(sorted(weights)))
    weights[first].view(-1).view(torch.int32)[0] ^= 1
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def reorder_files(directory: Path) -> None:
    for file in ("config.json", "preprocessor_config.json"):
        path = directory / file
        path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items())), indent=7))
    weights = load_file(directory / "model.safetensors")
    save_file(dict(reversed(weights.items())), directory / "model.safetensors", metadata={"format": "pt"})


def vit_fingerprint(directory: Path, **options: object) -> str:
    return embedcache.load_encoder(f"hf:{directory}", **{"pooling": "mean", "device": "cpu", **options}).fingerprint


IMAGE_CHANGES = {
    "one weight bit": flip_weight_bit,
    "a config field": lambda d: change_config(d, layer_norm_eps=1e-5),
    "mean": lambda d: change_processor(d, image_mean=[0.5, 0.5, 0.4]),
    "std": lambda d: change_processor(d, image_std=[0.25, 0.25, 0.3]),
    "interpolation": lambda d: change_processor(d, resample=3),
    "size": lambda d: change_processor(d, size={"height": 112, "width": 128}),
}


@pytest.mark.parametrize("change", IMAGE_CHANGES)
def test_image_changes_miss(checkpoints: Path, tmp_path: Path, change: str, image_encoder) -> None:
    copy = tmp_path / "vit"
    shutil.copytree(checkpoints / "vit", copy)
    IMAGE_CHANGES[change](copy)
    assert vit_fingerprint(copy) != image_encoder.fingerprint


@pytest.mark.parametrize("options", [{"pooling": "cls"}, {"compute_dtype": "bfloat16"}])
def test_options_miss(checkpoints: Path, options: dict, image_encoder) -> None:
    assert vit_fingerprint(checkpoints / "vit", **options) != image_encoder.fingerprint


def test_the_decode_policy_and_our_own_version_are_covered(checkpoints: Path, monkeypatch, image_encoder) -> None:
    from embedcache.encoders import hf

    monkeypatch.setattr(hf, "PREPROCESSING_VERSION", 999)
    assert vit_fingerprint(checkpoints / "vit") != image_encoder.fingerprint
    monkeypatch.undo()
    monkeypatch.setattr(hf, "DecodePolicy", lambda: embedcache.data.radiograph.DecodePolicy(background=9))
    assert vit_fingerprint(checkpoints / "vit") != image_encoder.fingerprint


def test_neutral_changes_hit(checkpoints: Path, tmp_path: Path, image_encoder) -> None:
    copy = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(checkpoints / "vit", copy)
    reorder_files(copy)
    change_config(copy, transformers_version="0.0.1", _name_or_path="somewhere/else")
    assert vit_fingerprint(copy) == image_encoder.fingerprint


def test_text_changes_miss(checkpoints: Path, tmp_path: Path, text_encoder) -> None:
    def fingerprint(directory: Path, **options: object) -> str:
        return embedcache.load_encoder(f"hf:{directory}", device="cpu", **options).fingerprint

    assert fingerprint(checkpoints / "bert") == text_encoder.fingerprint
    assert fingerprint(checkpoints / "bert", max_length=64) != text_encoder.fingerprint
    copy = tmp_path / "bert"
    shutil.copytree(checkpoints / "bert", copy)
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    words = [w for w in vocabulary if not w.startswith("[")][-2:]
    vocabulary[words[0]], vocabulary[words[1]] = vocabulary[words[1]], vocabulary[words[0]]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert fingerprint(copy) != text_encoder.fingerprint


# what cannot be loaded


def test_unknown_names_and_places() -> None:
    with pytest.raises(EncoderError, match=r"unknown encoder 'dinov9'; expected hf:NAME.*dinov2-s"):
        embedcache.load_encoder("dinov9")
    with pytest.raises(EncoderError, match="no such directory"):
        embedcache.load_encoder("hf:./nowhere")
    with pytest.raises(EncoderError, match=r"fetch it once with 'hf download nobody/nothing'.*hf auth login"):
        embedcache.load_encoder("hf:nobody/nothing", modality="image")
    with pytest.raises(EncoderError, match="compute_dtype 'float8'"):
        torch_dtype("float8")


def test_a_pooler_that_is_not_in_the_checkpoint_is_refused(checkpoints: Path) -> None:
    with pytest.raises(EncoderError, match=r"lacks pooler\..*would be random; choose pooling cls or mean"):
        embedcache.load_encoder(f"hf:{checkpoints / 'vit'}", pooling="pooler")


def test_a_checkpoint_that_lacks_a_layer_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    copy = tmp_path / "vit"
    shutil.copytree(checkpoints / "vit", copy)
    weights = load_file(copy / "model.safetensors")
    lost = next(name for name in weights if "2" in name and name.endswith("bias"))
    save_file({k: v for k, v in weights.items() if k != lost}, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match="which would be random; use a checkpoint of the whole model"):
        embedcache.load_encoder(f"hf:{copy}", pooling="mean")


def test_a_half_downloaded_checkpoint_and_one_of_other_sizes(checkpoints: Path, tmp_path: Path) -> None:
    copy = tmp_path / "vit"
    shutil.copytree(checkpoints / "vit", copy)
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EncoderError, match=r"cannot load its model.*holds a whole model"):
        embedcache.load_encoder(f"hf:{copy}")
    (copy / "model.safetensors").write_bytes(whole)
    change_config(copy, intermediate_size=200)
    with pytest.raises(EncoderError, match=r"cannot load its model|would be random"):
        embedcache.load_encoder(f"hf:{copy}")


def test_a_device_that_is_not_here(checkpoints: Path) -> None:
    with pytest.raises(DeviceError, match="device 'tpu:7', expected auto or one of cpu"):
        embedcache.load_encoder(f"hf:{checkpoints / 'vit'}", device="tpu:7")


def test_a_pickle_is_not_read(checkpoints: Path, tmp_path: Path) -> None:
    copy = tmp_path / "vit"
    shutil.copytree(checkpoints / "vit", copy)
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(EncoderError, match="cannot load its model"):
        embedcache.load_encoder(f"hf:{copy}", pooling="mean")


def test_code_beside_a_checkpoint_is_not_run(checkpoints: Path, tmp_path: Path) -> None:
    copy = tmp_path / "vit"
    shutil.copytree(checkpoints / "vit", copy)
    change_config(copy, auto_map={"AutoModel": "evil.Evil", "AutoConfig": "evil.EvilConfig"}, model_type="evil")
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w').close()\n")
    with pytest.raises(EncoderError):
        embedcache.load_encoder(f"hf:{copy}", modality="image")
    assert not (tmp_path / "canary").exists()


def test_a_hub_name_loads_from_the_hubs_cache(checkpoints: Path, tmp_path: Path) -> None:
    """The same files by hub name, by name@revision and by directory are the same encoder."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--made--encoder"
    shutil.copytree(checkpoints / "bert", repository / "snapshots" / revision)
    settings = {"max_seq_length": 24}
    (repository / "snapshots" / revision / "sentence_bert_config.json").write_text(json.dumps(settings))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    code = (
        "import sys, embedcache\n"
        "for name in sys.argv[1:]:\n"
        "    e = embedcache.load_encoder(name, device='cpu')\n"
        "    print(e.fingerprint, e.record.identity['max_length'])\n"
    )
    names = ["hf:made/encoder", f"hf:made/encoder@{revision}", f"hf:{repository / 'snapshots' / revision}"]
    done = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert len(set(lines)) == 1
    assert lines[0].endswith(" 24")


# random checkpoints


def test_random_checkpoints_are_written_once_and_seeded(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_tiny("tiny-vit", tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    assert write_tiny("tiny-vit", tmp_path / "a", seed=0) == tmp_path / "a"
    with pytest.raises(EncoderError, match="another random checkpoint"):
        write_tiny("tiny-vit", tmp_path / "a", seed=1)
    with pytest.raises(EncoderError, match="expected one of tiny-vit"):
        write_tiny("huge-vit", tmp_path / "d", seed=1)


def test_a_tokenizer_of_the_reports_is_the_same_every_time(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom embedcache.encoders.random_init import write_tiny\n"
        "write_tiny('tiny-bert', Path(sys.argv[1]), seed=0, reports=['Clear lungs.', 'An Opacity, clear.', 'ABC cab.'])"
    )
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / seed)], check=True, env={**os.environ, "PYTHONHASHSEED": seed}
        )
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / s).iterdir()} for s in ("1", "2"))
    assert first == second
    vocabulary = json.loads(first["tokenizer.json"])["model"]["vocab"]
    assert [vocabulary[piece] for piece in ("[PAD]", "[CLS]", "[SEP]")] == [0, 2, 3]
    assert {"clear", "lungs", "opacity", "##c"} <= set(vocabulary)


def test_random_like_keeps_all_but_the_weights(checkpoints: Path, tmp_path: Path, image_encoder) -> None:
    write_random_like(f"hf:{checkpoints / 'vit'}", tmp_path / "random", seed=5)
    random = embedcache.load_encoder(f"hf:{tmp_path / 'random'}", pooling="mean", device="cpu")
    ours, theirs = dict(random.record.identity), dict(image_encoder.record.identity)
    assert ours.pop("weights") != theirs.pop("weights")
    assert ours == theirs
    copy = tmp_path / "vit"
    shutil.copytree(checkpoints / "vit", copy)
    change_processor(copy, image_mean=[0.1, 0.1, 0.1])
    with pytest.raises(EncoderError, match="holds another random checkpoint"):
        write_random_like(f"hf:{copy}", tmp_path / "random", seed=5)
    with pytest.raises(EncoderError, match="expected hf: and a local directory"):
        write_random_like("hf:some/name", tmp_path / "x", seed=0)
