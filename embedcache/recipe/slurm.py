"""A recipe as jobs of Slurm: one that plans, an array that shares stage one, one that does the rest."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

_SCRIPT = """\
#!/usr/bin/env bash
# Submits the recipe {recipe} as three steps of Slurm: bash submit.sh
# Submitted again after a failure, it goes on where it stopped.
set -euo pipefail

# draws or reads the data once, says what stage one takes, and fails where that does not fit
plan=$(sbatch --parsable --job-name={name}-plan{last} --wrap={plan})

# each job encodes its part of every store
parts=$(sbatch --parsable --job-name={name} --array=1-{n} \\
  --dependency="afterok:${{plan%%;*}}" --kill-on-invalid-dep=yes{options} --wrap={part})

# whatever a failed job left is encoded here, then stage two
sbatch --job-name={name}-last --dependency="afterany:${{parts%%;*}}"{last} --wrap={rest}
"""


def submit_script(
    recipe: Path,
    name: str,
    overrides: Sequence[str],
    *,
    n_parts: int,
    options: Sequence[str] = (),
    last_options: Sequence[str] = (),
) -> str:
    """The script, for bash.

    Args:
        name: of the recipe; jobs are called after it.
        overrides: `a.b=c` each, as for `embedcache run`.
        options: for sbatch, of the jobs of the array, such as `--gres=gpu:1`.
        last_options: of the jobs before and after it.
    """
    settings = [word for override in overrides for word in ("--set", override)]
    command = shlex.join(["embedcache", "run", str(recipe.resolve()), *settings])
    return _SCRIPT.format(
        recipe=recipe,
        name=shlex.quote(name),
        n=n_parts,
        options="".join(f" {shlex.quote(option)}" for option in options),
        last="".join(f" {shlex.quote(option)}" for option in last_options),
        plan=shlex.quote(f"{command} --plan"),
        part=shlex.quote(f"{command} --part $SLURM_ARRAY_TASK_ID/{n_parts}"),
        rest=shlex.quote(command),
    )
