"""Work on a file that may crash or hang the library that parses it, in a process of its own.

HDF5 has had memory faults on damaged files, and loops for ever on some: a damaged heap of variable-length text is one.
"""

from __future__ import annotations

import importlib
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import embedcache
from embedcache.errors import EmbedCacheError

_PACKAGE = Path(embedcache.__file__).parents[1]
_SCRIPT = "import sys; sys.path.append(sys.argv[1]); from embedcache.store.isolated import main; main(*sys.argv[2:])"
_MEMORY_BYTES = 4 * 2**30  # beside twice the size of the file
_REFUSED = 3


def isolated(work: str, file: Path, *arguments: str, timeout_s: float) -> Any:
    """What `work(file, *arguments)` returns, by way of JSON.

    Args:
        work: `package.module:function`.

    Raises:
        ChildProcessError: it raised, crashed, took too much memory, or longer than `timeout_s`; the message says which.
    """
    # -P: the current directory, which may be a stranger's, is no place to import from
    command = [sys.executable, "-P", "-c", _SCRIPT, str(_PACKAGE), work, str(file.absolute()), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise ChildProcessError(f"not read within {timeout_s:.0f} s") from error
    if done.returncode == _REFUSED:
        raise ChildProcessError(done.stderr.decode("utf-8", "replace").strip())
    if done.returncode:
        raise ChildProcessError(f"reading it ended with exit code {done.returncode}")
    try:
        return json.loads(done.stdout)
    except ValueError as error:
        raise ChildProcessError(f"reading it gave {done.stdout[:80]!r}") from error


def main(work: str, file: str, *arguments: str) -> None:
    """The other process."""
    wanted, hard = _MEMORY_BYTES + 2 * Path(file).stat().st_size, resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    module, _, name = work.partition(":")
    try:
        result = getattr(importlib.import_module(module), name)(Path(file), *arguments)
    except EmbedCacheError as error:
        print(error, file=sys.stderr)
        sys.exit(_REFUSED)
    print(json.dumps(result))
