"""Reading a recipe: YAML without surprises, and all its wrong fields at once with their lines."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from embedcache.errors import RecipeError
from embedcache.recipe.schema import Recipe
from embedcache.strict_yaml import StrictLoader

DEMO = Path(__file__).with_name("demo.yaml")  # pipelines/phantom.yaml, which an installed package has not

_Path = tuple[str | int, ...]


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        overrides: `a.b=c` each; the value is read as YAML.

    Raises:
        RecipeError: not there, not YAML, or wrong fields: all of them, each with its line.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"{path}: no recipe there; pipelines/ holds examples")
    try:
        loader = StrictLoader(path.read_text("utf-8"))
        node = loader.get_single_node()
        content = loader.construct_document(node) if node is not None else None
        lines = _lines(node, ()) if node is not None else {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise RecipeError(f"{path}:{line} {getattr(error, 'problem', None) or error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: expected fields such as 'name' and 'data', found {type(content).__name__}")
    origins = {location: f"line {line}" for location, line in lines.items()}
    for override in overrides:
        _override(content, override, origins)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        problems = [_described(detail, content, origins) for detail in error.errors()]
    listed = "\n".join(f"  {problem}" for problem in sorted(problems, key=_by_line))
    raise RecipeError(f"{path}: {len(problems)} wrong field{'s' if len(problems) > 1 else ''}\n{listed}")


def _lines(node: yaml.Node, at: _Path) -> dict[_Path, int]:
    """The line of every key and item, by its path."""
    found: dict[_Path, int] = {at: node.start_mark.line + 1}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            found |= _lines(value, (*at, key.value))
            found[(*at, key.value)] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            found |= _lines(item, (*at, i))
    return found


def _override(content: dict[str, Any], override: str, origins: dict[_Path, str]) -> None:
    name, equals, value = override.partition("=")
    keys = name.split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {override!r}: expected a.b=value")
    target = content
    for key in keys[:-1]:
        target = target.setdefault(key, {})
        if not isinstance(target, dict):
            raise RecipeError(f"--set {override!r}: {key!r} holds a value, not fields")
    try:
        target[keys[-1]] = StrictLoader(value).get_single_data()
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"--set {override!r}: the value is not YAML") from error
    origins[tuple(keys)] = f"--set {name}"


def _described(detail: Mapping[str, Any], content: dict[str, Any], origins: dict[_Path, str]) -> str:
    location = tuple(detail["loc"])
    kinds = ("phantom", "table", "dataset")  # pydantic names the kind of data, the file does not
    named = [k for k, key in enumerate(location) if key in kinds and location[:k][-1:] == ("data",)]
    location = tuple(key for k, key in enumerate(location) if k not in named[:1])
    known = location
    while known not in origins and known:
        known = known[:-1]
    where = origins.get(known, "line 1")
    field = ".".join(map(str, location))
    if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        close = difflib.get_close_matches(str(location[-1]), _fields_beside(location), n=1)
        return f"{where}: {field}: unknown field" + (f", did you mean {close[0]!r}?" if close else "")
    if detail["type"] == "missing":
        return f"{where}: {field}: missing"
    found = detail.get("ctx", {}).get("tag", detail["input"])  # the tag of a kind of data, else the value itself
    close = difflib.get_close_matches(str(found), _choices(detail), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{where}: {field}: {detail['msg'][0].lower()}{detail['msg'][1:]}, found {detail['input']!r:.60}{hint}"


def _choices(detail: Mapping[str, Any]) -> list[str]:
    """What pydantic expected where only some words are right."""
    context = detail.get("ctx", {})
    return re.findall(r"'([^']*)'", str(context.get("expected", context.get("expected_tags", ""))))


def _fields_beside(location: _Path) -> list[str]:
    """The names that the schema knows where an unknown one stands."""
    schema = Recipe.model_json_schema()
    here: list[dict[str, Any]] = [schema]
    for key in location[:-1]:
        here = [found for node in here for found in _step(node, str(key), schema)]
    return sorted({name for node in here for name in node.get("properties", {})})


def _step(node: dict[str, Any], key: str, schema: dict[str, Any]) -> list[dict[str, Any]]:
    of_any_name = [node.get("additionalProperties"), *node.get("patternProperties", {}).values()]
    below = node.get("properties", {}).get(key) or next(filter(None, of_any_name), None)
    if not isinstance(below, dict):
        return []
    options = below.get("oneOf") or below.get("anyOf") or [below]
    references = [option["$ref"].split("/")[-1] for option in options if "$ref" in option]
    return [schema["$defs"][name] for name in references] or [o for o in options if isinstance(o, dict)]


def _by_line(problem: str) -> tuple[int, str]:
    word = problem.split(":")[0].removeprefix("line ")
    return (int(word) if word.isdigit() else 0, problem)
