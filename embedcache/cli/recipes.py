"""Commands of recipes, which run both stages."""

from __future__ import annotations

import json
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from embedcache.cli.base import PATH, json_option, main
from embedcache.cli.comparing import say_comparison, with_images_option
from embedcache.cli.extracting import part_option, refuse_unless_room
from embedcache.errors import SettingsError

if TYPE_CHECKING:
    from embedcache.recipe.schema import Recipe

_STATES = {"done": "done", "elsewhere": "copied", "to do": "to do", "waits": "to do"}  # what waits is not known yet
_run_dir_option = click.option("--run-dir", type=PATH, help="Where results go; by default runs/<recipe>/<time>.")
_plan_option = click.option(
    "--plan", is_flag=True, help="Say what stage one would take and which steps are done, and stop."
)
_set_option = click.option("--set", "overrides", multiple=True, metavar="A.B=C", help="Change a field of the recipe.")


@main.command()
@click.argument("recipe", type=PATH)
@_set_option
@_run_dir_option
@_plan_option
@part_option
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
    if part is not None and run_dir is not None:
        raise SettingsError("--run-dir was given with --part: a part is of stage one, which has no run directory")
    if plan:
        _plan(checked, run_dir, part, as_json=as_json)
    elif part is not None:
        from embedcache.recipe.encode import encode_recipe

        reports = encode_recipe(checked, part=part, say=partial(click.echo, err=as_json))
        if as_json:
            click.echo(json.dumps([report.to_json() for report in reports]))
    else:
        _carry_out(checked, run_dir, with_images=with_images, as_json=as_json)


@main.command()
@_set_option
@_run_dir_option
@_plan_option
@json_option
def demo(overrides: tuple[str, ...], run_dir: Path | None, plan: bool, as_json: bool) -> None:
    """Run both stages on drawn radiographs with random encoders: no data, no network, 1 to 3 minutes.

    The recipe is pipelines/phantom.yaml; what it makes goes below cache/ and runs/ of the current directory. Its report
    shows the images, as they are of nobody.

    \b
    embedcache demo
    """
    from embedcache.recipe.read import DEMO, read_recipe

    checked = read_recipe(DEMO, overrides)
    if plan:
        _plan(checked, run_dir, as_json=as_json)
    else:
        _carry_out(checked, run_dir, with_images=True, as_json=as_json)


def _plan(recipe: Recipe, run_dir: Path | None, part: tuple[int, int] | None = None, *, as_json: bool) -> None:
    """Says what a recipe would take, and stops with a message where there is no room for it."""
    from embedcache.recipe.encode import plan_recipe
    from embedcache.recipe.run import planned_steps
    from embedcache.stage_one.estimate import in_total

    say = partial(click.echo, err=as_json)
    estimates = plan_recipe(recipe, part=part)
    if as_json:
        click.echo(json.dumps({name: found.to_json() for name, found in estimates.items()}))
    for name, found in estimates.items():
        say("\n".join([name, *(f"  {line}" for line in found.lines())]))
    say(f"in all: {in_total(estimates.values())}")
    if part is None:
        say("stage two")
        for name, state in planned_steps(recipe, run_dir=run_dir).items():
            say(f"  {_STATES[state]:9} {name}")
    refuse_unless_room(estimates.values())


def _carry_out(recipe: Recipe, run_dir: Path | None, *, with_images: bool, as_json: bool) -> None:
    """Both stages, the comparison and the report."""
    from embedcache.comparing.study import Pair
    from embedcache.recipe.run import run_recipe
    from embedcache.report.run_text import run_text
    from embedcache.reporting.write import write_report

    result = run_recipe(recipe, run_dir=run_dir, say=partial(click.echo, err=as_json))
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
    from embedcache.recipe.slurm import submit_script

    checked = read_recipe(recipe, overrides)
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
