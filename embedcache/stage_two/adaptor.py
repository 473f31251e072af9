"""The Adaptor of *Freeze the backbones* (2024): a light module on top of frozen, cached embeddings.

Shape notation: b pairs, l tokens, d_image and d_text embedding widths, p projection width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
import yaml
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor, nn

from embedcache.errors import FingerprintMismatchError, RunNotFoundError, RunStateError, SettingsError
from embedcache.fingerprint import digest_arrays
from embedcache.output import write_text
from embedcache.stage_two.config import RUN_CONFIG, SEEDS, Kind, TrainConfig
from embedcache.stage_two.files import write_tensors
from embedcache.stage_two.inputs import InputNorm, unit
from embedcache.stage_two.published import model_card, reference_weights
from embedcache.stage_two.tensors import width
from embedcache.stage_two.towers import AttentionTowers, SeparateTowers, mean_token, mlp_tower, separate_towers
from embedcache.store.store import Store

WEIGHTS, CONFIG = "adaptor.safetensors", "config.json"
KINDS = get_args(Kind)
_CHUNK = 4096  # embeddings that go through at once where there are many


class AdaptorOutput(NamedTuple):
    """What the Adaptor makes of b pairs.

    image_embeds: unit vectors, (b, p). text_embeds: unit vectors, (b, p). logits_per_text: scaled cosine
    similarities, rows are texts, (b, b).
    """

    image_embeds: Tensor
    text_embeds: Tensor
    logits_per_text: Tensor


class Adaptor(nn.Module, PyTorchModelHubMixin):
    """Brings both modalities into one space.

    `attention` is the paper's (*Freeze the backbones*, arXiv 2401.01179): two bias-free projections, L2 norm,
    `n_layers` post-norm blocks shared by both modalities, L2 norm. On pooled embeddings each modality is a single
    token, no information crosses between them, and the blocks run without queries and keys. Tokens attend to the
    tokens of their own sample, and a pair is compared by the mean over its unit vectors.

    The others are to be compared with it: `mlp` (a tower of residual inverted bottlenecks for each modality, as in
    FuseMix), `linear` (a projection for each), `identity` (the embeddings themselves; nothing but the scale learns).

    Args:
        image_dim: d_image, width of the image embeddings.
        text_dim: d_text, width of the text embeddings.
        kind: `attention`, `mlp`, `linear` or `identity`.
        projection_dim: p, width of the shared space; `identity` keeps the embeddings' own.
        n_layers: blocks of `attention` and `mlp`.
        n_heads: of `attention`, must divide `projection_dim`.
        ff_dim: width of the feed-forward layer of `attention` and `mlp`.
        dropout: of attention weights, of the feed-forward layer and of residual branches.
        attention: over tokens: `self`, or `cross-modal`, where each modality asks the other's tokens, as the paper's
            formula says. That one has a shortcut: an image's vector then depends on its own report, so the loss falls
            even where images and reports have nothing to do with each other, and what was learnt is of no use for an
            image alone.
        normalise: of the inputs: `none`, `l2`, `zscore` or `whiten`, fitted on training rows; see `InputNorm`.
        logit_scale: logarithm of the factor of all similarities, at the start.
        logit_bias: what is added to them, at the start; None for no such parameter.
        encoders: for each modality `name` and `fingerprint` of the encoder whose outputs it was trained on, and which
            `features` of them, `embeddings` or `tokens`.
    """

    def __init__(
        self,
        image_dim: int,
        text_dim: int,
        *,
        kind: str = "attention",
        projection_dim: int = 768,
        n_layers: int = 2,
        n_heads: int = 12,
        ff_dim: int = 2048,
        dropout: float = 0.1,
        attention: str = "self",
        normalise: str = "none",
        logit_scale: float = TrainConfig().logit_scale,
        logit_bias: float | None = None,
        encoders: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "image_dim": image_dim, "text_dim": text_dim, "kind": kind, "projection_dim": projection_dim,
            "n_layers": n_layers, "n_heads": n_heads, "ff_dim": ff_dim, "dropout": dropout, "attention": attention,
            "normalise": normalise, "logit_scale": logit_scale, "logit_bias": logit_bias,
            "encoders": {modality: dict(encoder) for modality, encoder in (encoders or {}).items()},
        }  # fmt: skip
        self.image_norm, self.text_norm = InputNorm(normalise, image_dim), InputNorm(normalise, text_dim)
        self.towers: AttentionTowers | SeparateTowers
        if kind == "attention":
            self.towers = AttentionTowers(
                image_dim,
                text_dim,
                projection_dim=projection_dim,
                n_layers=n_layers,
                n_heads=n_heads,
                ff_dim=ff_dim,
                dropout=dropout,
                attention=attention,
            )
        elif kind == "mlp":
            self.towers = separate_towers(
                image_dim,
                text_dim,
                lambda dim: mlp_tower(
                    dim, projection_dim=projection_dim, n_layers=n_layers, ff_dim=ff_dim, dropout=dropout
                ),
            )
        elif kind == "linear":
            self.towers = separate_towers(image_dim, text_dim, lambda dim: nn.Linear(dim, projection_dim, bias=False))
        elif kind == "identity":
            if image_dim != text_dim:
                raise SettingsError(
                    f"adaptor 'identity' of {image_dim}-d images and {text_dim}-d texts, expected one width: nothing "
                    "projects them; use 'linear'"
                )
            self.towers = separate_towers(image_dim, text_dim, lambda dim: nn.Identity())
        else:
            raise ValueError(f"adaptor {kind!r}, expected one of {', '.join(KINDS)}")
        self.logit_scale = nn.Parameter(torch.tensor(logit_scale))
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.tensor(logit_bias))

    @classmethod
    def of_config(cls, image_store: Store, text_store: Store, config: TrainConfig) -> Adaptor:
        """A new Adaptor for the embeddings, or tokens, of two stores."""
        return cls(
            width(image_store, config.image),
            width(text_store, config.text),
            kind=config.adaptor,
            projection_dim=config.projection_dim,
            n_layers=config.n_layers,
            n_heads=config.n_heads,
            ff_dim=config.ff_dim,
            dropout=config.dropout,
            attention=config.attention,
            normalise=config.normalise,
            logit_scale=config.logit_scale,
            logit_bias=config.logit_bias,
            encoders={
                store.modality: {
                    "name": _name(store),
                    "fingerprint": store.encoder_fingerprint,
                    "features": features,
                }
                for store, features in ((image_store, config.image), (text_store, config.text))
            },
        )

    @property
    def encoders(self) -> dict[str, dict[str, str]]:
        """For each modality what it was trained on: `name`, `fingerprint`, `features`; empty if unknown."""
        return dict(self.config["encoders"])

    def forward(
        self, image: Tensor, text: Tensor, *, image_mask: Tensor | None = None, text_mask: Tensor | None = None
    ) -> AdaptorOutput:
        """Embeds b pairs and compares each text with each image.

        Args:
            image: pooled embeddings, (b, d_image), or tokens, (b, l, d_image).
            text: pooled embeddings, (b, d_text), or tokens, (b, l, d_text).
            image_mask, text_mask: which tokens are there, (b, l) bool; None for all.

        Raises:
            ValueError: shapes that are no pairs.
        """
        image_embeds, text_embeds = self.embed(image, text, image_mask=image_mask, text_mask=text_mask)
        return AdaptorOutput(image_embeds, text_embeds, self.logits(text_embeds, image_embeds))

    def embed(
        self, image: Tensor, text: Tensor, *, image_mask: Tensor | None = None, text_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Unit vectors of b pairs, (b, p) each; arguments as of `forward`."""
        if image.ndim not in (2, 3) or text.ndim not in (2, 3) or len(image) != len(text):
            raise ValueError(
                f"image {tuple(image.shape)} and text {tuple(text.shape)}, expected (b, {self.config['image_dim']}) "
                f"and (b, {self.config['text_dim']}), or tokens (b, l, d)"
            )
        x, y = self.towers.both(self.image_norm(image), self.text_norm(text), image_mask, text_mask)
        return _pooled(x, image_mask), _pooled(y, text_mask)

    def logits(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Scaled cosine similarities of unit vectors (m, p) and (n, p), with the bias where there is one, (m, n)."""
        similarities = self.logit_scale.exp() * (rows.float() @ columns.float().T)
        return similarities if self.logit_bias is None else similarities + self.logit_bias

    def encode_image(self, image: Tensor) -> Tensor:
        """Image embeddings (b, d_image) or tokens (b, l, d_image) to unit vectors, (b, p) or (b, l, p)."""
        return unit(self.towers.image(self.image_norm(image)))

    def encode_text(self, text: Tensor) -> Tensor:
        """Text embeddings (b, d_text) or tokens (b, l, d_text) to unit vectors, (b, p) or (b, l, p)."""
        return unit(self.towers.text(self.text_norm(text)))

    def check_encoder(self, store: Store, where: object) -> None:
        """Refuses a store of another encoder than this Adaptor was trained on.

        Args:
            where: where the Adaptor comes from, for the message.

        Raises:
            FingerprintMismatchError: names both encoders.
        """
        known = self.encoders.get(store.modality, {"name": "unknown", "fingerprint": "unknown"})
        if known["fingerprint"] != store.encoder_fingerprint:
            raise FingerprintMismatchError(
                f"{where}: its Adaptor was trained on {store.modality} encoder {known['name']!r} "
                f"({known['fingerprint'][:12]}...), {store.path} holds {_name(store)!r} "
                f"({store.encoder_fingerprint[:12]}...); train one on this store"
            )

    def untrained(self, seed: int = 0) -> Adaptor:
        """One with other weights, drawn from a seed, and with this one's normalisation of inputs."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            fresh = Adaptor(**self.config)
        fresh.image_norm.load_state_dict(self.image_norm.state_dict())
        fresh.text_norm.load_state_dict(self.text_norm.state_dict())
        return fresh.eval()

    @classmethod
    def from_reference(cls, state_dict: Mapping[str, Tensor], *, n_heads: int = 12) -> Adaptor:
        """Takes over a checkpoint of the paper's own code.

        Args:
            state_dict: its names, `projection.*`, `adaptor_module.*`, `logit_scale`, also with a prefix such as
                `model.` before all of them; others are ignored.
            n_heads: not part of a state dict.

        Raises:
            KeyError: the state dict lacks a weight; the message names it.
        """
        ours, n_layers = reference_weights(state_dict)
        projection_dim, image_dim = ours["towers.image_projection.weight"].shape
        adaptor = cls(
            image_dim,
            ours["towers.text_projection.weight"].shape[1],
            projection_dim=projection_dim,
            n_layers=n_layers,
            n_heads=n_heads,
            ff_dim=ours["towers.blocks.0.linear1.weight"].shape[0] if n_layers else 2048,
        )
        adaptor.load_state_dict(ours)
        return adaptor

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Adaptor:
        """Reads an Adaptor from a folder, a run directory for one, or from a repository of the Hugging Face hub.

        Args:
            pretrained_model_name_or_path: a folder, or `owner/name`.
            options: of `PyTorchModelHubMixin.from_pretrained`, such as `revision` and `token`.

        Raises:
            RunNotFoundError: no Adaptor there; a `FileNotFoundError`.
        """
        path = Path(pretrained_model_name_or_path)
        if not path.is_dir() and (path.is_absolute() or len(path.parts) > 2):
            raise _no_adaptor(path)
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Writes `adaptor.safetensors`, `config.json` (settings, both encoders' names and fingerprints) and a page.

        Args:
            options: of `PyTorchModelHubMixin.save_pretrained`, such as `push_to_hub` and `repo_id`.
        """
        return super().save_pretrained(save_directory, **options)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The page that goes beside the weights: what they were trained on, and how to use them."""
        return ModelCard(model_card(self.config, count_parameters(self)))

    def _save_pretrained(self, save_directory: Path) -> None:
        """Writes `adaptor.safetensors` and `config.json` (settings, both encoders' names and fingerprints)."""
        write_tensors(Path(save_directory) / WEIGHTS, self.state_dict())
        write_text(Path(save_directory) / CONFIG, json.dumps(self.config, indent=2) + "\n")
        write_text(Path(save_directory) / "README.md", model_card(self.config, count_parameters(self)))

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **settings: Any,
    ) -> Adaptor:
        from huggingface_hub import hf_hub_download
        from safetensors.torch import load_file

        if "image_dim" not in settings:
            raise _no_adaptor(model_id)
        adaptor = cls(**settings)
        path = Path(model_id) / WEIGHTS
        if not Path(model_id).is_dir():
            try:
                path = Path(
                    hf_hub_download(
                        model_id,
                        WEIGHTS,
                        revision=revision,
                        cache_dir=cache_dir,
                        force_download=force_download,
                        local_files_only=local_files_only,
                        token=token,
                    )
                )
            except EntryNotFoundError as error:
                raise _no_adaptor(model_id) from error
        elif not path.is_file():
            raise _no_adaptor(model_id)
        adaptor.load_state_dict(load_file(path))
        return adaptor.eval()


def read_adaptor(run_dir: str | Path) -> Adaptor:
    """The Adaptor of a run directory, in evaluation mode; never asks a hub.

    Raises:
        RunNotFoundError: no Adaptor there; a `FileNotFoundError`.
    """
    if not (Path(run_dir) / CONFIG).is_file():
        raise _no_adaptor(run_dir)
    return Adaptor.from_pretrained(run_dir)


def read_adaptors(run_dir: str | Path) -> list[Adaptor]:
    """The Adaptors of a run directory, one for each seed that it is trained from, the run's own first.

    Raises:
        RunNotFoundError: no Adaptor there.
        RunStateError: not all seeds are trained.
    """
    found, path = [read_adaptor(run_dir)], Path(run_dir) / RUN_CONFIG
    n_seeds = yaml.safe_load(path.read_text("utf-8"))["train"].get("n_seeds") or 1 if path.is_file() else 1
    for k in range(1, n_seeds):
        if not (Path(run_dir) / SEEDS / str(k) / CONFIG).is_file():
            raise RunStateError(
                f"{run_dir}: to be trained from {n_seeds} seeds, and {SEEDS}/{k} is not there; run 'embedcache train' "
                "again, which goes on where it was stopped"
            )
        found.append(read_adaptor(Path(run_dir) / SEEDS / str(k)))
    return found


@torch.inference_mode()
def encoded_images(adaptor: Adaptor, x: Tensor) -> Tensor:
    """Unit vectors of any number of image embeddings, (n, d) to (n, p), some at a time."""
    return torch.cat([adaptor.encode_image(part) for part in x.split(_CHUNK)])


def adaptor_digest(adaptor: Adaptor | None) -> str:
    """Of its weights, in the order that the module holds them; blank without one."""
    if adaptor is None:
        return ""
    return digest_arrays(("float32", value.cpu().numpy()) for value in adaptor.state_dict().values())


def count_parameters(module: nn.Module) -> int:
    """How many numbers training changes."""
    return sum(math.prod(p.shape) for p in module.parameters() if p.requires_grad)


def _no_adaptor(where: object) -> RunNotFoundError:
    return RunNotFoundError(f"{where}: no Adaptor there; name a run directory that 'embedcache train' wrote")


def _name(store: Store) -> str:
    return str(store.encoder.get("name", "external"))


def _pooled(x: Tensor, mask: Tensor | None) -> Tensor:
    """Tokens to the unit vector of their sample, (b, l, p) to (b, p); pooled ones, (b, p), to unit vectors."""
    return unit(x) if x.ndim == 2 else unit(mean_token(unit(x), mask))
