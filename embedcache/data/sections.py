"""Sections of a free-text radiology report: headings in their many spellings, and the text under each.

The plain parse gives the names, starts and texts of the section parser that users of MIMIC-CXR know, and differs from
it on purpose in five places:

- A heading follows the text's start, any line break (CR LF and form feed too) and up to eight blanks, not only a line
  feed and one blank; a few words known as headings also count in title case (`Findings:`), before a dash
  (`IMPRESSION - `), alone on a line, and with one letter wrong, missing, too many or swapped with its neighbour.
- A line directly below an empty heading can be a heading (the usual parser takes it for that section's text).
- Words in capitals that are no known heading (`LUNGS:` within the findings) cut nothing, so nothing after them is lost.
- A heading that names views only (`CHEST:`) opens findings, but not within findings.
- In a text without line breaks, headings in capitals count after any blank, in title case after a sentence, provided
  that findings or an impression are among them; else the text is a report without headings.

A heading is looked for in at most 120 characters at a time: time grows with the length of the text and no faster.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_LINE = re.compile(r"[^\n\r\f\v\x85\u2028\u2029]+")
_REACH = 120  # characters of a line, or before a colon, that can belong to its heading
_INDENT = r"[ \t\xa0\u200b-\u200f\u2060\ufeff]{0,8}"
_INVISIBLE = re.compile(r"[\s\u200b-\u200f\u2060\ufeff]*")
_WORDS = r"(?P<words>[A-Z][A-Za-z ()/,&-]{1,79}?)"
_BEFORE_COLON = re.compile(_INDENT + _WORDS + r" ?:")
_BEFORE_DASH = re.compile(_INDENT + _WORDS + r" ?[-–—](?=\s|$)")
_ALONE = re.compile(_INDENT + r"(?P<words>[A-Z][A-Z ()/,&-]{1,79}?)\s*$")
_BREAK = re.compile(r"[\n\r\f\v\x85\u2028\u2029]")
_CAPITALS = re.compile(r"(?<!\w)[A-Z][A-Z ()/,&-]*$")
_TITLE = re.compile(r"(?:^\s*|[.!?]\s+)(?P<words>[A-Z][a-z]+(?: [A-Za-z]+){0,3}) ?$")
_LETTER = re.compile(r"[^\W\d_]")
_PARAGRAPH = re.compile(r"\n\s*\n|\n[ \t]{0,8}(?=[A-Z][A-Z ()/,-]{1,60}:\s)")
_BOILERPLATE = re.compile(r"^[ \t]*(?:_{8,}|(?:FINAL|PRELIMINARY|INTERIM) REPORT)[ \t]*$", re.MULTILINE)

# phrase in singular, capitals and single blanks -> name; plurals come out of the spelling correction
_PHRASES = {
    "findings": "FINDINGS|FINDINGS AND COMMENTS|REPORT|CHEST FINDINGS|FINDINGS CHEST|RADIOGRAPHIC FINDINGS",
    "impression": "IMPRESSION|CONCLUSION|OPINION|INTERPRETATION|FINAL IMPRESSION|FINAL DIAGNOSIS|PRELIMINARY IMPRESSION"
    "|RADIOLOGICAL DIAGNOSIS|RADIOGRAPHIC IMPRESSION|IMPRESSION AND RECOMMENDATION|IMPRESSION RECOMMENDATION"
    "|IMPRESSION AND PLAN|CONCLUSION AND RECOMMENDATION|FINDINGS AND IMPRESSION|FINDINGS IMPRESSION"
    "|IMPRESSION AND FINDINGS|IMPRESSION FINDINGS",
    "summary": "SUMMARY",
    "indication": "INDICATION|CLINICAL INDICATION|INDICATION FOR STUDY|INDICATION FOR EXAMINATION|INDICATION FOR EXAM"
    "|REASON FOR EXAMINATION|REASON FOR EXAM|REASON FOR THE EXAM|REASON FOR THIS EXAMINATION|REASON FOR STUDY"
    "|REASON FOR THE STUDY|REASON|MEDICAL CONDITION|UNDERLYING MEDICAL CONDITION|ADMITTING DIAGNOSIS|CLINICAL QUESTION",
    "history": "HISTORY|CLINICAL HISTORY|PATIENT HISTORY|CLINICAL INFORMATION|CLINICAL DATA|CLINICAL DETAILS"
    "|HISTORY AND INDICATION|INDICATION AND HISTORY|CLINICAL HISTORY AND INDICATION|HX",
    "technique": "TECHNIQUE|PROCEDURE|PROCEDURE COMMENTS|PROTOCOL|METHOD|VIEWS OBTAINED",
    "comparison": "COMPARISON|COMPARISON STUDY|COMPARISON FILMS|PRIOR STUDY|PRIOR STUDIES|PREVIOUS STUDY",
    "examination": "EXAMINATION|EXAM|STUDY|TYPE OF EXAMINATION|TYPE OF EXAM|EXAM TYPE|EXAMINATION PERFORMED|EXAM DATE"
    "|RADIOGRAPHIC EXAMINATION OF THE CHEST|DATE OF EXAMINATION|DATE OF EXAM",
    "notification": "NOTIFICATION|COMMUNICATION|CRITICAL RESULT|CRITICAL RESULTS",
    "recommendation": "RECOMMENDATION|RECOMMENDATION AND FOLLOW UP|FOLLOW UP RECOMMENDATION|PLAN",
    "wet read": "WET READ|WET READING|WET READ VERSION|PRELIMINARY READ|PRELIMINARY REPORT",
    "addendum": "ADDENDUM|ADDENDUM REPORT",
    "narrative": "NARRATIVE",
    "end": "END OF IMPRESSION|ACCESSION NUMBER|DICTATED BY|SIGNED BY|ELECTRONICALLY SIGNED BY|ATTENDING PHYSICIAN"
    "|ORDERING PHYSICIAN|REFERRING PHYSICIAN|ATTESTATION|REPORT SIGNED BY",
}
_NAMES = {phrase: name for name, phrases in _PHRASES.items() for phrase in phrases.split("|")}
_CORRECTABLE = re.findall(
    r"\w+",
    "FINDINGS IMPRESSION INDICATION COMPARISON TECHNIQUE EXAMINATION CONCLUSION INTERPRETATION RECOMMENDATION"
    " NOTIFICATION ADDENDUM HISTORY INFORMATION NARRATIVE",
)
_VIEW_NOUN = re.compile(r"CHEST|THORAX|VIEWS?|RADIOGRAPHS?|X?RAYS?|FILMS?|CXR")
_VIEW_WORD = re.compile(
    _VIEW_NOUN.pattern
    + r"|PA|AP|LAT|LATERAL|FRONTAL|POSTEROANTERIOR|ANTEROPOSTERIOR|PORTABLE|BEDSIDE|UPRIGHT|SUPINE|ERECT"
    r"|SEMI|SEMIUPRIGHT|SEMIERECT|SITTING|DECUBITUS|LORDOTIC|OBLIQUES?|EXPIRATORY|INSPIRATORY|EXPIRATION|INSPIRATION"
    r"|SINGLE|ONE|TWO|THREE|FOUR|LEFT|RIGHT|BILATERAL|RIBS?|X|OF|THE|AN?|AND|WITH|IN|FOR"
)


@dataclass(frozen=True)
class Section:
    """One section of a report.

    Args:
        name: `findings`, `impression`, `indication` and so on; `preamble` before the first heading, `full report`
            where there is no heading.
        start: where its text starts in the report, behind the colon and one white-space character.
        text: the report's own characters from there to the line break before the next heading.
    """

    name: str
    start: int
    text: str


@dataclass(frozen=True)
class _Heading:
    name: str
    end_before: int  # where the section before it ends
    at: int
    start: int
    views: bool


def sections(report: str) -> list[Section]:
    """The sections of a free-text report, in order; empty ones are kept, and a name may come twice.

    Raises nothing: a text without a heading is one section, `full report`.
    """
    one_line = not _BREAK.search(report.strip())
    found = list(_inline(report) if one_line else _at_lines(report))
    if one_line and not any(h.name in ("findings", "impression") for h in found):
        found = []
    kept: list[_Heading] = []
    for heading in found:
        if not (heading.views and kept and kept[-1].name == "findings"):
            kept.append(heading)
    if not kept:
        return [Section("full report", 0, report)]
    parts = []
    if not _INVISIBLE.fullmatch(report, 0, kept[0].at):
        parts.append(Section("preamble", 0, report[: kept[0].at]))
    ends = [h.end_before for h in kept[1:]] + [len(report)]
    parts += [Section(h.name, h.start, report[h.start : max(h.start, end)]) for h, end in zip(kept, ends, strict=True)]
    return parts


def findings_and_impression(report: str) -> tuple[str, str]:
    """The findings and the impression of a report, `""` where absent.

    The last section of a name that holds a letter wins; `SUMMARY` stands in for an absent impression. Where a report
    has headings but neither section, its body is given as the findings: the narrative, wet read and addendum, and each
    further paragraph below another heading (the first one answers the heading), or else what stands before the first
    heading; without any such text both are `""`. The usual parser leaves such a body in the section above it, the
    `last_paragraph` of MIMIC's users. A text without headings is given whole as the impression, so that short readings
    ("normal") are kept; only lines that hold a title (`FINAL REPORT`) or a rule are left out.
    """
    parts = sections(report)
    if parts[0].name == "full report":
        return "", _body(report)
    last = {part.name: part.text for part in parts if _LETTER.search(part.text)}
    findings = last.get("findings", "")
    impression = last.get("impression") or last.get("summary", "")
    if findings or impression:
        return findings, impression
    below = [_below(part) for part in parts if part.name not in ("preamble", "notification", "recommendation", "end")]
    body = "\n\n".join(text for text in below if text)
    return body or _body(last.get("preamble", "")), ""


def _below(part: Section) -> str:
    paragraphs = [p for p in _paragraphs(part.text) if _LETTER.search(p)]
    return "\n\n".join(paragraphs if part.name in ("narrative", "wet read", "addendum") else paragraphs[1:])


def _paragraphs(text: str) -> list[str]:
    return _PARAGRAPH.split(text.replace("\r\n", "\n").replace("\r", "\n"))


def _body(text: str) -> str:
    """The text without lines that hold a report's title or a rule; the text itself if nothing else is there."""
    body = _BOILERPLATE.sub("", text)
    return body if _LETTER.search(body) else text


