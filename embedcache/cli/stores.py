"""Commands for stores: look at them, check and mend them, move them in and out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from embedcache.cli.base import PATH, json_option, main
from embedcache.cli.predicting import run_options
from embedcache.report.plain_table import in_columns


@main.command()
@click.argument("root", type=PATH, default="cache")
@json_option
def ls(root: Path, as_json: bool) -> None:
    """List the stores below ROOT, by default below cache/.

    \b
    embedcache ls
    embedcache ls cache/mimic-cxr
    """
    from embedcache.store.listing import list_stores

    found = list_stores(root)
    if as_json:
        click.echo(json.dumps(found))
        return
    if not found:
        click.echo(f"{root}: no stores; make one with 'embedcache extract' or 'embedcache import'")
        return
    click.echo("\n".join(_lines(found)))


@main.command()
@click.argument("store", type=PATH)
@json_option
def info(store: Path, as_json: bool) -> None:
    """Show what a store holds and which encoder made it.

    \b
    embedcache info cache/phantom/tiny-vit
    """
    from embedcache.store.listing import describe

    facts = describe(store)
    if as_json:
        click.echo(json.dumps(facts))
        return
    facts["encoder"] = facts["encoder"].get("name", "made elsewhere")
    for name, value in facts.items():
        if value is not None:
            click.echo(f"{name.replace('_', ' '):20} {value}")


@main.command()
@click.argument("store", type=PATH)
@json_option
def verify(store: Path, as_json: bool) -> None:
    """Compare every byte of a store with its digests; exit code 1 if anything is wrong.

    \b
    embedcache verify cache/phantom/tiny-vit
    """
    from embedcache.progress import Progress
    from embedcache.store.verify import verify_store

    n_shards = sum(1 for _ in store.glob("shard-*.json")) or 1  # one where the store is one file
    with Progress(f"verifying {store}", total=n_shards, unit="shard") as progress:
        problems = verify_store(store, advance=progress.advance)
    if as_json:
        click.echo(json.dumps([asdict(problem) for problem in problems]))
    else:
        for problem in problems:
            click.echo(f"{problem.kind}: {problem.message} ({_counted(problem.ids)})")
        click.echo(f"{store}: {'sound' if not problems else f'{len(problems)} problems'}")
        if problems and store.is_dir():
            click.echo(f"to take damaged shards out and extract them again: embedcache repair {store}", err=True)
    if problems:
        raise SystemExit(1)


@main.command()
@click.argument("store", type=PATH)
@json_option
def repair(store: Path, as_json: bool) -> None:
    """Move damaged files of a store aside; the next extraction computes exactly those shards again.

    Run it while nothing writes to the store. Nothing is deleted: see STORE/quarantine.

    \b
    embedcache repair cache/mimic-cxr/dinov2-s
    """
    from embedcache.store.repair import repair_store

    report = repair_store(store)
    if as_json:
        click.echo(json.dumps(asdict(report)))
        return
    for name in report.quarantined:
        click.echo(f"moved to {store / 'quarantine'}: {name}")
    for name in report.restored:
        click.echo(f"written anew from sound shards: {name}")
    if not report.quarantined:
        click.echo(f"{store}: nothing damaged")
    if report.to_extract:
        click.echo(
            f"{_counted(report.to_extract)} are planned and not computed: run the command that wrote this store again "
            "('embedcache extract', or 'embedcache import')"
        )


@main.command()
@click.argument("store", type=PATH)
@click.argument("out", type=PATH)
@json_option
def pack(store: Path, out: Path, as_json: bool) -> None:
    """Merge a store into one file that is itself a store; STORE is left as it is.

    \b
    embedcache pack cache/mimic-cxr/dinov2-s dinov2-s.h5
    """
    from embedcache.store.listing import describe
    from embedcache.store.rewrite import pack_store

    pack_store(store, out)
    facts = describe(out)
    click.echo(json.dumps(facts) if as_json else f"{out}: {facts['rows']:,} rows, {facts['bytes']:,} bytes")


@main.command()
@click.argument("store", type=PATH)
@click.option(
    "--ids",
    "listed",
    required=True,
    metavar="ID,... | FILE",
    help="Ids, or a file of them: .txt with one a line, .csv, .parquet, .json.",
)
@click.option("--out", type=PATH, required=True, help="Where the store without them goes.")
@json_option
def drop(store: Path, listed: str, out: Path, as_json: bool) -> None:
    """Write a store anew without some ids, as when a patient withdraws.

    Take the ids out of the manifest too, and delete the old store: it is named at the end.

    \b
    embedcache drop cache/mimic-cxr/dinov2-s --ids withdrawn.txt --out cache/mimic-cxr/dinov2-s-2
    """
    from embedcache.store.rewrite import drop_ids

    report = drop_ids(store, _listed(listed), out)
    if as_json:
        click.echo(json.dumps({key: str(v) if isinstance(v, Path) else v for key, v in asdict(report).items()}))
        return
    click.echo(
        f"{out}: {report.n_rows:,} rows; left out {report.n_dropped} rows and {report.n_failures_dropped} failures\n"
        f"{report.delete} still holds them: check {out}, then delete it"
    )


@main.command("import")
@click.argument("source", type=PATH)
@click.argument("out", type=PATH)
@click.option("--kind", help="What wrote SOURCE; by default told from what lies there.")
@click.option("--modality", type=click.Choice(["image", "text"]), default="image", show_default=True)
@click.option("--ids", type=PATH, help="A file with the id of each row: txt, csv, parquet, json or npy.")
@click.option("--id-column", help="The column of ids in a table.")
@click.option("--vector-column", help="The column of vectors in a table.")
@click.option(
    "--store-dtype", type=click.Choice(["float16", "float32", "bfloat16", "int8"]), help="By default as it is."
)
@click.option("--note", help="Kept in the record: which encoder made the vectors, and how.")
@click.option("--trust-row-order", is_flag=True, help="Accept that rows and ids are joined by number, unverified.")
@json_option
def import_(source: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Make a store of embeddings that another tool wrote.

    \b
    KIND           SOURCE
    npy            one .npy (n, d), with --ids
    npz            one .npz with ids and embeddings
    hdf5           one .h5 with ids and embeddings
    parquet        one table with a column of vectors
    safetensors    one file that 'embedcache export' wrote
    clip-retrieval the folder with img_emb/, text_emb/, metadata/
    clam           h5 files of CLAM or TRIDENT: features, coords
    fusemix        a torch dictionary of vectors by id
    physionet      MIMIC-CXR image embeddings, files/pNN/.../*.tfrecord
    paper          .npy of the paper's code, with its id csv as --ids

    \b
    embedcache import embeddings.npy cache/mine/external --ids ids.txt
    """
    from embedcache.store.exchange import import_store
    from embedcache.store.listing import describe

    import_store(source, out, **options)
    facts = describe(out)
    click.echo(json.dumps(facts) if as_json else f"{out}: {facts['rows']:,} rows of {facts['dim']} {facts['dtype']}")


