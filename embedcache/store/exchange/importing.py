"""Embeddings made elsewhere to a store: which format lies there, who reads it, what the store says of where it is from.

Shape notation: n rows, d embedding width.
"""

from __future__ import annotations

import importlib
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedcache.errors import EmbedCacheError, ImportFormatError, StoreWriteError, some_ids
from embedcache.store import layout
from embedcache.store.catalogue import Catalogue
from embedcache.store.exchange.source import Asked, Found, contents_digest, files_record
from embedcache.store.save import save_store
from embedcache.store.store import Store


@dataclass(frozen=True)
class Format:
    """One foreign format.

    Args:
        what: in a few words, for messages and help.
        options: which of the caller's options it has a use for.
    """

    module: str
    what: str
    options: frozenset[str] = frozenset()

    def read(self, source: Path, asked: Asked) -> Found:
        reader: Callable[[Path, Asked], Found] = importlib.import_module(
            f"embedcache.store.exchange.{self.module}"
        ).read
        return reader(source, asked)


IMPORT_KINDS = {
    "paper": Format("paper", "the paper's own .npy and its CSV of dicom ids", frozenset({"ids", "trust_row_order"})),
    "npy": Format("npy", "one .npy (n, d) and a file of ids", frozenset({"ids", "id_column"})),
    "npz": Format("npz", "one .npz with ids and embeddings"),
    "hdf5": Format("hdf5", "one HDF5 file with ids and embeddings"),
    "parquet": Format("parquet", "one Parquet table", frozenset({"id_column", "vector_column"})),
    "safetensors": Format("safetensors", "one .safetensors of 'embedcache export'"),
    "clam": Format("clam", "HDF5 files of CLAM or TRIDENT, or one of them"),
    "clip-retrieval": Format("clip_retrieval", "a folder of clip-retrieval", frozenset({"id_column"})),
    "fusemix": Format("fusemix", "one .dpt of FuseMix"),
    "physionet": Format("physionet", "PhysioNet's MIMIC-CXR embeddings, .tfrecord files"),
}
_SUFFIXES = {
    ".npz": "npz",
    ".parquet": "parquet",
    ".safetensors": "safetensors",
    ".dpt": "fusemix",
    ".pt": "fusemix",
    ".tfrecord": "physionet",
}
# what readers and the libraries beneath them raise on bytes that nobody foresaw
_UNREADABLE = (
    ValueError, TypeError, LookupError, ArithmeticError, SystemError, RuntimeError, MemoryError, EOFError, OSError,
    lzma.LZMAError, zlib.error,
)  # fmt: skip
_HDF5_SUFFIXES = (".h5", ".hdf5")


def import_store(
    source: str | Path,
    out: str | Path,
    *,
    kind: str | None = None,
    modality: str = "image",
    ids: str | Path | None = None,
    id_column: str | None = None,
    vector_column: str | None = None,
    trust_row_order: bool = False,
    store_dtype: str | None = None,
    note: str | None = None,
) -> Store:
    """Writes a store of embeddings that another tool made; ids stay as they are, byte for byte.

    The store's record names the format, the files and their SHA-256, and never a path above them, a time or a host: so
    its fingerprint changes with a vector, an id or the format, and not with where the files lie.

    Args:
        source: a file or a directory, as the format has it.
        out: the directory of the new store.
        kind: one of `IMPORT_KINDS`; where it is not given, what lies there decides, if it can.
        ids: a file of ids, for rows that come without: .txt, .csv, .parquet, .json or .npy.
        id_column, vector_column: columns of a table; `id` and `embedding` where they are not given.
        trust_row_order: for `paper`: you know that rows and CSV are in one order; see `exchange/paper.py`.
        store_dtype: one of `STORED_DTYPES`; else the source's own where it is float16, bfloat16 or float32.
        note: the name in the record, such as the encoder's; the name of the file where it is not given.

    Raises:
        ImportFormatError: the source is not what the format has, or its rows cannot be kept.
        StoreWriteError: `out` holds a store already, or cannot be written.
    """
    source, out = Path(source), Path(out)
    if modality not in layout.MODALITIES:
        raise ImportFormatError(f"modality {modality!r}, expected {' or '.join(map(repr, layout.MODALITIES))}")
    if kind is not None and kind not in IMPORT_KINDS:
        raise ImportFormatError(f"kind {kind!r}, expected one of {', '.join(IMPORT_KINDS)}")
    if (out / layout.STORE_NAME).is_file() and Catalogue.read(out).shards:
        raise StoreWriteError(f"{out}: holds a store already; name another directory")
    asked = Asked(
        modality,
        out.absolute().parent,
        Path(ids) if ids is not None else None,
        id_column,
        vector_column,
        trust_row_order,
    )
    if not source.exists():
        raise ImportFormatError(f"{source}: nothing there, expected embeddings made elsewhere; check the path")
    kind = kind or detect_kind(source, asked)
    _check_options(kind, asked)
    try:
        found = IMPORT_KINDS[kind].read(source, asked)
        record = _record(kind, source, note, found)
    except EmbedCacheError:
        raise
    except _UNREADABLE as error:
        raise ImportFormatError(
            f"{source}: cannot be read as {kind} ({type(error).__name__}: {error}): damaged, cut short, or not of that "
            "kind; write it again, or name another --kind"
        ) from error
    dtype = store_dtype or found.stored
    try:
        return save_store(out, found.ids, found.embeddings, record=record, modality=modality, store_dtype=dtype)
    except EmbedCacheError:
        raise
    except ValueError as error:
        raise ImportFormatError(f"{source}: {error}") from error


