"""Where a checkpoint's files are, and which of them may be read.

Every source library is given a local directory: one that the user named, or the snapshot of a hub repository, fetched
only where it is not on this machine. Weights are safetensors. A pickle is read only if the catalogue pins its digest
or the caller asks for it, and then with torch's `weights_only`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedcache.encoders.base import EncoderOptions
from embedcache.errors import EncoderError
from embedcache.fingerprint import digest_file

HUB_PREFIX = "hf-hub:"  # as timm and open_clip mark names of the hub
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")  # pickles that are no part of a model
_OTHER_FRAMEWORKS = ("onnx/*", "openvino/*", "*.h5", "*.msgpack", "*.ot", "coreml/*")
_FETCHED = ("*.json", "*.txt", "*.model", "*.py", "*.safetensors", "*.jinja")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's files in a local directory.

    Args:
        source: how the user named it, for messages.
        name: the same without the path of a directory, for records.
        directory: where its files are.
        revision: the hub's commit, where it came from there.
        allow_pickle: whether the caller asked for pickles by name.
        pins: SHA-256 of pickles that may be read, by file name.
        trust_remote_code: whether the caller asked for code beside the weights.
    """

    source: str
    name: str
    directory: Path
    revision: str | None = None
    allow_pickle: bool = False
    pins: Mapping[str, str] = field(default_factory=dict)
    trust_remote_code: bool = False

    @classmethod
    def find(cls, kind: str, location: str, options: EncoderOptions, pins: Mapping[str, str]) -> Checkpoint:
        """The directory that is named, or the hub's snapshot; the network is asked only for what is not here.

        Args:
            kind: the source library's prefix, such as `hf`.
            location: a directory, a hub name, or `name@revision`.

        Raises:
            EncoderError: no such directory, or the repository is neither here nor to be had; says what to run.
        """
        source, local = f"{kind}:{location}", Path(location).expanduser()
        consents = (options.allow_pickle, pins, options.trust_remote_code)
        if local.is_dir():
            return cls(source, f"{kind}:{local.resolve().name}", local, None, *consents)
        if location.startswith((".", "/", "~")):
            raise EncoderError(f"{source}: no such directory; give a local directory or a hub name")
        name, _, revision = location.removeprefix(HUB_PREFIX).partition("@")
        directory = _snapshot(source, name, revision or None, pickles=options.allow_pickle or bool(pins))
        return cls(source, source, directory, directory.name, *consents)

    @property
    def remedy(self) -> str:
        """What to run where files are missing or of the wrong kind."""
        if self.revision is None:
            return "check that the directory holds a whole checkpoint in that library's own format"
        name = self.source.partition(":")[2].removeprefix(HUB_PREFIX).partition("@")[0]
        return f"fetch it anew with 'hf download {name} --revision {self.revision} --force-download'"

    def json(self, file: str) -> dict[str, Any]:
        """A JSON file of the checkpoint with named fields; empty where there is no such file.

        Raises:
            EncoderError: not JSON, or no fields in it.
        """
        found = self.any_json(file) if (self.directory / file).is_file() else {}
        if not isinstance(found, dict):
            raise EncoderError(
                f"{self.source}: {file} holds a {type(found).__name__}, expected named fields; {self.remedy}"
            )
        return found

    def any_json(self, file: str) -> Any:
        """A JSON file of any content; None where there is no such file.

        Raises:
            EncoderError: not JSON.
        """
        path = self.directory / file
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise EncoderError(f"{self.source}: {file} is not JSON ({type(error).__name__}); {self.remedy}") from error

    def needs_pickle(self) -> bool:
        """Whether the weights are a pickle, which may then be read with `weights_only`.

        Raises:
            EncoderError: no weights, a pickle that nobody admitted, or one whose digest is not the pinned one.
        """
        if any(self.directory.glob("*.safetensors")):
            return False
        pickles = self.pickles()
        if not pickles:
            raise EncoderError(f"{self.source}: no weights, expected *.safetensors; {self.remedy}")
        for path in pickles:
            admit_pickle(path, self.source, self.allow_pickle, self.pins)
        return True

    def weights(self) -> dict[str, Any]:
        """All weights by name, from safetensors or from admitted pickles.

        Raises:
            EncoderError: none, or not readable.
        """
        from safetensors.torch import load_file

        if self.needs_pickle():
            return {name: tensor for path in self.pickles() for name, tensor in read_pickle(path).items()}
        with self.loading("weights"):
            files = sorted(self.directory.glob("*.safetensors"))
            return {name: tensor for path in files for name, tensor in load_file(path).items()}

    @property
    def notes(self) -> dict[str, str]:
        """Where it came from, for the record's notes."""
        return {"checkpoint": self.name, **({"revision": self.revision} if self.revision else {})}

    def pickles(self) -> list[Path]:
        """Pickled weights in the directory, by name."""
        found = (path for pattern in _PICKLES for path in self.directory.glob(pattern))
        return sorted(path for path in found if path.name not in _NO_WEIGHTS)

    def code(self) -> dict[str, str]:
        """Digests of the code beside the weights, where the caller trusts it and the config names it.

        Raises:
            EncoderError: the config names code in another repository, whose content is not here to be hashed.
        """
        described = ("config.json", "tokenizer_config.json", "preprocessor_config.json")
        named = [entry for file in described for entry in _auto_map(self.json(file))]
        if not self.trust_remote_code or not named:
            return {}
        elsewhere = sorted({entry for entry in named if "--" in entry})
        if elsewhere:
            raise EncoderError(
                f"{self.source}: its config names code of another repository ({elsewhere[0]}), which cannot be "
                "fingerprinted; copy that code beside the weights and name it in auto_map without the repository"
            )
        return {path.name: digest_file(path) for path in sorted(self.directory.glob("*.py"))}

    @contextlib.contextmanager
    def loading(self, what: str) -> Iterator[None]:
        """A library's errors become ours, with the command to run."""
        from pickle import UnpicklingError

        from safetensors import SafetensorError

        try:
            yield
        except EncoderError:
            raise
        except UnpicklingError as error:
            raise EncoderError(
                f"{self.source}: its {what} is not a pickle of weights alone; nothing in it was run. Ask its maker for "
                "safetensors"
            ) from error
        except (OSError, ValueError, LookupError, ImportError, RuntimeError, TypeError, AttributeError) as error:
            raise self._cannot(what, error) from error
        except SafetensorError as error:
            raise self._cannot(what, error) from error

    def _cannot(self, what: str, error: Exception) -> EncoderError:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
        return EncoderError(
            f"{self.source}: cannot load its {what} ({type(error).__name__}: {first_line}); {self.remedy}"
        )


