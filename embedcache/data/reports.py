"""Reports: free text to what a tokenizer is given.

A report becomes one text (as it is, its caption, or one section) or one text for each of its sentences; `ReportPolicy`
says which. No message of this module holds any of a report's text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from embedcache.data.sections import findings_and_impression
from embedcache.errors import InputError, ManifestError
from embedcache.fingerprint import input_digest
from embedcache.settings import STRICT, check

Unit = Literal["report", "caption", "findings", "impression", "sentence"]
Rule = Literal["clean", "paper"]

_SPACE = re.compile(r"\s+")
_LETTER_OR_DIGIT = re.compile(r"[^\W_]")
_BREAK = re.compile(r"[\n\r\f\v\x85\u2028\u2029]")
_EVENT = re.compile(
    r"(?P<number>(?<!\S)[0-9]{1,2}[.)](?=\s|[^\W\d_]|\Z))"
    r"|(?P<stop>[.!?…؟۔।。！？]+[\"'”’»)\]]*)"
    r"|(?P<paragraph>(?:\n|\r(?!\n))\s*[\n\r])"
)
_CLOSING = "\"'”’»)]"
_LONGEST_WORD = 40
_WORD_BEFORE = re.compile(r"(?<!\w)(?:\w\.)*\w+$")
_DOTTED = re.compile(r"(?:\w\.)+\w")
# in the case in which they are written: "MS" and "CA" are diseases
_ABBREVIATIONS = frozenset(
    re.findall(
        r"\S+", "Dr dr DR Drs Mr Mrs Ms Prof prof St vs Vs VS cf approx resp incl e.g E.g i.e I.e fig Fig figs Figs nos"
    )
)
_PAPER_ENUMERATOR = re.compile(r"[0-9]+\.")
_PAPER_TOKEN = re.compile(r"\w+")
_PAPER_MIN_TOKENS = 3


@dataclass(frozen=True)
class ReportPolicy:
    """What of a report is encoded; every field is part of the text encoder's fingerprint.

    Args:
        unit: `report`: the text as it is, white space folded; the rule has no part in it. `caption`: the impression,
            then the findings, of a report with headings, else the whole text. `findings`, `impression`: that section
            alone; a text without headings counts as an impression. `sentence`: each sentence of the caption, as
            `<report id>#s00` and so on.
        rule: `clean` keeps every word; `paper` filters as the paper's code does (see `caption`).
    """

    __pydantic_config__ = STRICT

    unit: Unit = "caption"
    rule: Rule = "clean"

    def __post_init__(self) -> None:
        check(self)


def clean_report(text: str) -> str:
    """A report's text with runs of white space folded to one space.

    Raises:
        InputError: nothing to read, a NUL, or text that is not valid Unicode.
    """
    folded = _folded(_readable(text))
    if not folded:
        raise InputError("empty-report", "the report is empty")
    return folded


def caption(impression: str | float | None, findings: str | float | None, *, rule: Rule = "clean") -> str | None:
    """The caption of a report: its impression, then its findings, in one line.

    `clean` folds white space and drops list numbers ("1.", "2)") where a sentence or an item of a list starts, nothing
    else: "3.2 cm", accents, case, "Normal." stay, and so do the blanks of de-identification ("___", "XXXX"), which hold
    the place of a word in the grammar. `paper` is the paper's code: lower-case runs of ASCII letters, digits and "_",
    cut at full stops and numbers before them, pieces of one token dropped. Both give their own output back unchanged.

    Args:
        impression, findings: text; None and NaN count as empty.

    Returns:
        The caption; None if too short to keep: under `clean` without a letter or digit, under `paper` under 3 tokens.

    Raises:
        InputError: a NUL, or text that is not valid Unicode.
    """
    parts = [_readable(_text_or_empty(part)) for part in (impression, findings)]
    kept = _by_rule(parts, ReportPolicy(rule=rule).rule)
    return " ".join(kept) or None


def sentences(text: str) -> list[str]:
    """A text's sentences, white space folded, pieces without a letter or digit joined to the sentence before them.

    A sentence ends at a full stop, question or exclamation mark before white space, at a blank line, before a number
    that starts an item of a list, and at a stop that a capital follows at once ("clear.No effusion"). It does not end
    within "3.2 cm", "Dr. Smith", "e.g.", "vs.", "5 p.m.", after a list number, or at an ellipsis. No character but
    white space is lost.
    """
    cuts, _ = _scan(text)
    return _pieces(text, cuts)


def report_text(text: str, policy: ReportPolicy) -> str:
    """What the tokenizer is given for a report, or for a sentence that `text_units` made.

    Raises:
        InputError: `nul`, `not-unicode` or `empty-report` as `clean_report`; `no-section`: the unit is not in the
            report; `too-short`: the rule keeps nothing of it; `no-sentence`: no sentence could be made.
    """
    if policy.unit == "sentence":
        folded = _folded(_readable(text))
        if not _LETTER_OR_DIGIT.search(folded):
            raise InputError("no-sentence", f"the report holds no sentence that the rule {policy.rule!r} keeps")
        return folded
    if policy.unit == "report":
        return clean_report(text)
    return " ".join(_kept_parts(text, policy))


def report_sentences(text: str, policy: ReportPolicy) -> list[str]:
    """The sentences of what `report_text` gives, and with its errors; the paper's rule leaves them no full stops."""
    if policy.unit == "sentence":
        return [report_text(text, policy)]
    if policy.unit == "report":
        return sentences(clean_report(text))
    parts = _kept_parts(text, policy)
    return parts if policy.rule == "paper" else [sentence for part in parts for sentence in sentences(part)]


