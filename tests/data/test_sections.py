from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from embedcache.data.sections import Section, findings_and_impression, sections

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "sections.json").read_text("utf-8"))


def named(report: str) -> list[tuple[str, str]]:
    return [(part.name, part.text.strip()) for part in sections(report)]


@pytest.mark.parametrize("golden", GOLDEN, ids=range(len(GOLDEN)))
def test_the_usual_parser_is_reproduced(golden: dict) -> None:
    expected = zip(golden["names"], golden["starts"], golden["sections"], strict=True)
    assert sections(golden["report"]) == [Section(*part) for part in expected]


@pytest.mark.parametrize("golden", GOLDEN, ids=range(len(GOLDEN)))
def test_line_ends_of_other_systems_change_no_name(golden: dict) -> None:
    for end in ("\r\n", "\r", "\f"):
        parts = sections(golden["report"].replace("\n", end))
        assert [part.name for part in parts] == golden["names"]
        assert [part.text.split() for part in parts] == [text.split() for text in golden["sections"]]


@pytest.mark.parametrize("golden", [g for g in GOLDEN if "findings" in g["names"]], ids=lambda g: str(g["starts"][-1]))
def test_folded_to_one_line_the_same_sections_are_found(golden: dict) -> None:
    folded = sections(" ".join(golden["report"].split()))
    assert [part.name for part in folded] == golden["names"]
    assert [part.text.split() for part in folded] == [text.split() for text in golden["sections"]]


@pytest.mark.parametrize(
    ("heading", "name"),
    [
        ("FINDING", "findings"),
        ("FINIDNGS", "findings"),
        ("CHEST", "findings"),
        ("PA AND LATERAL VIEWS OF THE CHEST", "findings"),
        ("PORTABLE SEMI-UPRIGHT AP CHEST X-RAY", "findings"),
        ("AP AND LATERAL", "findings"),
        ("CONCLUSIONS", "impression"),
        ("OPINION", "impression"),
        ("IMPRESSON", "impression"),
        ("IMPRESSSION", "impression"),
        ("IMPRESSION AND RECOMMENDATIONS", "impression"),
        ("FINDINGS/IMPRESSION", "impression"),
        ("SUMMARY", "summary"),
        ("REASON FOR EXAM", "indication"),
        ("INDICATION(S)", "indication"),
        ("CLINICAL INFORMATION", "history"),
        ("COMPARISION", "comparison"),
        ("COMPARISONS", "comparison"),
        ("TECNIQUE", "technique"),
        ("EXAM", "examination"),
        ("STUDY", "examination"),
        ("RECOMMENDATION(S)", "recommendation"),
        ("NOTIFICATIONS", "notification"),
        ("WET READ", "wet read"),
        ("ADDENDUM", "addendum"),
    ],
)
def test_spellings_of_headings(heading: str, name: str) -> None:
    assert named(f" FINAL REPORT\n {heading}:  Some text.\n") == [("preamble", "FINAL REPORT"), (name, "Some text.")]


@pytest.mark.parametrize(
    "report",
    [
        "FINDINGS: Clear.\nIMPRESSION: Normal.",
        "FINDINGS:Clear.\nIMPRESSION:Normal.",
        "Findings: Clear.\n\nImpression: Normal.",
        "Findings: Clear. Impression: Normal.",
        "FINDINGS: Clear. IMPRESSION: Normal.\n \n",
        "FINDINGS - Clear.\nIMPRESSION – Normal.",
        "FINDINGS\nClear.\n\nIMPRESSION\nNormal.",
        "\u200bFINDINGS: Clear.\r\nIMPRESSION: Normal.",
    ],
)
def test_ways_to_write_a_heading(report: str) -> None:
    assert named(report) == [("findings", "Clear."), ("impression", "Normal.")]


@pytest.mark.parametrize(
    "line",
    [
        "AP CHEST, 3:05 A.M., ___",
        "AP chest compared to 3:05:",
        "CHEST CLEAR: NO PNEUMOTHORAX",
        "THE FINDINGS: as before",
        "findings: as before",
        "FINDINGS as before: none",
        "Chest: as before",
        "The impression - as before",
        " " * 20 + "FINDINGS: centred",
    ],
)
def test_what_is_no_heading(line: str) -> None:
    assert [part.name for part in sections(f"{line}\n{line}\n")] == ["full report"]


def test_a_heading_below_an_empty_one_is_found() -> None:
    assert sections("FINDINGS:\nIMPRESSION: Normal.") == [
        Section("findings", 10, ""),
        Section("impression", 22, "Normal."),
    ]


