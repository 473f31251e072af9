"""What this machine has and lacks for embedcache, a line for each, with the command that mends it."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from embedcache import __version__
from embedcache.device import count_cores
from embedcache.resources import available_bytes, free_bytes, in_bytes

State = Literal["ok", "missing", "problem"]
_HUB, _PATIENCE_S = "https://huggingface.co", 3.0
_LOADED = ("torch", "torchvision", "h5py", "numpy", "pyarrow")  # compiled: their presence says little
_TEST_ONLY = "test"
_TORCH = """
import torch
print("CUDA", torch.version.cuda or "none")
for k in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
    found = torch.cuda.get_device_properties(k)
    print(f"{found.name}, {found.total_memory / 1e9:.0f} GB")
"""


@dataclass(frozen=True)
class Finding:
    """One line.

    Args:
        state: `problem` where something that is required does not work, `missing` where something else is not there.
        fix: what to run; blank where nothing is to be done.
    """

    name: str
    state: State
    said: str
    fix: str = ""

    def line(self) -> str:
        fix = f"; {self.fix}" if self.fix else ""
        return f"{self.state:8} {self.name:22} {self.said}{fix}"


def examine(cache: Path, *, network: bool = True) -> Iterator[Finding]:
    """Everything there is to know, as it is found.

    Args:
        cache: where stores are to lie.
        network: whether the hub is asked.
    """
    yield Finding("Python", "ok", platform.python_version())
    yield Finding("embedcache", "ok", f"{__version__}, {Path(__file__).parent}")
    yield from _command()
    yield from _libraries()
    yield from _devices()
    yield _decoders()
    yield Finding("memory", "ok", f"{in_bytes(available_bytes())} free")
    yield from _disk(cache)
    yield _hub() if network else Finding("hub", "ok", "not asked")
    yield from _extras()


def _command() -> Iterator[Finding]:
    found = shutil.which("embedcache")
    own = Path(sys.executable).parent / "embedcache"
    if found is None:
        yield Finding("command", "missing", "'embedcache' is not on PATH", f"call {sys.executable} -m embedcache")
    elif own.exists() and not Path(found).samefile(own):
        yield Finding("command", "missing", f"'embedcache' on PATH is another one, {found}", f"call {own}")
    else:
        yield Finding("command", "ok", found)


def _libraries() -> Iterator[Finding]:
    """Every required library against the version that this package asks for; compiled ones are loaded too."""
    from packaging.requirements import Requirement

    for text in importlib.metadata.requires("embedcache") or ():
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        fix = f"run pip install '{wanted.name}{wanted.specifier}'"
        version = _version(wanted.name)
        if not version:
            yield Finding(wanted.name, "problem", "not installed", fix)
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            yield Finding(wanted.name, "problem", f"{version}, expected {wanted.specifier}", fix)
            continue
        broken = _broken(wanted.name) if wanted.name in _LOADED else ""
        if broken:
            yield Finding(wanted.name, "problem", f"{version} cannot be loaded: {broken}", f"{fix} --force-reinstall")
        else:
            yield Finding(wanted.name, "ok", version)


def _broken(name: str) -> str:
    """Why a library cannot be loaded, in a process of its own; blank where it can."""
    done = _python_says(f"import {name}")
    lines = done.stderr.strip().splitlines()
    return "" if done.returncode == 0 else lines[-1] if lines else f"exit code {done.returncode}"


def _python_says(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def _devices() -> Iterator[Finding]:
    cores = count_cores()
    yield Finding("CPU", "ok", f"{cores} core{'' if cores == 1 else 's'} to use")
    done = _python_says(_TORCH)
    if done.returncode:  # told with the libraries
        return
    cuda, *gpus = done.stdout.strip().splitlines()
    if gpus:
        yield from (Finding(f"GPU {k}", "ok", f"{gpu}, torch with {cuda}") for k, gpu in enumerate(gpus))
    else:
        yield Finding("GPU", "missing", f"none (torch with {cuda}): all is computed on the CPU")


def _decoders() -> Finding:
    try:
        from pydicom.pixels import get_decoder
        from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, JPEGLosslessSV1, JPEGLSLossless, RLELossless
    except ImportError as error:
        return Finding(
            "DICOM", "problem", f"pydicom cannot be loaded: {error}", "run pip install --force-reinstall pydicom"
        )
    kinds = {
        "JPEG baseline": JPEGBaseline8Bit,
        "JPEG lossless": JPEGLosslessSV1,
        "JPEG-LS": JPEGLSLossless,
        "JPEG 2000": JPEG2000Lossless,
        "RLE": RLELossless,
    }
    lacking = [name for name, uid in kinds.items() if not get_decoder(uid).is_available]
    if lacking:
        return Finding("DICOM", "problem", f"cannot decode {', '.join(lacking)}", "run pip install embedcache again")
    return Finding("DICOM", "ok", f"decodes {', '.join(kinds)}")


def _disk(cache: Path) -> Iterator[Finding]:
    yield Finding("disk", "ok", f"{in_bytes(free_bytes(cache))} free for {cache}")
    folder = cache.absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as made:
            yield _links(Path(made), folder)
            yield _locks(Path(made), folder)
    except OSError as error:
        yield Finding(
            "cache", "problem", f"{folder} cannot be written ({error.strerror})", "name another: --cache PATH"
        )


def _links(made: Path, folder: Path) -> Finding:
    (made / "a").touch()
    try:
        os.link(made / "a", made / "b")
    except OSError as error:
        said = f"{folder} has none ({error.strerror}), and stores publish their shards by them"
        return Finding("hard links", "problem", said, "keep stores on another file system")
    return Finding("hard links", "ok", f"{folder} has them")


def _locks(made: Path, folder: Path) -> Finding:
    with (made / "a").open("r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            said = f"{folder} has none ({error.strerror}): two extractions on one store would do the same work"
            return Finding("record locks", "missing", said, "run one at a time, or use --part")
    return Finding("record locks", "ok", f"{folder} has them")


def _hub() -> Finding:
    offline = "use directories of checkpoints (hf:path/to/checkpoint), made where there is a network"
    endpoint = os.environ.get("HF_ENDPOINT") or _HUB
    token = "a token is set" if _has_token() else "no token, which gated encoders need: run hf auth login"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding("hub", "missing", "HF_HUB_OFFLINE is set", offline)
    shown = urlsplit(endpoint)._replace(netloc=urlsplit(endpoint).netloc.rpartition("@")[2]).geturl()  # no password
    request = urllib.request.Request(endpoint, method="HEAD", headers={"User-Agent": f"embedcache/{__version__}"})
    try:
        with urllib.request.urlopen(request, timeout=_PATIENCE_S):
            pass
    except urllib.error.HTTPError:  # it answered
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return Finding("hub", "missing", f"{shown} cannot be reached ({reason})", offline)
    return Finding("hub", "ok", f"{shown} answers; {token}")


def _has_token() -> bool:
    from huggingface_hub import get_token

    with contextlib.suppress(Exception):
        return bool(get_token())
    return False


def _extras() -> Iterator[Finding]:
    """The package's own extras: what they bring, or how to get it."""
    from packaging.requirements import Requirement

    metadata = importlib.metadata.metadata("embedcache")
    required = [Requirement(text) for text in importlib.metadata.requires("embedcache") or ()]
    for extra in sorted(set(metadata.get_all("Provides-Extra") or ()) - {_TEST_ONLY}):
        of_extra = [r for r in required if r.marker is not None and r.marker.evaluate({"extra": extra})]
        names = [r.name for r in of_extra if not r.marker or not r.marker.evaluate({"extra": ""})]
        found = {name: _version(name) for name in names}
        if all(found.values()):
            yield Finding(f"[{extra}]", "ok", ", ".join(f"{name} {version}" for name, version in found.items()))
        else:
            yield Finding(f"[{extra}]", "missing", "not installed", f"run pip install 'embedcache[{extra}]'")


def _version(name: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return ""
