"""The command of stage one."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from embedcache.cli.base import PATH, json_option, main
from embedcache.cli.encoders import encoder_options, load_named, policy
from embedcache.errors import NoRoomError, SettingsError

if TYPE_CHECKING:
    from embedcache.stage_one.estimate import Estimate


class _BatchSize(click.ParamType):
    name = "integer or auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "auto" else click.IntRange(min=1).convert(value, param, ctx)


class _Part(click.ParamType):
    name = "i/n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from embedcache.stage_one.plan import Part

        try:
            part = Part.parse(value)
        except SettingsError as error:
            self.fail(str(error), param, ctx)
        return part.number, part.n


part_option = click.option("--part", type=_Part(), help="Do the i-th of n parts of the plan, and leave the rest.")


@main.command()
@click.argument("manifest", type=PATH)
@click.argument("encoder")
@click.option("--store", "store_dir", type=PATH, required=True, help="The store's directory.")
@encoder_options
@click.option("--tokens", is_flag=True, help="Store tokens beside the embeddings.")
@click.option("--views", default=1, type=click.IntRange(min=1), help="Rows of each sample: the plain one, and others.")
@click.option("--view", "view_policy", multiple=True, metavar="FIELD=VALUE", help="How views are drawn: ViewPolicy.")
@click.option("--store-dtype", default="float16", type=click.Choice(["float16", "float32", "bfloat16", "int8"]))
@click.option("--batch-size", default="32", type=_BatchSize(), show_default=True, help="auto: by a GPU's memory.")
@click.option("--shard-rows", default=1024, type=click.IntRange(min=1), show_default=True)
@click.option("--threads", "n_threads", type=click.IntRange(min=1), help="Of each process; by default its cores.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes; by default one for each GPU, else one.")
@click.option("--backend", default="local", type=click.Choice(["local", "dask", "ray"]), show_default=True)
@click.option("--address", help="Of a running dask scheduler or ray cluster.")
@part_option
@click.option("--plan", is_flag=True, help="Say what it would take, and stop.")
@click.option("--retry-failed", is_flag=True, help="Try the inputs again that failed before.")
@click.option("--check-inputs", is_flag=True, help="Read stored images again and refuse changed ones.")
@json_option
def extract(manifest: Path, encoder: str, store_dir: Path, plan: bool, as_json: bool, **options: Any) -> None:
    """Stage one: run every sample of MANIFEST through ENCODER once.

    Stopped or killed, the same command goes on where it was.

    \b
    embedcache extract manifest.parquet dinov2-s --store cache/mine/dinov2-s
    embedcache extract manifest.parquet dinov2-s --store cache/mine/dinov2-s --plan
    embedcache extract manifest.parquet rad-dino --store cache/mine/tokens --tokens --image-size 518 --token-grid 16
    embedcache extract manifest.parquet dinov2-b --store cache/mine/b --compute-dtype bfloat16 --batch-size auto
    embedcache extract manifest.parquet dinov2-b --store cache/mine/b --backend dask --address tcp://head:8786
    """
    from embedcache.data.manifest import Manifest
    from embedcache.data.views import ViewPolicy

    read = Manifest.read(manifest)
    from embedcache.stage_one.asked import Asked
    from embedcache.stage_one.extract import extract as run_extract
    from embedcache.stage_one.extract import plan_extraction
    from embedcache.workers.chosen import Workers

    options["view_policy"] = policy(ViewPolicy, options["view_policy"], "--view")
    Asked(**{field.name: options[field.name] for field in fields(Asked)})  # before an encoder is loaded
    Workers(options["backend"], options["address"], options["workers"], options["n_threads"])
    loaded = load_named(encoder, options)
    if plan:
        options.pop("check_inputs")
        found = plan_extraction(read, loaded, store_dir, **options)
        click.echo(json.dumps(found.to_json()) if as_json else "\n".join(found.lines()))
        refuse_unless_room([found])
        return
    report = run_extract(read, loaded, store_dir, **options)
    if as_json:
        click.echo(json.dumps(report.to_json()))
        return
    for failure in report.failures:
        click.echo(f"failed {failure.id!r}: {failure.reason}: {failure.message}", err=True)
    if report.failures:
        click.echo("to try failed inputs again: --retry-failed", err=True)
    click.echo(
        f"{report.store}: asked {report.n_asked}, encoded {report.n_embedded}, present {report.n_present}, "
        f"failed {report.n_failed}, {report.seconds:.1f} s"
    )
    if report.n_embedded:
        click.echo(f"phases: {report.phases}")
    if report.reduced:
        sizes = ", ".join(sorted({str(size) for size in report.reduced.values()}))
        click.echo(f"memory ran out: {len(report.reduced)} shards were encoded in batches of {sizes}", err=True)
    if report.truncated:
        n_cut = sum(report.truncated.values())
        click.echo(f"cut off: {n_cut:,} tokens of {len(report.truncated):,} texts; --max-length lets more in", err=True)


def refuse_unless_room(estimates: Collection[Estimate]) -> None:
    """Stops with a message where a disk or the memory would not do for what is planned."""
    from embedcache.resources import check_room

    check_room({found.store: found.bytes_needed for found in estimates})
    for found in estimates:
        if not found.fits:
            raise NoRoomError(
                f"{found.store}: needs more memory than is free; take fewer --workers, a smaller --batch-size or "
                "--shard-rows, or a --token-grid"
            )
