from __future__ import annotations

import csv
import dataclasses
import json
import math
import random
import re
import traceback
from collections import Counter
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import pytest

from embedcache.data.reports import (
    ReportPolicy,
    Rule,
    Unit,
    caption,
    changed_reports,
    clean_report,
    report_digest,
    report_text,
    sentences,
    text_units,
)
from embedcache.errors import InputError, ManifestError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "captions.json").read_text("utf-8"))
INDIANA = Path(__file__).resolve().parents[3] / "shared" / "data" / "labels" / "indiana_reports.csv"
POLICIES = [ReportPolicy(unit, rule) for unit in get_args(Unit) for rule in get_args(Rule)]
REPORT = """                                 FINAL REPORT
 INDICATION:  Zanzibar cough.

 FINDINGS:  Heart size is normal.  A 3.2 cm nodule, seen by
 Dr. Ünal.  Clear.

 IMPRESSION:

 1.  No pneumonia
 2.  Stable nodule.
"""
WORD = re.compile(r"\w*[^\W\d_]\w*")  # with at least one letter
BITS = [
    *(
        "1.",
        "2)",
        "3.",
        "3.2",
        "12.",
        "No",
        "no",
        "e.g.",
        "vs.",
        "Dr.",
        "p.m.",
        "J.",
        "XXXX.In",
        "clear.No",
        "lungs",
        "___",
    ),
    *(
        ".",
        "..",
        "...",
        "…",
        "?",
        "!",
        ":",
        ")",
        "(",
        '."',
        "\n",
        "\n\n",
        "\r\n",
        "\r",
        "\f",
        "\u2028",
        " ",
        "  ",
        "\u200b",
    ),
    *(
        "FINDINGS:",
        "\nIMPRESSION: ",
        "Normal.",
        "etc.",
        "正常。",
        "لا.",
        "1.Severe",
        "9)",
        "\t",
        "2.\n",
        "\n3. ",
        "é",
        "x y",
    ),
]


def random_texts(n: int) -> list[str]:
    rng = random.Random(20)
    return [rng.choice(["", " "]).join(rng.choices(BITS, k=rng.randrange(1, 16))) for _ in range(n)]


def refusal(text: str, policy: ReportPolicy) -> str:
    try:
        report_text(text, policy)
    except InputError as error:
        return error.reason
    return ""


def bare(text: str) -> str:
    return "".join(text.split())


def test_white_space_is_folded_and_nothing_else_changes() -> None:
    assert clean_report("  A 3.2 cm\n\tnodule; Überprüfung.\r\n") == "A 3.2 cm nodule; Überprüfung."


@pytest.mark.parametrize(
    ("text", "reason"), [("", "empty-report"), (" \n\t", "empty-report"), ("a\0b", "nul"), ("\ud800", "not-unicode")]
)
def test_unusable_reports(text: str, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        clean_report(text)
    assert caught.value.reason == reason


def test_changed_reports_are_found_by_content() -> None:
    encoded = {i: np.frombuffer(report_digest(t), np.uint8) for i, t in {"a": "one", "b": "two", "c": "x"}.items()}
    encoded["unknown"] = np.zeros(16, np.uint8)
    reports = {"a": "one ", "b": "two!", "c": "", "unknown": "anything", "new": "not encoded"}
    assert changed_reports(reports.items(), encoded) == ["b", "c"]


@pytest.mark.parametrize("pair", GOLDEN, ids=[pair["uid"] for pair in GOLDEN])
def test_the_papers_captions_are_reproduced(pair: dict) -> None:
    assert caption(pair["impression"], pair["findings"], rule="paper") == pair["caption"]


@pytest.mark.parametrize(
    ("impression", "findings", "clean", "paper"),
    [
        ("Normal.", "", "Normal.", None),
        ("A 3.2 cm nodule.", None, "A 3.2 cm nodule.", "2 cm nodule"),
        ("Épanchement  à\n gauche", "é", "Épanchement à gauche é", None),
        (
            "1. No mass.\n2) Clear",
            "3. Heart 1.5 times.",
            "No mass. Clear Heart 1.5 times.",
            "no mass 2 clear 5 times",
        ),
        ("Seen on ___ and XXXX", math.nan, "Seen on ___ and XXXX", "seen on ___ and xxxx"),
        (None, "Findings come last.", "Findings come last.", "findings come last"),
        (None, math.nan, None, None),
        ("  ", ". ___ ?", None, None),
        (pd.NA, "7", "7", None),
        ("No acute process. .", "", "No acute process. .", "no acute process"),
        ("1. 1.Severe", "", "Severe", None),
        ("up to\n 2. There", "", "up to 2. There", None),
        ("é normal. No mass", "", "é normal. No mass", "normal no mass"),
        ("see no. 3. Clear", "", "see no. 3. Clear", None),
    ],
)
def test_captions(impression: str, findings: str, clean: str | None, paper: str | None) -> None:
    assert caption(impression, findings) == clean
    assert caption(impression, findings, rule="paper") == paper


def test_captions_of_what_is_no_text() -> None:
    with pytest.raises(TypeError, match="a section is of type bytes, expected str, None or NaN"):
        caption(b"Normal.", "")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rule is 'papers', expected one of clean, paper"):
        caption("Normal.", "", rule="papers")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="NUL"):
        caption("a\0", "")


