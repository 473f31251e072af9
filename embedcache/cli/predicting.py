"""The command that answers for new images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from embedcache.cli.base import PATH, json_option, main
from embedcache.cli.encoders import consent_options
from embedcache.report.answer_text import answer_text, csv_line

_Command = TypeVar("_Command", bound=Callable[..., Any])


def run_options(command: _Command) -> _Command:
    """Puts on a command what says which of a run's models answer, and where their encoder is."""
    for option in (
        *consent_options(),
        click.option(
            "--decoder",
            type=click.Choice(["paper", "conv", "linear"]),
            help="Which decoder; by default the first that is there.",
        ),
        click.option(
            "--head",
            type=click.Choice(["mlp", "linear", "logistic"]),
            help="Which head of a label; by default the first that it has.",
        ),
        click.option("--encoder", help="Where the encoder is, such as hf:DIRECTORY; by default as the run says."),
    ):
        command = option(command)
    return command


@main.command()
@click.argument("run", type=PATH)
@click.argument("files", nargs=-1, required=True, type=PATH)
@click.option("--masks", type=PATH, help="A folder for masks, as PNG in each image's own frame.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@run_options
@click.option("--csv", "as_csv", is_flag=True, help="Print all columns as CSV.")
@json_option
def predict(
    run: Path,
    files: tuple[Path, ...],
    masks: Path | None,
    batch_size: int,
    as_csv: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer for new image files, DICOM included, with the heads and decoders of a run.

    RUN is a run directory after 'embedcache probe' or 'embedcache segment' with it. A file that cannot be read costs
    its own row. For research, not for diagnosis.

    \b
    embedcache predict runs/mine new/*.dcm
    embedcache predict runs/mine new/*.png --masks new-masks --csv > answers.csv
    """
    if as_csv and as_json:
        raise click.UsageError("--csv and --json were given; expected one of them")
    from embedcache.predicting.predictor import Predictor

    predictor = Predictor(run, **options)
    rows = predictor.rows(files, masks=masks, batch_size=batch_size)
    names, n_failed = predictor.columns(with_masks=masks is not None), 0
    if as_csv:  # row by row, so that what is printed is not lost
        click.echo(csv_line(names), nl=False)
        for row in rows:
            click.echo(csv_line(map(row.get, names)).encode("utf-8", "surrogateescape"), nl=False)
            n_failed += bool(row["failure"])
    else:
        table = list(rows)
        click.echo(json.dumps(table) if as_json else answer_text(table, names))
        n_failed = sum(bool(row["failure"]) for row in table)
    for note in predictor.notes:
        click.echo(f"note: {note}", err=True)
    if masks is None and predictor.models.decoder is not None:
        click.echo("note: the run has a decoder of masks; --masks FOLDER writes them", err=True)
    if n_failed:
        click.echo(f"{n_failed} of {len(files)} files have no answer", err=True)
    if n_failed == len(files):
        raise SystemExit(2)