def _at_lines(report: str) -> Iterator[_Heading]:
    """Headings at the start of a line."""
    for line in _LINE.finditer(report):
        begin, stop = line.span()
        reach = min(stop, begin + _REACH)
        match = _BEFORE_COLON.match(report, begin, reach)
        name = _name(match["words"]) if match else None
        views = False
        if match and name is None and report[match.end() : match.end() + 1].strip() == "":
            views = _names_views(match["words"])
            name = "findings" if views else None
        if name is None:
            match = _BEFORE_DASH.match(report, begin, reach)
            name = _name(match["words"]) if match else None
        if name is None and stop <= reach:
            match = _ALONE.match(report, begin, stop)
            name = _name(match["words"]) if match else None
        if match and name is not None:
            before = begin - 1 if begin else 0
            yield _Heading(name, before, match.start("words"), _past_blank(report, match.end()), views)


def _inline(report: str) -> Iterator[_Heading]:
    """Headings within a text that has no line breaks."""
    floor, colon = 0, report.find(":")
    while colon >= 0:
        floor = max(floor, colon - _REACH)
        found = None
        if capitals := _CAPITALS.search(report, floor, colon):
            found = _longest_heading(capitals[0], capitals.start())
        elif (title := _TITLE.search(report, floor, colon)) and (name := _name(title["words"])):
            found = name, title.start("words"), False
        if found:
            name, at, views = found
            yield _Heading(name, at, at, _past_blank(report, colon + 1), views)
        floor, colon = colon + 1, report.find(":", colon + 1)