@main.command()
@click.argument("source", metavar="STORE|RUN", type=PATH)
@click.argument("out", type=PATH)
@click.option("--kind", type=click.Choice(["parquet", "npy", "safetensors"]), help="By default told from OUT's ending.")
@click.option("--onnx", is_flag=True, help="Write a run's encoder, Adaptor, heads and decoder as one ONNX graph.")
@run_options
@json_option
def export(source: Path, out: Path, kind: str | None, onnx: bool, as_json: bool, **options: Any) -> None:
    """Write a store's ids and embeddings, or a run as a graph, for other tools.

    \b
    embedcache export cache/mimic-cxr/dinov2-s dinov2-s.parquet
    embedcache export runs/mine mine.onnx --onnx
    """
    if onnx and kind is not None:
        raise click.UsageError(f"--kind {kind} is of a store; leave it out, or --onnx")
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value]
    if not onnx and given:
        raise click.UsageError(f"{given[0]} is of a run; give --onnx as well, or leave it out")
    if onnx:
        from embedcache.predicting.exporting import export_onnx

        graph = export_onnx(source, out, **options)
        told = f"outputs {', '.join(graph.outputs)}; at most {graph.difference:.1e} from torch"
        lines = [*map(str, graph.files), told]
        click.echo(json.dumps(asdict(graph), default=str) if as_json else "\n".join(lines))
        for note in graph.notes:
            click.echo(f"note: {note}", err=True)
        return
    if (source / "config.yaml").is_file():
        raise click.UsageError(f"{source} is a run and no store; give --onnx to write it as a graph")
    from embedcache.store.exchange import export_store

    written = export_store(source, out, kind=kind)
    click.echo(json.dumps([str(p) for p in written]) if as_json else "\n".join(str(p) for p in written))


def _listed(listed: str) -> list[str]:
    """Ids from a file of them, or from the command line itself."""
    from embedcache.store.exchange.id_files import read_ids

    path = Path(listed)
    try:
        is_file = path.is_file()
    except OSError:  # a list too long for a name
        is_file = False
    return [i for i in (read_ids(path)[0] if is_file else listed.split(",")) if i]


def _counted(ids: Iterable[str]) -> str:
    """How many ids, and the first of them."""
    from embedcache.errors import some_ids

    listed = list(ids)
    return f"{len(listed)} ids: {some_ids(listed)}" if listed else "no ids known"


def _lines(stores: list[dict[str, Any]]) -> list[str]:
    """A line for each store, in columns; for one that cannot be opened, why."""
    rows = [
        [
            s["path"],
            s["modality"],
            s["encoder"],
            f"{s['rows']:,} x {s['dim']} {s['dtype']}",
            f"tokens {s['tokens']}" if s["tokens"] else "",
            f"{s['bytes'] / 1e6:,.1f} MB",
            f"{s['failed']} failed" if s["failed"] else "",
            f"{s['unfinished_shards']} shards unfinished" if s["unfinished_shards"] else "",
        ]
        for s in stores
        if "error" not in s
    ]
    return in_columns(rows) + [f"{s['path']}  cannot be opened: {s['error']}" for s in stores if "error" in s]
