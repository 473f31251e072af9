"""As much of protocol buffers as one `tf.train.Example` with a list of floats needs, without TensorFlow.

Example.features = 1; Features.feature = 1, a map whose entries have key = 1 and value = 2; Feature.float_list = 2;
FloatList.value = 1. Where a message is given in parts, the parts joined are the message.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}
_MOST_VARINT = 10  # bytes
_FEATURE_KINDS = {1: "bytes_list", 2: "float_list", 3: "int64_list"}


class WireError(ValueError):
    """Bytes that are no message; the text says why."""


def float_features(example: bytes) -> dict[str, np.ndarray | str]:
    """The features of an Example: values of float lists, (d,) float32; the name of the kind of any other.

    Raises:
        WireError: the bytes are not an Example.
    """
    features: dict[str, np.ndarray | str] = {}
    for entry in _messages(_joined(example, 1), 1):
        try:
            name = _joined(entry, 1).decode("utf-8")
        except UnicodeDecodeError as error:
            raise WireError("a feature's name is not UTF-8") from error
        features[name] = _feature(_joined(entry, 2))
    return features


def _feature(message: bytes) -> np.ndarray | str:
    kind, floats = "nothing", b""
    for number, wire, value in _fields(message):
        if number in _FEATURE_KINDS and wire == _BYTES:
            kind = _FEATURE_KINDS[number]
            floats += value if number == 2 else b""
    return np.frombuffer(_floats(floats), "<f4") if kind == "float_list" else kind


def _floats(message: bytes) -> bytes:
    """Values of a FloatList, packed, one by one, or in packed chunks."""
    parts = []
    for number, wire, value in _fields(message):
        if number != 1:
            continue
        if wire not in (_BYTES, _FIXED32) or len(value) % 4:
            raise WireError(f"a float list holds {len(value)} bytes of wire type {wire}")
        parts.append(value)
    return b"".join(parts)


def _joined(message: bytes, wanted: int) -> bytes:
    return b"".join(_messages(message, wanted))


def _messages(message: bytes, wanted: int) -> list[bytes]:
    return [value for number, wire, value in _fields(message) if number == wanted and wire == _BYTES]


def _fields(message: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Number, wire type and bytes of each field; unknown ones are the caller's to leave."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        if number == 0:
            raise WireError(f"field number 0 at byte {at}")
        start = at
        if wire == _VARINT:
            _, at = _varint(message, at)
        elif wire == _BYTES:
            size, start = _varint(message, at)
            at = start + size
        elif wire in _FIXED:
            at += _FIXED[wire]
        else:
            raise WireError(f"wire type {wire} at byte {at}")
        if at > len(message):
            raise WireError(f"a field of {at - start} bytes at byte {start} of {len(message)}: cut short")
        yield number, wire, message[start:at]


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number and where it ends."""
    value = 0
    for k in range(_MOST_VARINT):
        if at + k >= len(message):
            raise WireError(f"a number at byte {at} is cut short")
        byte = message[at + k]
        value |= (byte & 0x7F) << (7 * k)
        if byte < 0x80:
            return value, at + k + 1
    raise WireError(f"a number at byte {at} does not end")
