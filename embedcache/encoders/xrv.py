"""Models of torchxrayvision: the ResNet autoencoder and classifiers, with their own [-1024, 1024] grey input.

A local directory holds `config.json` with the name of the weights and `model.safetensors`, as `convert` writes them
from the pickles that torchxrayvision publishes.

Shape notation: b batch size, d width.
"""

from __future__ import annotations

import json
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from embedcache.encoders.base import EncoderOptions, Modality
from embedcache.encoders.checkpoint import Checkpoint, admit_pickle, read_pickle, write_safetensors
from embedcache.encoders.image import ImageModel
from embedcache.encoders.pooling import Output
from embedcache.encoders.transforms import of_xrv, paper_transform
from embedcache.errors import EncoderError

_AUTOENCODER = "101-elastic"


@dataclass(frozen=True)
class _Network:
    """An architecture of torchxrayvision.

    Args:
        whole: takes the published state dict.
        used: what the features come from, the decoder or classifier left out.
        features: from (b, 1, H, W) to a map (b, d, rows, columns).
        image_size: native height and width.
    """

    whole: torch.nn.Module
    used: torch.nn.Module
    features: Callable[[torch.Tensor], torch.Tensor]
    image_size: int


def load(location: str, modality: Modality | None, options: EncoderOptions, pins: Mapping[str, str]) -> ImageModel:
    """The name of one of torchxrayvision's weights, or a local directory."""
    source = f"xrv:{location}"
    if modality == "text" or options.layer is not None:
        raise EncoderError(f"{source}: torchxrayvision gives images' last features only; leave out modality and layer")
    _library()
    if location.startswith((".", "/", "~")) or Path(location).is_dir():
        checkpoint = Checkpoint.find("xrv", location, options, pins)
        weights_name = str(checkpoint.json("config.json").get("weights"))
        weights, name, notes = checkpoint.weights(), checkpoint.name, checkpoint.notes
    else:
        path = _published(location)
        if not path.is_file():
            raise EncoderError(
                f"{source}: not on this machine; fetch and convert it once with 'embedcache encoders --convert "
                f"{source} --out DIRECTORY', then name xrv:DIRECTORY"
            )
        admit_pickle(path, source, options.allow_pickle, pins)
        weights_name, weights, name, notes = location, read_pickle(path, safe_globals=_classes()), source, {}
    network = _network(weights_name, source)
    try:
        network.whole.load_state_dict(weights)
    except RuntimeError as error:
        first_line = str(error).splitlines()[0]
        raise EncoderError(f"{source}: these are not the weights of {weights_name} ({first_line})") from error

    def forward(pixels: torch.Tensor) -> Output:
        cells = network.features(pixels)
        grid = (cells.shape[2], cells.shape[3])
        return Output(cells.flatten(2).transpose(1, 2), grid, pooler=cells.mean(dim=(2, 3)))

    native = options.image_size or network.image_size
    return ImageModel(
        source="xrv",
        name=name,
        module=network.used,
        forward=forward,
        transform=paper_transform(to_unit=False) if options.transform == "paper" else of_xrv(native),
        config={"class": type(network.whole).__name__, "config": {}},
        pooling="pooler",
        concurrent=True,
        libraries=("torchxrayvision", "scikit-image"),
        notes=notes,
    )


def convert(location: str, out: Path) -> Path:
    """Fetches published weights where they are not here, and writes them as a local directory of safetensors.

    Raises:
        EncoderError: no such weights, or they cannot be fetched or read.
    """
    _library()
    from torchxrayvision import utils

    path = _published(location)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            utils.download(_url(location), str(path))
        except OSError as error:
            raise EncoderError(
                f"xrv:{location}: cannot be fetched ({type(error).__name__}); where there is a network, run "
                f"'curl -L --create-dirs -o {path.name} {_url(location)}' and put the file into {path.parent}"
            ) from error
    network = _network(location, f"xrv:{location}")
    network.whole.load_state_dict(read_pickle(path, safe_globals=_classes()))
    out.mkdir(parents=True, exist_ok=True)
    write_safetensors(network.whole.state_dict(), out / "model.safetensors")
    (out / "config.json").write_text(json.dumps({"weights": location}), "utf-8")
    return out


def _library() -> None:
    """Imports torchxrayvision, which switches all warnings off where it is imported.

    Raises:
        EncoderError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            import torchxrayvision  # noqa: F401
    except ImportError as error:
        raise EncoderError("xrv: encoders need torchxrayvision; run 'pip install embedcache[xrv]'") from error


def _url(weights: str) -> str:
    from torchxrayvision import autoencoders, models

    known = {**autoencoders.model_urls, **models.model_urls}
    if weights not in known:
        raise EncoderError(f"xrv:{weights}: no such weights, expected one of {', '.join(sorted(known))}")
    return str(known[weights]["weights_url"])


def _published(weights: str) -> Path:
    """Where torchxrayvision keeps the file that it downloads."""
    from torchxrayvision import utils

    return Path(utils.get_cache_dir()) / _url(weights).rpartition("/")[2]


def _network(weights: str, source: str) -> _Network:
    from torchvision.models import resnet50
    from torchxrayvision import autoencoders, models

    _url(weights)
    if weights == _AUTOENCODER:
        autoencoder = autoencoders.ResNetAE101()
        parts = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
        encoder = torch.nn.ModuleList([getattr(autoencoder, part) for part in parts])
        return _Network(autoencoder, encoder, autoencoder.encode, 224)
    if weights == "resnet50-res512-all":
        resnet = resnet50(num_classes=18)
        resnet.conv1 = torch.nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
        trunk = torch.nn.Sequential(*list(resnet.children())[:-2])  # without pooling and classifier
        return _Network(resnet, trunk, trunk, 512)
    if "labels" not in models.model_urls.get(weights, {}) or weights.startswith("resnet"):
        raise EncoderError(f"{source}: weights {weights!r} are of an architecture that is not read here")
    densenet = models.DenseNet(num_classes=len(models.model_urls[weights]["labels"]))
    return _Network(densenet, densenet.features, lambda pixels: functional.relu(densenet.features(pixels)), 224)


def _classes() -> list[Any]:
    """What the published pickles of whole DenseNets are made of, all of it without code of its own."""
    from torch import nn
    from torchxrayvision import models

    own = [models.DenseNet, models._DenseBlock, models._DenseLayer, models._Transition]
    layers = [nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.Linear]
    return [*own, *layers, OrderedDict, set]
