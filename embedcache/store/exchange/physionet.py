"""PhysioNet's MIMIC-CXR image embeddings: one `.tfrecord` for each image, made by Google's CXR Foundation.

Files lie at `files/p10/p10000032/s50414267/<dicom id>.tfrecord` and hold one framed `tf.train.Example` each, with the
feature `embedding`: 1,376 values in the release; any width is read, as long as it is one.

Shape notation: n rows, d embedding width.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from embedcache.errors import ImportFormatError, some_ids
from embedcache.store.exchange.protobuf import WireError, float_features
from embedcache.store.exchange.source import Asked, Found, Spool, check_ids

SUFFIX = ".tfrecord"

_FEATURE = "embedding"
_HEADER, _FOOTER = struct.Struct("<QI"), struct.Struct("<I")
_MASK_DELTA = 0xA282EAD8
_AGAIN = "download it again"


def read(source: Path, asked: Asked) -> Found:
    """Rows of all records below a directory, in the order of their paths; ids are the names of the files.

    Raises:
        ImportFormatError: a damaged or foreign file, rows of different width, an image given twice.
    """
    files = {source.name: source} if source.is_file() else dict(sorted(record_files(source)))
    if not files:
        raise ImportFormatError(
            f"{source}: no {SUFFIX} file in or below it, expected files/p10/p10000032/s50414267/<dicom id>{SUFFIX}; "
            "check the path"
        )
    ids = [path.stem for path in files.values()]
    names = list(files)
    check_ids(ids, lambda k: f"{source}: {names[k]}")
    spool, digests = Spool(asked.scratch), {}
    dim: int | None = None
    for name, path in files.items():
        data = _bytes(path)
        values = _embedding(data, path)
        if dim is not None and len(values) != dim:
            raise ImportFormatError(
                f"{path}: {len(values)} values, but {files[names[0]]} has {dim}, expected one width; import what "
                "another encoder made as a store of its own"
            )
        dim = len(values)
        digests[name] = hashlib.sha256(data).hexdigest()
        spool.add(values)
    return Found(ids, spool.rows(dim or 0), files, digests=digests)


def record_files(source: Path) -> Iterator[tuple[str, Path]]:
    """Every record below a directory: its name relative to it, and its path."""
    for folder, _, names in os.walk(source):
        for name in names:
            if name.endswith(SUFFIX) and not name.startswith("."):
                path = Path(folder, name)
                yield path.relative_to(source).as_posix(), path


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes() if path.is_file() else b""
    except OSError as error:
        raise ImportFormatError(f"{path}: cannot be read ({error.strerror}); check it, or {_AGAIN}") from error


def _embedding(data: bytes, path: Path) -> np.ndarray:
    """The vector of a file with one record, (d,) float32."""
    try:
        features = float_features(_record(data, path))
    except WireError as error:
        raise ImportFormatError(f"{path}: its record is no tf.train.Example ({error}); {_AGAIN}") from error
    values = features.get(_FEATURE)
    if values is None or isinstance(values, str) or not len(values):
        found = f"features {some_ids(features) or 'none'}" if values is None else f"{_FEATURE!r} of {values}"
        found = f"{_FEATURE!r} without values" if isinstance(values, np.ndarray) else found
        raise ImportFormatError(f"{path}: {found}, expected the feature {_FEATURE!r} with a list of floats; {_AGAIN}")
    return values


def _record(data: bytes, path: Path) -> bytes:
    """The one record of a TFRecord file, after both its checksums were found right."""
    head, tail = _HEADER.size, _FOOTER.size
    if len(data) < head:
        raise ImportFormatError(f"{path}: {len(data)} bytes, expected one record of {head + tail} or more; {_AGAIN}")
    n_bytes, of_length = _HEADER.unpack_from(data)
    if _masked_crc32c(data[:8]) != of_length:
        if _is_bare_example(data):
            raise ImportFormatError(
                f"{path}: a bare tf.train.Example without TFRecord framing, as older versions of Google's tool wrote "
                "it, so nothing can tell whether it is whole; expected one framed record: write it again with "
                "tf.io.TFRecordWriter"
            )
        raise ImportFormatError(
            f"{path}: the checksum of its record's length is wrong: damaged or no TFRecord; {_AGAIN}"
        )
    end = head + n_bytes + tail
    if len(data) < end:
        raise ImportFormatError(f"{path}: {len(data)} bytes, its record needs {end}: cut short; {_AGAIN}")
    record = data[head : head + n_bytes]
    if _masked_crc32c(record) != _FOOTER.unpack_from(data, head + n_bytes)[0]:
        raise ImportFormatError(f"{path}: the checksum of its record is wrong: damaged; {_AGAIN}")
    if len(data) > end:
        raise ImportFormatError(
            f"{path}: {len(data) - end} bytes after its first record, expected one record in a file: the name of the "
            "file is the id of its one image"
        )
    return record


def _is_bare_example(data: bytes) -> bool:
    try:
        return bool(float_features(data))
    except WireError:
        return False


def _masked_crc32c(data: bytes) -> int:
    import google_crc32c

    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF
