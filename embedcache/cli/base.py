"""What all commands share: the group, its errors, common options."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from embedcache import __version__
from embedcache.errors import EmbedCacheError

PATH = click.Path(path_type=Path)
_RESUMED = ("extract", "run", "train")  # called again, these go on where they were stopped
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
    embedcache run pipelines/phantom.yaml
    embedcache extract manifest.parquet dinov2-s --store cache/mine/dinov2-s
    """


def in_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def say_notes(notes: Sequence[str], warning: str) -> None:
    """What is to be known of scores, on standard error: they may be piped on."""
    for note in notes:
        click.echo(f"note: {note}", err=True)
    if warning:
        click.echo(f"warning: {warning}", err=True)
