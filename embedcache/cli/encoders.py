"""Commands and options for encoders: which there are, what one is, how it is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from embedcache.cli.base import PATH, json_option, main
from embedcache.errors import EncoderError
from embedcache.report.plain_table import in_columns

if TYPE_CHECKING:
    from embedcache.encoders.base import Encoder

_Command = TypeVar("_Command", bound=Callable[..., Any])

_OPTIONS = {  # by the name that `load_encoder` gives them
    "modality": click.option(
        "--modality", type=click.Choice(["image", "text"]), help="Needed where a checkpoint has both sides."
    ),
    "pooling": click.option(
        "--pooling", type=click.Choice(["cls", "mean", "cls_mean", "pooler", "projection", "first"])
    ),
    "layer": click.option("--layer", type=int, help="Block whose output is taken, from 1 or from -1 backwards."),
    "transform": click.option(
        "--transform", type=click.Choice(["paper"]), help="The paper's image transform, not the encoder's."
    ),
    "image_size": click.option("--image-size", type=click.IntRange(min=1), help="Input size in pixels."),
    "token_grid": click.option(
        "--token-grid", type=click.IntRange(min=1), help="Rows and columns that image tokens are pooled to."
    ),
    "decode": click.option(
        "--decode", multiple=True, metavar="FIELD=VALUE", help="How image files become pixels; see DecodePolicy."
    ),
    "max_length": click.option("--max-length", type=click.IntRange(min=3), help="Most tokens of a report."),
    "report": click.option(
        "--report", multiple=True, metavar="FIELD=VALUE", help="What of a report is encoded: unit=..., rule=..."
    ),
    "device": click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N."),
    "compute_dtype": click.option(
        "--compute-dtype",
        default="float32",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="What products are taken in (autocast).",
    ),
    "compile": click.option("--compile", is_flag=True, help="Run the model through torch.compile."),
    "trust_remote_code": click.option(
        "--trust-remote-code", is_flag=True, help="Run the code that lies beside the weights."
    ),
    "allow_pickle": click.option("--allow-pickle", is_flag=True, help="Read weights that are a pickle."),
}


def encoder_options(command: _Command) -> _Command:
    """Puts the options of `load_encoder` on a command."""
    for option in reversed(_OPTIONS.values()):
        command = option(command)
    return command


def consent_options() -> list[Callable[[_Command], _Command]]:
    """Options by which a user consents to code and to pickles."""
    return [_OPTIONS["allow_pickle"], _OPTIONS["trust_remote_code"]]


def load_named(name: str, options: dict[str, Any]) -> Encoder:
    """Loads an encoder by the options of `encoder_options`, which are taken out of `options`."""
    from embedcache.data.radiograph import DecodePolicy
    from embedcache.data.reports import ReportPolicy
    from embedcache.encoders.load import load_encoder

    asked = {option: options.pop(option) for option in _OPTIONS}
    asked["decode"] = policy(DecodePolicy, asked["decode"], "--decode")
    asked["report"] = policy(ReportPolicy, asked["report"], "--report")
    return load_encoder(name, **asked)


def policy(kind: type, settings: Iterable[str], option: str) -> Any:
    """A policy from FIELD=VALUE settings, each value read as YAML; None where there are none."""
    from dataclasses import fields

    import yaml

    given: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or name not in {f.name for f in fields(kind)}:
            known = ", ".join(f.name for f in fields(kind))
            raise EncoderError(f"{option} {setting!r}: expected FIELD=VALUE with one of {known}")
        read = yaml.safe_load(value)
        given[name] = tuple(read) if isinstance(read, list) else read
    try:
        return kind(**given) if given else None
    except (ValueError, TypeError) as error:
        raise EncoderError(f"{option}: {error}") from error


@main.command()
@click.argument("name", required=False)
@click.option("--check", is_flag=True, help="Load NAME and print its record.")
@click.option("--convert", is_flag=True, help="Write NAME's pickled weights as safetensors into --out.")
@click.option("--out", type=PATH, help="Directory for --convert.")
@encoder_options
@json_option
def encoders(name: str | None, check: bool, convert: bool, out: Path | None, as_json: bool, **options: Any) -> None:
    """List the encoders that have a short name, or look at one.

    NAME is a short name, or hf:, open_clip:, timm:, xrv: with a hub name or a directory, or py:package.module:factory.

    \b
    embedcache encoders
    embedcache encoders rad-dino
    embedcache encoders --check hf:path/to/checkpoint
    embedcache encoders --convert hf:dmis-lab/biobert-v1.1 --out checkpoints/biobert
    """
    if convert:
        if name is None or out is None:
            raise click.UsageError("--convert needs NAME and --out")
        from embedcache.encoders.load import convert_encoder

        written = convert_encoder(name, out)
        click.echo(json.dumps(str(written)) if as_json else f"{written}: safetensors; load it by naming this directory")
        return
    if check:
        if name is None:
            raise click.UsageError("--check needs NAME")
        _show_checked(load_named(name, options), as_json)
        return
    from embedcache.encoders.catalogue import CATALOGUE

    if name is not None and name not in CATALOGUE:
        raise EncoderError(f"no short name {name!r}; to load it and see its record: embedcache encoders --check {name}")
    listed = [CATALOGUE[name]] if name else list(CATALOGUE.values())
    if as_json:
        click.echo(json.dumps([entry.to_json() for entry in listed]))
    elif name:
        click.echo("\n".join(listed[0].lines()))
    else:
        click.echo("\n".join(in_columns([entry.row() for entry in listed])))
        click.echo("\nexposure to the test images of each dataset, and where that is said: embedcache encoders NAME")


def _show_checked(encoder: Encoder, as_json: bool) -> None:
    grid = encoder.token_grid
    facts = {
        "fingerprint": encoder.fingerprint,
        "modality": encoder.modality,
        "dim": encoder.dim,
        "token_dim": encoder.token_dim,
        "token_grid": None if grid is None else list(grid),
    }
    if as_json:
        click.echo(json.dumps({**facts, **encoder.record.to_json()}))
        return
    import yaml

    for name, value in facts.items():
        click.echo(f"{name:12} {value}")
    click.echo(yaml.safe_dump(encoder.record.to_json(), sort_keys=False, allow_unicode=True).rstrip())