@pytest.mark.parametrize("rule", get_args(Rule))
def test_a_caption_of_a_caption_is_itself(rule: Rule) -> None:
    kept = [once for text in random_texts(4000) if (once := caption(text, None, rule=rule))]
    assert len(kept) > 500
    for once in kept:
        assert caption(once, None, rule=rule) == once
        assert caption("", once, rule=rule) == once


def test_a_clean_caption_loses_only_list_numbers() -> None:
    for text in random_texts(4000):
        kept = caption(text, None)
        if kept is None:
            assert not re.search(r"[^\W_]", re.sub(r"\b[0-9]{1,2}[.)]", "", text))
            continue
        lost = Counter(bare(text)) - Counter(bare(kept))
        assert not Counter(bare(kept)) - Counter(bare(text))
        assert set(lost) <= set("0123456789.)")
        assert WORD.findall(kept) == [w for w in WORD.findall(text) if not w.isdigit()]
        assert kept.count("3.2") == text.count("3.2")


@pytest.mark.parametrize(
    "whole",
    [
        "A 3.2 cm nodule, seen.",
        "Seen by Dr. Smith today.",
        "Lines, e.g. PICC, vs. drains.",
        "Taken at 5 p.m. with the patient upright.",
        "1. No acute disease.",
        "2) No acute disease",
        "Stable... possibly worse.",
        "Stable… Or worse.",
        "Compared by Dr. J. Smith",
        "Left base ? consolidation.",
        "Effusion etc. on the left.",
        "Compared with image no. 3 of today.",
        "5.Heart",
        "normal",
        "No acute abnormality. .",
    ],
)
def test_what_stays_one_sentence(whole: str) -> None:
    assert sentences(whole) == [whole]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Lungs clear.No effusion", ["Lungs clear.", "No effusion"]),
        ("A XXXX.In place", ["A XXXX.", "In place"]),
        ("Taken at 5 p.m. Lungs clear.", ["Taken at 5 p.m.", "Lungs clear."]),
        ("Effusion? No. None! (See below.) End", ["Effusion?", "No.", "None!", "(See below.)", "End"]),
        ("Hepatitis C. No effusion.", ["Hepatitis C.", "No effusion."]),
        ("Known MS. Clear.", ["Known MS.", "Clear."]),
        ("1. Clear\n2. Stable\n\nSigned", ["1. Clear", "2. Stable", "Signed"]),
        ("Line one\r\nline two\r\n\r\nOther", ["Line one line two", "Other"]),
        (". Clear. lungs too.. Yes", [". Clear.", "lungs too..", "Yes"]),
        ("正常。无积液。", ["正常。", "无积液。"]),
        ("الرئتان صافيتان. لا انصباب؟ نعم", ["الرئتان صافيتان.", "لا انصباب؟", "نعم"]),
        ("", []),
        (" ... ___ . ", []),
    ],
)
def test_where_sentences_end(text: str, parts: list[str]) -> None:
    assert sentences(text) == parts


