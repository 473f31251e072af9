"""The one function that loads an encoder, whatever library it comes from."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from embedcache.encoders.base import Encoder, EncoderOptions, Modality, Pooling
from embedcache.encoders.catalogue import CATALOGUE
from embedcache.errors import EncoderError

if TYPE_CHECKING:
    from embedcache.data.radiograph import DecodePolicy
    from embedcache.data.reports import ReportPolicy

SOURCES = {  # prefix: the room that loads it
    "hf": "embedcache.encoders.hf",
    "open_clip": "embedcache.encoders.open_clip",
    "timm": "embedcache.encoders.timm",
    "xrv": "embedcache.encoders.xrv",
    "py": "embedcache.encoders.own",
}


def load_encoder(
    name: str,
    *,
    modality: Modality | None = None,
    pooling: Pooling | None = None,
    layer: int | None = None,
    transform: Literal["paper"] | None = None,
    image_size: int | None = None,
    token_grid: int | tuple[int, int] | None = None,
    decode: DecodePolicy | None = None,
    max_length: int | None = None,
    report: ReportPolicy | None = None,
    device: str = "auto",
    compute_dtype: str = "float32",
    compile: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Encoder:
    """Loads a frozen encoder. What is left out is as its authors meant it; what is chosen is in its record.

    Args:
        name: a short name of the catalogue, or a source: `hf:` (transformers), `open_clip:`, `timm:`, `xrv:`
            (torchxrayvision), each with a hub name, `name@revision` or a local directory, or
            `py:package.module:factory`.
        modality: `image` or `text`; needed where a checkpoint has both.
        pooling: `cls`, `mean` (of images over patches alone, of texts over real tokens), `cls_mean` (both, side by
            side), `pooler` (the model's own), `projection` (into a space shared by images and texts) or `first` (the
            first patch or token whatever it is, as the paper's code took it of Swin). What the checkpoint does not
            contain is refused.
        layer: the block whose output is taken: from 1, or from -1 backwards; by default the last, with its final norm.
        transform: `paper` for the paper's own image transform instead of the encoder's.
        image_size: input size in pixels, where it is not the encoder's own; position embeddings are interpolated.
        token_grid: rows and columns that the tokens of an image are pooled to.
        decode: how image files become pixels; by default `DecodePolicy` with JPEGs decoded at a reduced scale that
            stays at least twice as large as what they are resized to.
        max_length: most tokens of a text; by default 112, or fewer where the model or its authors take fewer.
        report: which part of a report is encoded; by default its caption.
        device: `auto`, `cpu`, `cuda`, `cuda:1`.
        compute_dtype: `float32`, or `bfloat16` or `float16`: products are taken in it (autocast), weights stay float32.
        compile: run the model through `torch.compile`: slow at first, then faster; its last bits may differ.
        trust_remote_code: run code that lies beside the weights; it is hashed into the fingerprint.
        allow_pickle: read weights that are a pickle, with torch's `weights_only`.

    Raises:
        EncoderError: unknown name, missing files or weights; the message says what to run.
    """
    entry = CATALOGUE.get(name)
    kind, _, location = (entry.local_source() if entry else name).partition(":")
    if kind not in SOURCES or not location:
        raise EncoderError(
            f"unknown encoder {name!r}; expected one of {', '.join(f'{k}:...' for k in SOURCES)}, or a short name: "
            f"{', '.join(sorted(CATALOGUE))}"
        )
    if entry and modality not in (None, entry.modality):
        raise EncoderError(f"{name}: an encoder of {entry.modality}s, modality {modality!r} was asked for")
    options = EncoderOptions(
        pooling=pooling or (entry.pooling if entry and layer is None else None),
        layer=layer,
        transform=transform,
        image_size=image_size,
        token_grid=token_grid,
        decode=decode,
        max_length=max_length,
        report=report,
        device=device,
        compute_dtype=compute_dtype,
        compile=compile,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    options.check(name)
    from embedcache.encoders.image import ImageEncoder, ImageModel
    from embedcache.encoders.text import TextEncoder

    room = importlib.import_module(SOURCES[kind])
    model = room.load(location, modality or (entry.modality if entry else None), options, entry.pins if entry else {})
    label = entry.name if entry else None
    encoder: ImageEncoder | TextEncoder
    if isinstance(model, ImageModel):
        options.check_modality("image", name)
        encoder = ImageEncoder(model, options, name=label)
    else:
        options.check_modality("text", name)
        encoder = TextEncoder(model, options, name=label)
    # a worker has another working directory, but the same files
    is_local = Path(location).expanduser().is_dir()
    at = f"{kind}:{Path(location).expanduser().resolve()}" if is_local else name
    encoder.origin = Loading(at, modality, options, encoder.fingerprint)
    # the record travels with stores: of a directory it holds the name, not the path
    of_directory = is_local and not entry
    said = {
        "name": f"{kind}:{Path(location).expanduser().resolve().name}" if of_directory else name,
        "is_directory": of_directory,
        "modality": encoder.modality,
        "options": options.chosen(),
    }
    encoder.record = replace(encoder.record, loading=said)
    return encoder


_loaded: dict[tuple[str, str], Encoder] = {}  # in a worker, by fingerprint and device


@dataclass(frozen=True)
class Loading:
    """One call of `load_encoder`, to be made again elsewhere.

    Args:
        fingerprint: of the encoder that it gave.
    """

    name: str
    modality: Modality | None
    options: EncoderOptions
    fingerprint: str

    def load(self) -> Encoder:
        """The same encoder, loaded once in each process.

        Raises:
            EncoderError: what is loaded here is another encoder.
        """
        key = (self.fingerprint, self.options.device)
        if key not in _loaded:
            options = {field.name: getattr(self.options, field.name) for field in fields(self.options)}
            encoder = load_encoder(self.name, modality=self.modality, **options)
            if encoder.fingerprint != self.fingerprint:
                raise EncoderError(
                    f"{self.name}: its fingerprint here is {encoder.fingerprint[:12]}..., expected "
                    f"{self.fingerprint[:12]}...: other weights, files or package versions than where the work was "
                    "planned; give every worker the same"
                )
            _loaded.clear()  # a worker has one at a time
            _loaded[key] = encoder
        return _loaded[key]

    def on(self, device: str) -> Loading:
        """The same encoder on another device."""
        return replace(self, options=replace(self.options, device=device))


def convert_encoder(name: str, out: Path) -> Path:
    """Writes a checkpoint whose weights are a pickle as a directory of safetensors, without running what is in it.

    Args:
        name: as for `load_encoder`.
        out: a new directory.

    Raises:
        EncoderError: no such checkpoint, no pickle in it, or one that holds more than weights.
    """
    entry = CATALOGUE.get(name)
    kind, _, location = (entry.source if entry else name).partition(":")
    if kind == "xrv":
        from embedcache.encoders import xrv

        return xrv.convert(location, out)
    if kind not in ("hf", "open_clip", "timm") or not location:
        raise EncoderError(f"{name}: expected hf:, open_clip:, timm: or xrv: with a name or a directory")
    from embedcache.encoders.checkpoint import Checkpoint, convert

    return convert(Checkpoint.find(kind, location, EncoderOptions(allow_pickle=True), {}), out)
