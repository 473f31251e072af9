"""Commands that compare encoders by their stores, and write reports."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

import click

from embedcache.cli.base import PATH, json_option, main
from embedcache.cli.settings import pairs, read_settings
from embedcache.errors import SettingsError

with_images_option = click.option(
    "--with-images", is_flag=True, help="Show thumbnails of patients' images in the report."
)


@main.command()
@click.argument("stores", metavar="STORE...", nargs=-1, required=True)
@click.option("--manifest", type=PATH, required=True, help="Of the images that the stores hold.")
@click.option(
    "--text", "texts", multiple=True, metavar="STORE", help="Of reports: an Adaptor is trained for each pair."
)
@click.option("--random", "randoms", multiple=True, metavar="NAME=STORE", help="Random weights beside an encoder.")
@click.option("--label", "labels", multiple=True, help="Of the manifest, or a set of labels; by default all.")
@click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Any field of ProbeConfig.")
@click.option("--train", "training", multiple=True, metavar="FIELD=VALUE", help="Any field of TrainConfig.")
@click.option("--masks", is_flag=True, help="Also learn masks from the tokens of the stores.")
@click.option("--segment", "segmenting", multiple=True, metavar="FIELD=VALUE", help="Any field of SegmentConfig.")
@click.option("--retrieve", is_flag=True, help="Also find reports for images, and back.")
@click.option("--exposure", multiple=True, metavar="NAME=LEVEL", help="What an encoder has seen of these images.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes; by default as cores and memory allow.")
@click.option("--run-dir", type=PATH, help="Where results go; by default runs/<manifest>/<time>.")
@with_images_option
@json_option
def compare(
    stores: tuple[str, ...],
    manifest: Path,
    texts: tuple[str, ...],
    randoms: tuple[str, ...],
    labels: tuple[str, ...],
    settings: tuple[str, ...],
    training: tuple[str, ...],
    masks: bool,
    segmenting: tuple[str, ...],
    retrieve: bool,
    exposure: tuple[str, ...],
    workers: int | None,
    run_dir: Path | None,
    with_images: bool,
    as_json: bool,
) -> None:
    """Compare encoders on the rows that all of their stores have: same heads, same seeds, paired tests, one report.

    A store may be given as NAME=PATH. Stopped or killed, the same command goes on where it was.

    \b
    embedcache compare cache/mine/dinov2-s cache/mine/rad-dino --manifest mine.parquet --label pneumonia
    embedcache compare cache/mine/dinov2-s cache/mine/rad-dino --text cache/mine/minilm --manifest mine.parquet \\
        --set n_seeds=3 --set fractions=0.1,1 --train epochs=20 --exposure rad-dino=seen
    """
    from embedcache.data.manifest import Manifest
    from embedcache.stage_two.config import TrainConfig
    from embedcache.stage_two.probe_config import ProbeConfig
    from embedcache.stage_two.retrieve_config import RetrieveConfig
    from embedcache.stage_two.segment_config import SegmentConfig

    if segmenting and not masks:
        raise SettingsError("--segment sets how masks are learnt; give --masks as well")
    configs = {
        "probe": read_settings(ProbeConfig, pairs(settings, "--set")),
        "train": read_settings(TrainConfig, pairs(training, "--train")),
        "segment": read_settings(SegmentConfig, pairs(segmenting, "--segment")) if masks else None,
        "retrieve": RetrieveConfig() if retrieve else None,
    }
    from embedcache.comparing.compare import compare as run_compare
    from embedcache.report.run_text import run_text
    from embedcache.reporting.write import write_report
    from embedcache.workers.chosen import Workers

    result = run_compare(
        Manifest.read(manifest),
        _named(stores),
        run_dir,
        labels=labels,
        text_stores=_named(texts),
        random_stores=pairs(randoms, "--random"),
        exposure=pairs(exposure, "--exposure"),
        workers=Workers(n=workers),
        say=lambda line: click.echo(line, err=as_json),
        **configs,  # type: ignore[arg-type]  # by their names
    )
    written = write_report(result.run_dir, with_images=with_images)
    if as_json:
        click.echo(json.dumps({**result.to_json(), "report": str(written.page)}))
        return
    click.echo("\n" + run_text(result.tables))
    say_comparison(result.verdicts, result.warnings, written.page)


@main.command()
@click.argument("run_dir", metavar="RUN", type=PATH)
@with_images_option
def report(run_dir: Path, with_images: bool) -> None:
    """Write the report of a finished run anew: report.html, methods.md, tables as CSV, Markdown and LaTeX.

    \b
    embedcache report runs/phantom/2026-01-31T12-00-00
    embedcache report runs/phantom/2026-01-31T12-00-00 --with-images
    """
    from embedcache.reporting.write import write_report

    written = write_report(run_dir, with_images=with_images)
    for path in (written.page, written.methods, *written.tables):
        click.echo(str(path))


def say_comparison(verdicts: tuple[str, ...], warnings: tuple[str, ...], page: Path) -> None:
    """Prints what a comparison says, and where its report is."""
    click.echo("\ndifferences (paired; p adjusted for all of them)")
    for line in verdicts or ("one pair of encoders: nothing to compare",):
        click.echo(f"  {line}")
    for line in warnings:
        click.echo(f"warning: {line}")
    click.echo(f"\nreport: {shlex.quote(str(page))}")


def _named(stores: tuple[str, ...]) -> Mapping[str, Path]:
    """Stores by name, each given as PATH or NAME=PATH."""
    from embedcache.comparing.compare import named_stores

    alone = [store for store in stores if "=" not in store or Path(store).exists()]
    named = [store for store in stores if store not in alone]
    found = {**named_stores(alone), **{name: Path(path) for name, path in pairs(named, "STORE").items()}}
    if len(found) < len(stores):
        raise SettingsError(f"stores {', '.join(stores)}: two have one name; give each its own as NAME=PATH")
    return found
