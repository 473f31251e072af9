"""The contact sheet: what it shows and where, what it refuses to choke on, and that no text becomes markup."""

from __future__ import annotations

import base64
import io
import stat
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from dicoms import dicom, saved
from PIL import Image

from embedcache.data.manifest import Manifest
from embedcache.data.masks import boxes_mask
from embedcache.data.preview import write_preview
from embedcache.errors import SettingsError
from embedcache.report.page import render, write_page

VOID = {"meta", "img", "br"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def all(self, tag: str, css: str | None = None) -> list[Element]:
        found = [c for c in self.children if c.tag == tag and css in (None, c.attributes.get("class"))]
        return found + [deeper for c in self.children for deeper in c.all(tag, css)]

    def words(self) -> str:
        return self.text + "".join(c.words() for c in self.children)

    def shape(self) -> tuple:
        """Elements and attributes, without the words that a reader sees."""
        kept = {name: value for name, value in self.attributes.items() if name != "alt"}
        return (self.tag, kept, [c.shape() for c in self.children])


class Tree(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = Element("page", {})
        self.open = [self.root]
        self.others: list[str] = []
        self.feed(text)
        self.close()
        assert len(self.open) == 1, f"left open: {[e.tag for e in self.open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].text += data

    def handle_comment(self, data: str) -> None:
        self.others.append(data)

    def handle_decl(self, decl: str) -> None:
        self.others.append(decl)

    def handle_pi(self, data: str) -> None:
        self.others.append(data)

    def unknown_decl(self, data: str) -> None:
        self.others.append(data)


def page_of(manifest: Manifest, path: Path, **settings: int) -> Element:
    tree = Tree(write_preview(manifest, path, **settings).read_text("utf-8"))
    assert tree.others == ["DOCTYPE html"]
    return tree.root


def picture(card: Element) -> np.ndarray:
    head, _, body = str(card.all("img")[0].attributes["src"]).partition(",")
    assert head == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body, validate=True))).convert("RGB")).astype(int)


def cards_by_id(page: Element) -> dict[str, Element]:
    return {card.all("h3")[0].text: card for card in page.all("article", "card")}


def one_image(root: Path, *, shape: tuple[int, int] = (40, 80), level: int = 90) -> str:
    Image.fromarray(np.full(shape, level, np.uint8)).save(root / "x.png")
    return "x.png"


def test_a_page_of_a_small_dataset(make_manifest, tmp_path: Path) -> None:
    manifest = make_manifest(60)
    page = page_of(manifest, tmp_path / "made" / "preview.html", n_per_split=4, size=64)
    assert page.all("title")[0].text == "squares: preview"
    assert page.all("h1")[0].text == "squares"
    sections = page.all("section")
    assert [s.all("h2")[0].words() for s in sections] == ["train 4 of 36", "valid 4 of 12", "test 4 of 12"]
    rows = [[cell.words() for cell in row.all("td")] for row in page.all("tr")[1:]]
    assert rows[0] == ["36", "12", "12", "0"]
    assert rows[1] == ["18 of 36 (50%)", "6 of 12 (50%)", "6 of 12 (50%)", "-"]
    frame = manifest.frame.set_index("id")
    for sample_id, card in cards_by_id(page).items():
        assert max(picture(card).shape) == 64
        assert card.all("div", "report")[0].text == frame["report"][sample_id]
        assert card.all("li")[0].text == f"opacity {int(frame['label.opacity'][sample_id])}"
        assert bool(card.all("li", "positive")) == bool(frame["label.opacity"][sample_id])
        expected = np.asarray(Image.open(manifest.path(frame["image"][sample_id])).resize((64, 64)), int)
        assert np.abs(picture(card).mean(axis=2) - expected).mean() < 12


