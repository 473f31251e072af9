"""The command that learns masks from tokens."""

from __future__ import annotations

from pathlib import Path

import click

from embedcache.cli.base import PATH, json_option, main, say_scores
from embedcache.cli.settings import pairs, read_settings


@main.command()
@click.argument("manifest", type=PATH)
@click.argument("image_store", type=PATH)
@click.option("--run-dir", type=PATH, help="A run of 'embedcache train': its Adaptor is applied to the tokens.")
@click.option("--random-store", type=PATH, help="The images through random weights, for the control random-encoder.")
@click.option("--protocol", type=click.Choice(["paper-rsna", "paper-siim"]), help="The paper's own settings.")
@click.option(
    "--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Any field of SegmentConfig, such as size=448."
)
@click.option("--out", type=PATH, help="For tables, what each image got and decoders; by default RUN_DIR/masks.")
@json_option
def segment(
    manifest: Path,
    image_store: Path,
    run_dir: Path | None,
    random_store: Path | None,
    protocol: str | None,
    settings: tuple[str, ...],
    out: Path | None,
    as_json: bool,
) -> None:
    """Learn masks from the tokens of a store, and score them beside an empty mask.

    \b
    embedcache segment manifest.parquet cache/mine/tokens --run-dir runs/mine --out masks
    embedcache segment manifest.parquet cache/mine/tokens --set decoders=linear,conv --set fractions=0.1,1
    embedcache segment rsna.parquet cache/rsna/dinov2-s --run-dir runs/mine --protocol paper-rsna
    """
    from embedcache.data.manifest import Manifest
    from embedcache.stage_two.segment_config import SegmentConfig

    given = pairs(settings, "--set") | ({} if protocol is None else {"protocol": protocol})
    config = read_settings(SegmentConfig, given)
    from embedcache.report.mask_text import mask_text
    from embedcache.stage_two.kept import mask_folder
    from embedcache.stage_two.segment import segment as run_segment
    from embedcache.stage_two.segment_tables import TABLES

    result = run_segment(
        Manifest.read(manifest), image_store, run_dir=run_dir, random_store=random_store, config=config
    )
    if out is None and run_dir is not None:
        out = mask_folder(run_dir)
    tables, written = {name: getattr(result, name) for name in TABLES}, "tables, what each image got and decoders"
    say_scores(result, tables, mask_text(**tables), out=out, written=written, as_json=as_json)
