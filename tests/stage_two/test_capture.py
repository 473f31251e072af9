"""The bookkeeping around CUDA graphs, on a stand-in for torch's: what is eager, recorded, filled in and replayed.

No GPU runs here: that graphs themselves do what torch says is taken on its word.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from embedcache.stage_two.feed import Batch
from embedcache.stage_two.steps import _EAGER_STEPS, _Captured


class StandIn:
    """While a graph is recorded nothing is computed; a replay computes what was recorded, on the tensors of then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recording: list[Callable[[], None]] | None = None
        self.n_recorded = 0
        outer = self

        class Graph:
            def __init__(self) -> None:
                self.calls: list[Callable[[], None]] = []

            def replay(self) -> None:
                for call in self.calls:
                    call()

        class Stream:
            def wait_stream(self, other: object) -> None:
                pass

        @contextlib.contextmanager
        def graph(recorded: Graph, **options: object):
            assert options == {"capture_error_mode": "thread_local"}
            outer.recording = recorded.calls
            outer.n_recorded += 1
            yield
            outer.recording = None

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "graph", graph)

    def step(self, batch: Batch) -> Tensor:
        """A step whose loss is the sum of its images."""
        out = torch.zeros(1)

        def compute() -> None:
            out.copy_(batch.image.sum().reshape(1))

        compute() if self.recording is None else self.recording.append(compute)
        return out


def test_each_shape_is_recorded_once_and_every_batch_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = StandIn(monkeypatch)
    captured = _Captured(stand_in.step)
    torch.manual_seed(0)
    losses, expected = [], []
    for k in range(12):
        n = 5 if k % 3 else 4
        image = torch.randn(1, n, 3)
        codes = torch.arange(n)[None]
        losses.append(captured(Batch(image, image, None, None, codes, codes)))
        expected.append(image.sum().reshape(1))
        if k + 1 == _EAGER_STEPS:
            assert stand_in.n_recorded == 0
    assert stand_in.n_recorded == 2
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected))  # and none overwrites another's
