"""Loading checkpoints: from directories and the hub's cache, only what is asked for; errors say what to run."""

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
from safetensors.torch import load_file, save_file

import embedcache
from embedcache.encoders import checkpoint as checkpoint_module
from embedcache.encoders.base import EncoderOptions
from embedcache.encoders.checkpoint import Checkpoint
from embedcache.encoders.load import convert_encoder
from embedcache.errors import DeviceError, EncoderError
from embedcache.fingerprint import digest_file

REPORTS = ["The lungs are clear.", "Heart size is normal. There is an opacity in the left lower zone."]


def change_config(directory: Path, **fields: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


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


def test_it_is_frozen(image_encoder) -> None:
    model = image_encoder._module
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_the_record_is_json_and_names_no_path(image_encoder, checkpoints: Path) -> None:
    text = json.dumps(image_encoder.record.to_json())
    assert str(checkpoints) not in text
    assert image_encoder.record.name == "hf:vit"


# what cannot be loaded


def test_unknown_names_and_places() -> None:
    with pytest.raises(
        EncoderError, match=r"unknown encoder 'dinov9'; expected one of hf:..., .*, or a short name: .*dinov2-s"
    ):
        embedcache.load_encoder("dinov9")
    with pytest.raises(EncoderError, match="no such directory"):
        embedcache.load_encoder("hf:./nowhere")
    with pytest.raises(EncoderError, match=r"fetch it once with 'hf download nobody/nothing'.*hf auth login"):
        embedcache.load_encoder("hf:nobody/nothing", modality="image")
    with pytest.raises(EncoderError, match="compute_dtype 'float8'"):
        embedcache.load_encoder("hf:./nowhere", compute_dtype="float8")


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
    with pytest.raises(EncoderError, match=r"cannot load its model.*holds a whole checkpoint"):
        embedcache.load_encoder(f"hf:{copy}")
    (copy / "model.safetensors").write_bytes(whole)
    change_config(copy, intermediate_size=200)
    with pytest.raises(EncoderError, match=r"cannot load its model|would be random"):
        embedcache.load_encoder(f"hf:{copy}")


def test_a_device_that_is_not_here(checkpoints: Path) -> None:
    with pytest.raises(DeviceError, match="device 'tpu:7', expected auto or one of cpu"):
        embedcache.load_encoder(f"hf:{checkpoints / 'vit'}", device="tpu:7")


def pickled(checkpoints: Path, directory: Path) -> Path:
    """The small ViT with its weights as a pickle."""
    shutil.copytree(checkpoints / "vit", directory)
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    return directory


def test_a_pickle_is_refused_with_the_command_that_converts_it(
    checkpoints: Path, tmp_path: Path, image_encoder
) -> None:
    directory = pickled(checkpoints, tmp_path / "vit")
    with pytest.raises(
        EncoderError, match=r"a pickle \(pytorch_model.bin\).*'embedcache encoders --convert hf:"
    ) as caught:
        embedcache.load_encoder(f"hf:{directory}")
    command = str(caught.value).split("'")[1].replace("DIRECTORY", str(tmp_path / "converted")).split()
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    converted = embedcache.load_encoder(f"hf:{tmp_path / 'converted'}", pooling="mean", device="cpu")
    assert converted.fingerprint == image_encoder.fingerprint
    with pytest.raises(EncoderError, match="not empty; name a new directory"):
        convert_encoder(f"hf:{directory}", tmp_path / "converted")
    allowed = embedcache.load_encoder(f"hf:{directory}", pooling="mean", device="cpu", allow_pickle=True)
    assert allowed.fingerprint == image_encoder.fingerprint


def test_a_pinned_pickle_is_read_and_another_one_is_not(checkpoints: Path, tmp_path: Path, image_encoder) -> None:
    from embedcache.encoders import hf
    from embedcache.encoders.image import ImageEncoder

    directory = pickled(checkpoints, tmp_path / "vit")
    pin = {"pytorch_model.bin": digest_file(directory / "pytorch_model.bin")}
    options = EncoderOptions(pooling="mean", device="cpu")
    loaded = ImageEncoder(hf.load(str(directory), "image", options, pin), options)
    assert loaded.fingerprint == image_encoder.fingerprint
    content = bytearray((directory / "pytorch_model.bin").read_bytes())
    content[-1] ^= 1
    (directory / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(EncoderError, match=r"pytorch_model.bin has SHA-256 .*, the catalogue pins"):
        hf.load(str(directory), "image", options, pin)


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return (open, (str(self.canary), "w"))


@pytest.mark.parametrize("way", ["allow", "convert"])
def test_a_pickle_that_would_run_code_runs_none(checkpoints: Path, tmp_path: Path, way: str) -> None:
    directory = pickled(checkpoints, tmp_path / "vit")
    torch.save({"weight": Evil(tmp_path / "canary")}, directory / "pytorch_model.bin")
    read = {
        "allow": lambda: embedcache.load_encoder(f"hf:{directory}", allow_pickle=True),
        "convert": lambda: convert_encoder(f"hf:{directory}", tmp_path / "converted"),
    }[way]
    with pytest.raises(EncoderError, match=r"not a pickle of weights alone.*nothing in it was run") as caught:
        read()
    assert "weights_only" not in str(caught.value)  # torch would tell the user how to run it all the same
    assert not (tmp_path / "canary").exists()


def test_pickles_of_open_clip_timm_and_torchxrayvision(made, tmp_path: Path, monkeypatch) -> None:
    """Each library's own pickles are refused, converted without running them, and then are the same encoder."""
    import torchxrayvision as xrv

    for source, file in (("open_clip/native", "open_clip_model.safetensors"), ("timm/vit", "model.safetensors")):
        library, _, name = source.partition("/")
        copy = tmp_path / library
        shutil.copytree(made[library][name], copy)
        weights = load_file(copy / file)
        (copy / file).unlink()
        torch.save({"state_dict": weights}, copy / "open_clip_pytorch_model.bin")
        options = {"modality": "image", "device": "cpu"}
        with pytest.raises(EncoderError, match="a pickle"):
            embedcache.load_encoder(f"{library}:{copy}", **options)
        convert_encoder(f"{library}:{copy}", tmp_path / f"{library}-converted")
        converted = embedcache.load_encoder(f"{library}:{tmp_path / f'{library}-converted'}", **options)
        original = embedcache.load_encoder(f"{library}:{made[library][name]}", **options)
        assert converted.fingerprint == original.fingerprint
    monkeypatch.setattr(xrv.utils, "get_cache_dir", lambda: str(tmp_path / "xrv"))
    directory = made["xrv"]["densenet121-res224-nih"]
    with pytest.raises(EncoderError, match=r"not on this machine; fetch and convert it once with 'embedcache encoders"):
        embedcache.load_encoder("xrv:densenet121-res224-nih")
    whole = xrv.models.DenseNet(num_classes=18)  # torchxrayvision publishes its DenseNets as pickles of whole modules
    whole.load_state_dict(load_file(directory / "model.safetensors"))
    (tmp_path / "xrv").mkdir()
    url = xrv.models.model_urls["nih"]["weights_url"]
    torch.save(whole, tmp_path / "xrv" / url.rpartition("/")[2])
    with pytest.raises(EncoderError, match="a pickle"):
        embedcache.load_encoder("xrv:densenet121-res224-nih")
    convert_encoder("xrv:densenet121-res224-nih", tmp_path / "xrv-converted")
    original = embedcache.load_encoder(f"xrv:{directory}", device="cpu")
    for source, options in (
        (f"xrv:{tmp_path / 'xrv-converted'}", {}),
        ("xrv:densenet121-res224-nih", {"allow_pickle": True}),
    ):
        assert embedcache.load_encoder(source, device="cpu", **options).fingerprint == original.fingerprint
    with pytest.raises(EncoderError, match="no such weights, expected one of 101-elastic"):
        embedcache.load_encoder("xrv:no-such-weights")


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


def test_what_is_in_the_hubs_cache_needs_no_network(checkpoints: Path, tmp_path: Path) -> None:
    """The hub's address leads nowhere here, and offline mode is not set: local files are enough."""
    repository = tmp_path / "hub" / "models--made--encoder"
    shutil.copytree(checkpoints / "bert", repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    code = (
        "import embedcache\n"
        "e = embedcache.load_encoder('hf:made/encoder', device='cpu')\n"
        "print(e.record.notes['revision'])\n"
        "try:\n    embedcache.load_encoder('hf:made/other', modality='text')\n"
        "except embedcache.EmbedCacheError as error:\n    print(error)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment |= {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    revision, error = done.stdout.splitlines()
    assert revision == "0" * 40
    assert "not on this machine and not to be fetched" in error
    assert "'hf download made/other'" in error


def test_a_gated_repository_says_what_to_do(monkeypatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

    def refuse(name: str, **options: object) -> str:
        if options.get("local_files_only"):
            raise LocalEntryNotFoundError("not here")
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(EncoderError, match=r"gated; accept its terms.*'hf auth login' and 'hf download google/meds"):
        embedcache.load_encoder("medsiglip-image")


def test_a_snapshot_with_missing_parts_is_fetched_anew(checkpoints: Path, tmp_path: Path, monkeypatch) -> None:
    import huggingface_hub

    partial, whole = tmp_path / "partial", tmp_path / "whole"
    shutil.copytree(checkpoints / "vit", whole)
    shutil.copytree(checkpoints / "vit", partial)
    (partial / "model.safetensors").unlink()
    asked = []

    def download(name: str, **options: object) -> str:
        asked.append(options)
        return str(partial if options.get("local_files_only") else whole)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = Checkpoint.find("hf", "made/encoder@v1", EncoderOptions(), {})
    assert found.directory == whole
    assert [o.get("revision") for o in asked] == ["v1", "v1"]
    assert not any("*.bin" in str(o.get("allow_patterns")) for o in asked)
    Checkpoint.find("hf", "made/encoder", EncoderOptions(allow_pickle=True), {})
    assert "*.bin" in asked[-1]["allow_patterns"]
    assert checkpoint_module.HUB_PREFIX == "hf-hub:"


def test_names_of_timm_and_open_clip_lead_to_their_hub_repositories() -> None:
    from embedcache.encoders import open_clip, timm

    assert timm._on_the_hub("vit_base_patch16_224.mae") == "timm/vit_base_patch16_224.mae"
    assert open_clip._on_the_hub("ViT-B-16/openai") == "timm/vit_base_patch16_clip_224.openai"
    with pytest.raises(EncoderError, match="no such model; did you mean resnet"):
        timm._on_the_hub("resnet5")
    with pytest.raises(EncoderError, match="no weights of that name on the hub; there are resnet50"):
        timm._on_the_hub("resnet50.nobody")
    with pytest.raises(EncoderError, match=r"tags of 'ViT-B-16': .*laion2b_s34b_b88k"):
        open_clip._on_the_hub("ViT-B-16/nobody")


def test_an_adapter_is_not_a_model(checkpoints: Path, tmp_path: Path) -> None:
    copy = tmp_path / "vit"
    shutil.copytree(checkpoints / "vit", copy)
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(EncoderError, match="holds an adapter, not a whole model; merge it once"):
        embedcache.load_encoder(f"hf:{copy}")


def test_images_of_different_shapes_cannot_be_batched(checkpoints: Path, tmp_path: Path) -> None:
    copy = tmp_path / "vit"
    shutil.copytree(checkpoints / "vit", copy)
    path = copy / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "size": {"shortest_edge": 128}}))
    with pytest.raises(EncoderError, match="for a wide image and"):
        embedcache.load_encoder(f"hf:{copy}")


def test_a_checkpoint_without_its_tokenizer_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    """transformers would go on with an empty vocabulary, and every report would be the same."""
    copy = tmp_path / "bert"
    shutil.copytree(checkpoints / "bert", copy)
    for path in [*copy.glob("tokenizer*"), *copy.glob("vocab*")]:
        path.unlink()
    with pytest.raises(EncoderError, match=r"no tokenizer, expected one of tokenizer.json, vocab.txt"):
        embedcache.load_encoder(f"hf:{copy}")


def test_a_tokenizer_of_another_model_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bert"
    shutil.copytree(checkpoints / "bert", copy)
    words = json.loads((copy / "tokenizer.json").read_text())
    for k in range(50):
        words["model"]["vocab"][f"word{k}"] = len(words["model"]["vocab"])
    (copy / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(EncoderError, match=r"the tokenizer has \d+ words, the model \d+; they do not belong together"):
        embedcache.load_encoder(f"hf:{copy}")


@pytest.mark.parametrize("source", ["hf", "timm", "xrv", "open_clip"])
@pytest.mark.parametrize("content", ["{", "[1]", "3", '"words"', "{}", "null"])
def test_a_config_that_is_none_is_an_error_of_ours(tmp_path: Path, source: str, content: str) -> None:
    for file in ("config.json", "open_clip_config.json", "modules.json"):
        (tmp_path / file).write_text(content)
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(EncoderError, match=source):
        embedcache.load_encoder(f"{source}:{tmp_path}", modality="image")
    if source in ("hf", "open_clip"):
        with pytest.raises(EncoderError, match=source):
            embedcache.load_encoder(f"{source}:{tmp_path}", modality="text")