def test_positives_and_negatives_are_drawn_in_turn(tmp_path: Path) -> None:
    image = one_image(tmp_path)
    values = [1] * 3 + [0] * 40 + [None] * 40
    frame = pd.DataFrame({"id": [f"i{k}" for k in range(83)], "image": image, "split": "train", "label.a": values})
    manifest = Manifest(frame, name="made", root=tmp_path)

    def shown(**settings: int) -> list[str]:
        page = page_of(manifest, tmp_path / "p.html", size=8, **settings)
        return [card.all("li")[0].text if card.all("li") else "" for card in page.all("article")]

    assert shown(n_per_split=6) == ["a 1", "a 0", "a 1", "a 0", "a 1", "a 0"]
    assert shown(n_per_split=8) == ["a 1", "a 0", "a 1", "a 0", "a 1", "a 0", "a 0", "a 0"]
    assert shown(n_per_split=46) == ["a 1", "a 0"] * 3 + ["a 0"] * 37 + [""] * 3


def test_the_draw_is_the_seeds(make_manifest, tmp_path: Path) -> None:
    manifest = make_manifest(60)
    again = Manifest(manifest.frame.iloc[::-1], name="squares", root=manifest.root)
    first = list(cards_by_id(page_of(manifest, tmp_path / "a.html", size=8)))
    assert first == list(cards_by_id(page_of(again, tmp_path / "b.html", size=8)))
    assert first != list(cards_by_id(page_of(manifest, tmp_path / "c.html", size=8, seed=1)))
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_splits_several_none_and_no_labels(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"id": ["a", "b", "c"], "image": one_image(tmp_path), "split": ["train+test", "", ""], "age": [45.0, None, 7.5]}
    )
    page = page_of(Manifest(frame, name="made", root=tmp_path), tmp_path / "p.html")
    titles = [s.all("h2")[0].words() for s in page.all("section")]
    assert titles == ["train 1 of 1", "test 1 of 1", "no split 2 of 2"]
    cards = cards_by_id(page)
    assert [d.text for d in cards["a"].all("dd")] == ["45"]
    assert [d.text for d in cards["c"].all("dd")] == ["7.5"]
    assert not cards["b"].all("dl")
    assert not cards["b"].all("ul")
    assert not cards["b"].all("div", "report")
    empty = Manifest(frame.iloc[:0], name="nobody", root=tmp_path)
    assert not page_of(empty, tmp_path / "p.html").all("section")


def test_classes_are_counted_by_their_number(tmp_path: Path) -> None:
    values = [0, 1, 2, 2, None] + [k % 20 for k in range(40)]
    splits = ["train"] * 5 + ["test"] * 40
    frame = pd.DataFrame(
        {"id": [f"i{k}" for k in range(45)], "image": one_image(tmp_path), "split": splits, "label.kind": values}
    )
    page = page_of(Manifest(frame, name="made", root=tmp_path), tmp_path / "p.html", size=8)
    cells = [[span.text for span in cell.all("span")] for cell in page.all("tr")[2].all("td")]
    assert cells[0] == ["0: 1 (25%)", "1: 1 (25%)", "2: 2 (50%)", "1 blank"]
    assert cells[2][-2:] == ["11: 2 (5%)", "and 8 more classes"]
    assert "kind 2" in {label.text for label in page.all("li", "positive")}


def is_coloured(pixels: np.ndarray) -> np.ndarray:
    return pixels[..., 0] - pixels[..., 2] > 40


