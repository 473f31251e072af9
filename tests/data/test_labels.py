from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from embedcache.data.labels import resolve_uncertain
from embedcache.errors import SettingsError

SAID = [1.0, 0.0, -1.0, np.nan, np.nan]
OTHER = [0.0, 0.0, 0.0, 0.0, np.nan]


@pytest.mark.parametrize(
    ("policy", "finding", "uncertain"),
    [
        ("zeros", "Edema", 0),
        ("ones", "Cardiomegaly", 1),
        ("ignore", "Edema", np.nan),
        ("paper", "Atelectasis", 1),
        ("paper", "Edema", 1),
        ("paper", "Pleural Effusion", 1),
        ("paper", "Cardiomegaly", 0),
        ("paper", "Consolidation", 0),
        ("paper", "Fracture", 0),
    ],
)
def test_uncertain_labels_by_policy(policy, finding: str, uncertain: float) -> None:
    table = pd.DataFrame({f"label.{finding}": SAID, "label.Other": OTHER})
    resolved = resolve_uncertain(table, (finding, "Other"), policy)
    unlabelled = 0 if policy == "paper" else np.nan
    np.testing.assert_array_equal(resolved[f"label.{finding}"], [1, 0, uncertain, 0, unlabelled])
    np.testing.assert_array_equal(resolved["label.Other"], [0, 0, 0, 0, unlabelled])


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(SettingsError, match="uncertain labels 'u-ones', expected one of zeros, ones, ignore, paper"):
        resolve_uncertain(pd.DataFrame({"label.Edema": SAID}), ("Edema",), "u-ones")
