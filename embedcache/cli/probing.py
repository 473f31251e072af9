"""The command that scores embeddings."""

from __future__ import annotations

from pathlib import Path

import click

from embedcache.cli.base import PATH, json_option, main, say_scores
from embedcache.cli.settings import pairs, read_settings


@main.command()
@click.argument("manifest", type=PATH)
@click.argument("image_store", type=PATH)
@click.option("--label", required=True, help="Name of a label of the manifest, or of a set of labels.")
@click.option("--run-dir", type=PATH, help="A run of 'embedcache train': its Adaptor is applied.")
@click.option("--text-store", type=PATH, help="For the control text-as-label.")
@click.option("--random-store", type=PATH, help="The images through random weights, for the control random-encoder.")
@click.option("--test", "test_manifest", type=PATH, help="Another dataset's manifest, to score the same heads on.")
@click.option("--test-store", type=PATH, help="Its images, through the same encoder.")
@click.option("--labelmap", type=PATH, help="How its labels read as this one's (YAML).")
@click.option("--protocol", type=click.Choice(["paper-rsna", "paper-covidx"]), help="The paper's own settings.")
@click.option(
    "--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Any field of ProbeConfig, such as heads=mlp,knn."
)
@click.option("--out", type=PATH, help="For tables, predictions and heads; by default RUN_DIR/probes/LABEL.")
@json_option
def probe(
    manifest: Path,
    image_store: Path,
    label: str,
    run_dir: Path | None,
    text_store: Path | None,
    random_store: Path | None,
    test_manifest: Path | None,
    test_store: Path | None,
    labelmap: Path | None,
    protocol: str | None,
    settings: tuple[str, ...],
    out: Path | None,
    as_json: bool,
) -> None:
    """Score the embeddings of a store on a label, beside controls.

    \b
    embedcache probe manifest.parquet cache/mine/dinov2-s --label pneumonia --run-dir runs/mine
    embedcache probe manifest.parquet cache/mine/dinov2-s --label pneumonia --set heads=logistic,knn \\
        --set unit=patient --out scores
    embedcache probe rsna.parquet cache/rsna/dinov2-s --label pneumonia --run-dir runs/mine --protocol paper-rsna
    embedcache probe chexpert.parquet cache/chexpert/dinov2-s --label chexpert --test nih.parquet \\
        --test-store cache/nih/dinov2-s --labelmap docs/labelmaps/nih-to-chexpert.yaml
    """
    from embedcache.data.manifest import Manifest
    from embedcache.stage_two.probe_config import ProbeConfig

    given = pairs(settings, "--set") | ({} if protocol is None else {"protocol": protocol})
    config = read_settings(ProbeConfig, given)
    from embedcache.report.score_text import probe_text
    from embedcache.stage_two.kept import probe_folder
    from embedcache.stage_two.probe import probe as run_probe
    from embedcache.stage_two.probe_tables import TABLES

    result = run_probe(
        Manifest.read(manifest),
        image_store,
        label=label,
        run_dir=run_dir,
        text_store=text_store,
        random_store=random_store,
        test_manifest=None if test_manifest is None else Manifest.read(test_manifest),
        test_store=test_store,
        labelmap=labelmap,
        config=config,
    )
    if out is None and run_dir is not None:
        out = probe_folder(run_dir, label)
    tables, written = {name: getattr(result, name).assign(label=label) for name in TABLES}, "tables, predictions, heads"
    say_scores(result, tables, probe_text(**tables), out=out, written=written, as_json=as_json)
