"""What all commands share: the group, its errors, common options."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import click

from embedcache import __version__
from embedcache.errors import EmbedCacheError

if TYPE_CHECKING:
    import pandas as pd

PATH = click.Path(path_type=Path)
_RESUMED = ("compare", "demo", "extract", "run", "train")  # called again, these go on where they were stopped
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


class _Group(click.Group):
    """Shows our own errors as one message and gives their exit code; stopped, it says how to go on."""

    def invoke(self, ctx: click.Context) -> Any:
        received: list[int] = []
        try:
            with _signals_stop(received):
                return super().invoke(ctx)
        except EmbedCacheError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough
            go_on = f"; what is finished is kept. To go on: {_command()}" if ctx.invoked_subcommand in _RESUMED else ""
            click.echo(f"\nstopped{go_on}", err=True)
            ctx.exit(128 + (received[0] if received else signal.SIGINT))


@contextlib.contextmanager
def _signals_stop(received: list[int]) -> Iterator[None]:
    """SIGTERM and SIGHUP end the command as Ctrl-C does; what the caller ignores (nohup) stays ignored.

    Args:
        received: gets the number of the signal: a library written in C may put an exception of its own for ours.
    """

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        received.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in caught}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _command() -> str:
    """The command that is running, as it was called."""
    called = sys.argv[0]
    if Path(called).name == "__main__.py":
        program = [sys.executable, "-m", "embedcache"]
    else:
        name = Path(called).name
        program = [name if shutil.which(name) == called else called]
    return shlex.join([*program, *sys.argv[1:]])


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Encode radiographs and reports once, train on the cached embeddings in minutes.

    \b
    embedcache demo
    embedcache extract manifest.parquet dinov2-s --store cache/mine/dinov2-s
    """


class Scored(Protocol):
    """What a command that scores is given."""

    @property
    def notes(self) -> tuple[str, ...]: ...
    @property
    def warning(self) -> str: ...
    def write(self, folder: Path) -> None: ...


def say_scores(
    result: Scored, tables: Mapping[str, pd.DataFrame], text: str, *, out: Path | None, written: str, as_json: bool
) -> None:
    """Writes a result where it was asked for, and prints it; what is to be known of it goes to standard error.

    Args:
        tables: for JSON.
        text: for people.
        written: what `out` then holds.
    """
    if out is not None:
        result.write(out)
    if as_json:
        click.echo(json.dumps({name: json.loads(t.to_json(orient="records")) for name, t in tables.items()}))
    else:
        click.echo(text)
        if out is not None:
            click.echo(f"\n{written}: {out}")
    for note in result.notes:
        click.echo(f"note: {note}", err=True)
    if result.warning:
        click.echo(f"warning: {result.warning}", err=True)
