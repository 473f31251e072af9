"""What this machine has and lacks for embedcache, a line for each, with the command that mends it."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from embedcache import __version__
from embedcache.device import count_cores
from embedcache.resources import available_bytes, free_bytes, in_bytes

if TYPE_CHECKING:
    from packaging.requirements import Requirement

State = Literal["ok", "missing", "problem"]
_HUB, _PATIENCE_S = "https://huggingface.co", 3.0
_LOADING_S = 120  # for one library: a shared file system that is cold needs minutes for torch
_TEST_ONLY = "test"
_DICOM = "DICOM"
_PACKAGES = Path(__file__).parents[1]
_SCRIPT = "import sys; sys.path.append(sys.argv[1]); from embedcache.doctor import prove; prove(*sys.argv[2:])"
_MARK = "embedcache doctor: "


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


@dataclass(frozen=True)
class _Told:
    """What came of a library in a process of its own.

    Args:
        built_with: what stands beside its version.
        facts: of torch the GPUs, of huggingface_hub whether a token is set, of DICOM `plugin: transfer syntax` for each
            that cannot be decoded.
        broken: why it does not work; blank where it does.
    """

    built_with: str = ""
    facts: Sequence[str] = ()
    broken: str = ""


def examine(cache: Path, *, network: bool = True) -> Iterator[Finding]:
    """Everything there is to know, as it is found.

    Args:
        cache: where stores are to lie.
        network: whether the hub is asked.
    """
    yield Finding("Python", "ok", platform.python_version())
    yield Finding("embedcache", "ok", f"{__version__}, {Path(__file__).parent}")
    yield from _command()
    told = yield from _libraries()
    yield from _devices(told.get("torch"))
    yield _decoders(told[_DICOM])
    yield Finding("memory", "ok", f"{in_bytes(available_bytes())} free")
    yield from _disk(cache)
    yield _hub(told.get("huggingface_hub")) if network else Finding("hub", "ok", "not asked")
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


def _libraries() -> Generator[Finding, None, dict[str, _Told]]:
    """Every required library against the version that this package asks for, and what came of loading it.

    Returns:
        By module, and for `DICOM`, what they told.
    """
    required = _required()
    brought = importlib.metadata.packages_distributions()
    modules = {wanted.name: [] if _lack(wanted) else _modules(wanted.name, brought) for wanted in required}
    coming = _try([*(module for of_one in modules.values() for module in of_one), _DICOM])
    told: dict[str, _Told] = {}
    for wanted in required:
        lack, version, fix = _lack(wanted), _version(wanted.name), _install([wanted])
        if lack:
            yield Finding(wanted.name, "problem", lack, fix)
            continue
        parts = dict(islice(coming, len(modules[wanted.name])))
        told |= parts
        broken = [part.broken for part in parts.values() if part.broken]
        if broken:
            yield Finding(wanted.name, "problem", f"{version} does not work: {broken[0]}", f"{fix} --force-reinstall")
        else:
            built_with = [part.built_with for part in parts.values() if part.built_with]
            yield Finding(wanted.name, "ok", ", ".join([version, *built_with]))
    return told | dict(coming)


def _required(extra: str = "") -> list[Requirement]:
    """What the package asks for, or what one of its extras adds to that."""
    from packaging.requirements import Requirement

    def is_asked(wanted: Requirement, by: str) -> bool:
        return wanted.marker is None or wanted.marker.evaluate({"extra": by})

    every = [Requirement(text) for text in importlib.metadata.requires("embedcache") or ()]
    return [wanted for wanted in every if is_asked(wanted, extra) and not (extra and is_asked(wanted, ""))]


def _lack(wanted: Requirement) -> str:
    version = _version(wanted.name)
    if not version:
        return "not installed"
    return "" if wanted.specifier.contains(version, prereleases=True) else f"{version}, expected {wanted.specifier}"


def _install(wanted: Sequence[Requirement]) -> str:
    return " ".join(["run pip install", *(f"'{one.name}{one.specifier}'" for one in wanted)])


def _modules(name: str, brought: Mapping[str, Sequence[str]]) -> list[str]:
    """What a distribution brings to import: the module of its own name, or else every public one.

    Args:
        brought: the distributions that bring a module.
    """
    from packaging.utils import canonicalize_name

    own = canonicalize_name(name)
    public = [module for module in brought if module.isidentifier() and not module.startswith("_")]
    found = [module for module in public if own in {canonicalize_name(of) for of in brought[module] if of}]
    named = own.replace("-", "_")
    return [named] if named in found else found


def _try(names: Sequence[str]) -> Iterator[tuple[str, _Told]]:
    """What comes of each, in this order: all in one process, and what ends that costs the next a new one."""
    left = list(names)
    while left:
        # -P: the current directory, which may be a stranger's, is no place to import from
        command = [sys.executable, "-P", "-c", _SCRIPT, str(_PACKAGES), str(_LOADING_S), *left]
        last, pipe = "", subprocess.PIPE
        with subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, errors="replace") as child:
            for line in child.stdout or ():
                if line.startswith(_MARK):
                    yield left.pop(0), _Told(**json.loads(line.removeprefix(_MARK)))
                    last = ""
                else:
                    last = line.strip() or last
        if left:
            yield left.pop(0), _Told(broken=_ending(child.returncode, last))


def _ending(code: int, last: str) -> str:
    if code == -signal.SIGALRM:
        return f"not loaded within {_LOADING_S} s"
    if code < 0:
        return f"it ends Python ({signal.strsignal(-code)})"
    return last or f"exit code {code}"


def prove(limit_s: str, *names: str) -> None:
    """The other process: loads each and has it do something where that says more, and tells by the line."""
    proofs = {"h5py": _hdf5, "torch": _gpus, "huggingface_hub": _token, _DICOM: _undecoded}
    for name in names:
        signal.alarm(int(limit_s))  # no handler: it ends a process that hangs in compiled code, too
        if name in proofs:
            told = proofs[name]()
        else:
            importlib.import_module(name)
            told = _Told()
        print(f"\n{_MARK}{json.dumps(asdict(told))}", flush=True)


def _hdf5() -> _Told:
    import h5py

    with h5py.File("doctor.h5", "w", driver="core", backing_store=False) as file:
        file["numbers"] = [1, 2, 3]
        read = file["numbers"][()].tolist()
    if read != [1, 2, 3]:
        raise OSError(f"HDF5 in memory: wrote [1, 2, 3], read {read}")
    return _Told(f"HDF5 {h5py.version.hdf5_version}")


def _gpus() -> _Told:
    import torch

    n = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [torch.cuda.get_device_properties(k) for k in range(n)]
    gpus = [f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB" for gpu in found]
    return _Told(f"CUDA {torch.version.cuda or 'none'}", gpus)


def _token() -> _Told:
    from huggingface_hub import get_token

    token = None
    with contextlib.suppress(Exception):  # a file that cannot be read holds none
        token = get_token()
    return _Told(facts=["a token is set"] if token else [])


def _undecoded() -> _Told:
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    from embedcache.data.dicom import DECODERS

    kinds = [(UID(syntax), plugin) for syntax, plugin in DECODERS.items()]
    return _Told(facts=[f"{p}: {uid.name}" for uid, p in kinds if p not in get_decoder(uid).available_plugins])


def _devices(torch: _Told | None) -> Iterator[Finding]:
    cores = count_cores()
    yield Finding("CPU", "ok", f"{cores} core{'' if cores == 1 else 's'} to use")
    if torch is None or torch.broken:  # told with the libraries
        return
    cuda = f"torch with {torch.built_with}"
    if torch.facts:
        yield from (Finding(f"GPU {k}", "ok", f"{gpu}, {cuda}") for k, gpu in enumerate(torch.facts))
    else:
        yield Finding("GPU", "missing", f"none ({cuda}): all is computed on the CPU")


def _decoders(told: _Told) -> Finding:
    if told.broken:
        return Finding(_DICOM, "problem", f"cannot be read: {told.broken}", "mend the libraries above")
    if not told.facts:
        return Finding(_DICOM, "ok", "decodes every transfer syntax that embedcache reads")
    plugins, _, syntaxes = zip(*(fact.partition(": ") for fact in told.facts), strict=True)
    # pydicom's name of a plugin is a part of the names of all that it needs: pylibjpeg, pylibjpeg-openjpeg
    lacking = [wanted for wanted in _required() if any(plugin in wanted.name.lower() for plugin in plugins)]
    said = f"cannot decode {', '.join(syntaxes)} without {', '.join(dict.fromkeys(plugins))}"
    return Finding(_DICOM, "problem", said, f"{_install(lacking)} --force-reinstall")


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


def _hub(library: _Told | None) -> Finding:
    offline = "use directories of checkpoints (hf:path/to/checkpoint), made where there is a network"
    endpoint = os.environ.get("HF_ENDPOINT") or _HUB
    token = library.facts if library else ()
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
    said = "a token is set" if token else "no token, which gated encoders need: run hf auth login"
    return Finding("hub", "ok", f"{shown} answers; {said}")


def _extras() -> Iterator[Finding]:
    """The package's own extras: what they bring, or how to get it."""
    metadata = importlib.metadata.metadata("embedcache")
    for extra in sorted(set(metadata.get_all("Provides-Extra") or ()) - {_TEST_ONLY}):
        added = _required(extra)
        lacks = [f"{wanted.name} {_lack(wanted)}" for wanted in added if _lack(wanted)]
        if lacks:
            yield Finding(f"[{extra}]", "missing", "; ".join(lacks), f"run pip install 'embedcache[{extra}]'")
        else:
            yield Finding(f"[{extra}]", "ok", ", ".join(f"{wanted.name} {_version(wanted.name)}" for wanted in added))


def _version(name: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return ""
