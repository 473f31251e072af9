"""Settings of retrieval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from embedcache.settings import STRICT, check


@dataclass(frozen=True)
class RetrieveConfig:
    """What is looked for, and how it is scored.

    Args:
        split: whose pairs are queries and candidates.
        at: numbers of best matches that recall and precision are taken over.
        controls: whether the same Adaptor with weights drawn anew stands beside it.
        n_draws: bootstrap draws of patients.
    """

    split: Literal["train", "valid", "test"] = "test"
    at: tuple[Annotated[int, Ge(1)], ...] = (1, 5, 10)
    controls: bool = True
    n_draws: Annotated[int, Ge(1)] = 2000
    device: str = "auto"

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check(self)
        if not self.at or len(set(self.at)) < len(self.at) or min(self.at) < 1:
            raise ValueError(f"at {', '.join(map(str, self.at))}: expected one number at least, above 0, and each once")