def test_sentences_joined_lose_only_white_space() -> None:
    for text in random_texts(4000):
        parts = sentences(text)
        assert bare("".join(parts)) == (bare(text) if parts else "")
        assert parts or not re.search(r"[^\W_]", text)
        assert all(part == clean_report(part) for part in parts)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (ReportPolicy("report"), " ".join(REPORT.split())),
        (
            ReportPolicy(),
            "No pneumonia Stable nodule. Heart size is normal. A 3.2 cm nodule, seen by Dr. Ünal. Clear.",
        ),
        (ReportPolicy("findings"), "Heart size is normal. A 3.2 cm nodule, seen by Dr. Ünal. Clear."),
        (ReportPolicy("impression"), "No pneumonia Stable nodule."),
        (ReportPolicy("impression", "paper"), "no pneumonia stable nodule"),
        (ReportPolicy("findings", "paper"), "heart size is normal 2 cm nodule seen by dr"),
        (ReportPolicy("caption", "paper"), "no pneumonia stable nodule heart size is normal 2 cm nodule seen by dr"),
        (ReportPolicy("sentence"), " ".join(REPORT.split())),
    ],
    ids=str,
)
def test_the_text_for_each_unit(policy: ReportPolicy, expected: str) -> None:
    assert report_text(REPORT, policy) == expected