def text_units(reports: Mapping[str, str], policy: ReportPolicy) -> dict[str, str]:
    """The texts to encode by id: the reports themselves, or under the unit `sentence` each of their sentences.

    A report's sentences are numbered from `<report id>#s00`, with three digits where it has more than a hundred. A
    report without a sentence keeps its own id, with its text if `report_text` refuses that, else with an empty text,
    so that it fails by its id later.

    Raises:
        ManifestError: the id of a sentence is the id of another report.
    """
    if policy.unit != "sentence":
        return dict(reports)
    units: dict[str, str] = {}
    for report_id, text in reports.items():
        found = _sentence_units(text, policy)
        if not found:
            units[report_id] = "" if _is_sentence(text, policy) else text
        digits = max(2, len(str(len(found) - 1)))
        for k, sentence in enumerate(found):
            sentence_id = f"{report_id}#s{k:0{digits}d}"
            if sentence_id in reports:
                raise ManifestError(
                    f"report id {sentence_id!r} is also a sentence's of {report_id!r}; rename one of them"
                )
            units[sentence_id] = sentence
    return units


def report_digest(text: str) -> bytes:
    """The digest that stage one keeps beside a report's row, (16 bytes); of the cleaned text.

    Raises:
        InputError: as `clean_report`.
    """
    return input_digest(clean_report(text).encode("utf-8"))


def changed_reports(reports: Iterable[tuple[str, str]], encoded: Mapping[str, np.ndarray]) -> list[str]:
    """Report ids whose text is not what was encoded under them.

    Args:
        reports: report id and text; ids that were not encoded are passed over.
        encoded: the digest kept beside each encoded report, (16,) uint8; all zero means unknown, and passes.
    """
    changed = []
    for report_id, text in reports:
        if report_id in encoded and encoded[report_id].any():
            try:
                same = report_digest(text) == encoded[report_id].tobytes()
            except InputError:
                same = False
            if not same:
                changed.append(report_id)
    return changed


def _folded(text: str) -> str:
    return _SPACE.sub(" ", text).strip()


