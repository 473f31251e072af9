"""DICOM files to 8-bit pixels, through pydicom: only what a display needs is read, and none of it is passed on.

Every transfer syntax is decoded by one named, permissively licensed library, so that the same file gives the same
pixels wherever it is read. What pydicom has to say of a file may quote its tags; it is neither logged nor shown.

Shape notation: h and w of the image.
"""

from __future__ import annotations

import io
import re
import zlib
from typing import Any

import numpy as np

from embedcache.data.image_files import check_pixels, keep_quiet
from embedcache.data.radiograph import DecodePolicy, check_frame, stretched
from embedcache.errors import InputError, refusing

_DEFLATED = "1.2.840.10008.1.2.1.99"
_DICOMDIR = "1.2.840.10008.1.3.10"
_UID = re.compile(r"[0-9]+(\.[0-9]+)+")
_META_START = 132  # behind the preamble and its mark
_UNCOMPRESSED = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", _DEFLATED)
DECODERS = {  # transfer syntax -> pydicom's name of the library that decodes it
    "1.2.840.10008.1.2.5": "pydicom",  # RLE
    "1.2.840.10008.1.2.4.50": "pillow",  # JPEG baseline
    "1.2.840.10008.1.2.4.51": "gdcm",  # JPEG extended, 12 bits
    "1.2.840.10008.1.2.4.57": "gdcm",  # JPEG lossless
    "1.2.840.10008.1.2.4.70": "gdcm",
    "1.2.840.10008.1.2.4.80": "pyjpegls",  # JPEG-LS
    "1.2.840.10008.1.2.4.81": "pyjpegls",
    "1.2.840.10008.1.2.4.90": "pylibjpeg",  # JPEG 2000, by pylibjpeg-openjpeg
    "1.2.840.10008.1.2.4.91": "pylibjpeg",
    "1.2.840.10008.1.2.4.201": "pylibjpeg",  # HTJ2K
    "1.2.840.10008.1.2.4.202": "pylibjpeg",
    "1.2.840.10008.1.2.4.203": "pylibjpeg",
}
_IMAGE_TAGS = [
    "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit",
]  # fmt: skip
_DISPLAY_TAGS = [
    "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "VOILUTSequence", "WindowCenter", "WindowWidth",
    "VOILUTFunction",
    *(f"{colour}PaletteColorLookupTableDescriptor" for colour in ("Red", "Green", "Blue")),
    *(f"{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue")),
    *(f"Segmented{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue")),
]  # fmt: skip
_PIXELS = ["PixelData", "FloatPixelData", "DoubleFloatPixelData"]


def decode_dicom(data: bytes, policy: DecodePolicy) -> np.ndarray:
    """The image of a DICOM file, 8-bit grey (h, w) or colour (h, w, 3).

    Args:
        data: the whole file, preamble included.

    Raises:
        InputError: `corrupt`, `no-pixels`, `too-large`, `several-frames`, `no-such-frame`, `no-decoder`, `unsupported`,
            `truncated`.
    """
    import pydicom.config

    keep_quiet("pydicom")
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE  # it would quote values that break a rule
    with refusing("corrupt", "its DICOM header cannot be read"):
        syntax, body = _transfer_syntax(data)
        if syntax == _DEFLATED:
            _check_deflated(data[body:], policy.max_file_bytes)
        dataset = _read(data)
    with refusing("truncated", f"its pixels cannot be decoded, transfer syntax {syntax}"):
        return _image(dataset, syntax, policy)


def _image(dataset: Any, syntax: str, policy: DecodePolicy) -> np.ndarray:
    if not any(name in dataset for name in _PIXELS):
        raise InputError("no-pixels", "a DICOM object without an image")
    n_frames = int(dataset.get("NumberOfFrames") or 1)
    check_pixels(int(dataset.Columns), int(dataset.Rows), n_frames, policy.max_pixels)
    frame = check_frame(n_frames, policy)
    stored = _stored_pixels(dataset, syntax, frame if n_frames > 1 else None)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        return _palette(stored, dataset)
    if stored.ndim == 3:
        return stretched(stored, 0, 2 ** int(dataset.BitsStored) - 1)
    if dataset.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise InputError("unsupported", "a photometric interpretation that nothing here says how to read")
    return _grey(stored, dataset, policy)