def test_words_in_capitals_within_the_findings_cut_nothing() -> None:
    body = "LUNGS: Clear.\n HEART: Large.\n LATERAL VIEW: Clear."
    assert findings_and_impression(f" FINDINGS:\n {body}\n IMPRESSION: Large heart.") == (f" {body}", "Large heart.")


@pytest.mark.parametrize("heading", ["Comparison: None.", "HISTORY: Cough."])
def test_one_line_without_findings_or_impression_is_no_report_with_headings(heading: str) -> None:
    report = f"{heading} Well expanded lungs."
    assert sections(report) == [Section("full report", 0, report)]
    assert findings_and_impression(report) == ("", report)


def test_the_last_section_with_a_letter_wins() -> None:
    report = "FINDINGS: First.\nIMPRESSION: One.\nFINDINGS: Second.\nIMPRESSION: ___\nFINDINGS:\n 1-1-2000"
    assert [part.strip() for part in findings_and_impression(report)] == ["Second.", "One."]


def test_a_summary_code_does_not_replace_the_impression() -> None:
    code = "SUMMARY:4-POSSIBLE SIGNIFICANT FINDINGS\n\nACCESSION NUMBER: 1"
    assert findings_and_impression(f"NARRATIVE:\nx\n\nIMPRESSION:\n\n1. Clear.\n\n{code}")[1].strip() == "1. Clear."
    assert findings_and_impression("HISTORY: Cough.\nSUMMARY: Normal chest.") == ("", "Normal chest.")


def test_a_body_under_no_heading_is_given_as_findings() -> None:
    """Golden report 5: the usual parser leaves it in the indication."""
    body = "PA and lateral upright chest radiographs were reviewed. The lungs are clear. Heart size is unchanged."
    findings, impression = findings_and_impression(GOLDEN[4]["report"])
    assert (" ".join(findings.split()), impression) == (body, "")


@pytest.mark.parametrize(
    ("report", "body"),
    [
        ("INDICATION: Cough.\n \n Lungs clear.\n\n NOTIFICATION: Dr. ___.\n\n By phone.", ["Lungs clear."]),
        ("COMPARISON: None.\n LUNGS: clear.\n HEART: large.", ["LUNGS: clear.", "HEART: large."]),
        ("   FINAL REPORT\n Two views.\n\n Lungs clear.\n\n HISTORY: Cough.\n", ["Two views.", "Lungs clear."]),
        ("NARRATIVE:\nLungs clear.\n\nHISTORY: Cough.\n", ["Lungs clear."]),
        ("INDICATION: Cough.\r\n\r\nLungs clear.\r\n", ["Lungs clear."]),
        ("INDICATION: Cough.\nTECHNIQUE: PA.\n", []),
    ],
)
def test_where_a_body_is_looked_for(report: str, body: list[str]) -> None:
    findings, impression = findings_and_impression(report)
    assert (" ".join(findings.split()), impression) == (" ".join(body), "")


@pytest.mark.parametrize(
    "reading", ["normal", "Bilateral pulmonary tuberculosis.", "___", "", "NORMAL CHEST", "no: none"]
)
def test_a_reading_without_headings_is_kept_whole(reading: str) -> None:
    assert findings_and_impression(reading) == ("", reading)


def test_only_titles_and_rules_leave_a_report_without_headings() -> None:
    report = f"          FINAL REPORT\n Compared to\n ___\n {'_' * 78}\n clear."
    assert findings_and_impression(report)[1].split() == ["Compared", "to", "___", "clear."]
    assert findings_and_impression("  FINAL REPORT \n") == ("", "  FINAL REPORT \n")


def test_sections_are_slices_that_lose_only_headings() -> None:
    rng = random.Random(0)
    bits = [
        "FINDINGS:",
        "IMPRESSION:",
        "\n",
        "\r\n",
        "\f",
        " ",
        "clear",
        ".",
        "CHEST:",
        "Comparison: ",
        "\n\n",
        "é",
        "___",
        ":",
    ]
    for _ in range(2000):
        report = "".join(rng.choices(bits, k=rng.randrange(30)))
        parts = sections(report)
        assert all(report[part.start :].startswith(part.text) for part in parts)
        starts = [part.start for part in parts]
        assert starts == sorted(starts)
        assert sum(part.text.count("clear") for part in parts) == report.count("clear")


@pytest.mark.parametrize(
    "unit",
    [":", "A:", "A\n", "\n", "\n ", "A ", "A B C ", "A -", "\n FINDINGS: x", "A. Ab ab: ", "_", "\n____", "x", "\r\n"],
)
def test_a_long_text_ends(unit: str) -> None:
    report = unit * (60_000 // len(unit))
    parts = sections(report)
    assert parts[-1].start + len(parts[-1].text) == len(report)
    assert len(findings_and_impression(report)) == 2
