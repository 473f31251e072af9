"""The command that looks at the machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from embedcache.cli.base import PATH, json_option, main


@main.command()
@click.option("--cache", type=PATH, default="cache", show_default=True, help="Where stores are to lie.")
@click.option("--no-network", is_flag=True, help="Do not ask the hub.")
@json_option
def doctor(cache: Path, no_network: bool, as_json: bool) -> None:
    """Say what this machine has and lacks: a line each, with the command that mends it.

    Exit code 1 where something that is required does not work; never for want of a GPU, a network or an extra.

    \b
    embedcache doctor
    embedcache doctor --cache path/on/the/big/disk --no-network
    """
    from embedcache.doctor import examine

    found = []
    for finding in examine(cache, network=not no_network):
        found.append(finding)
        if not as_json:
            click.echo(finding.line())
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in found]))
    if any(finding.state == "problem" for finding in found):
        raise SystemExit(1)
