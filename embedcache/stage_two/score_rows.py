"""Rows of tables of scores: a value with its three intervals, and p-values adjusted within a family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from embedcache.metrics.intervals import Sampled, over_patients, over_patients_and_seeds, over_seeds
from embedcache.metrics.paired import holm

Row = dict[str, object]


def interval_columns(sampled: Sampled) -> Row:
    """`value`, `low` and `high` over patients and seeds, and the interval over either alone.

    All scores are from 0 to 1, where intervals end.

    Args:
        sampled: a score of each seed, value (s,).
    """
    both = over_patients_and_seeds(sampled, seed=0).within(0, 1)
    patients, seeds = over_patients(sampled), over_seeds(sampled).within(0, 1)
    return {
        "value": both.value,
        "low": both.low,
        "high": both.high,
        "patients_low": patients.low,
        "patients_high": patients.high,
        "seeds_low": seeds.low,
        "seeds_high": seeds.high,
    }


def adjust_p_values(gains: Sequence[Row], family: Sequence[str]) -> None:
    """Adds `p_holm`, adjusted for the number of rows that agree in the columns of a family."""
    groups: dict[object, list[Row]] = {}
    for row in gains:
        groups.setdefault(tuple(str(row[name]) for name in family), []).append(row)
    for rows in groups.values():
        for row, p in zip(rows, holm([cast(float, r["p_value"]) for r in rows]).tolist(), strict=True):
            row["p_holm"] = p
