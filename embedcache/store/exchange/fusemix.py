"""Dictionaries of FuseMix, `.dpt` or `.pt`: one vector for each running number, saved by torch.

FuseMix numbers the images and captions of its annotation file in the order of the file; the keys are these numbers, so
the ids of a store made here mean something only beside that file.

Shape notation: n rows, d embedding width.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

from embedcache.errors import ImportFormatError
from embedcache.store.exchange.source import Asked, Found, Spool, a_file, check_ids

_PAIRINGS = ("txt2img", "img2txt")
_OLDEST_TORCH = (2, 10)  # before it weights_only could be made to run code (CVE-2026-24747)


def read(source: Path, asked: Asked) -> Found:
    """Rows and keys of one dictionary, in its order.

    Raises:
        ImportFormatError: pickled objects, no flat dictionary, values of another rank or width.
    """
    vectors = _load(source)
    for name in _PAIRINGS:
        vectors.pop(name, None)
    if not vectors:
        raise ImportFormatError(f"{source}: no vectors, expected a dictionary of them; run FuseMix's extraction again")
    first, ids, dtypes = "", [], set()
    dim: int | None = None
    spool = Spool(asked.scratch)
    for key in list(vectors):
        vector = _vector(vectors.pop(key), key, source)
        if dim is not None and len(vector) != dim:
            raise ImportFormatError(
                f"{source}: key {key!r} has {len(vector)} values, but {first!r} has {dim}, expected one width"
            )
        first, dim = (key, len(vector)) if dim is None else (first, dim)
        dtypes.add(str(vector.dtype).removeprefix("torch."))
        spool.add(vector.float().numpy())
        ids.append(key)
    check_ids(ids, lambda k: f"{source}: key {k} (counted from 0)")
    stored = dtypes.pop() if len(dtypes) == 1 else "float32"
    return Found(
        ids,
        spool.rows(dim or 0),
        {source.name: source},
        {"ids": "running numbers of its annotation file"},
        stored=stored if stored in ("float16", "bfloat16") else "float32",
    )


def _load(source: Path) -> dict[Any, Any]:
    import torch

    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < _OLDEST_TORCH:
        raise ImportFormatError(
            f"{source}: torch {torch.__version__}, expected {'.'.join(map(str, _OLDEST_TORCH))} or later to read files "
            "of tensors safely; run 'pip install --upgrade torch'"
        )
    try:
        loaded = torch.load(a_file(source), map_location="cpu", weights_only=True)
    except ImportFormatError:
        raise
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError,
            AttributeError, MemoryError) as error:  # fmt: skip
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ImportFormatError(
            f"{source}: cannot be read as tensors alone ({reason}); other pickled objects are never loaded: save it "
            "again as a flat dictionary of tensors"
        ) from error
    if not isinstance(loaded, dict):
        raise ImportFormatError(
            f"{source}: a {type(loaded).__name__}, expected a flat dictionary of vectors; save a tensor of rows "
            "with numpy.save and import it with --kind npy --ids"
        )
    return loaded


def _vector(value: Any, key: Any, source: Path) -> Any:
    """The value of a key, a 1-D tensor of floats that has all its values in the file."""
    import torch

    where = f"{source}: key {key!r}"
    if not isinstance(key, str):
        raise ImportFormatError(f"{where}: a {type(key).__name__}, expected text; save it again with str keys")
    if not isinstance(value, torch.Tensor):
        raise ImportFormatError(f"{where}: a {type(value).__name__}, expected a tensor (d,); leave the key out")
    value = value.detach()
    if value.ndim != 1 or value.layout != torch.strided or not value.is_floating_point():
        raise ImportFormatError(
            f"{where}: {value.dtype} of shape {tuple(value.shape)}, expected floats (d,): one pooled vector a key"
        )
    if value.is_meta or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ImportFormatError(f"{where}: claims {value.numel()} values and has fewer in the file; save it again")
    return value
