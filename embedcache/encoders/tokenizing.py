"""Tokenizers of transformers: their content for the fingerprint, and token ids with what was cut off."""

from __future__ import annotations

import json
import threading
from typing import Any

from embedcache.encoders.base import quiet_transformers
from embedcache.encoders.checkpoint import Checkpoint
from embedcache.encoders.text import TokenIds
from embedcache.errors import EncoderError
from embedcache.fingerprint import fingerprint

_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model", "tekken.json")


class Tokenize:
    """A text to token ids, one thread at a time: a fast tokenizer keeps its truncation as state.

    Args:
        tokenizer: a fast tokenizer of transformers.
        max_length: most tokens of a text, special ones included.
        prefix: what stands before every text.
        lower_case: whether texts are put into lower case first.
    """

    def __init__(self, tokenizer: Any, max_length: int, *, prefix: str = "", lower_case: bool = False) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        self._prefix, self._lower_case = prefix, lower_case
        self._one_at_a_time = threading.Lock()

    def __call__(self, text: str) -> TokenIds:
        text = self._prefix + (text.lower() if self._lower_case else text)
        with self._one_at_a_time:
            encoded = self._tokenizer(text, truncation=True, max_length=self._max_length)
        cut = sum(part.special_tokens_mask.count(0) for part in encoded.encodings[0].overflowing)
        return TokenIds(encoded["input_ids"], cut)


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's fast tokenizer.

    Raises:
        EncoderError: it has none.
    """
    from transformers import AutoTokenizer, BertTokenizerFast

    if not any(True for pattern in _VOCABULARIES for _ in checkpoint.directory.glob(pattern)):
        # transformers would make a tokenizer without words, which takes every report for the same one
        raise EncoderError(
            f"{checkpoint.source}: no tokenizer, expected one of {', '.join(_VOCABULARIES)}; {checkpoint.remedy}"
        )
    # BioViL's own class of tokenizer is BERT's with a name of its own
    own_class = checkpoint.json("tokenizer_config.json").get("tokenizer_class") == "CXRBertTokenizer"
    with quiet_transformers(), checkpoint.loading("tokenizer"):
        if own_class and not checkpoint.trust_remote_code:
            return BertTokenizerFast.from_pretrained(checkpoint.directory)
        return AutoTokenizer.from_pretrained(checkpoint.directory, trust_remote_code=checkpoint.trust_remote_code)


def tokenizer_identity(tokenizer: Any, source: str) -> dict[str, Any]:
    """All that a fast tokenizer does, by content.

    Raises:
        EncoderError: a slow tokenizer, whose content cannot be hashed.
    """
    if not tokenizer.is_fast:
        raise EncoderError(
            f"{source}: its tokenizer has no tokenizer.json, so its content cannot be fingerprinted; save it once with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...) as a fast tokenizer"
        )
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content.pop("truncation", None)  # state, set at every call
    content.pop("padding", None)
    return {"content": fingerprint(content), "truncation_side": tokenizer.truncation_side}
