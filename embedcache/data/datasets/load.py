"""Every dataset by its name: from its official folder to a manifest."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embedcache.data.datasets import (
    chexpert,
    covidx,
    generic,
    mimic_cxr,
    nih,
    open_i,
    packed,
    padchest,
    rsna,
    siim,
    vindr_cxr,
)
from embedcache.data.datasets.layout import Asked, Built, Layout, Option, SplitRule, build
from embedcache.data.manifest import Manifest
from embedcache.errors import DatasetError, SettingsError

LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout
    for layout in (
        mimic_cxr.LAYOUT,
        chexpert.LAYOUT,
        chexpert.TEST,
        chexpert.FIVE_BY_200,
        rsna.LAYOUT,
        covidx.LAYOUT,
        siim.LAYOUT,
        open_i.LAYOUT,
        nih.LAYOUT,
        padchest.LAYOUT,
        vindr_cxr.LAYOUT,
        *generic.LAYOUTS,
        *packed.LAYOUTS,
    )
}

_OWN = ("split", "task", "seed", "valid", "test")  # what every dataset is asked


def load_dataset(
    name: str,
    root: str | Path,
    *,
    split: SplitRule = "patient",
    task: str | None = None,
    seed: int = 0,
    valid: float = 0.1,
    test: float = 0.2,
    **options: Any,
) -> Manifest:
    """The manifest of a dataset as it was downloaded; opens no image, unless `headers` asks for DICOM headers.

    `manifest.about.notes` says what was found: absent images (left out), the rule of the splits, rows set aside.

    Args:
        name: such as `rsna`; `embedcache manifest --help` shows them all with their folders.
        root: its folder.
        split: `patient`: no patient on two sides (`exam` where the dataset does not name its patients), balanced,
            official test lists kept. `paper`: the published rule, with its seed, its rounding and its leaks.
        task: for datasets with several kinds of use, such as `segmentation` of rsna.
        seed: of the `patient` splits and label fractions.
        valid, test: their shares, where no official list says.
        options: of the dataset, such as `uncertain="ones"` of chexpert.

    Raises:
        DatasetError: no such dataset, not its folder, none of its images there, no such split or task.
        ManifestError: a table that is not as it is published.
        SettingsError: options that the dataset does not have, or values that they cannot take.
    """
    return build_dataset(name, root, split=split, task=task, seed=seed, valid=valid, test=test, **options).manifest


def build_dataset(name: str, root: str | Path, **asked: Any) -> Built:
    """As `load_dataset`, with the same arguments; gives the images that are absent or in no table, too."""
    layout = layout_named(name)
    own = {key: asked[key] for key in _OWN if asked.get(key) is not None}
    options = {key: value for key, value in asked.items() if key not in _OWN}
    layout.check(own.get("task"), options)
    if own.get("seed", 0) < 0:
        raise SettingsError(f"seed {own['seed']}, expected 0 or more")
    own.setdefault("task", next(iter(layout.tasks), ""))
    given = {o.name: _as_given(o, options[o.name]) for o in layout.options if options.get(o.name) is not None}
    return build(layout, root, Asked(**own, options=given))


def layout_named(name: str, *, others: Sequence[str] = ()) -> Layout:
    """A dataset's layout.

    Args:
        others: names that could be meant beside those of datasets.

    Raises:
        DatasetError: no such dataset; names those there are.
    """
    if name not in LAYOUTS:
        known = [*LAYOUTS, *others]
        close = difflib.get_close_matches(name, known, n=1)
        meant = f"did you mean {close[0]!r}? " if close else ""
        raise DatasetError(f"no dataset {name!r}; {meant}There are {', '.join(known)}")
    return LAYOUTS[name]


def _as_given(option: Option, value: Any) -> Any:
    return Path(value) if option.kind == "path" else value