def _readable(text: str) -> str:
    if "\0" in text:
        raise InputError("nul", "the report holds a NUL character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # it holds the text, so it must not be chained to ours
        pass
    else:
        return text
    raise InputError("not-unicode", "the report holds a lone surrogate, it is not valid Unicode")


def _text_or_empty(part: Any) -> str:
    if part is None or (isinstance(part, float) and math.isnan(part)) or type(part).__name__ == "NAType":
        return ""
    if not isinstance(part, str):
        raise TypeError(f"a section is of type {type(part).__name__}, expected str, None or NaN")
    return part


def _chosen(text: str, unit: Unit) -> list[str]:
    findings, impression = findings_and_impression(text)
    return {"findings": [findings], "impression": [impression]}.get(unit, [impression, findings])


def _kept_parts(text: str, policy: ReportPolicy) -> list[str]:
    """What a policy keeps of a report: sections, or by the paper's rule sentences."""
    clean_report(text)
    chosen = _chosen(text, policy.unit)
    if not any(_folded(part) for part in chosen):
        wanted = "findings and no impression" if policy.unit == "caption" else policy.unit
        raise InputError("no-section", f"the report has no {wanted}; the unit 'report' takes any text")
    kept = _by_rule(chosen, policy.rule)
    if not kept:
        raise InputError("too-short", f"the rule {policy.rule!r} keeps nothing of the report's {policy.unit}")
    return kept


def _by_rule(parts: list[str], rule: Rule) -> list[str]:
    """The pieces that a rule keeps, in order; empty where it keeps nothing."""
    if rule == "paper":
        return _paper_sentences(" ".join(parts))
    cleaned = [_folded(_blanked(part, _scan(part)[1])) for part in parts]
    return [part for part in cleaned if part] if any(map(_LETTER_OR_DIGIT.search, cleaned)) else []


def _paper_sentences(text: str) -> list[str]:
    pieces = [piece for run in _PAPER_ENUMERATOR.split(text) for piece in run.split(".")]
    kept, n_tokens = [], 0
    for piece in pieces:
        tokens = _PAPER_TOKEN.findall(piece.lower())
        plain = [token.encode("ascii", "ignore").decode("ascii") for token in tokens]
        plain = [token for token in plain if token]
        if len(tokens) > 1 and plain:  # the paper counts tokens before it drops what is not ASCII
            kept.append(" ".join(plain))
            n_tokens += len(plain)
    return kept if n_tokens >= _PAPER_MIN_TOKENS else []


def _sentence_units(text: str, policy: ReportPolicy) -> list[str]:
    try:
        chosen = _chosen(_readable(text), policy.unit)
    except InputError:
        return []
    if policy.rule == "paper":
        return [piece for piece in _by_rule(chosen, "paper") if _LETTER_OR_DIGIT.search(piece)]  # not a lone "___"
    scanned = [(part, *_scan(part)) for part in chosen]
    return [piece for part, cuts, numbers in scanned for piece in _pieces(_blanked(part, numbers), cuts)]


def _is_sentence(text: str, policy: ReportPolicy) -> bool:
    try:
        report_text(text, policy)
    except InputError:
        return False
    return True


def _blanked(text: str, numbers: list[tuple[int, int]]) -> str:
    """The text with blanks where the numbers of list items stood, every other character in its place."""
    kept, seen = [], 0
    for begin, end in numbers:
        kept += [text[seen:begin], " " * (end - begin)]
        seen = end
    return "".join([*kept, text[seen:]])


def _pieces(text: str, cuts: list[int]) -> list[str]:
    """The text between the cuts, folded; what holds no letter or digit joins its neighbour."""
    groups: list[list[str]] = []
    worded = False  # whether the last group has a letter or digit
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        piece = _folded(text[begin:end])
        has_word = bool(_LETTER_OR_DIGIT.search(piece))
        if groups and not (has_word and worded):
            groups[-1] += [piece] if piece else []
            worded = worded or has_word
        elif piece:
            groups.append([piece])
            worded = has_word
    return [" ".join(group) for group in groups] if worded else []


def _scan(text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Where sentences end, and the spans of the numbers that start items of a list."""
    cuts: list[int] = []
    numbers: list[tuple[int, int]] = []
    seen, at_start, expected = 0, True, 1
    for event in _EVENT.finditer(text):
        between = text[seen : event.start()]
        seen = event.end()
        at_start = at_start and not between.strip()
        if event["number"]:
            value = int(event["number"][:-1])
            # wrapping can put the number that ends a sentence on a new line: there only a list's next one counts
            below = value == expected and _BREAK.search(between[len(between.rstrip()) :])
            if at_start or below:
                if not at_start:
                    cuts.append(event.start())
                numbers.append(event.span())
                at_start, expected = True, value + 1
                continue
        marks_at = event.end() - 1 if event["number"] else event.start()
        at_start = event["paragraph"] is not None or _ends_sentence(text, marks_at, event.end())
        if at_start:
            cuts.append(event.end())
    return cuts, numbers


def _ends_sentence(text: str, begin: int, end: int) -> bool:
    """Whether the marks and closing brackets at `text[begin:end]` end a sentence."""
    marks = text[begin:end].rstrip(_CLOSING)
    if not marks or "…" in marks or "..." in marks:
        return False
    if end == len(text) or any(mark in marks for mark in "。！？"):
        return True
    before = _WORD_BEFORE.search(text, max(0, begin - _LONGEST_WORD), begin)
    word = before[0] if before else ""
    if not text[end].isspace():
        joined = text[begin:end] == "." and text[end].isupper() and word not in _ABBREVIATIONS
        return joined and (word == "XXXX" or (len(word) > 1 and word[-2:].isalpha() and word[-2:].islower()))
    if marks.strip("."):  # a mark of doubt before a word, as in "? pneumonia", ends nothing
        return begin > 0 and not text[begin - 1].isspace()
    if word in _ABBREVIATIONS:
        return False
    following = _next_character(text, end)
    if word.lower() == "no":
        return not following.isdigit()
    if word.lower() == "etc" or _DOTTED.fullmatch(word):
        return following.isupper()
    initial = len(word) == 1 and word.isupper() and text[max(0, begin - 3) : begin - 1] in (". ", "")
    return not (initial and following.isupper())


def _next_character(text: str, at: int) -> str:
    while at < len(text) and text[at].isspace():
        at += 1
    return text[at : at + 1]
