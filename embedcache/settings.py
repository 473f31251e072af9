"""Settings as frozen dataclasses whose bounds are written once, in the types.

`Annotated[int, Ge(1)]` is checked by pydantic where a recipe sets the field, and by `check` where Python does.
"""

from __future__ import annotations

import operator
from typing import Any, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

STRICT = {"extra": "forbid", "allow_inf_nan": False}  # how recipes read such a dataclass

_BOUNDS = {
    Ge: ("ge", operator.ge, "at least"),
    Gt: ("gt", operator.gt, "above"),
    Le: ("le", operator.le, "at most"),
    Lt: ("lt", operator.lt, "below"),
}


def check(settings: Any) -> None:
    """Compares every field with the bounds in its type.

    Raises:
        ValueError: all fields that break one, with what was found and expected.
    """
    wrong = []
    for name, hint in get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        for bound in getattr(hint, "__metadata__", ()):
            attribute, holds, words = _BOUNDS[type(bound)]
            limit = getattr(bound, attribute)
            if not holds(value, limit):
                wrong.append(f"{name} is {value!r}, expected {words} {limit}")
    if wrong:
        raise ValueError("; ".join(wrong))
