"""The encoder of a store or a run, loaded again from its record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedcache.data.radiograph import DecodePolicy
from embedcache.data.reports import ReportPolicy
from embedcache.encoders.base import Encoder, EncoderOptions
from embedcache.encoders.load import load_encoder
from embedcache.errors import EncoderError, FingerprintMismatchError
from embedcache.fingerprint import fingerprint

_OWN_CODE = "py:"
_DIRECTORIES = ("hf", "open_clip", "timm", "xrv")  # sources that load a directory and run none of its code


def load_recorded(
    record: Mapping[str, Any],
    *,
    encoder: str | None = None,
    here: str = "",
    device: str = "auto",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Encoder:
    """Loads the encoder that a record is of, with the same choices, and refuses any other.

    Code and pickles are consented to anew: a record may come from anywhere.

    Args:
        record: as stores hold it: `name`, `identity`, `notes`, `loading`.
        encoder: where to take it from instead, as `load_encoder` has it, such as `hf:` and a directory.
        here: where it was found on the machine that encoded; tried where the record names a directory.

    Raises:
        EncoderError: the record does not say where it comes from, or it is not there; says what to name.
        FingerprintMismatchError: what is loaded is another encoder.
    """
    said, shown = record.get("loading", {}), str(record.get("name", "external"))
    if "identity" not in record:
        raise EncoderError(
            f"{shown!r}: embeddings made elsewhere, whose record is no encoder's of this library: no new image can be "
            "brought to them; extract the images with an encoder, and probe that store"
        )
    name = encoder or _place(said, here, shown)
    found = load_encoder(
        name,
        modality=said.get("modality"),
        **_options(said.get("options", {})),
        device=device,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    expected = fingerprint(dict(record["identity"]))
    if found.fingerprint != expected:
        differ = [key for key, value in record["identity"].items() if found.record.identity.get(key) != value]
        raise FingerprintMismatchError(
            f"{name}: encoder fingerprint {found.fingerprint[:12]}..., expected {expected[:12]}... of {shown!r}"
            + (f", as its {', '.join(differ)} {'is another' if len(differ) == 1 else 'are others'}" if differ else "")
            + "; name the encoder that the embeddings were made with (--encoder), and consent to code or pickles where "
            "that was done (--trust-remote-code, --allow-pickle)"
        )
    return found


def _place(said: Mapping[str, Any], here: str, shown: str) -> str:
    """What to load where nobody names it."""
    name = str(said.get("name", ""))
    if not name:
        raise EncoderError(
            f"{shown!r}: its record does not say how it was loaded, as older versions did not write that; extract into "
            "a new store, or name the encoder, such as --encoder hf:DIRECTORY, if nothing was chosen for it"
        )
    if name.startswith(_OWN_CODE):
        raise EncoderError(
            f"{shown!r}: an encoder of somebody's own code, which is run only if you name it: --encoder {name}"
        )
    if not said.get("is_directory"):
        return name
    kind = name.partition(":")[0]
    place = Path(here.removeprefix(f"{kind}:"))
    if here.startswith(f"{kind}:") and kind in _DIRECTORIES and place.is_absolute() and place.is_dir():
        return here
    raise EncoderError(
        f"{shown!r}: was loaded from a directory {name.partition(':')[2]!r}, which is not "
        f"{'there any more' if here else 'known here'}; say where it is: --encoder {kind}:DIRECTORY"
    )


def _options(said: Mapping[str, Any]) -> dict[str, Any]:
    """As `load_encoder` takes them: of what JSON holds, lists are tuples and two policies are objects."""
    unknown = sorted(set(said) - set(EncoderOptions.of_values()))
    if unknown:
        raise EncoderError(f"a record with options {', '.join(unknown)}, which this version does not know; update it")
    options = _with_tuples(said)
    policies: dict[str, Any] = {"decode": DecodePolicy, "report": ReportPolicy}
    for name, policy in policies.items():
        if name in options:
            options[name] = policy(**_with_tuples(options[name]))
    return options


def _with_tuples(said: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}
