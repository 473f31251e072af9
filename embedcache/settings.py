"""Settings as frozen dataclasses whose bounds and choices are written once, in the types.

`Annotated[int, Ge(1)]` and `Literal["a", "b"]` are checked by pydantic where a recipe sets the field, and by `check`
where Python does.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

STRICT = {"extra": "forbid", "allow_inf_nan": False}  # how recipes read such a dataclass

_BOUNDS = {
    Ge: ("ge", operator.ge, "at least"),
    Gt: ("gt", operator.gt, "above"),
    Le: ("le", operator.le, "at most"),
    Lt: ("lt", operator.lt, "below"),
}


def check(settings: Any) -> None:
    """Compares every field with the bounds and choices in its type.

    Raises:
        ValueError: all fields that break one, with what was found and expected.
    """
    hints = get_type_hints(type(settings), include_extras=True)
    wrong = [
        f"{name} is {value!r}, expected {expected}"
        for name, hint in hints.items()
        for value in [getattr(settings, name)]
        for expected in _broken(value, hint)
    ]
    if wrong:
        raise ValueError("; ".join(wrong))


def fix(settings: Any, fixed: Mapping[str, Any], protocol: str) -> None:
    """Sets what a protocol fixes in a frozen dataclass of settings.

    Raises:
        ValueError: a field that was given another value, neither its usual one nor the protocol's.
    """
    usual = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(type(settings))}
    against = [name for name, value in fixed.items() if getattr(settings, name) not in (value, usual[name])]
    if against:
        raise ValueError(f"protocol {protocol!r} fixes {', '.join(against)}; leave them out, or the protocol")
    for name, value in fixed.items():
        object.__setattr__(settings, name, value)


def _broken(value: Any, hint: Any) -> Iterator[str]:
    """What a type expects and a value does not keep."""
    if isinstance(value, float) and math.isinf(value):
        yield "a finite number"
        return
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            yield f"one of {', '.join(map(str, get_args(hint)))}"
    elif get_origin(hint) in (Union, UnionType):  # a bounded value, or None
        if value is not None:
            for kind in get_args(hint):
                yield from _broken(value, kind)
    else:
        for bound in getattr(hint, "__metadata__", ()):
            attribute, holds, words = _BOUNDS[type(bound)]
            limit = getattr(bound, attribute)
            if not holds(value, limit):
                yield f"{words} {limit}"