def _longest_heading(words: str, at: int) -> tuple[str, int, bool] | None:
    """Name and place of the heading that most of the last words make, and whether it names views."""
    starts = [0, *(blank.end() for blank in re.finditer(r" +(?=.)", words))]
    for k in starts:
        if name := _name(words[k:]):
            return name, at + k, False
    return next((("findings", at + k, True) for k in starts if _names_views(words[k:])), None)


def _past_blank(report: str, at: int) -> int:
    return at + 1 if report[at : at + 1].isspace() else at


def _name(words: str) -> str | None:
    """The section that a heading opens: capitals or title case, small spelling faults mended; None if unknown."""
    if words.islower():
        return None
    phrase = re.sub(r"[^A-Z]+", " ", words.upper().replace("(S)", "S")).strip()
    if phrase in _NAMES:
        return _NAMES[phrase]
    return _NAMES.get(" ".join(_corrected(word) for word in phrase.split()))


def _names_views(words: str) -> bool:
    """Whether a heading in capitals says only which views of the chest were taken."""
    if words != words.upper():
        return False
    said = re.findall(r"[A-Z]+", words)
    pair = not {"PA", "AP", "FRONTAL"}.isdisjoint(said) and not {"LAT", "LATERAL"}.isdisjoint(said)
    return all(map(_VIEW_WORD.fullmatch, said)) and (pair or any(map(_VIEW_NOUN.fullmatch, said)))


def _corrected(word: str) -> str:
    return next((known for known in _CORRECTABLE if _one_slip(word, known)), word)


def _one_slip(a: str, b: str) -> bool:
    """Whether two words are equal up to one letter changed, added, left out, or swapped with the next."""
    if abs(len(a) - len(b)) > 1:
        return False
    k = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    a, b = a[k:], b[k:]
    swapped = a[:2] == b[:2][::-1] and a[2:] == b[2:]
    return a[1:] == b[1:] or a[1:] == b or a == b[1:] or swapped