def admit_pickle(path: Path, source: str, allow_pickle: bool, pins: Mapping[str, str]) -> None:
    """Whether a pickle may be read at all: its digest is pinned, or the caller asked for pickles by name.

    Raises:
        EncoderError: neither, or its digest is not the pinned one.
    """
    pinned = pins.get(path.name)
    if pinned is not None and (found := digest_file(path)) != pinned:
        raise EncoderError(
            f"{source}: {path.name} has SHA-256 {found[:12]}..., the catalogue pins {pinned[:12]}...; fetch it anew"
        )
    if pinned is None and not allow_pickle:
        raise EncoderError(
            f"{source}: its weights are a pickle ({path.name}), which can run code when it is read; convert it once "
            f"with 'embedcache encoders --convert {source} --out DIRECTORY', or pass allow_pickle=True "
            "(--allow-pickle) if you trust its maker"
        )


def read_pickle(path: Path, *, safe_globals: list[Any] | None = None) -> dict[str, Any]:
    """A state dict from a pickle, by torch's restricted unpickler.

    Args:
        safe_globals: classes that may be built beside tensors, for pickles of whole modules.

    Raises:
        EncoderError: it holds more than weights.
    """
    import pickle

    import torch

    try:
        with torch.serialization.safe_globals(safe_globals or []):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, AttributeError) as error:
        raise EncoderError(
            f"{path.name}: not a pickle of weights alone ({type(error).__name__}); nothing in it was run. Ask its "
            "maker for safetensors"
        ) from error
    if isinstance(content, torch.nn.Module):
        return content.state_dict()
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise EncoderError(f"{path.name}: holds a {type(content).__name__}, expected a dictionary of tensors")
    return content


def write_safetensors(weights: Mapping[str, Any], path: Path) -> None:
    """Writes a state dict, shared tensors once each."""
    from safetensors.torch import save_file

    save_file({k: v.detach().clone().contiguous() for k, v in weights.items()}, path, metadata={"format": "pt"})


def convert(checkpoint: Checkpoint, out: Path) -> Path:
    """Copies a checkpoint with its pickled weights as safetensors.

    Raises:
        EncoderError: nothing to convert, or `out` is not empty.
    """
    pickles = checkpoint.pickles()
    if not pickles:
        raise EncoderError(f"{checkpoint.source}: no pickled weights to convert")
    if out.exists() and any(out.iterdir()):
        raise EncoderError(f"{out}: not empty; name a new directory")
    by_open_clip = (checkpoint.directory / "open_clip_config.json").is_file()
    parts = [p for p in pickles if "-of-" in p.name] or pickles[:1]  # the parts of one model, or the one file
    weights = {name: tensor for part in parts for name, tensor in read_pickle(part).items()}
    out.mkdir(parents=True, exist_ok=True)
    for path in checkpoint.directory.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".txt", ".model", ".py") and ".bin.index" not in path.name:
            copied = out / path.relative_to(checkpoint.directory)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copied)
    write_safetensors(weights, out / ("open_clip_model.safetensors" if by_open_clip else "model.safetensors"))
    return out


def _snapshot(source: str, name: str, revision: str | None, *, pickles: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    at = f" --revision {revision}" if revision else ""
    try:
        with contextlib.suppress(LocalEntryNotFoundError):
            here = Path(snapshot_download(name, revision=revision, local_files_only=True))
            if _has_weights(here):
                return here
        patterns = [*_FETCHED, *(_PICKLES if pickles else ())]
        fetched = snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=list(_OTHER_FRAMEWORKS)
        )
        return Path(fetched)
    except GatedRepoError as error:
        raise EncoderError(
            f"{source}: the repository is gated; accept its terms on its page, then run 'hf auth login' and "
            f"'hf download {name}{at}'"
        ) from error
    except HFValidationError as error:
        raise EncoderError(f"{source}: neither a directory here nor a hub name ({error})") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise EncoderError(
            f"{source}: not on this machine and not to be fetched ({type(error).__name__}); fetch it once with "
            f"'hf download {name}{at}' (gated: 'hf auth login' first)"
        ) from error


def _has_weights(directory: Path) -> bool:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        parts = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        return all((directory / part).is_file() for part in parts)
    return any(True for pattern in ("*.safetensors", *_PICKLES) for _ in directory.glob(pattern))


def _auto_map(config: Mapping[str, Any]) -> list[str]:
    entries = config.get("auto_map") or {}
    flat: list[Any] = []
    for entry in entries.values() if isinstance(entries, dict) else [entries]:
        flat += entry if isinstance(entry, list) else [entry]
    return [entry for entry in flat if isinstance(entry, str)]
