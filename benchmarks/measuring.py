"""What the benchmarks share: calls timed turn by turn, and a table of ratios with their goals."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

_COLUMNS = ("measurement", "value", "unit", "ratio", "of what", "goal", "met")
_RIGHT = {"value", "ratio"}


@dataclass(frozen=True)
class Goal:
    """What a measurement should reach: its ratio or its value, at least or at most a bound."""

    of: Literal["ratio", "value"]
    bound: float
    sense: Literal[">=", "<="] = ">="

    def __str__(self) -> str:
        return f"{self.of} {self.sense} {self.bound:g}"


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Args:
        value: median over the repeats.
        ratio: median over the repeats of the ratio within each; None where nothing is compared.
        of_what: what is above and below the line of the ratio.
        goal: None for a number that is only told.
    """

    measurement: str
    value: float
    unit: str
    ratio: float | None = None
    of_what: str = ""
    goal: Goal | None = None

    def __post_init__(self) -> None:
        if self.ratio is not None and not self.of_what:
            raise ValueError(f"{self.measurement}: a ratio without a word on what is in it")

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached, as measured and unrounded; None without a goal."""
        if self.goal is None:
            return None
        found = self.value if self.goal.of == "value" else self.ratio
        if found is None:
            raise ValueError(f"{self.measurement}: a goal for a ratio that was not measured")
        return found >= self.goal.bound if self.goal.sense == ">=" else found <= self.goal.bound

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "goal": None if self.goal is None else str(self.goal), "met": self.met}

    def cells(self) -> tuple[str, ...]:
        """As the table shows it, a cell for each of its columns."""
        ratio = "" if self.ratio is None else _short(self.ratio)
        met = {None: "", True: "yes", False: "NO"}[self.met]
        goal = "" if self.goal is None else str(self.goal)
        return (self.measurement, _short(self.value), self.unit, ratio, self.of_what, goal, met)


def table(results: Sequence[Result]) -> str:
    """The results as aligned text."""
    lines = [_COLUMNS, *(result.cells() for result in results)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    justified = [
        "  ".join(
            cell.rjust(width) if name in _RIGHT else cell.ljust(width)
            for name, cell, width in zip(_COLUMNS, cells, widths, strict=True)
        ).rstrip()
        for cells in lines
    ]
    return "\n".join([justified[0], "-" * max(map(len, justified)), *justified[1:]])


def machine(*libraries: str) -> dict[str, Any]:
    """What the numbers depend on, beside the code: cores, how busy they are, and versions."""
    versions = {name: importlib.metadata.version(name) for name in libraries}
    return {
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **versions,
    }


def shown(results: Sequence[Result], about: Mapping[str, Any], as_json: bool) -> str:
    """The results and what they were measured on, as JSON or as a table."""
    if as_json:
        return json.dumps({"machine": about, "results": [result.as_json() for result in results]})
    return f"{about}\n\n{table(results)}"


def waited(call: Callable[[], object], device: str) -> Callable[[], None]:
    """A call whose work on the GPU is done when it returns."""

    def done() -> None:
        call()
        if device != "cpu":
            import torch

            torch.cuda.synchronize()

    return done


def turn_by_turn(calls: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What each call gives, one number a repeat; in every repeat all are called, in an order that turns round.

    Number k of one call and number k of another were taken side by side: compare those with `median_ratio`.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats):
        for name in list(calls)[:: -1 if repeat % 2 else 1]:
            found[name].append(calls[name]())
    return found


def seconds(call: Callable[[], object]) -> Callable[[], float]:
    """The same call, but it gives the seconds that it took."""

    def timed() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return timed


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the ratios within each repeat, which drifts of the machine touch least."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
