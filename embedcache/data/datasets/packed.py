"""Datasets whose images lie within archives: webdataset tars, and the Parquet files of Hugging Face's hub.

Stage one reads files, so the images are unpacked into `ROOT/unpacked/`, where `unpack` says so; what lies there already
is not written again.
"""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from embedcache.data.datasets.layout import SPLIT_NAMES, Asked, Draft, Layout, Option
from embedcache.data.files import IMAGE_SUFFIXES
from embedcache.data.labels import LABEL_PREFIX, LabelSet, Task
from embedcache.data.tables import as_text
from embedcache.errors import DatasetError, ManifestError
from embedcache.output import write_whole

_FOLDER = "unpacked"
_UNPACK = Option("unpack", f"Write the images as files below ROOT/{_FOLDER}/, which stage one needs.", "flag")
_REPORTS = ("report", "text", "caption")  # columns of the hub that hold one


def _read_tars(root: Path, asked: Asked) -> Draft:
    _check_unpack(root, asked)
    return _drafted(root, [row for path in _archives(root, "*.tar") for row in _samples(root, path)])


def _samples(root: Path, path: Path) -> Iterator[dict[str, Any]]:
    """A row for each key of a tar: its image is unpacked, its text is the report, its class and columns are kept."""
    parts: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, slash, file_name = member.name.removeprefix("./").rpartition("/")
                stem, _, kind = file_name.partition(".")  # a folder may have dots in its name
                key = folder + slash + stem
                row = parts.setdefault(key, {"key": f"{path.stem}/{key}", "official": _split_of(path.stem)})
                file = archive.extractfile(member)
                assert file is not None  # it is a file
                data = file.read()
                if f".{kind.lower()}" in IMAGE_SUFFIXES:
                    row["image"] = _unpacked(root, path.stem, f"{key}.{kind}", data)
                elif kind == "txt":
                    row["report"] = as_text(data, path / member.name)
                elif kind == "cls":
                    row[f"{LABEL_PREFIX}class"] = float(as_text(data, path / member.name))
                elif kind == "json":
                    row |= _columns(json.loads(as_text(data, path / member.name)))
    except ManifestError:
        raise
    except (tarfile.TarError, EOFError, OSError, zlib.error, ValueError) as error:
        raise ManifestError(f"{path}: cut short, damaged, or no webdataset ({error}); download it again") from error
    yield from (row for row in parts.values() if "image" in row)


def _columns(said: Any) -> dict[str, Any]:
    """Texts and numbers under names that a manifest may have."""
    known = ("patient", "study", "view", "sex", "age", "site", "source", "acquired", "report")
    pairs = said.items() if isinstance(said, Mapping) else ()
    return {
        name: value
        for name, value in pairs
        if (name in known or name.startswith(LABEL_PREFIX)) and isinstance(value, (str, int, float))
    }


def _read_hub(root: Path, asked: Asked) -> Draft:
    import pyarrow as pa
    import pyarrow.parquet as pq

    _check_unpack(root, asked)
    rows: list[dict[str, Any]] = []
    classes: tuple[str, ...] = ()
    for path in _archives(root, "*.parquet"):
        try:
            with pq.ParquetFile(path) as file:
                names = file.schema_arrow.names
                classes = _classes(file.schema_arrow.metadata or {}) or classes
                if "image" not in names:
                    raise ManifestError(f"{path}: no column image; it has {', '.join(names)}")
                for batch in file.iter_batches(64):
                    rows += [_hub_row(root, path, len(rows) + k, row) for k, row in enumerate(batch.to_pylist())]
        except (pa.ArrowException, OSError) as error:
            raise ManifestError(f"{path}: not a readable Parquet file ({error}); download it again") from error
    return _drafted(root, rows, classes)


