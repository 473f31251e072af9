"""Commands that ask the shared space: which report belongs to an image, and what a prompt says of it."""

from __future__ import annotations

import json
from pathlib import Path

import click

from embedcache.cli.base import PATH, json_option, main
from embedcache.cli.settings import pairs, read_settings


@main.command()
@click.argument("manifest", type=PATH)
@click.argument("image_store", type=PATH)
@click.argument("text_store", type=PATH)
@click.option("--run-dir", type=PATH, required=True, help="A run of 'embedcache train'.")
@click.option("--label", "labels", multiple=True, help="A label whose precision among the best matches is wanted.")
@click.option(
    "--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Any field of RetrieveConfig, such as at=1,10,100."
)
@click.option("--out", type=PATH, help="A folder for the scores and the best matches of each query.")
@json_option
def retrieve(
    manifest: Path,
    image_store: Path,
    text_store: Path,
    run_dir: Path,
    labels: tuple[str, ...],
    settings: tuple[str, ...],
    out: Path | None,
    as_json: bool,
) -> None:
    """Find the report of each image, and back, among all distinct texts.

    \b
    embedcache retrieve manifest.parquet cache/mine/dinov2-s cache/mine/bert --run-dir runs/mine
    embedcache retrieve manifest.parquet cache/mine/dinov2-s cache/mine/bert --run-dir runs/mine \\
        --label pneumonia --set at=5,10,100 --out matches
    """
    from embedcache.data.manifest import Manifest
    from embedcache.report.retrieval_text import retrieval_text
    from embedcache.stage_two.retrieve import RetrieveConfig
    from embedcache.stage_two.retrieve import retrieve as run_retrieve

    config = read_settings(RetrieveConfig, pairs(settings, "--set"))
    result = run_retrieve(Manifest.read(manifest), image_store, text_store, run_dir, labels=labels, config=config)
    if out is not None:
        result.write(out)
    if as_json:
        click.echo(json.dumps({"scores": json.loads(result.scores.to_json(orient="records"))}))
    else:
        click.echo(retrieval_text(result.scores))
        if out is not None:
            click.echo(f"\nscores and matches: {out}")
    for note in result.notes:
        click.echo(f"note: {note}", err=True)
    if result.warning:
        click.echo(f"warning: {result.warning}", err=True)
