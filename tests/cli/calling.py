"""The command line, called in this process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from embedcache.cli import main


def call(*arguments: object) -> Result:
    """What a command does and prints."""
    return CliRunner().invoke(main, [str(a) for a in arguments])
