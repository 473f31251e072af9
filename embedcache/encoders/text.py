"""Text encoders: one class for every source library, which gives it a model and a tokenizer.

Shape notation: b batch size, l tokens, d width.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedcache.data.reports import ReportPolicy, report_digest, report_sentences, report_text
from embedcache.data.views import ViewPolicy, sampled
from embedcache.device import moved, pick_device
from embedcache.encoders.base import (
    OF_INPUTS,
    Encoded,
    EncoderOptions,
    Modality,
    Model,
    Origin,
    Prepared,
    computing_in,
    freeze,
    reload,
)
from embedcache.encoders.pooling import Output, choose_pooling, pool
from embedcache.errors import EncoderError, refusing

_REMEMBERED = 1024  # texts whose token ids are kept
REPORT_TOKENS = 112  # as the paper's code: most reports end before


@dataclass(frozen=True)
class TokenIds:
    """One text as its model takes it: token ids, and how many tokens were cut off at its end."""

    ids: Sequence[int]
    n_truncated: int = 0


@dataclass(frozen=True, kw_only=True)
class TextModel(Model):
    """A text model as a source library gives it, or a factory of the user's own; its tokenizer belongs into `config`.

    Args:
        forward: from token ids (b, l) and the mask of real tokens (b, l) to what the model has.
        tokenize: from a text to its token ids, special tokens included; safe in threads.
        pad_id: the token id that fills up shorter texts, on the right.
        max_length: most tokens of a text.
        pad_to: fill every text up to so many tokens, for models that read their padding; None: to the longest of
            a batch.
        head: what its authors put behind the pooling: (b, d) to (b, e).
    """

    forward: Callable[[torch.Tensor, torch.Tensor], Output]
    tokenize: Callable[[str], TokenIds]
    pad_id: int
    max_length: int
    pad_to: int | None = None
    head: Callable[[torch.Tensor], torch.Tensor] | None = None


class TextEncoder:
    """A frozen text model with its tokenizer, pooled as asked.

    Args:
        name: what the record calls it instead of the model's own name.

    Raises:
        EncoderError: the model has no such pooling.
    """

    modality: Modality = "text"
    token_grid: tuple[int, int] | None = None
    origin: Origin | None = None

    def __init__(self, model: TextModel, options: EncoderOptions, *, name: str | None = None) -> None:
        self.report_policy = options.report or ReportPolicy()
        self._tokenize = _remembering(model.tokenize)
        self._pad_id, self._pad_to = model.pad_id, model.pad_to
        self._forward, self._head = model.forward, model.head
        self.device, self._compute_dtype = "cpu", "float32"
        freeze(model.module, device=self.device)
        output, mask = self._run([model.tokenize("No acute findings.").ids])
        self._pooling = choose_pooling(output, options.pooling or model.pooling, self.modality, model.name)
        self.dim = self._pooled(output, mask).shape[-1]
        self.token_dim = None if output.tokens is None else output.tokens.shape[-1]
        preparation = {
            "modality": self.modality,
            "pooling": self._pooling,
            "dim": self.dim,
            "report": asdict(self.report_policy),
            "max_length": model.max_length,
            "padding": {"id": model.pad_id, "to": model.pad_to or "longest"},
        }
        self.device, self._compute_dtype = pick_device(options.device), options.compute_dtype
        self.record = model.record(preparation, options, name=name, device=self.device)
        self.fingerprint = self.record.fingerprint
        self._module = freeze(model.module, device=self.device)
        self._forward = model.compiled(options, dynamic=True)
        self.concurrent = model.concurrent and not options.compile

    def __reduce__(self) -> tuple[Any, ...]:
        return reload(self.origin, self.record.name)

    def prepare(self, sample: Path | str) -> Prepared:
        """Takes from one report what is to be encoded, and tokenises it."""
        return self.prepare_views(sample, 1, ViewPolicy())[0]

    def prepare_views(self, sample: Path | str, n: int, policy: ViewPolicy) -> list[Prepared]:
        """What is to be encoded of one report, tokenised, and n - 1 samples of its sentences."""
        views, digest = [report_text(str(sample), self.report_policy)], report_digest(str(sample))
        if n > 1:
            pieces = report_sentences(str(sample), self.report_policy)
            views += [sampled(pieces, digest, view, policy) for view in range(1, n)]
        with refusing("tokenise", "the encoder's tokenizer refused it", OF_INPUTS):
            tokenised = [self._tokenize(view) for view in views]
        return [
            Prepared(t.ids, digest, len(t.ids), t.n_truncated, np.asarray(t.ids, "<i8").tobytes()) for t in tokenised
        ]

    def encode(self, batch: Sequence[Prepared], *, tokens: bool = False) -> Encoded:
        """Runs the model on b tokenised reports.

        Args:
            tokens: give the tokens too, with the length of each text.

        Raises:
            EncoderError: tokens were asked of a model that has none.
        """
        with torch.inference_mode(), computing_in(self._compute_dtype, self.device):
            output, mask = self._run([p.inputs for p in batch])
            embeddings = self._pooled(output, mask).float().cpu().numpy()
            if not tokens:
                return Encoded(embeddings)
            if output.tokens is None:
                raise EncoderError(f"{self.record.name}: the model has no tokens, only pooled embeddings")
            lengths = np.array([p.n_tokens for p in batch], np.int64)
            real = output.tokens[:, : int(lengths.max())]
            return Encoded(embeddings, real.float().cpu().numpy(), lengths)

    def _run(self, texts: Sequence[Sequence[int]]) -> tuple[Output, torch.Tensor]:
        longest = self._pad_to or max(len(ids) for ids in texts)
        ids = torch.full((len(texts), longest), self._pad_id, dtype=torch.int64)
        mask = torch.zeros((len(texts), longest), dtype=torch.int64)
        for row, of_text in enumerate(texts):
            ids[row, : len(of_text)] = torch.tensor(of_text, dtype=torch.int64)
            mask[row, : len(of_text)] = 1
        ids, mask = moved(ids, self.device), moved(mask, self.device)
        with torch.inference_mode():
            return self._forward(ids, mask), mask

    def _pooled(self, output: Output, mask: torch.Tensor) -> torch.Tensor:
        pooled = pool(output, self._pooling, mask)
        return pooled if self._head is None else self._head(pooled)


def _remembering(tokenize: Callable[[str], TokenIds]) -> Callable[[str], TokenIds]:
    """The same, once for each of the last texts: equal ones follow each other in a plan, and meet in threads."""
    remembered, one_at_a_time = functools.lru_cache(_REMEMBERED)(tokenize), threading.Lock()

    def call(text: str) -> TokenIds:
        with one_at_a_time:
            return remembered(text)

    return call


def report_length(limit: int, asked: int | None, source: str, *, authors: int | None = None) -> int:
    """Most tokens of a text: what was asked for, else 112, or less where the model or its authors take less.

    Raises:
        EncoderError: more than the model takes, or fewer than its special tokens and one word.
    """
    length = asked if asked is not None else min(REPORT_TOKENS, limit, authors or limit)
    if not 2 < length <= limit:
        raise EncoderError(f"{source}: max_length {length}, the model takes 3 to {limit} tokens")
    return int(length)
