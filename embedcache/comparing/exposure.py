"""Whether encoders have seen the test data in their own pre-training, and so whether comparing them is fair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from embedcache.encoders.catalogue import CATALOGUE, DATASETS, EXPOSURES, Exposure
from embedcache.errors import SettingsError

FAIR, NOT_FAIR, NOT_KNOWN = "fair", "not a fair comparison", "not known to be fair"


@dataclass(frozen=True)
class Exposed:
    """What is said of an encoder and a dataset.

    Args:
        level: one of `EXPOSURES`.
        said: where that is said; blank where nobody says.
    """

    level: Exposure
    said: str

    @classmethod
    def of(cls, encoder: Mapping[str, Any], dataset: str) -> Exposed:
        """What the catalogue says of the encoder in a store's record."""
        asked = {str(encoder.get("name", "")), str(encoder.get("loading", {}).get("name", ""))}
        entry = next((e for e in CATALOGUE.values() if {e.name, e.source, e.source.partition("@")[0]} & asked), None)
        if entry is None or dataset not in DATASETS:
            return cls("unknown", "")
        return cls(entry.exposure[dataset], entry.said)

    @classmethod
    def told(cls, level: str, encoder: str) -> Exposed:
        """What a user says.

        Raises:
            SettingsError: no such level.
        """
        if level not in EXPOSURES:
            listed = "; ".join(f"{name}: {words}" for name, words in EXPOSURES.items())
            raise SettingsError(f"exposure {level!r} of {encoder}, expected one of {listed}")
        return cls(next(known for known in get_args(Exposure) if known == level), "told by the user")

    @classmethod
    def drawn(cls) -> Exposed:
        """Of weights that were drawn at random."""
        return cls("none", "its weights were drawn at random")


def fairness(a: Exposed, b: Exposed) -> str:
    """Whether a difference between two encoders is one of encoders, and not of what they have seen.

    Returns:
        `FAIR`, `NOT_FAIR`, or `NOT_KNOWN` where nobody says what one of them has seen.
    """
    if "unknown" in (a.level, b.level):
        return NOT_KNOWN
    return FAIR if a.level == b.level else NOT_FAIR
