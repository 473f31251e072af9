"""The page of a run: what stands where, what is left out, and that no text becomes markup."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_contents import contents, nothing, picture

from embedcache.report.html_table import Cell, Table, bytes_cell, cell_of, interval_cell, number, table_of
from embedcache.report.page import render
from embedcache.report.run_page import run_page
from embedcache.report.sections import by_task, cleaned

SECTIONS = [
    "verdicts", "warnings", "notes", "overview", "scores", "efficiency", "differences", "gains", "masks", "retrieval",
    "zero-shot", "subgroups", "calibration", "encoders", "maps", "training", "examples", "audit", "provenance",
]  # fmt: skip
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Every element with its attributes and its own words, in order; what is left open is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[int] = []
        self.others: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        self.words.append("")
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for k in self.open:
            self.words[k] += data

    def handle_decl(self, decl: str) -> None:
        self.others.append(decl)

    def handle_comment(self, data: str) -> None:
        self.others.append(data)

    def all(self, tag: str, **attributes: str) -> list[tuple[dict[str, str | None], str]]:
        return [
            (found, words)
            for (name, found), words in zip(self.elements, self.words, strict=True)
            if name == tag and all(found.get(key) == value for key, value in attributes.items())
        ]


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(run_page(contents()))


def ids(page: Page) -> list[str]:
    return [str(found["id"]) for found, _ in page.all("section")]


def tables_of(page: Page) -> dict[str, list[list[str]]]:
    """Rows of cells of each table by its caption, its number left out."""
    found: dict[str, list[list[str]]] = {}
    for (tag, _), words in zip(page.elements, page.words, strict=True):
        if tag == "caption":
            rows = found[re.sub(r"Table \d+\. ", "", words)] = []
        elif tag == "tr":
            rows.append([])
        elif tag in ("td", "th"):
            rows[-1].append(words)
    return found


def test_parts_stand_in_their_order_and_the_contents_name_them(page: Page) -> None:
    assert page.others == ["DOCTYPE html"]
    assert ids(page) == SECTIONS
    assert [str(found["href"]) for found, _ in page.all("a")] == ["#main", *(f"#{name}" for name in SECTIONS)]
    assert [words for _, words in page.all("h1")] == ["a run"]
    assert page.all("title")[0][1] == "a run: report"


def test_headings_go_down_one_step_at_a_time(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_every_table_has_a_caption_and_scopes_and_every_id_is_one(page: Page) -> None:
    assert len(page.all("table")) == len(page.all("caption")) == len({words for _, words in page.all("caption")})
    assert {found.get("scope") for found, _ in page.all("th")} == {"col", "row"}
    heads = page.all("th", scope="col")
    assert len(heads) == len(page.all("button", **{"class": "sort"}))
    assert all(found["aria-sort"] == "none" for found, _ in heads)
    every = [found["id"] for _, found in page.elements if "id" in found]
    assert len(every) == len(set(every))
    labels = [found["aria-label"] for found, _ in page.all("div", role="region")]
    assert len(labels) == len(set(labels))
    assert all(found["tabindex"] == "0" for found, _ in page.all("div", role="region"))
    assert all(found["aria-label"] and found["role"] == "img" for found, _ in page.all("svg"))
    assert len(page.all("figure")) == len(page.all("figcaption")) == len(page.all("svg"))


def test_scores_stand_beside_their_controls(page: Page) -> None:
    tables = tables_of(page)
    heads, *rows = tables["AUROC of ward: opacity by setting, head and labels (test 40, 9 positive)"]
    assert heads == [
        "encoders",
        "setting",
        "head",
        "10%: 20 labels, 3 to choose by",
        "100%: 2000 labels, 3 to choose by",
    ]
    assert [row[:2] for row in rows[:3]] == [
        ["vit + bert", "result"],
        ["resnet + bert", "result"],
        ["vit + bert", "no-adaptor"],
    ]
    score = contents().tables["scores"].iloc[0]
    assert rows[0][3] == f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"
    assert {
        row[2] for row in tables["masks (test 40, 9 of them with a mask; 95% interval over patients and seeds)"][1:]
    } >= {"result"}
    heads, *rows = tables["masks (test 40, 9 of them with a mask; 95% interval over patients and seeds)"]
    assert [heads.index(name) for name in ("Dice", "empty mask", "Dice on positives")] == [5, 6, 7]
    assert all("[" not in row[6] for row in rows)  # it is no estimate of a model
    found = next(rows for caption, rows in tables.items() if caption.startswith("ward, image to report: 40 queries"))
    assert [row[0] for row in found[-2:]] == ["chance", "one order for all"]
    assert "the prompts say the opposite" in {
        row[-1] for row in tables["labels by prompts (95% interval over patients and seeds)"]
    }
    groups = next(rows for caption, rows in tables.items() if caption.startswith("ward: opacity, a head head"))
    assert groups[2][3:6] == ["20", "4", "too few"]


def test_what_was_compared_and_how_to_repeat_it(page: Page) -> None:
    words = " ".join(page.words[0].split())
    for text in ("vit is better", "a leak", "a note", "40 images", "today, here", "embedcache run a.yaml"):
        assert text in words
    tables = tables_of(page)
    row = tables["all paired differences, first minus second"][1]
    assert row[:4] == ["vit + bert", "resnet + bert", "ward: probe: opacity", "AUROC"]
    assert re.fullmatch(r"[+-]0\.\d{3}", row[4])
    assert row[6:9] == ["0.02", "real", "all labels"]
    assert tables["encoders: exposure to the test data"][1] == ["vit", "has seen them", "its card"]
    assert tables["audit of the splits"][1] == ["patients in two splits", "none"]
    assert [words for _, words in page.all("pre")] == ["embedcache run a.yaml\nembedcache ls"]


@pytest.mark.parametrize(
    ("table", "parts"),
    [
        ("gains", ["gains"]),
        ("calibration", ["calibration"]),
        ("subgroups", ["subgroups"]),
        ("mask_scores", ["overview", "masks"]),
        ("mask_gains", []),
        ("retrieval_scores", ["overview", "retrieval"]),
        ("zeroshot_scores", ["overview", "zero-shot"]),
    ],
)
def test_each_table_makes_its_own_part_and_no_other(table: str, parts: list[str]) -> None:
    some = contents().tables[table]
    assert ids(Page(run_page(nothing(tables={table: some})))) == ["verdicts", *parts]
    assert ids(Page(run_page(nothing(tables={table: some.iloc[:0]})))) == ["verdicts"]


def test_a_run_of_nothing_is_a_page() -> None:
    page = Page(run_page(nothing()))
    assert ids(page) == ["verdicts"]
    assert "Nothing was compared" in page.words[0]
    assert ids(Page(run_page(nothing(commands=["embedcache ls"])))) == ["verdicts", "provenance"]


def test_a_run_of_one_encoder_without_texts_on_one_dataset() -> None:
    some = contents(maps=(), retrieval=(), masks=(), differences=pd.DataFrame())
    tables = {
        name: table[(table["image"] == "vit") & (table["data"] == "ward")].assign(text="").drop(columns=["data"])
        for name, table in some.tables.items()
    }
    page = Page(run_page(replace(some, tables=tables)))
    _, *rows = tables_of(page)["AUROC of opacity by setting, head and labels (test 40, 9 positive)"]
    assert {row[0] for row in rows} == {"vit"}
    assert "differences" not in ids(page)


def test_values_that_are_undefined_or_blank_are_said_to_be() -> None:
    some = contents(maps=(), retrieval=(), masks=())
    tables = {name: table.copy() for name, table in some.tables.items()}
    for table in tables.values():
        for name in ("value", "low", "high", "p_value", "p_holm", "class", "auroc", "auroc_low", "auroc_high"):
            if name in table:
                table[name] = np.nan
    tables["scores"]["control"] = tables["scores"]["control"].replace("", None)  # as CSV brings a blank back
    page = Page(run_page(replace(some, tables=tables, curves=some.curves.assign(valid_loss=np.nan))))
    rows = tables_of(page)["AUROC of ward: opacity by setting, head and labels (test 40, 9 positive)"]
    assert rows[1] == ["vit + bert", "result", "a head", "undefined", "undefined"]
    assert "nan" not in page.words[0].split()
    assert ">nan<" not in run_page(replace(some, tables=tables))


def test_shots_are_no_shares() -> None:
    some = contents(maps=(), retrieval=(), masks=())
    shots = some.tables["scores"].assign(fraction=np.nan)
    shots["shots"] = shots["n_train"] // 10
    page = Page(run_page(replace(some, tables={"scores": shots})))
    heads = tables_of(page)["AUROC of ward: opacity by setting, head and labels (test 40, 9 positive)"][0]
    assert heads[3:] == ["2 a class: 20 labels, 3 to choose by", "200 a class: 2000 labels, 3 to choose by"]
    assert "so many labels of each class" in page.words[0]


def test_pictures_only_where_they_may_be_shown() -> None:
    some = contents(tables={}, maps=())
    shown = [replace(example, picture=picture()) for example in some.retrieval]
    with_one = replace(some, retrieval=shown)
    assert len(Page(run_page(with_one)).all("img")) == 2
    page = Page(run_page(replace(with_one, has_images=False)))
    assert not page.all("img")
    assert "made without pictures" in page.words[0]
    assert "data:image" not in run_page(replace(with_one, has_images=False))
    for uri in ("http://evil.example/x.png", "data:text/html,x", "data:image/svg+xml;base64,PHN2Zz4="):
        bad = [replace(example, picture=uri) for example in some.retrieval]
        assert uri not in run_page(replace(some, retrieval=bad))


def test_the_same_contents_give_the_same_bytes() -> None:
    assert run_page(contents()) == run_page(contents())


def test_the_policy_names_the_pages_own_style_and_script_and_nothing_else(page: Page) -> None:
    text = run_page(nothing())
    for one in (page, Page(text)):
        policy = [found["content"] for found, _ in one.all("meta", **{"http-equiv": "Content-Security-Policy"})]
        style, script = (
            base64.b64encode(hashlib.sha256(one.all(tag)[0][1].encode()).digest()).decode()
            for tag in ("style", "script")
        )
        sources = f"style-src 'sha256-{style}'; script-src 'sha256-{script}'"
        assert policy == [f"default-src 'none'; img-src data:; {sources}; base-uri 'none'; form-action 'none'"]
        assert len(one.all("style")) == len(one.all("script")) == 1
        assert "url(" not in one.all("style")[0][1]
        assert "@import" not in one.all("style")[0][1]
        for tag, found in one.elements:
            assert tag not in {"link", "iframe", "object", "embed", "form", "base"}
            assert not [name for name in found if name.startswith("on") or name == "style"]
            assert str(found.get("src", "data:image/")).startswith("data:image/")
            assert str(found.get("href", "#")).startswith("#")
    preview = Page(render("preview.html.j2", name="x", n_rows=0, n_per_split=1, size=9, seed=0, splits=[], labels=[]))
    assert "unsafe" not in str(preview.all("meta", **{"http-equiv": "Content-Security-Policy"}))
    assert not preview.all("script")


def test_no_text_becomes_markup(page: Page) -> None:
    text = "<script>alert(1)</script> \"'><img src=x onerror=a> </style> {{ 7 * 7 }} <!-- ${x}"
    hostile = Page(run_page(contents(lambda word: f"{word} {text}")))
    drawn = {"g", "path", "use", "defs", "clippath", "rect", "text", "tspan"}  # how many depends on how words wrap

    def shape(of: Page) -> list[tuple[str, list[str]]]:
        return [(tag, sorted(found)) for tag, found in of.elements if tag not in drawn]

    assert shape(hostile) == shape(page)
    assert hostile.words[0].count(text) > 450
    assert hostile.others == ["DOCTYPE html"]


def test_cells_by_kind() -> None:
    cells = [cell_of(v) for v in (1234567, 0.12345, np.nan, None, True, "x", np.int64(3), np.float32(0.5), pd.NA)]
    assert [cell.text for cell in cells] == ["1,234,567", "0.123", "", "", "yes", "x", "3", "0.500", ""]
    assert [cell.sort for cell in cells] == ["1234567.0", "0.12345", "", "", "", "", "3.0", "0.5", ""]
    assert interval_cell(0.5, 0.4, 0.6) == Cell("0.500 [0.400, 0.600]", 0.5)
    assert interval_cell(np.nan, np.nan, np.nan).text == "undefined"
    assert number(0.5, places=1, sign=True).text == "+0.5"
    assert [bytes_cell(n).text for n in (12, 2_210_000, np.nan)] == ["12 bytes", "2.2 MB", ""]


def test_a_column_that_is_blank_throughout_is_left_out() -> None:
    table = table_of(["a", "b", "c"], [["x", "", 1], ["y", None, np.nan]], caption="t")
    assert [(head.name, head.is_number) for head in table.heads] == [("a", False), ("c", True)]
    assert [[cell.text for cell in row] for row in table.rows] == [["x", "1"], ["y", ""]]
    assert table_of(["a"], [], caption="t") == Table("t", (), ())


def test_tables_as_csv_brings_them_back() -> None:
    table = pd.DataFrame({"data": ["a", "a"], "control": [np.nan, "x"], "headline": ["True", "False"], "class": np.nan})
    (found,) = cleaned({"scores": table, "gains": table.iloc[:0]}).values()
    assert list(found["control"]) == ["", "x"]
    assert list(found["class"]) == ["", ""]
    assert list(found["headline"]) == [True, False]
    assert "data" not in found
    two = cleaned({"scores": table, "more": table.assign(data="b")})
    assert "data" in two["scores"]
    named = [name for name, _, _ in by_task(two["scores"].assign(label="l", test=["external", "difference"]))]
    assert named == ["a: l, external", "a: l, internal - external"]


def test_templates_are_packaged() -> None:
    folder = Path(render.__code__.co_filename).with_name("templates")
    assert {path.suffix for path in folder.iterdir()} == {".j2"}
