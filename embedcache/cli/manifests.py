"""Commands around manifests: make one from a dataset's folder, audit it, map its labels, look at it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from embedcache.cli.base import PATH, json_option, main
from embedcache.errors import SettingsError
from embedcache.output import write_text
from embedcache.report.plain_table import in_columns

if TYPE_CHECKING:
    from embedcache.data.audit import AuditReport, Balance, Shared
    from embedcache.data.datasets.layout import Layout, Option
    from embedcache.data.manifest import Manifest

_LEAK_EXIT_CODE = 3
_SHOWN_SHORTCUTS = 5


class _Manifests(click.Group):
    """A subcommand for each dataset beside those for any manifest; `--help` shows each dataset's folders."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from embedcache.data.datasets.load import LAYOUTS

        return [*LAYOUTS, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        own = super().get_command(ctx, name)
        if own is not None:
            return own
        from embedcache.data.datasets.load import LAYOUTS

        return _command(LAYOUTS[name]) if name in LAYOUTS else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        from embedcache.data.datasets.load import layout_named

        if args and super().get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            layout_named(args[0], others=super().list_commands(ctx))  # a wrong name is told with those that come close
        return super().resolve_command(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from embedcache.data.datasets.load import LAYOUTS

        formatter.write("\nFolders, as they are downloaded:\n")
        for layout in LAYOUTS.values():
            formatter.write(f"\n{layout.name}: {layout.title}\n")
            formatter.write("".join(f"  {line}\n" for line in layout.tree.splitlines()))


@main.group(cls=_Manifests, subcommand_metavar="DATASET ROOT -o OUT | COMMAND ...")
def manifest() -> None:
    """Make a manifest from a dataset's official folder; audit it; look at it.

    \b
    embedcache manifest rsna path/to/rsna -o rsna.parquet
    embedcache manifest rsna path/to/rsna -o rsna-paper.parquet --split paper --task segmentation
    embedcache manifest table path/to/mine -o mine.parquet --column image=file --column label.tb=tuberculosis
    embedcache manifest audit rsna.parquet nih.parquet --strict
    embedcache manifest preview rsna.parquet -o rsna.html
    """


class _Pairs(click.ParamType):
    name = "ours=theirs"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        ours, equals, theirs = value.partition("=")
        if not (ours and equals and theirs):
            self.fail(f"{value!r}, expected <the manifest's column>=<the table's column>", param, ctx)
        return ours, theirs


def _command(layout: Layout) -> click.Command:
    """The command that makes a manifest of one dataset."""

    def make(root: Path, out: Path, strict: bool, as_json: bool, **options: Any) -> None:
        from embedcache.data.audit import audit
        from embedcache.data.datasets.load import build_dataset
        from embedcache.data.manifest import check_suffix

        check_suffix(out)
        if "columns" in options:
            options["columns"] = dict(options["columns"])
        given = {name: value for name, value in options.items() if value is not None and value is not False}
        built = build_dataset(layout.name, root, **given)
        built.manifest.write(out)
        _write_lists(out, built.absent, built.extra)
        report = audit(built.manifest, files=False, look=False)
        if as_json:
            about = {"manifest": str(out), "root": str(built.manifest.root), "notes": list(built.manifest.about.notes)}
            click.echo(json.dumps({**about, "audit": report.to_json()}))
        else:
            rule = f"split {report.split_rule!r}: " if report.split_rule else ""
            rows = ", ".join(f"{n:,} {split}" for split, n in report.n_rows.items())
            click.echo(f"{out}: {len(built.manifest):,} images, {rule}{rows}")
            click.echo(
                f"labels: {', '.join(f'{name} ({task})' for name, task in built.manifest.tasks.items()) or 'none'}"
            )
        for note in built.manifest.about.notes:
            click.echo(f"note: {note}", err=True)
        _end([report], [], [], strict)

    task = click.Option(["--task"], type=click.Choice(layout.tasks), help="By default the first.")
    parameters: list[click.Parameter] = [
        click.Argument(["root"], type=PATH),
        click.Option(["-o", "--out"], type=PATH, required=True, help="The manifest to write, .parquet."),
        click.Option(
            ["--split"],
            type=click.Choice(["patient", "paper"] if layout.published else ["patient"]),
            help="patient: no patient on two sides."
            + (" paper: the published rule, with its leaks." if layout.published else ""),
        ),
        *([task] if layout.tasks else []),
        click.Option(["--seed"], type=click.IntRange(min=0), help="Of the patient split; by default 0."),
        click.Option(["--valid"], type=click.FloatRange(0, 1, max_open=True), help="Its share; by default 0.1."),
        click.Option(
            ["--test"],
            type=click.FloatRange(0, 1, max_open=True),
            help="Its share without an official list; by default 0.2.",
        ),
        *map(_option, layout.options),
        click.Option(["--strict"], is_flag=True, help="Exit with 3 if anything leaks or patients are unknown."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print the result as JSON."),
    ]
    return click.Command(
        layout.name,
        params=parameters,
        callback=make,
        short_help=layout.title,
        help=f"Make a manifest of {layout.title}.\n\n\b\n{layout.tree}",
        epilog=f"embedcache manifest {layout.name} path/to/{layout.name} -o {layout.name}.parquet",
    )


def _option(option: Option) -> click.Option:
    name = f"--{option.name}"
    if option.kind == "flag":
        return click.Option([name], is_flag=True, help=option.help)
    if option.kind == "path":
        return click.Option([name], type=PATH, help=option.help)
    if option.kind == "pairs":
        return click.Option([name.removesuffix("s"), option.name], type=_Pairs(), multiple=True, help=option.help)
    if option.choices:
        return click.Option([name], type=click.Choice(option.choices), help=option.help)
    return click.Option([name], help=option.help)


def _write_lists(out: Path, absent: Sequence[str], extra: Sequence[str]) -> None:
    """The files that stayed out, beside the manifest; lists of an earlier run go."""
    for name, paths in (("absent", absent), ("extra", extra)):
        path = out.with_suffix(f".{name}.txt")
        if not paths:
            path.unlink(missing_ok=True)
        else:
            write_text(path, "".join(f"{p}\n" for p in paths))
            click.echo(f"{name} images are listed in {path}", err=True)


@manifest.command("audit")
@click.argument("manifests", type=PATH, nargs=-1, required=True)
@click.option("--files/--no-files", default=True, show_default=True, help="Compare the image files.")
@click.option("--strict", is_flag=True, help="Exit with 3 if anything leaks or patients are unknown.")
@json_option
def audit_command(manifests: tuple[Path, ...], files: bool, strict: bool, as_json: bool) -> None:
    """Show what leaks between splits, and between datasets where several are named.

    \b
    embedcache manifest audit rsna.parquet
    embedcache manifest audit rsna.parquet nih.parquet covidx.parquet --strict
    """
    from embedcache.data.audit import audit, files_of, overlaps, unknown_overlaps

    read = _read_named(manifests)
    digests = files_of(read) if files else None
    reports = [audit(one, files=digests[k] if digests is not None else False) for k, one in enumerate(read)]
    between, unknown = overlaps(read, digests), unknown_overlaps(read)
    if as_json:
        from dataclasses import asdict

        told = {"audits": [r.to_json() for r in reports], "between": [asdict(s) for s in between], "unknown": unknown}
        click.echo(json.dumps(told))
    else:
        for report in reports:
            click.echo("\n".join(_lines(report)) + "\n")
        if len(read) > 1:
            click.echo("\n".join(_lines_between(between, unknown)))
    _end(reports, between, unknown, strict)


def _read_named(paths: Sequence[Path]) -> list[Manifest]:
    """Manifests, those of one name called by their files'."""
    from embedcache.data.manifest import Manifest

    resolved = [path.resolve() for path in paths]
    twice = [str(path) for path, real in zip(paths, resolved, strict=True) if resolved.count(real) > 1]
    if twice:
        raise SettingsError(f"{twice[0]} was named twice; name each manifest once")
    read = [Manifest.read(path) for path in paths]
    names = [one.name for one in read]
    for one, path in zip(read, paths, strict=True):
        if names.count(one.name) > 1:
            one.name = path.stem
    return read


def _lines(report: AuditReport) -> list[str]:
    """An audit as text."""
    patients = (
        "every row names its patient"
        if report.patients_known
        else f"patients unknown: {report.n_without_patient:,} of {sum(report.n_rows.values()):,} rows name none"
    )
    rule = f"split rule {report.split_rule!r}, " if report.split_rule else ""
    lines = [f"{report.name}: {rule}{patients}"]
    table = [["split", "images", "patients", "studies"]]
    table += [
        [split, f"{n:,}", f"{report.n_patients[split]:,}", f"{report.n_studies[split]:,}"]
        for split, n in report.n_rows.items()
    ]
    lines += [f"  {line}" for line in in_columns(table)]
    for found in report.shared:
        mark = "LEAK " if found.is_leak else "same "
        what = "reports of equal text" if found.kind == "report" else f"{found.kind}{'s' if found.n != 1 else ''}"
        lines.append(
            f"  {mark} {found.n:,} {what} in {found.left} and {found.right}: {found.n_left:,} of "
            f"{report.n_rows[found.left]:,} {found.left} and {found.n_right:,} of {report.n_rows[found.right]:,} "
            f"{found.right} images"
        )
    if not report.leaks:
        n_rows = sum(report.n_rows.values())
        compared = "images, patients, studies" + (
            "; files were not compared" if report.n_compared is None else f", {report.n_compared:,} of {n_rows:,} files"
        )
        lines.append(
            f"  nothing is shared between splits: {compared}" if report.patients_known else f"  none shared: {compared}"
        )
    if report.missing:
        lines.append(f"  {len(report.missing):,} images are not there, such as {report.missing[0]!r}")
    if report.balance:
        lines += ["  labels"] + [f"    {line}" for line in in_columns(_balance_table(report.balance))]
    if report.shortcuts:
        lines.append("  metadata alone, learnt on train, on test")
        shown = [
            [s.label, f"by {s.column}", f"{s.metric} {s.value:.3f}", f"chance {s.chance:.3f}"]
            for s in report.shortcuts[:_SHOWN_SHORTCUTS]
        ]
        lines += [f"    {line}" for line in in_columns(shown)]
    return lines


def _balance_table(balance: Sequence[Balance]) -> list[list[str]]:
    """Labels down, splits across: how many of each class."""
    splits = list(dict.fromkeys(b.split for b in balance))
    rows = [["label", *splits]]
    for label in dict.fromkeys(b.label for b in balance):
        cells = []
        for b in (b for b in balance if b.label == label):
            if len(b.n_of_class) == 2:
                share = f" ({b.n_of_class[1] / b.n_known:.1%})" if b.n_known else ""
                cells.append(f"{b.n_of_class[1]:,} of {b.n_known:,}{share}")
            else:
                names = b.classes if len(b.classes) == len(b.n_of_class) else [""] * len(b.n_of_class)
                cells.append(", ".join(f"{name} {n:,}".strip() for name, n in zip(names, b.n_of_class, strict=True)))
        rows.append([label, *cells])
    return rows


def _lines_between(between: Sequence[Shared], unknown: Sequence[str]) -> list[str]:
    told = [f"  unknown: {line}" for line in unknown]
    if not between:
        return ["between datasets: nothing shared was found (files, long file names, patients of one register)", *told]
    table = [["shared", "", "", "how many", "images", "images"]]
    table += [[s.kind, s.left, s.right, f"{s.n:,}", f"{s.n_left:,}", f"{s.n_right:,}"] for s in between]
    return ["between datasets", *(f"  {line}" for line in in_columns(table)), *told]


def _end(reports: Sequence[AuditReport], between: Sequence[Shared], untold: Sequence[str], strict: bool) -> None:
    """Warns of leaks; under --strict they end the command."""
    for report in reports:
        if report.warning:
            click.echo(f"warning: {report.warning}", err=True)
    unknown = [report.name for report in reports if not report.patients_known]
    if strict and (unknown or between or untold or any(report.leaks for report in reports)):
        if unknown:
            click.echo(
                f"patients unknown in {', '.join(unknown)}: no split of it is known to be free of leaks", err=True
            )
        click.get_current_context().exit(_LEAK_EXIT_CODE)


@manifest.command("map")
@click.argument("manifest_path", metavar="MANIFEST", type=PATH)
@click.argument("labelmap", type=PATH)
@click.option("-o", "--out", type=PATH, required=True, help="The manifest to write, .parquet.")
def map_command(manifest_path: Path, labelmap: Path, out: Path) -> None:
    """Read a manifest's labels as another dataset's, to score a head that was trained there.

    LABELMAP is a YAML file: from, to, and for each label {to: ..., match: exact or broader}, or drop.

    \b
    embedcache manifest map nih.parquet nih-to-chexpert.yaml -o nih-as-chexpert.parquet
    """
    from embedcache.data.labelmap import LabelMap
    from embedcache.data.manifest import Manifest, check_suffix

    check_suffix(out)
    mapped = LabelMap.read(labelmap).apply(Manifest.read(manifest_path))
    mapped.write(out)
    click.echo(f"{out}: {len(mapped):,} images, labels {', '.join(mapped.labels)}")


@manifest.command("preview")
@click.argument("manifest_path", metavar="MANIFEST", type=PATH)
@click.option("-o", "--out", type=PATH, help="The page to write; by default beside the manifest.")
@click.option("--per-split", "n_per_split", default=6, show_default=True, type=click.IntRange(min=1))
@click.option("--size", default=320, show_default=True, type=click.IntRange(16, 4096), help="Longer side, in pixels.")
@click.option("--seed", default=0, show_default=True)
def preview_command(manifest_path: Path, out: Path | None, n_per_split: int, size: int, seed: int) -> None:
    """Write an HTML page of a few samples of each split: image, mask, labels, report.

    The page holds patient data as the dataset does.

    \b
    embedcache manifest preview rsna.parquet -o rsna.html
    """
    from embedcache.data.manifest import Manifest
    from embedcache.data.preview import write_preview

    read = Manifest.read(manifest_path)
    page = write_preview(read, out or manifest_path.with_suffix(".html"), n_per_split=n_per_split, size=size, seed=seed)
    click.echo(str(page))
