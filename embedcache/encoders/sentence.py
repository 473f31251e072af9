"""What a sentence-transformers checkpoint puts around its model: prompt, pooling, dense layers, normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from embedcache.encoders.base import Pooling
from embedcache.encoders.checkpoint import Checkpoint
from embedcache.errors import EncoderError

_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS = {"Identity": torch.nn.Identity, "Tanh": torch.nn.Tanh, "ReLU": torch.nn.ReLU, "GELU": torch.nn.GELU}


class Normalize(torch.nn.Module):
    """Each vector divided by its L2 norm."""

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(vectors, dim=-1)


@dataclass(frozen=True)
class SentenceModules:
    """The modules that such a checkpoint lists in `modules.json`.

    Args:
        pooling: `cls` or `mean`.
        head: what follows the pooling, (b, d) to (b, e).
        prompt: what stands before every text.
        identity: kinds and settings of the modules, JSON-ready.
    """

    pooling: Pooling
    head: torch.nn.Sequential
    prompt: str
    identity: dict[str, Any]

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> SentenceModules | None:
        """The modules, or None for a checkpoint that lists none.

        Raises:
            EncoderError: a module that is not known here.
        """
        listed = checkpoint.any_json("modules.json")
        if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
            return None
        pooling: Pooling = "mean"
        steps: list[torch.nn.Module] = []
        identity: list[Any] = []
        for entry in listed:
            kind, folder = str(entry.get("type")).rpartition(".")[2], str(entry.get("path"))
            if kind == "Transformer":
                continue
            settings = checkpoint.json(f"{folder}/config.json")
            if kind == "Pooling":
                pooling = _pooling(settings, checkpoint)
                identity.append({"pooling": pooling})
            elif kind == "Dense":
                steps.append(_dense(settings, checkpoint, folder))
                identity.append({"dense": settings.get("activation_function")})
            elif kind == "Normalize":
                steps.append(Normalize())
                identity.append("normalize")
            else:
                raise EncoderError(
                    f"{checkpoint.source}: its module {kind} is not read here; name a pooling (cls or mean) to take "
                    "the model without its sentence modules"
                )
        prompts = checkpoint.json("config_sentence_transformers.json")
        named = prompts.get("default_prompt_name")
        prompt = str(prompts.get("prompts", {}).get(named, "")) if named else ""
        return cls(pooling, torch.nn.Sequential(*steps), prompt, {"modules": identity, "prompt": prompt})


def sentence_settings(checkpoint: Checkpoint) -> tuple[int | None, bool]:
    """The authors' most tokens of a text, and whether texts are put into lower case."""
    settings = checkpoint.json("sentence_bert_config.json")
    return settings.get("max_seq_length"), bool(settings.get("do_lower_case"))


def _pooling(settings: dict[str, Any], checkpoint: Checkpoint) -> Pooling:
    modes = settings.get("pooling_mode") or [mode for flag, mode in _POOLING_FLAGS.items() if settings.get(flag)]
    named = [modes] if isinstance(modes, str) else list(modes)
    if named == ["cls"]:
        return "cls"
    if named == ["mean"]:
        return "mean"
    raise EncoderError(
        f"{checkpoint.source}: pools by {' and '.join(map(str, named)) or 'nothing'}, which is not read here; name a "
        "pooling (cls or mean)"
    )


def _dense(settings: dict[str, Any], checkpoint: Checkpoint, folder: str) -> torch.nn.Module:
    from safetensors.torch import load_file

    activation = str(settings.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    path: Path = checkpoint.directory / folder / "model.safetensors"
    if activation not in _ACTIVATIONS or settings.get("use_residual") or not path.is_file():
        raise EncoderError(
            f"{checkpoint.source}: its dense layer ({folder}: {activation}) is not read here; expected safetensors and "
            f"one of {', '.join(_ACTIVATIONS)}. Name a pooling (cls or mean) to take the model without it"
        )
    linear = torch.nn.Linear(settings["in_features"], settings["out_features"], bias=settings.get("bias", True))
    with checkpoint.loading(f"{folder}/model.safetensors"):
        weights = {name.removeprefix("linear."): tensor for name, tensor in load_file(path).items()}
        linear.load_state_dict(weights)
    return torch.nn.Sequential(linear, _ACTIVATIONS[activation]())