def _transfer_syntax(data: bytes) -> tuple[str, int]:
    """The transfer syntax from the file's meta information, and where the data set begins behind it."""
    from pydicom.filereader import read_dataset

    handle = io.BytesIO(data)
    handle.seek(_META_START)
    meta = read_dataset(handle, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
    if str(meta.get("MediaStorageSOPClassUID", "")) == _DICOMDIR:
        raise InputError("no-pixels", "a DICOMDIR, which lists files and has no image")
    if "TransferSyntaxUID" not in meta:
        raise InputError("corrupt", "its DICOM header names no transfer syntax")
    syntax = str(meta.TransferSyntaxUID)
    if not _UID.fullmatch(syntax):
        raise InputError("corrupt", "what its DICOM header names as transfer syntax is no UID")
    return syntax, handle.tell()


def _check_deflated(body: bytes, limit: int) -> None:
    """Refuses a deflated data set that unpacks to more than the limit, before anything unpacks it whole."""
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    n_bytes, given = 0, body
    while given and not stream.eof:
        n_bytes += len(stream.decompress(given, 2**20))
        given = stream.unconsumed_tail
        if n_bytes > limit:
            raise InputError("too-large", f"a deflated DICOM file of more than {limit:,} bytes")


def _read(data: bytes) -> Any:
    from pydicom import dcmread

    return dcmread(io.BytesIO(data), specific_tags=[*_IMAGE_TAGS, *_DISPLAY_TAGS, *_PIXELS])


def _stored_pixels(dataset: Any, syntax: str, frame: int | None) -> np.ndarray:
    """One frame as it is stored, colour as RGB."""
    from pydicom.pixels import pixel_array

    decoder = DECODERS.get(syntax)
    if decoder is None and syntax not in _UNCOMPRESSED:
        raise InputError("no-decoder", f"transfer syntax {syntax}, which nothing here decodes")
    try:
        return pixel_array(dataset, index=frame, decoding_plugin=decoder or "")
    except NotImplementedError:
        raise InputError("no-decoder", f"transfer syntax {syntax} with pixels that nothing here decodes") from None


def _palette(stored: np.ndarray, dataset: Any) -> np.ndarray:
    from pydicom.pixels import apply_color_lut

    colours = apply_color_lut(stored, dataset)
    return stretched(colours, 0, np.iinfo(colours.dtype).max)


def _grey(stored: np.ndarray, dataset: Any, policy: DecodePolicy) -> np.ndarray:
    padded = _padding(stored, dataset, policy)
    real = np.ones(stored.shape, bool) if padded is None or padded.all() else ~padded
    shown = _windowed(stored, dataset, policy, real)
    if policy.monochrome1 == "invert" and dataset.PhotometricInterpretation == "MONOCHROME1":
        shown = 255 - shown
    if padded is not None:
        shown = np.where(padded, np.uint8(0), shown)
    return shown


def _padding(stored: np.ndarray, dataset: Any, policy: DecodePolicy) -> np.ndarray | None:
    """Which pixels are padding, (h, w) bool; None where the file has none or it is kept."""
    value = dataset.get("PixelPaddingValue")
    if policy.padding == "keep" or value is None:
        return None
    limit = dataset.get("PixelPaddingRangeLimit")
    low, high = sorted((int(value), int(value if limit is None else limit)))
    return (stored >= low) & (stored <= high)


def _windowed(stored: np.ndarray, dataset: Any, policy: DecodePolicy, real: np.ndarray) -> np.ndarray:
    """Stored grey values as 0 to 255, (h, w) uint8; `real` marks the pixels that are no padding."""
    from pydicom.pixels import apply_modality_lut, apply_voi

    if policy.intensity == "max":
        return stretched(stored, 0, float(stored[real].max()))
    if policy.intensity == "stored-bits":
        low = -(2 ** (int(dataset.BitsStored) - 1)) if dataset.PixelRepresentation == 1 else 0
        return stretched(stored, low, low + 2 ** int(dataset.BitsStored) - 1)
    values = apply_modality_lut(stored, dataset)
    if policy.intensity == "voi":
        if policy.window is not None:
            return _through_window(values, *policy.window, str(dataset.get("VOILUTFunction") or "LINEAR"))
        if dataset.get("VOILUTSequence"):
            table = dataset.VOILUTSequence[policy.window_index]
            bits = int(table.LUTDescriptor[2])
            return stretched(apply_voi(values, dataset, index=policy.window_index), 0, 2**bits - 1)
        window = _window(dataset, policy.window_index)
        if window is not None:
            return _through_window(values, *window, str(dataset.get("VOILUTFunction") or "LINEAR"))
    shown = values[real]
    return stretched(values, float(shown.min()), float(shown.max()))


def _window(dataset: Any, index: int) -> tuple[float, float] | None:
    """Centre and width of one of the file's windows; None where it has none.

    Raises:
        InputError: it has some, but not so many.
    """
    given = [dataset.get(name) for name in ("WindowCenter", "WindowWidth")]
    if any(value in (None, "") for value in given):
        return None
    centres, widths = ([float(v) for v in np.atleast_1d(value)] for value in given)
    if index >= min(len(centres), len(widths)):
        raise InputError("no-such-window", f"{len(centres)} windows, window {index} was asked for")
    return centres[index], widths[index]


def _through_window(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """As DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3 define it, from 0 to 255."""
    if function == "SIGMOID":
        if width <= 0:
            raise InputError("unsupported", "a window without width")
        exponent = np.clip(-4 * (values.astype(np.float64) - centre) / width, -700, 700)
        return stretched(1 / (1 + np.exp(exponent)), 0, 1)
    if function == "LINEAR_EXACT":
        low, high = centre - width / 2, centre + width / 2
    elif function == "LINEAR":
        low, high = centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2
    else:
        raise InputError("unsupported", "a VOI LUT function that nothing here knows")
    if high > low:
        return stretched(values, low, high)
    return np.where(values > low, np.uint8(255), np.uint8(0))
