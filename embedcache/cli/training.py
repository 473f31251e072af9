"""Commands that train Adaptors and count their parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from embedcache.cli.base import PATH, json_option, main
from embedcache.cli.settings import pairs, read_settings

if TYPE_CHECKING:
    from embedcache.stage_two.train import TrainResult

_set_option = click.option(
    "--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Any field of TrainConfig, such as loss=siglip."
)


@main.command()
@click.argument("manifest", type=PATH)
@click.argument("image_store", type=PATH)
@click.argument("text_store", type=PATH)
@click.option("--run-dir", type=PATH, required=True)
@click.option("--epochs", type=click.IntRange(min=1))
@click.option("--batch-size", type=click.IntRange(min=2))
@click.option("--lr", type=click.FloatRange(min=0, min_open=True))
@click.option("--adaptor", type=click.Choice(["attention", "mlp", "linear", "identity"]))
@click.option("--seed", type=int)
@click.option("--device")
@_set_option
@click.option("--seeds", type=click.IntRange(min=1), default=1, help="So many runs, together, with seeds of their own.")
@click.option("--grid", "axes", multiple=True, metavar="FIELD=V1,V2", help="A run for each value; several combine.")
@click.option("--allow-missing", is_flag=True, default=None, help="Leave out rows that a store does not hold.")
@click.option("--tensorboard", is_flag=True, default=None, help="Also write TensorBoard's event files.")
@click.option("--wandb", metavar="PROJECT", help="Also log to this project at W&B; offline where WANDB_MODE says so.")
@json_option
def train(
    manifest: Path,
    image_store: Path,
    text_store: Path,
    run_dir: Path,
    settings: tuple[str, ...],
    seeds: int,
    axes: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Stage two: train an Adaptor, or many at once, on the pairs of two stores.

    Stopped or killed, the same command goes on where it was. On several GPUs, start it with torchrun.

    \b
    embedcache train manifest.parquet cache/mine/dinov2-s cache/mine/bert --run-dir runs/mine
    embedcache train manifest.parquet cache/mine/dinov2-s cache/mine/bert --run-dir runs/five --seeds 5
    embedcache train manifest.parquet cache/mine/dinov2-s cache/mine/bert --run-dir runs/grid \\
        --grid lr=1e-5,1e-4 --grid n_layers=1,2 --set normalise=zscore
    torchrun --nproc-per-node 4 -m embedcache train manifest.parquet cache/mine/dinov2-s cache/mine/bert \\
        --run-dir runs/4
    """
    from embedcache.data.manifest import Manifest
    from embedcache.stage_two.config import TrainConfig

    given = {name: value for name, value in options.items() if value is not None} | pairs(settings, "--set")
    config = read_settings(TrainConfig, given)
    varied = {
        name: [getattr(read_settings(TrainConfig, {**given, name: value}), name) for value in values.split(",")]
        for name, values in pairs(axes, "--grid").items()
    }
    from embedcache.stage_two.distributed import is_first_process
    from embedcache.stage_two.train import grid, runs_table, train_many
    from embedcache.stage_two.train import train as run_train

    read = Manifest.read(manifest)
    if not varied and seeds == 1:
        results = {"": run_train(read, image_store, text_store, run_dir, config=config)}
    else:
        configs = grid(config, varied, n_seeds=seeds)
        results = train_many(read, image_store, text_store, run_dir, configs=configs)
    if not is_first_process():
        return
    if as_json:
        said = {name: result.to_json() for name, result in results.items()}
        click.echo(json.dumps(said[""] if list(said) == [""] else said))
        return
    _say_left_out(next(iter(results.values())))
    if "" in results:
        click.echo(_in_words(results[""]))
        if len(config.trainings) > 1:
            click.echo(
                f"this is the first of {config.n_seeds} seeds; all are in {run_dir}, and scores of it are over all"
            )
    else:
        click.echo(runs_table(configs, results).to_string(index=False, float_format="{:.4g}".format))
    click.echo(f"run directory: {run_dir}")


def _say_left_out(result: TrainResult) -> None:
    from embedcache.errors import some_ids

    if result.missing:
        click.echo(
            f"left out: {len(result.missing)} rows that a store does not account for: {some_ids(result.missing)}",
            err=True,
        )
    if result.warning:
        click.echo(f"warning: {result.warning}", err=True)


def _in_words(result: TrainResult) -> str:
    best = result.best
    pairs = f"{result.n_train} training pairs, {result.n_valid} validation pairs"
    epoch = f"best epoch {result.best_epoch + 1} of {len(result.history)}"
    if result.n_valid < 2:
        return f"{pairs}: none to choose an epoch by, so the last of {len(result.history)} is kept"
    lines = [f"{pairs}, {epoch}: validation loss {best['valid_loss']:.3f}"]
    for direction, words in (("image_to_text", "image to text"), ("text_to_image", "text to image")):
        recalls = ", ".join(
            f"@{k} {best[f'{direction}_recall@{k}']:.3f} (chance {best[f'{direction}_chance@{k}']:.3f})"
            for k in (1, 5, 10)
        )
        lines.append(f"{words}: recall {recalls}, median rank {best[f'{direction}_median_rank']:g}")
    return "\n".join(lines)


@main.command()
@click.argument("stores", type=PATH, nargs=-1, required=True)
@_set_option
@json_option
def params(stores: tuple[Path, ...], settings: tuple[str, ...], as_json: bool) -> None:
    """Count what an Adaptor on some stores trains, against training their encoders end to end.

    \b
    embedcache params cache/mine/dinov2-s cache/mine/resnet-ae cache/mine/bert
    embedcache params cache/mine/dinov2-s cache/mine/bert --set adaptor=linear
    """
    from embedcache.stage_two.config import TrainConfig
    from embedcache.stage_two.parameters import parameter_table
    from embedcache.store.store import open_store

    table = parameter_table([open_store(path) for path in stores], read_settings(TrainConfig, pairs(settings, "--set")))
    if as_json:
        click.echo(table.to_json(orient="records"))
        return
    shown = table.assign(fewer=[f"{x:.1%}" if x == x else "unknown" for x in table["fewer"].astype(float)])
    for column in ("trained", "frozen", "total", "end_to_end"):
        shown[column] = ["unknown" if x != x else f"{int(x):,}" for x in table[column].astype(float)]
    click.echo(shown.to_string(index=False))