def _hub_row(root: Path, path: Path, number: int, row: Mapping[str, Any]) -> dict[str, Any]:
    image = row["image"]
    if not isinstance(image, Mapping) or not image.get("bytes"):
        raise ManifestError(f"{path}: row {number} holds no bytes of an image; download the dataset with its images")
    name = Path(image.get("path") or "").name or f"{number:08d}.{_kind(image['bytes'])}"
    kept = _columns(row)
    report = next((row[column] for column in _REPORTS if isinstance(row.get(column), str)), "")
    label = {f"{LABEL_PREFIX}class": float(row["label"])} if isinstance(row.get("label"), int) else {}
    place = f"{number:08d}-{name}"
    return {
        **kept,
        **label,
        "key": f"{path.stem}/{place}",
        "report": report,
        "official": _split_of(path.stem),
        "image": _unpacked(root, path.stem, place, image["bytes"]),
    }


def _kind(data: bytes) -> str:
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
        return "png" if image.format == "PNG" else "jpg"


def _classes(metadata: Mapping[bytes, bytes]) -> tuple[str, ...]:
    """Names of the classes, as the hub keeps them beside the schema."""
    said = json.loads(metadata.get(b"huggingface", b"{}"))
    return tuple(said.get("info", {}).get("features", {}).get("label", {}).get("names", ()))


def _drafted(root: Path, rows: list[dict[str, Any]], classes: tuple[str, ...] = ()) -> Draft:
    if not rows:
        raise DatasetError(f"{root}: its archives hold no image")
    frame = pd.DataFrame(rows)
    labels = [column for column in frame if column.startswith(LABEL_PREFIX)]
    texts = [column for column in frame if column not in (*labels, "age")]
    frame = frame.astype(dict.fromkeys(texts, object)).fillna(dict.fromkeys(texts, ""))
    frame["id"] = frame.pop("key")
    official = frame.pop("official")
    own = f"{LABEL_PREFIX}class"
    sets: tuple[LabelSet, ...] = ()
    if own in frame:
        task: Task = "binary" if frame[own].max() <= 1 else "multi-class"
        sets = (LabelSet("class", task, ("class",), classes),)
    return Draft(frame, label_sets=sets, official=official, name=root.resolve().name)


def _archives(root: Path, pattern: str) -> list[Path]:
    found = sorted(path for place in (root, root / "data") for path in place.glob(pattern))
    if not found:
        raise DatasetError(f"{root}: no {pattern} in it, nor in its folder data")
    return found


def _check_unpack(root: Path, asked: Asked) -> None:
    if not asked.options.get("unpack"):
        raise DatasetError(
            f"{root}: its images lie within archives; --unpack writes them as files below {root / _FOLDER}"
        )


def _split_of(stem: str) -> str:
    """By how the archive's name begins."""
    return next((split for begin, split in SPLIT_NAMES.items() if stem.lower().startswith(begin)), "")


def _unpacked(root: Path, archive: str, name: str, data: bytes) -> str:
    """Writes an image below the root, unless it is there; gives its path relative to the root."""
    relative = f"{_FOLDER}/{archive}/{name.replace('/', '__')}"
    path = root / relative
    if not path.is_file() or path.read_bytes() != data:
        write_whole(path, lambda temporary: temporary.write_bytes(data))
    return relative


LAYOUTS = (
    Layout(
        name="webdataset",
        title="webdataset tars",
        tree="""\
ROOT/
  train-0000.tar, test-0000.tar     <key>.png (.jpg, .dcm), <key>.txt (report), <key>.cls (class), <key>.json (columns)
  unpacked/                         gets the images, with --unpack
""",
        marks=(),
        read=_read_tars,
        options=(_UNPACK,),
    ),
    Layout(
        name="hf",
        title="a dataset of Hugging Face's hub, as Parquet files with images",
        tree="""\
ROOT/
  train-00000-of-00001.parquet      image (bytes), label, text or report; here or in data/
  unpacked/                         gets the images, with --unpack
""",
        marks=(),
        read=_read_hub,
        options=(_UNPACK,),
    ),
)
