"""What the result of a probe learns from, and what each of its controls does.

Shape notation: n samples, d feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from embedcache.stage_two.adaptor import Adaptor, encoded_images
from embedcache.stage_two.controls import metadata_features, shuffled, told_by_text
from embedcache.stage_two.inputs import standardised
from embedcache.stage_two.label_budget import Budget
from embedcache.stage_two.probe_data import ProbeData
from embedcache.stage_two.tensors import resident
from embedcache.store.store import Store


@dataclass(frozen=True, eq=False)
class Setting:
    """Features and labels, made when their turn comes.

    Args:
        control: its name, blank for the result itself.
        features: those of a turn, of all samples, (n, d).
        budgets: labels.
        n_tests: how many of the test sets it is scored on.
        n_turns: Adaptors whose outputs the runs take in turn; 1 where all learn from the same features.
        of_budget: where features depend on the labels too: from those of its turn and a budget, (n, d).
    """

    control: str
    features: Callable[[int], Tensor]
    budgets: Callable[[], Sequence[Budget]]
    n_tests: int
    n_turns: int = 1
    of_budget: Callable[[Tensor, Budget], Tensor] | None = None


def settings_of(
    data: ProbeData, adaptors: Sequence[Adaptor], *, random_store: Store | None = None, text_store: Store | None = None
) -> list[Setting]:
    """The result, then each control that is asked for and whose needs are met; what it lacks is noted in the data.

    Args:
        adaptors: those that runs learn behind in turn; without any the embeddings are probed as they are.
        random_store: of the same images through an encoder of random weights.
        text_store: of the training images' reports.
    """
    everywhere, n_turns, wanted = len(data.tests), max(len(adaptors), 1), data.config.controls

    def own() -> Sequence[Budget]:
        return data.budgets

    def raw(turn: int) -> Tensor:
        return data.of_samples(data.embeddings)

    held: dict[int, Tensor] = {}  # one Adaptor's outputs serve all controls; those of several do not pile up

    def adapted(turn: int) -> Tensor:
        if turn not in held:
            held.clear()
            held[turn] = _adapted(data, adaptors[turn])
        return held[turn]

    def untrained(turn: int) -> Tensor:
        return _adapted(data, adaptors[turn].untrained(turn))

    result = adapted if adaptors else raw
    found = [Setting("", result, own, everywhere, n_turns)]
    if adaptors and "no-adaptor" in wanted:
        found.append(Setting("no-adaptor", raw, own, everywhere))
    if adaptors and "untrained-adaptor" in wanted:
        found.append(Setting("untrained-adaptor", untrained, own, everywhere, n_turns))
    if random_store is not None and "random-encoder" in wanted:
        found.append(Setting("random-encoder", lambda turn: data.of_other_store(random_store), own, 1))
    if "shuffled-labels" in wanted:
        found.append(
            Setting("shuffled-labels", result, lambda: [shuffled(b) for b in data.budgets], everywhere, n_turns)
        )
    if "metadata-only" in wanted:
        metadata = metadata_features(pd.concat([s.frame for s in data.sets], ignore_index=True), data.train)
        if metadata is not None:
            of_metadata = torch.from_numpy(metadata)
            found.append(Setting("metadata-only", lambda turn: of_metadata.to(data.device), own, everywhere))
    if text_store is not None and "text-as-label" in wanted:
        texts = data.texts(text_store)
        if len(texts) < len(data.train):
            without = len(data.train) - len(texts)
            data.notes.append(f"text-as-label: {without} of {len(data.train)} training samples have no text there")
        if len(set(texts.values())) > 1:
            found.append(Setting("text-as-label", raw, lambda: _told_by(data, text_store, texts), everywhere))
    if data.config.as_published:

        def in_batches(x: Tensor, budget: Budget) -> Tensor:
            return _across_batches(data, adaptors[budget.seed % n_turns], x, budget)

        found.append(Setting("as-published", result, own, everywhere, n_turns, in_batches))
    return found


def _adapted(data: ProbeData, adaptor: Adaptor) -> Tensor:
    """An Adaptor's outputs, (n, d)."""
    adaptor = adaptor.to(data.device).eval()
    rows = [encoded_images(adaptor, x) for x in data.embeddings]  # of inference mode, which heads cannot learn from
    return data.of_samples(rows)  # copies them


@torch.no_grad()
def _across_batches(data: ProbeData, adaptor: Adaptor, features: Tensor, budget: Budget) -> Tensor:
    """The Adaptor's outputs as the published code has them: each image attends to those of its batch."""
    raw, size = data.of_samples(data.embeddings), data.config.head.batch_size
    of_train = np.random.default_rng(budget.seed).permutation(budget.rows)
    found = features.clone()
    for rows in (of_train, budget.valid, *data.asked):
        for part in torch.from_numpy(rows).to(found.device).split(size):
            if len(part):
                found[part] = adaptor.encode_image(raw[part].unsqueeze(0)).squeeze(0)
    return found


def _told_by(data: ProbeData, store: Store, texts: Mapping[int, int]) -> list[Budget]:
    """Budgets whose other training samples are labelled by what their texts tell."""
    used, at = np.unique(np.fromiter(texts.values(), np.int64), return_inverse=True)
    x = standardised(resident(store, used, "cpu"), np.arange(len(used))).numpy()
    row_of, weight = dict(zip(texts, at.tolist(), strict=True)), data.config.class_weight
    return [told_by_text(budget, data.sets[0], row_of, x, data.target, weight) for budget in data.budgets]
