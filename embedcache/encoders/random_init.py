"""Encoders with seeded random weights, written as ordinary local checkpoints.

They serve as controls (what does the architecture give without pre-training?) and let the phantom run without
any download. Their weights have learnt nothing.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from embedcache.encoders.base import quiet_transformers
from embedcache.errors import EncoderError
from embedcache.fingerprint import digest_file, fingerprint

_IMAGE_PROCESSOR = {
    "do_resize": True,
    "size": {"height": 128, "width": 128},
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
}
TINY = ("tiny-vit", "tiny-resnet", "tiny-bert")
_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_VOCABULARY_WORDS = 400


def write_tiny(preset: str, directory: Path, *, seed: int, reports: Sequence[str] = ()) -> Path:
    """Writes a tiny random checkpoint, unless the same one is there.

    Args:
        preset: `tiny-vit` (96-d), `tiny-resnet` (384-d) or `tiny-bert` (128-d).
        reports: what the tokenizer of `tiny-bert` is trained on.

    Raises:
        EncoderError: unknown preset, or another checkpoint lies in the directory.
    """
    if preset not in TINY:
        raise EncoderError(f"unknown tiny encoder {preset!r}, expected one of {', '.join(TINY)}")

    def write(into: Path) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _TINY_WRITERS[preset](into, reports)

    return _write_once(directory, {"preset": preset, "seed": seed, "reports": list(reports)}, write)


def write_random_like(source: str, directory: Path, *, seed: int) -> Path:
    """Writes the architecture and preparation of a local checkpoint with random weights.

    Args:
        source: `hf:` and a local directory in the transformers format.

    Raises:
        EncoderError: not a local directory, or another checkpoint lies in `directory`.
    """
    from transformers import AutoConfig, AutoModel

    original = Path(source.removeprefix("hf:")).expanduser()
    if not (original / "config.json").is_file():
        raise EncoderError(f"{source}: expected hf: and a local directory with a config.json")

    copied = sorted(file for file in original.iterdir() if file.suffix in (".json", ".txt"))

    def write(into: Path) -> None:
        for file in copied:
            shutil.copyfile(file, into / file.name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            AutoModel.from_config(AutoConfig.from_pretrained(original)).save_pretrained(into)

    identity = {"like": {file.name: digest_file(file) for file in copied}, "seed": seed}
    return _write_once(directory, identity, write)


def _write_once(directory: Path, identity: dict[str, Any], write: Any) -> Path:
    marker, wanted = directory / "random.sha256", fingerprint(identity)
    if marker.is_file():
        if marker.read_text() != wanted:
            raise EncoderError(f"{directory}: holds another random checkpoint; delete it or name another directory")
        return directory
    unfinished = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    with quiet_transformers():
        write(unfinished)
    (unfinished / marker.name).write_text(wanted)
    unfinished.rename(directory)
    return directory


def _write_tiny_vit(into: Path, reports: Sequence[str]) -> None:
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    config = ViTConfig(
        hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=192, image_size=128,
        patch_size=16, initializer_range=0.1,
    )  # fmt: skip
    ViTModel(config, add_pooling_layer=False).save_pretrained(into)
    ViTImageProcessor(**_IMAGE_PROCESSOR).save_pretrained(into)


def _write_tiny_resnet(into: Path, reports: Sequence[str]) -> None:
    from transformers import ResNetConfig, ResNetModel, ViTImageProcessor

    config = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128, 384], depths=[1, 1, 1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(into)
    ViTImageProcessor(**_IMAGE_PROCESSOR).save_pretrained(into)


def _write_tiny_bert(into: Path, reports: Sequence[str]) -> None:
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    if not reports:
        raise EncoderError("tiny-bert: no reports given to train its tokenizer on")
    wordpiece = BertWordPieceTokenizer(vocab=_vocabulary(reports), lowercase=True)
    tokenizer = BertTokenizerFast(tokenizer_object=wordpiece._tokenizer, model_max_length=128)
    tokenizer.save_pretrained(into)
    config = BertConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=128, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(into)


def _vocabulary(reports: Sequence[str]) -> dict[str, int]:
    """Special tokens, all characters, and the most frequent words.

    The trainers of the tokenizers library break ties at random; this gives the same vocabulary every time.
    """
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer

    normalise, split = BertNormalizer(lowercase=True).normalize_str, BertPreTokenizer().pre_tokenize_str
    counts = Counter(word for report in reports for word, _ in split(normalise(report)))
    characters = sorted({character for word in counts for character in word})
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    pieces = [*_SPECIAL_TOKENS, *characters, *(f"##{c}" for c in characters), *words[:_VOCABULARY_WORDS]]
    return {piece: k for k, piece in enumerate(pieces)}


_TINY_WRITERS = {
    "tiny-vit": _write_tiny_vit,
    "tiny-resnet": _write_tiny_resnet,
    "tiny-bert": _write_tiny_bert,
}
