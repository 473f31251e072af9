"""A recipe as jobs of Slurm: one that plans, an array that shares stage one, one that does the rest."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from embedcache.errors import SettingsError

_SCRIPT = """\
#!/usr/bin/env bash
# Submits the recipe {recipe} as three steps of Slurm, from any directory; all of them run in this one:
here={here}
# Submitted again after a failure, it goes on where it stopped.
set -euo pipefail

# draws or reads the data once, says what stage one takes, and fails where that does not fit
plan=$(sbatch --parsable --job-name={name}-plan --chdir="$here"{options} --wrap={plan})
plan=${{plan%%;*}}

# each job encodes its part of every store
parts=$(sbatch --parsable --job-name={name} --array=1-{n} --chdir="$here" \\
  --dependency="afterok:$plan" --kill-on-invalid-dep=yes{options} --wrap={part})
parts=${{parts%%;*}}

# whatever a failed part left is encoded here, then stage two; without a plan that fits, nothing is
sbatch --job-name={name}-last --chdir="$here" \\
  --dependency="afterok:$plan,afterany:$parts" --kill-on-invalid-dep=yes{last} --wrap={rest}
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
    """The script, for bash. Jobs run in the present directory, with the present Python.

    Args:
        name: of the recipe; jobs are called after it.
        overrides: `a.b=c` each, as for `embedcache run`.
        options: for sbatch, of the plan and of the array, such as `--gres=gpu:1` or `--mem 8G`.
        last_options: of the last job.
    """
    settings = [word for override in overrides for word in ("--set", override)]
    command = shlex.join([sys.executable, "-m", "embedcache", "run", str(recipe.resolve()), *settings])
    return _SCRIPT.format(
        recipe=shlex.quote(str(recipe)),
        here=shlex.quote(str(Path.cwd())),
        name=shlex.quote(name),
        n=n_parts,
        options=_words(options),
        last=_words(last_options),
        plan=shlex.quote(f"{command} --plan"),
        part=shlex.quote(f"{command} --part $SLURM_ARRAY_TASK_ID/{n_parts}"),
        rest=shlex.quote(command),
    )


def _words(options: Sequence[str]) -> str:
    """Options as words of a command; one may hold several, such as `--mem 8G`."""
    words = []
    for option in options:
        try:
            words += shlex.split(option)
        except ValueError as error:
            raise SettingsError(f"option {option!r} for sbatch: {error}; quote it as in a shell") from error
    return "".join(f" {shlex.quote(word)}" for word in words)
