"""Settings given as FIELD=VALUE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from embedcache.errors import SettingsError

T = TypeVar("T")


def pairs(settings: Sequence[str], option: str) -> dict[str, str]:
    """Fields and their values as texts.

    Raises:
        SettingsError: one that has no `=`, or stands twice.
    """
    found = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise SettingsError(f"{option} {setting!r}: expected FIELD=VALUE")
        if name in found:
            raise SettingsError(f"{option} names {name!r} twice")
        found[name] = value
    return found


def read_settings(kind: type[T], given: Mapping[str, Any]) -> T:
    """Settings of a kind from texts and values: `a.b` is a field of a field, several values have commas between them.

    Raises:
        SettingsError: every mistake at once.
    """
    from pydantic import TypeAdapter, ValidationError

    types = {f.name: str(f.type) for f in fields(kind)}  # type: ignore[arg-type]  # a dataclass
    told: dict[str, Any] = {}
    for name, value in given.items():
        outer, _, inner = name.partition(".")
        if inner and not isinstance(told.setdefault(outer, {}), dict):
            raise SettingsError(f"{outer} was given a value of its own, and {name}; give its fields alone")
        if inner:
            told[outer][inner] = None if value == "none" else value
        elif value == "none" and types.get(name, "").endswith("| None"):
            told[name] = None
        elif isinstance(value, str) and types.get(name, "").startswith("tuple"):
            told[name] = tuple(part for part in value.split(",") if part)
        else:
            told[name] = value
    try:
        return TypeAdapter(kind).validate_python(told)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors()]
        raise SettingsError("; ".join(wrong)) from error
