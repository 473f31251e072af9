"""Tables as people have them: gzipped, with a byte order mark, Windows line ends, blanks, trailing commas."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from embedcache.data.tables import numbers, read_csv, take
from embedcache.errors import ManifestError

PLAIN = b"id, runs,note\n007,1 2,NA\nx,-1,\n"


@pytest.mark.parametrize(
    "content",
    [
        PLAIN,
        b"\xef\xbb\xbf" + PLAIN,
        PLAIN.replace(b"\n", b"\r\n"),
        gzip.compress(PLAIN, mtime=0),
        gzip.compress(b"\xef\xbb\xbf" + PLAIN.replace(b"\n", b"\r\n"), mtime=0),
        PLAIN.replace(b"\n", b",\n"),  # a trailing comma on every line
        PLAIN.replace(b"x,-1,\n", b"x,-1"),  # a short last row
        b",id, runs,note\n0,007,1 2,NA\n1,x,-1,\n",  # pandas' row numbers
    ],
)
@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.txt"])
def test_the_same_table_in_many_forms(tmp_path: Path, content: bytes, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    taken = take(read_csv(path), path, {"image": "id", "mask": ("EncodedPixels", "runs")}, optional={"more": "absent"})
    assert taken.to_dict("list") == {"image": ["007", "x"], "mask": ["1 2", "-1"], "more": ["", ""]}
    assert read_csv(path)["note"].tolist() == ["NA", ""]


def test_a_few_columns_of_a_large_table(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(PLAIN)
    some = read_csv(path, only=("runs", "id", "nothing"))
    assert some.to_dict("list") == {"id": ["007", "x"], " runs": ["1 2", "-1"]}
    path.write_bytes(b'\xef\xbb\xbfid,text,n\r\n1,"two\r\nlines, ""quoted""",3\r\n')
    assert read_csv(path, only=("id", "text"))["text"].tolist() == ['two\r\nlines, "quoted"']
    path.write_bytes(b"id,text,n\n1,a,2\n3,b,c,4\n")
    with pytest.raises(ManifestError, match="not a readable CSV file"):
        read_csv(path, only=("id", "n"))  # a comma that is not quoted would move the columns


def test_a_table_without_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"\nid,runs\n")
    with pytest.raises(ManifestError, match="no row below its header"):
        take(read_csv(path), path, {"image": "id"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\n", r"no column id, EncodedPixels or runs; it has a, b\. Is it the official file"),
        (b"id,runs\n1,\xff\n", r"not UTF-8 at line 2 \(byte 10\)"),
        ("id,runs\n1,2\n".encode("utf-16"), "not UTF-8 but UTF-16"),
        (gzip.compress(PLAIN, mtime=0)[:-12], "cut short or damaged"),
        (b"\x1f\x8bno gzip", "cut short or damaged|not a readable"),
        (b"id,runs,\n1,2,3\n", "column 3 has values and no name"),
        (b"", "it is empty"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(ManifestError, match=message) as caught:
        take(read_csv(path), path, {"image": "id", "mask": ("EncodedPixels", "runs")})
    assert str(path) in str(caught.value)


def test_numbers_name_the_row_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"n,m\n1.0,\n -1 ,\n ,\n")
    found = numbers(read_csv(path)["n"], path)
    assert found[:2].tolist() == [1, -1]
    assert found.isna().tolist() == [False, False, True]
    path.write_bytes(b"n\n1\nmany\n")
    with pytest.raises(ManifestError, match="column n, row 2: 'many', expected a number"):
        numbers(read_csv(path)["n"], path)
