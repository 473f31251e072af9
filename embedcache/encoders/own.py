"""A user's own encoder, named as `py:package.module:factory`: for checkpoints that no library loads.

The factory takes no arguments and gives an `ImageModel` or a `TextModel`. Naming it is the consent to run its code. Its
source file is hashed into the fingerprint, and so are the weights that it loads, by content; what else it reads or
imports belongs into the model's `config`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path

from embedcache.encoders.base import EncoderOptions, Modality
from embedcache.encoders.image import ImageModel
from embedcache.encoders.text import TextModel
from embedcache.encoders.transforms import paper_transform
from embedcache.errors import EncoderError
from embedcache.fingerprint import digest_file


def load(
    location: str, modality: Modality | None, options: EncoderOptions, pins: Mapping[str, str]
) -> ImageModel | TextModel:
    """What the factory gives, with its source file in the record."""
    source = f"py:{location}"
    module_name, _, factory_name = location.partition(":")
    if not module_name or not factory_name:
        raise EncoderError(f"{source}: expected py:package.module:factory")
    for option in ("layer", "image_size", "max_length"):
        if getattr(options, option) is not None:
            raise EncoderError(f"{source}: {option} cannot be chosen here; make it a choice of your factory's")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise
        raise EncoderError(
            f"{source}: no module {error.name!r}; install it, or run with PYTHONPATH set to the directory that holds it"
        ) from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        raise EncoderError(f"{source}: {module_name} has no function {factory_name!r}")
    file = inspect.getsourcefile(inspect.unwrap(factory))
    if file is None or not Path(file).is_file():
        raise EncoderError(f"{source}: its source file cannot be found, so its code cannot be fingerprinted")
    model = factory()
    if not isinstance(model, (ImageModel, TextModel)):
        raise EncoderError(
            f"{source}: the factory gave a {type(model).__name__}, expected embedcache.encoders.image.ImageModel or "
            "embedcache.encoders.text.TextModel"
        )
    config = {"own": dict(model.config), "factory": factory_name, "code": digest_file(Path(file))}
    if isinstance(model, ImageModel) and options.transform == "paper":
        model = dataclasses.replace(model, transform=paper_transform())
    return dataclasses.replace(model, source="py", name=source, config=config)
