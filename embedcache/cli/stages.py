"""Commands of stage one, and of recipes, which run both stages."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from embedcache.cli.base import PATH, json_option, main
from embedcache.cli.comparing import say_comparison, with_images_option
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


_part_option = click.option("--part", type=_Part(), help="Do the i-th of n parts of the plan, and leave the rest.")
_STATES = {"done": "done", "elsewhere": "copied", "to do": "to do", "waits": "to do"}  # what waits is not known yet
_set_option = click.option("--set", "overrides", multiple=True, metavar="A.B=C", help="Change a field of the recipe.")


@main.command()
@click.argument("recipe", type=PATH)
@_set_option
@click.option("--run-dir", type=PATH, help="Where results go; by default runs/<recipe>/<time>.")
@click.option("--plan", is_flag=True, help="Say what stage one would take and which steps are done, and stop.")
@_part_option
@with_images_option
@json_option
def run(
    recipe: Path,
    overrides: tuple[str, ...],
    run_dir: Path | None,
    plan: bool,
    part: tuple[int, int] | None,
    with_images: bool,
    as_json: bool,
) -> None:
    """Run a recipe: both stages, every encoder, one comparison, one report.

    What is done is not done again: a run that was stopped goes on, and steps of other runs of the recipe are taken over
    where nothing that determines them has changed. With --part, stage one alone: several machines that see the same
    files do a part each.

    \b
    embedcache run pipelines/phantom.yaml
    embedcache run pipelines/shenzhen.yaml --set data.root=path/to/shenzhen --plan
    embedcache run pipelines/shenzhen.yaml --part 1/4
    """
    from embedcache.recipe.read import read_recipe

    checked = read_recipe(recipe, overrides)
    from embedcache.comparing.study import Pair
    from embedcache.recipe.encode import encode_recipe, plan_recipe
    from embedcache.recipe.run import planned_steps, run_recipe
    from embedcache.report.run_text import run_text
    from embedcache.reporting.write import write_report
    from embedcache.stage_one.estimate import in_total

    def say(line: str) -> None:
        click.echo(line, err=as_json)

    if part is not None and run_dir is not None:
        raise SettingsError("--run-dir was given with --part: a part is of stage one, which has no run directory")
    if plan:
        estimates = plan_recipe(checked, part=part)
        if as_json:
            click.echo(json.dumps({name: found.to_json() for name, found in estimates.items()}))
        for name, found in estimates.items():
            say("\n".join([name, *(f"  {line}" for line in found.lines())]))
        say(f"in all: {in_total(estimates.values())}")
        if part is None:
            say("stage two")
            for name, state in planned_steps(checked, run_dir=run_dir).items():
                say(f"  {_STATES[state]:9} {name}")
        _refuse_unless_room(estimates.values())
        return
    if part is not None:
        reports = encode_recipe(checked, part=part, say=say)
        if as_json:
            click.echo(json.dumps([report.to_json() for report in reports]))
        return
    result = run_recipe(checked, run_dir=run_dir, say=say)
    written = write_report(result.run_dir, with_images=with_images)
    if as_json:
        click.echo(json.dumps({**result.to_json(), "report": str(written.page)}))
        return
    click.echo("\n" + run_text(result.tables))
    click.echo(f"\nrun directory: {result.run_dir}")
    if "scores" in result.tables:
        answering = result.run_dir / Pair(*result.scores[["image", "text"]].iloc[0]).folder
        click.echo(f"for new images: embedcache predict {shlex.quote(str(answering))} FILE ...")
    say_comparison(result.comparison.verdicts, result.comparison.warnings, written.page)


@main.command()
@click.argument("recipe", type=PATH)
@_set_option
@click.option("--parts", default=4, show_default=True, type=click.IntRange(min=1), help="Jobs that share stage one.")
@click.option("--sbatch", multiple=True, metavar="OPTION", help="For plan and parts, such as --sbatch=--gres=gpu:1.")
@click.option("--last-sbatch", multiple=True, metavar="OPTION", help="For the last job, which runs stage two.")
@click.option("-o", "--out", type=PATH, help="File to write; by default it is printed.")
def slurm(
    recipe: Path,
    overrides: tuple[str, ...],
    parts: int,
    sbatch: tuple[str, ...],
    last_sbatch: tuple[str, ...],
    out: Path | None,
) -> None:
    """Write a script that runs a recipe as jobs of Slurm: a plan, an array that shares stage one, and the rest.

    \b
    embedcache slurm pipelines/mine.yaml --parts 8 --sbatch=--gres=gpu:1 --sbatch=--time=8:00:00 -o submit.sh
    bash submit.sh
    """
    from embedcache.recipe.read import read_recipe

    checked = read_recipe(recipe, overrides)
    from embedcache.recipe.slurm import submit_script

    if checked.extract.retry_failed:
        raise SettingsError(
            f"{recipe}: extract.retry_failed with parts: each would try every failure; retry with 'embedcache run'"
        )
    script = submit_script(recipe, checked.name, overrides, n_parts=parts, options=sbatch, last_options=last_sbatch)
    if out is None:
        click.echo(script, nl=False)
        return
    try:
        out.write_text(script, "utf-8")
    except OSError as error:
        raise click.UsageError(f"{out}: cannot be written ({error.strerror})") from error
    click.echo(f"{out}: submit it with 'bash {out}'")


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
@_part_option
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
        _refuse_unless_room([found])
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


def _refuse_unless_room(estimates: Collection[Estimate]) -> None:
    from embedcache.resources import check_room

    check_room({found.store: found.bytes_needed for found in estimates})
    for found in estimates:
        if not found.fits:
            raise NoRoomError(
                f"{found.store}: needs more memory than is free; take fewer --workers, a smaller --batch-size or "
                "--shard-rows, or a --token-grid"
            )