@pytest.mark.parametrize(
    ("text", "policy", "reason"),
    [
        ("", ReportPolicy(), "empty-report"),
        (REPORT + "\0", ReportPolicy("sentence"), "nul"),
        (REPORT + "\udfff", ReportPolicy(), "not-unicode"),
        ("INDICATION: Zanzibar.\nTECHNIQUE: PA.", ReportPolicy(), "no-section"),
        ("Zanzibar is normal.", ReportPolicy("findings"), "no-section"),
        ("IMPRESSION: Zanzibar.", ReportPolicy("findings"), "no-section"),
        ("Zanzibar.", ReportPolicy(rule="paper"), "too-short"),
        ("___ .", ReportPolicy("impression"), "too-short"),
        ("", ReportPolicy("sentence"), "no-sentence"),
        ("___ .", ReportPolicy("sentence"), "no-sentence"),
    ],
)
def test_refusals_say_why_and_hold_no_text(text: str, policy: ReportPolicy, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        report_text(text, policy)
    assert caught.value.reason == reason
    error: BaseException | None = caught.value
    assert "".join(traceback.format_exception_only(error)).count("Zanzibar") == 0
    assert error.__cause__ is None
    assert error.__context__ is None


def test_a_missing_section_names_the_way_out() -> None:
    with pytest.raises(InputError, match="no findings and no impression; the unit 'report' takes any text"):
        report_text("HISTORY: x\nEXAM: y", ReportPolicy())


@pytest.mark.parametrize("reading", ["normal", "Bilateral pulmonary tuberculosis."])
def test_short_readings_are_kept(reading: str) -> None:
    assert report_text(reading, ReportPolicy()) == reading
    assert list(text_units({"a": reading}, ReportPolicy("sentence")).items()) == [("a#s00", reading)]


def test_units_other_than_sentences_are_the_reports() -> None:
    reports = {"b": REPORT, "a": ""}
    for policy in POLICIES:
        if policy.unit != "sentence":
            assert list(text_units(reports, policy).items()) == list(reports.items())


def test_sentences_get_ids_in_order() -> None:
    units = text_units({"b": REPORT, "a": "Clear.  Normal."}, ReportPolicy("sentence"))
    assert list(units.items()) == [
        ("b#s00", "No pneumonia"),
        ("b#s01", "Stable nodule."),
        ("b#s02", "Heart size is normal."),
        ("b#s03", "A 3.2 cm nodule, seen by Dr. Ünal."),
        ("b#s04", "Clear."),
        ("a#s00", "Clear."),
        ("a#s01", "Normal."),
    ]
    paper = text_units({"b": REPORT}, ReportPolicy("sentence", "paper"))
    assert list(paper) == [f"b#s{k:02d}" for k in range(len(paper))]
    assert " ".join(paper.values()) == report_text(REPORT, ReportPolicy("caption", "paper"))


@pytest.mark.parametrize(("n", "last"), [(100, "a#s99"), (101, "a#s100")])
def test_ids_of_one_report_have_one_length(n: int, last: str) -> None:
    units = list(text_units({"a": "Clear. " * n}, ReportPolicy("sentence")))
    assert units[-1] == last
    assert len(units) == n
    assert units == sorted(units)


@pytest.mark.parametrize("rule", get_args(Rule))
@pytest.mark.parametrize("text", ["", "a\0", "\ud800", " .", "INDICATION: x\nTECHNIQUE: y"])
def test_a_report_without_sentences_fails_by_its_own_id(text: str, rule: Rule) -> None:
    policy = ReportPolicy("sentence", rule)
    units = text_units({"good": "All is clear.", "bad": text}, policy)
    assert list(units) == ["good#s00", "bad"]
    with pytest.raises(InputError):
        report_text(units["bad"], policy)


def test_a_report_that_the_paper_drops_fails_as_sentences_too() -> None:
    policy = ReportPolicy("sentence", "paper")
    with pytest.raises(InputError, match="no sentence that the rule 'paper' keeps"):
        report_text(text_units({"a": "clear lungs"}, policy)["a"], policy)


def test_an_id_that_is_also_a_sentences_is_refused() -> None:
    with pytest.raises(ManifestError, match=r"'a#s00' is also a sentence's of 'a'"):
        text_units({"a": "Clear.", "a#s00": "Clear."}, ReportPolicy("sentence"))


def test_sentences_are_the_captions_words() -> None:
    for text in random_texts(2000):
        for rule in get_args(Rule):
            units = text_units({"a": text}, ReportPolicy("sentence", rule))
            try:
                whole = report_text(text, ReportPolicy(rule=rule))
            except InputError:
                assert list(units) == ["a"]
                continue
            assert WORD.findall(whole) == [w for unit in units.values() for w in WORD.findall(unit)]
            for unit in units.values():
                assert report_text(unit, ReportPolicy("sentence", rule)) == unit


def test_policies_are_checked_and_frozen() -> None:
    with pytest.raises(ValueError, match=r"unit is 'page', expected one of report, .*sentence; rule is 'x', expected"):
        ReportPolicy("page", "x")  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        ReportPolicy().unit = "report"  # type: ignore[misc]
    assert dataclasses.asdict(ReportPolicy()) == {"unit": "caption", "rule": "clean"}


@pytest.mark.parametrize(
    "unit",
    ["a", "a ", ". ", ".", "1. ", "1.", "\n", "\r\n", "? ", "a.b.", "vs. 1. ", "e.g.", ")", "…", "\u200b", "ا. ", "X."],
)
def test_long_texts_end(unit: str) -> None:
    text = unit * (60_000 // len(unit))
    assert bare("".join(sentences(text))) in (bare(text), "")
    for policy in POLICIES:
        first = next(iter(text_units({"a": text}, policy).values()))
        assert refusal(first, policy) in ("", "empty-report", "no-section", "too-short", "no-sentence")


def test_a_million_characters() -> None:
    text = "\n FINDINGS: Lungs clear, 3.2 cm. " * 30_000
    assert len(text) > 1_000_000 - 50_000
    assert report_text(text, ReportPolicy("findings")) == "Lungs clear, 3.2 cm."
    flat = " ".join(text.split())
    assert report_text(flat, ReportPolicy("report")) == flat


@pytest.mark.skipif(not INDIANA.is_file(), reason="shared/data/labels/indiana_reports.csv is not here")
def test_real_reports_lose_no_word() -> None:
    with INDIANA.open(encoding="utf-8", newline="") as file:
        rows = [(row["impression"], row["findings"]) for row in csv.DictReader(file)]
    assert len(rows) == 3851
    dropped: Counter[str] = Counter()
    losing: Counter[str] = Counter()
    for pair in rows:
        both = " ".join(pair)
        for rule in get_args(Rule):
            kept = caption(*pair, rule=rule)
            dropped[rule] += kept is None
            losing[rule] += kept is not None and bool(
                Counter(WORD.findall(both.lower())) - Counter(WORD.findall(kept.lower()))
            )
        kept = caption(*pair)
        assert WORD.findall(kept or "") == WORD.findall(both)
        assert (kept is None) == (not re.search(r"[^\W_]", both))
        assert [w for part in pair for s in sentences(part) for w in WORD.findall(s)] == WORD.findall(both)
    assert dropped == {"clean": 25, "paper": 25}
    assert losing == {"clean": 0, "paper": 156}
