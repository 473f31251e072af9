"""The usual ways to read rows in random order: map-style datasets for a torch DataLoader, one row a call.

Shape notation: n rows, d embedding width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

_WARM_BATCHES = 4  # what two workers have ready before anyone asks
_MANY_EPOCHS = 1000  # of shuffled row numbers: a loader never starts again within a measurement


class MapStyle(Protocol):
    """What a DataLoader asks of a dataset."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> Any: ...


class H5Rows:
    """Rows of one HDF5 dataset; every worker opens the file itself."""

    def __init__(self, path: Path, n: int) -> None:
        self._path, self._n = path, n
        self._rows: Any = None

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: int) -> np.ndarray:
        if self._rows is None:
            import h5py

            self._rows = h5py.File(self._path)["embeddings"]
        return self._rows[i]


class NpyRows:
    """Rows of a memory-mapped .npy file."""

    def __init__(self, path: Path) -> None:
        self._rows = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> np.ndarray:
        return np.array(self._rows[i])  # torch warns of arrays that cannot be written to


class Pairwise:
    """Rows of an image and a text dataset side by side, by one number."""

    def __init__(self, images: MapStyle, texts: MapStyle) -> None:
        self._images, self._texts = images, texts

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return {side: np.float32(rows[i]) for side, rows in (("image", self._images), ("text", self._texts))}


class PtFiles:
    """One .pt file a sample."""

    def __init__(self, folder: Path, n: int) -> None:
        self._folder, self._n = folder, n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: int) -> Any:
        import torch

        return torch.load(self._folder / f"{i}.pt")


def write_h5(path: Path, values: np.ndarray, **creation: Any) -> None:
    """One dataset of all rows, (n, d).

    Args:
        creation: chunks and filters, as h5py takes them.
    """
    import h5py

    with h5py.File(path, "w") as file:
        file.create_dataset("embeddings", data=values, **creation)


def write_pt_files(folder: Path, values: np.ndarray) -> None:
    """One file a row."""
    import torch

    folder.mkdir()
    for k, row in enumerate(values):
        torch.save(torch.from_numpy(row.copy()), folder / f"{k}.pt")


def loader_rate(
    dataset: Callable[[], MapStyle], *, batch_size: int, num_workers: int, budget_s: float
) -> Callable[[], float]:
    """Measures rows per second of a shuffled DataLoader that is running: its start is not counted.

    Args:
        dataset: makes the dataset anew, so that no open file is taken over a fork.
    """

    def rows_per_second() -> float:
        from torch.utils.data import DataLoader, RandomSampler

        rows = dataset()
        shuffled = RandomSampler(rows, num_samples=_MANY_EPOCHS * len(rows))
        loader: Any = DataLoader(rows, batch_size, sampler=shuffled, num_workers=num_workers)  # type: ignore[arg-type]
        return batch_rate(iter(loader), batch_size, budget_s=budget_s)

    return rows_per_second


def batch_rate(batches: Iterator[object], batch_size: int, *, budget_s: float) -> float:
    """Rows per second of batches, after a few that warm up."""
    for _ in range(_WARM_BATCHES):
        next(batches)
    start, n_batches, spent = time.perf_counter(), 0, 0.0
    while spent < budget_s:
        next(batches)
        n_batches += 1
        spent = time.perf_counter() - start
    return n_batches * batch_size / spent
