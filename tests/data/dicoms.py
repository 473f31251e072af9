"""DICOM files made for the tests, sound and damaged."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

DEFLATED = UID("1.2.840.10008.1.2.1.99")


def dicom(values: np.ndarray, *, syntax: str = ExplicitVRLittleEndian, **tags: Any) -> Dataset:
    """A dataset with these stored values, (h, w), (h, w, 3) or (frames, h, w); `tags` replace or add, None removes."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = UID(syntax)
    dataset.file_meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.1")
    dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["test"])
    colour = values.ndim == 3 and values.shape[2] == 3
    n_bits = values.dtype.itemsize * 8
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID
    dataset.Rows, dataset.Columns = values.shape[-3:-1] if colour else values.shape[-2:]
    dataset.SamplesPerPixel = 3 if colour else 1
    dataset.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        dataset.PlanarConfiguration = 0
    if values.ndim == 3 and not colour:
        dataset.NumberOfFrames = len(values)
    dataset.BitsAllocated = dataset.BitsStored = n_bits
    dataset.HighBit = n_bits - 1
    dataset.PixelRepresentation = int(np.issubdtype(values.dtype, np.signedinteger))
    dataset.PixelData = values.astype(values.dtype.newbyteorder("<")).tobytes()
    dataset["PixelData"].VR = "OW" if n_bits > 8 else "OB"
    for name, value in tags.items():
        if value is None:
            del dataset[name]
        else:
            setattr(dataset, name, value)
    return dataset


def saved(dataset: Dataset) -> bytes:
    """The file's bytes."""
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.save_as(out, enforce_file_format=True)
    return out.getvalue()


def lut(table: list[int], first: int, bits: int) -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(table), first, bits])
    item.add_new("LUTData", "US", table)
    return item


def grey(shape: tuple[int, int] = (32, 40), top: int = 4095) -> np.ndarray:
    return np.linspace(0, top, shape[0] * shape[1]).astype(np.uint16).reshape(shape)


def bad_dicoms() -> dict[str, tuple[bytes, str]]:
    """Files that must be refused: their bytes and the reason."""
    sound = saved(dicom(grey(), BitsStored=12, HighBit=11))
    frames = np.stack([grey()] * 3)
    directory = dicom(grey())
    directory.SOPClassUID = directory.file_meta.MediaStorageSOPClassUID = UID("1.2.840.10008.1.3.10")
    bomb = saved(dicom(np.zeros((8, 8), np.uint8), syntax=DEFLATED))
    meta_end = 132 + 12 + struct.unpack("<I", bomb[140:144])[0]
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    filler = deflate.compress(bytes(3 * 2**20)) + deflate.flush()
    unknown = saved(dicom(grey()))
    unknown = unknown.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.9.9\0")
    return {
        "half.dcm": (sound[: len(sound) // 2], "truncated"),
        "header-cut.dcm": (sound[:200], "corrupt|no-pixels|truncated"),
        "rows-missing.dcm": (saved(dicom(grey(), Rows=None)), "truncated"),
        "rows-wrong.dcm": (saved(dicom(grey(), Rows=64)), "truncated"),
        "no-pixels.dcm": (saved(dicom(grey(), PixelData=None)), "no-pixels"),
        "empty-pixels.dcm": (saved(dicom(grey(), PixelData=b"")), "no-pixels|truncated"),
        "directory.dcm": (saved(directory), "no-pixels"),
        "several-frames.dcm": (saved(dicom(frames)), "several-frames"),
        "huge.dcm": (saved(dicom(grey(), Rows=60000, Columns=60000)), "too-large"),
        "many-frames.dcm": (saved(dicom(grey(), NumberOfFrames=10**6)), "too-large|several-frames"),
        "deflated-bomb.dcm": (bomb[:meta_end] + filler, "too-large|no-pixels"),
        "unknown-syntax.dcm": (unknown, "no-decoder"),
        "photometric.dcm": (saved(dicom(grey(), PhotometricInterpretation="HOLOGRAM")), "unsupported|truncated"),
        "bits.dcm": (saved(dicom(grey(), BitsAllocated=7)), "truncated"),
        "window-function.dcm": (
            saved(dicom(grey(), WindowCenter=9, WindowWidth=9, VOILUTFunction="CUBIC")), "unsupported",
        ),
        "palette-without-tables.dcm": (saved(dicom(grey(), PhotometricInterpretation="PALETTE COLOR")), "truncated"),
        "words-for-numbers.dcm": (
            sound.replace(b"\x28\x00\x10\x00US\x02\x00\x20\x00", b"\x28\x00\x10\x00LO\x02\x00AB"), "truncated|corrupt",
        ),
    }  # fmt: skip
