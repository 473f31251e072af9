"""The Adaptor against numbers computed by the paper's own code, and what it is kept as."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden_numbers import close, part
from safetensors.torch import load_file
from torch import Tensor

import embedcache
from embedcache.errors import FingerprintMismatchError, RunNotFoundError
from embedcache.stage_two.adaptor import KINDS, Adaptor, count_parameters, read_adaptor
from embedcache.stage_two.config import TrainConfig
from embedcache.stage_two.losses import contrastive_loss


def test_outputs_and_loss(golden: dict[str, Tensor]) -> None:
    adaptor = Adaptor.from_reference(part(golden, "weights.")).eval()
    output = adaptor(golden["input.image"], golden["input.text"])
    close(output.image_embeds, golden["output.image_embeds"])
    close(output.text_embeds, golden["output.text_embeds"])
    close(output.logits_per_text, golden["output.logits_per_text"])
    close(contrastive_loss(output.logits_per_text).reshape(1), golden["output.loss"])
    close(adaptor.encode_image(golden["input.image"]), golden["output.image_embeds"])
    close(adaptor.encode_text(golden["input.text"]), golden["output.text_embeds"])


def test_tokens_of_one_modality(golden: dict[str, Tensor]) -> None:
    adaptor = Adaptor.from_reference(part(golden, "weights.")).eval()
    close(adaptor.encode_image(golden["input.image_tokens"]), golden["output.image_tokens"])


def test_gradients_and_none_for_queries_and_keys(golden: dict[str, Tensor]) -> None:
    adaptor = Adaptor.from_reference(part(golden, "weights.")).eval()
    contrastive_loss(adaptor(golden["input.image"], golden["input.text"]).logits_per_text).backward()
    theirs = Adaptor.from_reference(part(golden, "grad."))
    for (name, ours), expected in zip(adaptor.named_parameters(), theirs.parameters(), strict=True):
        assert ours.grad is not None, name
        close(ours.grad, expected.data)
        if name.endswith("in_proj_weight"):
            assert not ours.grad[: 2 * adaptor.config["projection_dim"]].any()


@pytest.mark.parametrize(("image_dim", "expected"), [(384, 11_912_705), (768, 12_207_617), (512, 12_011_009)])
def test_parameter_counts_of_the_paper(image_dim: int, expected: int) -> None:
    assert count_parameters(Adaptor(image_dim, 768)) == expected


@pytest.mark.parametrize("prefix", ["model.", "module.model."])
def test_a_reference_checkpoint_with_a_prefix(golden: dict[str, Tensor], prefix: str) -> None:
    weights = part(golden, "weights.")
    adaptor = Adaptor.from_reference({f"{prefix}{name}": value for name, value in weights.items()}).eval()
    close(adaptor.encode_image(golden["input.image"]), golden["output.image_embeds"])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_one_interface(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    text_dim = 6 if kind == "identity" else 5
    adaptor = Adaptor(6, text_dim, kind=kind, projection_dim=24, ff_dim=32, normalise="l2").eval()
    image, text = torch.randn(4, 6), torch.randn(4, text_dim)
    output = adaptor(image, text)
    width = 6 if kind == "identity" else 24
    assert output.image_embeds.shape == output.text_embeds.shape == (4, width)
    close(output.image_embeds.norm(dim=1), torch.ones(4))
    close(adaptor.encode_image(image), output.image_embeds)
    close(adaptor.encode_text(text), output.text_embeds)
    close(output.logits_per_text, adaptor.logit_scale.exp() * output.text_embeds @ output.image_embeds.T)
    assert adaptor.encode_image(torch.randn(4, 3, 6)).shape == (4, 3, width)
    adaptor.save_pretrained(tmp_path)
    close(read_adaptor(tmp_path).encode_text(text), output.text_embeds)


def test_what_the_simple_kinds_are() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    close(Adaptor(6, 6, kind="identity").encode_image(x), x / x.norm(dim=1, keepdim=True))
    assert count_parameters(Adaptor(6, 6, kind="identity")) == 1
    assert count_parameters(Adaptor(6, 5, kind="linear", projection_dim=8)) == 6 * 8 + 5 * 8 + 1
    mlp = Adaptor(6, 6, kind="mlp", projection_dim=8, n_layers=1, ff_dim=12).eval()
    block, norm, last = mlp.towers.image_tower  # type: ignore[misc, union-attr]
    h = x + block.narrow(torch.nn.functional.gelu(block.widen(block.norm(x))))
    y = last(norm(h))
    close(mlp.encode_image(x), y / y.norm(dim=1, keepdim=True))


def test_a_bias_of_similarities_and_their_scale_can_be_learnt() -> None:
    config = TrainConfig(loss="siglip")
    adaptor = Adaptor(6, 5, projection_dim=24, logit_scale=config.logit_scale, logit_bias=config.logit_bias).eval()
    output = adaptor(torch.randn(3, 6), torch.randn(3, 5))
    close(output.logits_per_text, 20 * output.text_embeds @ output.image_embeds.T - 10)
    assert count_parameters(adaptor) == count_parameters(Adaptor(6, 5, projection_dim=24)) + 1


def test_pairs_of_tokens_are_compared_by_the_mean_of_those_that_are_there() -> None:
    torch.manual_seed(0)
    adaptor = Adaptor(6, 5, projection_dim=24, ff_dim=32).eval()
    image, text = torch.randn(3, 4, 6), torch.randn(3, 7, 5)
    mask = torch.arange(7) < torch.tensor([[7], [2], [4]])
    output = adaptor(image, text, text_mask=mask)
    mean = adaptor.encode_image(image).mean(1)
    close(output.image_embeds, mean / mean.norm(dim=1, keepdim=True))
    alone = adaptor(image[1:2], text[1:2, :2])
    close(output.text_embeds[1:2], alone.text_embeds)


def test_an_untrained_one_has_other_weights_and_the_same_inputs() -> None:
    adaptor = Adaptor(6, 5, projection_dim=24, normalise="zscore").eval()
    adaptor.image_norm.fit([torch.randn(50, 6) * 3 + 1])
    other = adaptor.untrained()
    assert torch.equal(other.image_norm.mean, adaptor.image_norm.mean)
    assert not torch.equal(other.towers.image_projection.weight, adaptor.towers.image_projection.weight)  # type: ignore[union-attr]
    assert not other.training


def test_a_store_of_another_encoder_is_refused_by_name(world) -> None:
    encoders = {"image": {"name": "vit", "fingerprint": "f" * 64}}
    adaptor = Adaptor(16, 12, encoders=encoders)
    with pytest.raises(FingerprintMismatchError, match=r"there: .*image encoder 'vit' \(ffffffffffff.*'external'"):
        adaptor.check_encoder(world.image, "there")
    with pytest.raises(FingerprintMismatchError, match="text encoder 'unknown'"):
        adaptor.check_encoder(world.text, "there")
    Adaptor.of_config(world.image, world.text, TrainConfig()).check_encoder(world.image, "there")


def test_samples_do_not_touch_each_other() -> None:
    torch.manual_seed(0)
    adaptor = Adaptor(6, 5, projection_dim=24, ff_dim=32).eval()
    image = torch.randn(4, 6)
    alone = torch.cat([adaptor.encode_image(row[None]) for row in image])
    close(adaptor.encode_image(image), alone)


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match=r"projection_dim \(10\) must be divisible by n_heads \(3\)"):
        Adaptor(4, 4, projection_dim=10, n_heads=3)
    adaptor = Adaptor(4, 4, projection_dim=12)
    with pytest.raises(ValueError, match=r"expected \(b, 4\)"):
        adaptor(torch.randn(2, 4), torch.randn(3, 4))
    with pytest.raises(KeyError, match=r"lacks .projection\.visual_projection"):
        Adaptor.from_reference({"adaptor_module.encoder.0.linear1.weight": torch.zeros(2, 2)})


def test_it_is_saved_and_read_back(tmp_path: Path) -> None:
    encoders = {"image": {"name": "vit", "fingerprint": "f"}}
    adaptor = Adaptor(6, 5, projection_dim=24, n_layers=1, n_heads=3, ff_dim=32, dropout=0.2, encoders=encoders).eval()
    adaptor.save_pretrained(tmp_path / "run")
    read = embedcache.Adaptor.from_pretrained(tmp_path / "run")
    assert read.config == adaptor.config
    assert read.encoders == encoders
    image = torch.randn(3, 6)
    torch.testing.assert_close(read.encode_image(image), adaptor.encode_image(image), atol=0, rtol=0)
    with pytest.raises(RunNotFoundError, match="embedcache train"):
        embedcache.Adaptor.from_pretrained(tmp_path)
    with pytest.raises(RunNotFoundError, match="no Adaptor there"):
        embedcache.Adaptor.from_pretrained(tmp_path / "run" / "deeper" / "still")
    with pytest.raises(RunNotFoundError, match="embedcache train"):
        read_adaptor("owner/name")  # a run directory is never looked for on a hub


def test_the_saved_files_say_what_they_are(tmp_path: Path) -> None:
    encoders = {"image": {"name": "vit", "fingerprint": "a" * 64}, "text": {"name": "bert", "fingerprint": "b" * 64}}
    adaptor = Adaptor(6, 5, projection_dim=24, encoders=encoders)
    adaptor.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adaptor.safetensors")) == set(adaptor.state_dict())
    assert json.loads((tmp_path / "config.json").read_text())["encoders"] == encoders
    card = (tmp_path / "README.md").read_text()
    assert f"vit, fingerprint `{'a' * 64}`" in card
    assert "arXiv 2401.01179" in card


def test_it_is_pushed_to_a_hub_as_those_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the request itself: what the hub's client is asked to send."""
    from huggingface_hub import HfApi

    sent = {}

    def create_repo(self: HfApi, **options: object) -> object:
        return type("Url", (), {"repo_id": options["repo_id"]})()

    def upload_folder(self: HfApi, *, folder_path: Path, **options: object) -> str:
        sent.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()}, **options)
        return "commit"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    adaptor = Adaptor(6, 5, projection_dim=24)
    assert adaptor.push_to_hub("owner/adaptor") == "commit"
    assert sent["repo_id"] == "owner/adaptor"
    adaptor.save_pretrained(tmp_path)
    for name in ("adaptor.safetensors", "config.json", "README.md"):
        assert sent[name] == (tmp_path / name).read_bytes()


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    with pytest.raises(RunNotFoundError, match="no Adaptor there"):
        read_adaptor(tmp_path)
    with pytest.raises(ValueError, match="adaptor 'conv', expected one of attention, mlp"):
        Adaptor(4, 4, kind="conv")
    with pytest.raises(ValueError, match="'identity' of 4-d images and 5-d texts"):
        Adaptor(4, 5, kind="identity")