@pytest.mark.parametrize("kind", ["boxes", "runs", "file", "half"])
def test_a_mask_is_drawn_in_its_place(tmp_path: Path, kind: str) -> None:
    """A box near the top right corner of a wide image: no mirror, turn or transposition has it there."""
    mask = np.zeros((40, 80), bool)
    mask[5:15, 60:75] = True
    Image.fromarray(mask).save(tmp_path / "mask.png")
    text = {
        "boxes": boxes_mask([(60, 5, 15, 10)], (40, 80)),
        "runs": "rle:40x80:" + " ".join(f"{x * 40 + 5} 10" for x in range(60, 75)),
        "file": "mask.png",
        "half": boxes_mask([(30, 2.5, 7.5, 5)], (20, 40)),  # of a mask at half the image's size
    }[kind]
    frame = pd.DataFrame({"id": ["a"], "image": one_image(tmp_path), "mask": text})
    page = page_of(Manifest(frame, name="made", root=tmp_path), tmp_path / "p.html", size=320)
    pixels = picture(page)
    assert pixels.shape == (160, 320, 3)
    rows, columns = np.nonzero(is_coloured(pixels))
    top, bottom = (20, 60) if kind != "half" else (16, 56)  # 2.5 is truncated
    left, right = (240, 300) if kind != "half" else (240, 296)
    assert abs(rows.min() - top) <= 2
    assert abs(rows.max() + 1 - bottom) <= 2
    assert abs(columns.min() - left) <= 2
    assert abs(columns.max() + 1 - right) <= 2
    outside = np.ones(pixels.shape[:2], bool)
    outside[top - 9 : bottom + 9, left - 9 : right + 9] = False
    assert np.abs(pixels[outside] - 90).max() <= 4
    border, middle = pixels[top, (left + right) // 2], pixels[(top + bottom) // 2, (left + right) // 2]
    assert border[0] > middle[0] + 60 > 90 + 60  # the outline is stronger than the tint
    assert "% of the image" in page.all("p", "quiet")[1].text


def test_what_is_said_of_masks(tmp_path: Path) -> None:
    masks = {
        "blank": None,
        "empty": "rle:40x80:",
        "speck": "boxes:40x80:3,3,1,1",
        "swapped": "rle:80x40:",
        "broken": "rle:40x80:1",
        "absent": "masks/none.png",
    }
    frame = pd.DataFrame({"id": list(masks), "image": one_image(tmp_path), "mask": list(masks.values())})
    page = page_of(Manifest(frame, name="made", root=tmp_path), tmp_path / "p.html", size=20)
    cards = cards_by_id(page)
    notes = {name: "".join(p.text for p in card.all("p")) for name, card in cards.items()}
    assert notes["blank"] == ""
    assert notes["empty"] == "mask: empty"
    assert notes["speck"] == "mask: 0.0% of the image, too little to be seen at this size"
    assert "height and width are swapped" in notes["swapped"]
    assert "expected pairs of start and length" in notes["broken"]
    assert "no file at its path" in notes["absent"]
    for name in ("swapped", "broken", "absent"):
        assert cards[name].all("p", "bad"), name
        assert picture(cards[name]).shape == (10, 20, 3)


def test_a_dicom_file_is_shown(tmp_path: Path) -> None:
    values = np.zeros((40, 80), np.uint16)
    values[:20, :40] = 4000
    (tmp_path / "x.dcm").write_bytes(saved(dicom(values, BitsStored=12, HighBit=11, PatientName="CANARY^ZQ")))
    frame = pd.DataFrame({"id": ["a"], "image": ["x.dcm"], "mask": ["boxes:40x80:60,25,10,10"]})
    page = page_of(Manifest(frame, name="made", root=tmp_path), tmp_path / "p.html", size=80)
    pixels = picture(page)
    assert pixels.shape == (40, 80, 3)
    assert pixels[:18, :38].min() > 240
    assert is_coloured(pixels)[26:34, 61:69].mean() > 0.9
    assert not is_coloured(pixels)[:20].any()
    assert b"CANARY" not in (tmp_path / "p.html").read_bytes()


def test_an_input_that_cannot_be_read_is_a_card_that_says_so(tmp_path: Path) -> None:
    one_image(tmp_path)
    (tmp_path / "cut.png").write_bytes((tmp_path / "x.png").read_bytes()[:60])
    (tmp_path / "page.jpg").write_bytes(b"<html>not found</html>")
    (tmp_path / "folder.png").mkdir()
    reasons = {
        "x.png": "", "cut.png": "truncated", "page.jpg": "unknown-format", "none.png": "missing", "": "no-path",
        "folder.png": "not-a-file", "../x.png": "missing", "/etc/hosts": "outside-root",
    }  # fmt: skip
    frame = pd.DataFrame({"id": [f"i {name}" for name in reasons], "image": list(reasons), "report": "Clear lungs."})
    frame["mask"] = "rle:1x1:"
    page = page_of(Manifest(frame, name="made", root=tmp_path), tmp_path / "p.html", n_per_split=99)
    cards = cards_by_id(page)
    assert set(cards) == set(frame["id"])
    for name, reason in reasons.items():
        card = cards[f"i {name}"]
        assert bool(card.all("img")) == (not reason)
        assert [s.text for s in card.all("strong")] == ([reason] if reason else [])
        assert card.all("div", "report")[0].text == "Clear lungs."
    assert str(tmp_path) not in (tmp_path / "p.html").read_text()


def test_odd_images_and_reports(tmp_path: Path) -> None:
    Image.new("L", (4000, 2), 9).save(tmp_path / "wide.png")
    Image.new("L", (1, 1), 9).save(tmp_path / "dot.png")
    report = "  First line\n\tsecond <b>line</b> & more \u202eturned\u202c \ud800 end  " + "word " * 20_000
    frame = pd.DataFrame({"id": ["wide", "dot"], "image": ["wide.png", "dot.png"], "report_id": "r"})
    frame["report"] = pd.Series([report] * 2, dtype=object)  # as pandas' own texts hold no half surrogate pairs
    cards = cards_by_id(page_of(Manifest(frame, name="made", root=tmp_path), tmp_path / "p.html", size=100))
    assert picture(cards["wide"]).shape == (1, 100, 3)
    assert picture(cards["dot"]).shape == (100, 100, 3)
    assert cards["dot"].all("div", "report")[0].text == report.replace("\ud800", "?")


PAYLOADS = [
    "<script>alert(1)</script>", "</script><script>alert(1)</script>", "<ScRiPt>alert(1)</sCrIpT>",
    "<script src=//evil.example/x.js></script>", "<script/src=x>", "<scr<script>ipt>alert(1)</scr</script>ipt>",
    "<img src=x onerror=alert(1)>", '"><img src=x onerror=alert(1)>', "'><img src=x onerror=alert(1)>",
    "<img/src='x'/onerror=alert(1)>", "<img src=`x` onerror=alert(1)>", "<IMG SRC=JaVaScRiPt:alert(1)>",
    "<svg onload=alert(1)>", "<svg/onload=alert(1)//", "<svg><script>alert(1)</script></svg>",
    "<svg><animate onbegin=alert(1) attributeName=x dur=1s>", "<math><mtext></mtext><mglyph><style><img src=x>",
    "<iframe src=javascript:alert(1)></iframe>", "<iframe srcdoc='<script>alert(1)</script>'>",
    "<object data=javascript:alert(1)>", "<embed src=javascript:alert(1)>", "<applet code=x>",
    "<body onload=alert(1)>", "</body></html><body onload=alert(1)>", "<base href=//evil.example/>",
    "<meta http-equiv=refresh content='0;url=//evil.example'>", "<meta http-equiv=Content-Security-Policy content=''>",
    "<link rel=stylesheet href=//evil.example/x.css>", "<style>*{background:url(//evil.example)}</style>",
    "</style><script>alert(1)</script>", "</title><script>alert(1)</script>", "</textarea><script>alert(1)</script>",
    "</h1></section><form action=//evil.example><input name=q>", "<details open ontoggle=alert(1)>",
    "<a href=javascript:alert(1)>x</a>", "<a href='data:text/html,<script>alert(1)</script>'>x</a>",
    "<input autofocus onfocus=alert(1)>", "<select autofocus onfocus=alert(1)>", "<marquee onstart=alert(1)>",
    "<video><source onerror=alert(1)></video>", "<audio src=x onerror=alert(1)>", "<table background=javascript:x>",
    '" onmouseover="alert(1)', "' onmouseover='alert(1)", '" autofocus onfocus=alert(1) x="',
    "` onmouseover=alert(1) `",
    "<!--<img src=x onerror=alert(1)>-->", "--><script>alert(1)</script><!--", "<![CDATA[<script>alert(1)</script>]]>",
    "<?php echo 1 ?>", "<!DOCTYPE x [<!ENTITY y SYSTEM 'file:///etc/passwd'>]>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;script&#62;alert(1)&#60;/script&#62;", "&quot;&gt;&lt;img src=x onerror=alert(1)&gt;",
    "{{ 7 * 7 }}", "{% include '/etc/passwd' %}", "{{ ''.__class__.__mro__ }}", "{# gone #}",
    "${7*7} #{7*7} <%= 7*7 %>",
    "\\u003cscript\\u003ealert(1)", "%3Cscript%3Ealert(1)%3C/script%3E", "+ADw-script+AD4-alert(1)",
    "\u2028<script>alert(1)</script>\u2029", "＜script＞alert(1)＜/script＞", "\ufeff<script>alert(1)</script>",
    "<\x0bimg src=x onerror=alert(1)>", "<img\x0csrc=x\x0conerror=alert(1)>", "javascript:alert(1)",
    "<", "<<", "&", "\"'",
]  # fmt: skip


def made_of(text: str, root: Path) -> Manifest:
    """A manifest that has this text wherever a manifest has text."""
    frame = pd.DataFrame(
        {
            "id": [f"1 {text}", f"2 {text}", f"3 {text}"],
            "image": ["x.png", "x.png", text],
            "report": [f"{text} {text}", f"x{text}", text],
            "mask": ["rle:40x80:5 9", f"rle:40x80:{text}", text],
            "split": ["train", "", "test"],
            **dict.fromkeys(("patient", "study", "view", "sex", "site", "source", "age", "acquired"), text),
            f"label.{text}": [1, 0, 1],
            f"label.x{text}": [2, None, 1],
        }
    )
    return Manifest(frame, name=text, root=root)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_text_becomes_markup(tmp_path: Path, payload: str) -> None:
    assert len(set(PAYLOADS)) >= 50
    one_image(tmp_path)
    harmless = page_of(made_of("harmless", tmp_path), tmp_path / "harmless.html", size=16)
    page = page_of(made_of(payload, tmp_path), tmp_path / "p.html", size=16)
    assert page.shape() == harmless.shape()
    assert page.all("title")[0].text == f"{payload}: preview"
    assert page.all("h1")[0].text == payload
    card = cards_by_id(page)[f"1 {payload}"]
    assert card.all("div", "report")[0].text == f"{payload} {payload}"
    assert card.all("img")[0].attributes["alt"] == f"radiograph 1 {payload}"
    assert [d.text for d in card.all("dd")] == [payload] * 4
    assert [label.text for label in card.all("li")] == [f"{payload} 1", f"x{payload} 2"]


def test_the_page_runs_and_loads_nothing(make_manifest, tmp_path: Path) -> None:
    page = page_of(make_manifest(), tmp_path / "p.html")
    policies = [m.attributes["content"] for m in page.all("meta") if "http-equiv" in m.attributes]
    assert len(policies) == 1
    assert str(policies[0]).startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert not page.all("script")
    for element in [e for tag in ("img", "a", "link", "style") for e in page.all(tag)]:
        assert str(element.attributes.get("src", "data:")).startswith("data:")
        assert "href" not in element.attributes
        assert "url(" not in element.text
        assert "@import" not in element.text


def test_it_is_written_whole_and_for_its_owner_alone(make_manifest, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "p.html"
    path.write_text("before")
    path.chmod(0o644)
    manifest = make_manifest()
    assert write_preview(manifest, str(path), size=8) == path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text().startswith("<!DOCTYPE html>")
    path.write_text("before")

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_preview(manifest, path, size=8)
    assert path.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.html", "squares"]


def test_settings_that_make_no_sense_are_refused(make_manifest, tmp_path: Path) -> None:
    manifest = make_manifest()
    with pytest.raises(SettingsError, match="n_per_split is 0, expected 1 or more"):
        write_preview(manifest, tmp_path / "p.html", n_per_split=0)
    with pytest.raises(SettingsError, match="size is -5, expected 1 or more"):
        write_preview(manifest, tmp_path / "p.html", size=-5)
    with pytest.raises(SettingsError, match="a directory, expected the path of a page"):
        write_preview(manifest, tmp_path)


def test_a_value_that_a_template_lacks_is_an_error() -> None:
    from jinja2 import UndefinedError

    with pytest.raises(UndefinedError, match="name"):
        render("preview.html.j2", splits=[], labels=[])


def test_a_page_is_utf_8(tmp_path: Path) -> None:
    write_page(tmp_path / "deep" / "p.html", "größer \ud83d ≥")
    assert (tmp_path / "deep" / "p.html").read_text("utf-8") == "größer ? ≥"
