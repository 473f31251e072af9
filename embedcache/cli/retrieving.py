"""Commands that ask the shared space: which report belongs to an image, and what a prompt says of it."""

from __future__ import annotations

from pathlib import Path

import click

from embedcache.cli.base import PATH, json_option, main, say_scores
from embedcache.cli.settings import pairs, read_settings


@main.command()
@click.argument("manifest", type=PATH)
@click.argument("image_store", type=PATH)
@click.argument("text_store", type=PATH)
@click.option("--run-dir", type=PATH, required=True, help="A run of 'embedcache train'.")
@click.option("--sentence-store", type=PATH, help="The reports' sentences: texts are scored by them too.")
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
    sentence_store: Path | None,
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
    from embedcache.stage_two.retrieve import retrieve as run_retrieve
    from embedcache.stage_two.retrieve_config import RetrieveConfig

    config = read_settings(RetrieveConfig, pairs(settings, "--set"))
    result = run_retrieve(
        Manifest.read(manifest),
        image_store,
        text_store,
        run_dir,
        sentence_store=sentence_store,
        labels=labels,
        config=config,
    )
    tables, text = {"scores": result.scores}, retrieval_text(result.scores)
    say_scores(result, tables, text, out=out, written="scores and matches", as_json=as_json)


@main.command()
@click.argument("prompt_set")
@click.option("--label", "labels", multiple=True, required=True, help="A label to write prompts for.")
@click.option("-o", "--out", type=PATH, required=True, help="Manifest to write, for 'embedcache extract'.")
def prompts(prompt_set: str, labels: tuple[str, ...], out: Path) -> None:
    """Write the prompts of a set (chexzero, chexpert, or a YAML file) as a manifest of texts.

    \b
    embedcache prompts chexpert --label Pneumonia --label Edema -o prompts.parquet
    embedcache extract prompts.parquet bert --store cache/prompts/bert
    """
    from embedcache.data.prompts import PromptSet

    written = PromptSet.named(prompt_set).manifest(labels)
    written.write(out)
    click.echo(f"{out}: {len(written)} prompts; encode them with 'embedcache extract {out} ENCODER --store STORE'")


@main.command()
@click.argument("manifest", type=PATH)
@click.argument("image_store", type=PATH)
@click.argument("prompt_store", type=PATH)
@click.option("--run-dir", type=PATH, required=True, help="A run of 'embedcache train'.")
@click.option("--prompts", "prompt_set", default="chexzero", show_default=True, help="The set, or its YAML file.")
@click.option("--label", "labels", multiple=True, required=True, help="A label of the manifest, or a set of labels.")
@click.option("--split", type=click.Choice(["train", "valid", "test"]), default="test", show_default=True)
@click.option("--out", type=PATH, help="A folder for the scores, those of each wording, and predictions by id.")
@json_option
def zeroshot(
    manifest: Path,
    image_store: Path,
    prompt_store: Path,
    run_dir: Path,
    prompt_set: str,
    labels: tuple[str, ...],
    split: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """Score labels by prompts that speak for them and against them, without a label to learn from.

    \b
    embedcache zeroshot manifest.parquet cache/mine/dinov2-s cache/prompts/bert --run-dir runs/mine --label Pneumonia
    embedcache zeroshot manifest.parquet cache/mine/dinov2-s cache/prompts/bert --run-dir runs/mine \\
        --prompts prompts.yaml --label Pneumonia --label Edema --out zero
    """
    from embedcache.data.manifest import Manifest
    from embedcache.report.retrieval_text import zero_shot_text
    from embedcache.stage_two.zeroshot import ZeroShotConfig, zero_shot

    config = ZeroShotConfig(split=split)  # type: ignore[arg-type]  # one of its splits
    result = zero_shot(
        Manifest.read(manifest), image_store, prompt_store, run_dir, prompts=prompt_set, labels=labels, config=config
    )
    tables, text = {"scores": result.scores, "wordings": result.wordings}, zero_shot_text(result.scores)
    say_scores(result, tables, text, out=out, written="scores and predictions", as_json=as_json)
