"""Commands of the two stages: encode, train, probe, or all of it by a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from embedcache.cli.base import PATH, json_option, main
from embedcache.cli.encoders import encoder_options, load_named


@main.command()
@click.argument("recipe", type=PATH)
@click.option("--set", "overrides", multiple=True, metavar="A.B=C", help="Change a field of the recipe.")
@click.option("--run-dir", type=PATH, help="Where results go; by default runs/<recipe>/<time>.")
@json_option
def run(recipe: Path, overrides: tuple[str, ...], run_dir: Path | None, as_json: bool) -> None:
    """Run a recipe: both stages, every encoder, one table.

    \b
    embedcache run pipelines/phantom.yaml
    embedcache run pipelines/shenzhen.yaml --set data.root=path/to/shenzhen
    """
    from embedcache.recipe.read import read_recipe

    checked = read_recipe(recipe, overrides)
    from embedcache.recipe.run import run_recipe, score_table

    result = run_recipe(checked, run_dir=run_dir, say=lambda line: click.echo(line, err=as_json))
    if as_json:
        click.echo(json.dumps(result.to_json()))
        return
    click.echo("\n" + score_table(result.scores))
    click.echo(f"\nrun directory: {result.run_dir}")


@main.command()
@click.argument("manifest", type=PATH)
@click.argument("encoder")
@click.option("--store", "store_dir", type=PATH, required=True, help="The store's directory.")
@encoder_options
@click.option("--tokens", is_flag=True, help="Store tokens beside the embeddings.")
@click.option("--store-dtype", default="float16", type=click.Choice(["float16", "float32", "bfloat16", "int8"]))
@click.option("--batch-size", default=32, type=click.IntRange(min=1), show_default=True)
@click.option("--shard-rows", default=1024, type=click.IntRange(min=1), show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Preparing threads; by default one for each core.")
@click.option("--retry-failed", is_flag=True, help="Try the inputs again that failed before.")
@click.option("--check-inputs", is_flag=True, help="Read stored images again and refuse changed ones.")
@json_option
def extract(manifest: Path, encoder: str, store_dir: Path, as_json: bool, **options: Any) -> None:
    """Stage one: run every sample of MANIFEST through ENCODER once.

    Stopped or killed, the same command goes on where it was.

    \b
    embedcache extract manifest.parquet dinov2-s --store cache/mine/dinov2-s
    embedcache extract manifest.parquet hf:path/to/checkpoint --store cache/mine/own --pooling mean
    embedcache extract manifest.parquet rad-dino --store cache/mine/tokens --tokens --image-size 518 --token-grid 16
    """
    from embedcache.data.manifest import Manifest

    read = Manifest.read(manifest)
    from embedcache.stage_one.extract import extract as run_extract

    loaded = load_named(encoder, options)
    report = run_extract(read, loaded, store_dir, n_threads=options.pop("threads"), **options)
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
    if report.truncated:
        n_cut = sum(report.truncated.values())
        click.echo(f"cut off: {n_cut:,} tokens of {len(report.truncated):,} texts; --max-length lets more in", err=True)


@main.command()
@click.argument("manifest", type=PATH)
@click.argument("image_store", type=PATH)
@click.argument("text_store", type=PATH)
@click.option("--run-dir", type=PATH, required=True)
@click.option("--epochs", type=click.IntRange(min=1))
@click.option("--batch-size", type=click.IntRange(min=2))
@click.option("--lr", type=click.FloatRange(min=0, min_open=True))
@click.option("--seed", type=int)
@click.option("--device")
@json_option
def train(manifest: Path, image_store: Path, text_store: Path, run_dir: Path, as_json: bool, **options: Any) -> None:
    """Stage two: train an Adaptor on the pairs of two stores.

    \b
    embedcache train manifest.parquet cache/mine/dinov2-s cache/mine/bert --run-dir runs/mine
    """
    from embedcache.data.manifest import Manifest
    from embedcache.stage_two.train import TrainConfig
    from embedcache.stage_two.train import train as run_train

    config = TrainConfig(**{name: value for name, value in options.items() if value is not None})
    result = run_train(Manifest.read(manifest), image_store, text_store, run_dir, config=config)
    if as_json:
        click.echo(json.dumps(result.to_json()))
        return
    best = result.history[result.best_epoch]
    click.echo(
        f"{result.n_train} training pairs, {result.n_valid} validation pairs, best epoch {result.best_epoch + 1} of "
        f"{len(result.history)}: validation loss {best['valid_loss']:.3f}\nrun directory: {run_dir}"
    )


@main.command()
@click.argument("manifest", type=PATH)
@click.argument("image_store", type=PATH)
@click.option("--label", required=True, help="Name of the manifest's label set.")
@click.option("--run-dir", type=PATH, help="A run of 'embedcache train': its Adaptor is applied.")
@click.option("--text-store", type=PATH, help="Needed for the control text-as-label.")
@json_option
def probe(
    manifest: Path, image_store: Path, label: str, run_dir: Path | None, text_store: Path | None, as_json: bool
) -> None:
    """Score the embeddings of a store on a label, beside controls.

    \b
    embedcache probe manifest.parquet cache/mine/dinov2-s --label pneumonia --run-dir runs/mine
    """
    from embedcache.data.manifest import Manifest
    from embedcache.stage_two.probe import probe as run_probe

    result = run_probe(Manifest.read(manifest), image_store, label=label, run_dir=run_dir, text_store=text_store)
    click.echo(result.scores.to_json(orient="records") if as_json else result.scores.to_string(index=False))
