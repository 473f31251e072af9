from __future__ import annotations

import numpy as np
import pytest

from embedcache.fingerprint import canonical_json, digest_arrays, fingerprint


def test_equal_values_have_one_text_whatever_their_order() -> None:
    assert canonical_json({"b": [1, 2.5], "a": "é"}) == '{"a":"é","b":[1,2.5]}'.encode()
    assert fingerprint({"a": 1, "b": {"c": None, "d": True}}) == fingerprint({"b": {"d": True, "c": None}, "a": 1})


def test_one_digest_is_pinned() -> None:
    """A change here makes every cache in the world stale."""
    assert fingerprint({"pooling": "cls", "dim": 192, "mean": [0.5, 0.5]}) == (
        "9cba2674b5b4bd5c6c4fcb896e417d7d2453234a9dde0b3bd389e5995596461e"
    )


@pytest.mark.parametrize(
    ("value", "where"),
    [({"a": {1, 2}}, r"\$\.a.*set"), ({"a": [0, np.float32(1)]}, r"\$\.a\[1\]"), ({1: "x"}, "expected str")],
)
def test_what_cannot_be_hashed_is_an_error_that_says_where(value: object, where: str) -> None:
    with pytest.raises(TypeError, match=where):
        fingerprint(value)


def test_not_finite_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"\$\.x"):
        fingerprint({"x": float("nan")})


def test_arrays_differ_by_dtype_shape_content_and_order() -> None:
    a, b = np.arange(6, dtype=np.float32), np.ones(2, np.float32)
    digests = {
        digest_arrays([("float32", a)]),
        digest_arrays([("float32", a.reshape(2, 3))]),
        digest_arrays([("uint32", a)]),
        digest_arrays([("float32", a[::-1])]),
        digest_arrays([("float32", a), ("float32", b)]),
        digest_arrays([("float32", b), ("float32", a)]),
    }
    assert len(digests) == 6
    assert digest_arrays([("float32", a)]) == digest_arrays([("float32", a.copy())])


def test_canonical_json_is_as_the_format_page_says() -> None:
    """`cache/README.md` gives the rules, so that other languages can compare digests."""
    value = {
        "b": [1, 1.0, 0.5, 1e-5, 1e16, 1e15, 123456789.125, 0.1],
        "a": 'é"\\\b\f\n\r\t\x1f\x7f/',
        "A": None,
        "é": True,
    }
    expected = (
        '{"A":null,"a":"é\\"\\\\\\b\\f\\n\\r\\t\\u001f\x7f/",'
        '"b":[1,1.0,0.5,1e-05,1e+16,1000000000000000.0,123456789.125,0.1],"é":true}'
    )
    assert canonical_json(value) == expected.encode()