def detect_kind(source: Path, asked: Asked) -> str:
    """The format of what lies at a path.

    Raises:
        ImportFormatError: it could be several, or none; the message lists them.
    """
    if source.is_dir():
        return _kind_of_directory(source)
    suffix = source.suffix.lower()
    if suffix == ".npy":
        from embedcache.store.exchange.paper import ids_file

        named = asked.ids or ids_file(source)
        return "paper" if named is not None and "idx2dicom_id" in named.name else "npy"
    if suffix in _HDF5_SUFFIXES:
        from embedcache.store.exchange.foreign_hdf5 import opened

        with opened(source) as file:
            names = set(file)
        fitting = [kind for kind, name in (("hdf5", "embeddings"), ("clam", "features")) if name in names]
        return _only(fitting, source, f"HDF5 with {some_ids(sorted(names)) or 'nothing'}")
    return _only([_SUFFIXES[suffix]] if suffix in _SUFFIXES else [], source, f"a {suffix or 'nameless kind of'} file")


def _kind_of_directory(source: Path) -> str:
    from embedcache.store.exchange import clam, clip_retrieval, physionet

    if (source / layout.STORE_NAME).is_file():
        raise ImportFormatError(f"{source}: a store of embedcache already; open it with embedcache.open_store")
    fitting = []
    if any((source / folder).is_dir() for folder in clip_retrieval.FOLDERS.values()):
        fitting.append("clip-retrieval")
    if clam.slide_files(source):
        fitting.append("clam")
    if next(physionet.record_files(source), None) is not None:
        fitting.append("physionet")
    return _only(fitting, source, "a directory")


def _only(fitting: list[str], source: Path, what: str) -> str:
    if len(fitting) == 1:
        return fitting[0]
    could = f"that could be {' or '.join(fitting)}" if fitting else "of no kind that is known by its looks"
    kinds = "; ".join(f"{kind}: {fmt.what}" for kind, fmt in IMPORT_KINDS.items())
    raise ImportFormatError(f"{source}: {what} {could}; name its kind with --kind. Kinds are {kinds}")


def _check_options(kind: str, asked: Asked) -> None:
    for name in ("ids", "id_column", "vector_column", "trust_row_order"):
        if getattr(asked, name) and name not in IMPORT_KINDS[kind].options:
            raise ImportFormatError(
                f"--{name.replace('_', '-')} has no meaning for kind {kind!r} ({IMPORT_KINDS[kind].what}); leave it "
                "out, or name another kind"
            )


def _record(kind: str, source: Path, note: str | None, found: Found) -> dict[str, Any]:
    # a directory's own name says where it lies, and nothing of what it holds
    name = note or (kind if source.is_dir() else source.stem)
    return {
        "source": "external",
        "kind": kind,
        "name": name,
        "contents": contents_digest(found.ids, found.embeddings),
        **files_record(found),
        **found.facts,
    }
