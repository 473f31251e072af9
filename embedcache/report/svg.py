"""What all plots share: colours and marks, a blank figure, and SVG that a page with a strict policy can hold.

Matplotlib writes `style` attributes and one `<style>` element, which such a page refuses; here they become attributes,
and colours of the theme become classes, so that the page's own sheet turns them with light and dark.
"""

from __future__ import annotations

import io
import re
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, QUIET, LINE, CARD = "#1c2126", "#5b6570", "#d5dae0", "#fefefe"
SERIES = ("#0b6fb0", "#c2410c", "#0a7d5c", "#9c3f86", "#8a6100", "#4b5563")  # apart under every colour blindness
HEAT = ("#eff4f9", "#d9e6f2", "#bcd4e8", "#93bbdb", "#5f97c6", "#2f71a9", "#12508a")
ON_LOW, ON_HIGH = "#101010", "#f8f8f8"  # words on the first and on the last of HEAT
N_LOW = 4  # levels of HEAT that carry dark words
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
WIDTH = 900.0  # of a wide plot, in CSS pixels

_CLASSES = {INK: "ink", QUIET: "quiet", LINE: "line", CARD: "card", ON_LOW: "on-low", ON_HIGH: "on-high"}
_CLASSES |= {colour: f"c{k}" for k, colour in enumerate(SERIES)} | {colour: f"h{k}" for k, colour in enumerate(HEAT)}
_ROUNDED = {"d", "x", "y", "transform"}
_UNSEEN = {"Cc", "Cf", "Cs", "Cn", "Co"}  # kinds of characters that XML refuses, or that turn a line around
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "embedcache",
    "text.parse_math": False,
    "axes.unicode_minus": False,
    "font.size": 12.0,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10.0,
    "axes.labelsize": 12.0,
    "axes.labelpad": 7.0,
    "legend.fontsize": 12.0,
    "legend.frameon": False,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.6,
    "text.color": INK,
    "axes.titlecolor": INK,
    "axes.labelcolor": QUIET,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": LINE,
    "xtick.labelcolor": QUIET,
    "xtick.major.size": 0.0,
    "xtick.minor.size": 0.0,
    "xtick.major.pad": 6.0,
    "ytick.color": LINE,
    "ytick.labelcolor": QUIET,
    "ytick.major.size": 0.0,
    "ytick.minor.size": 0.0,
    "ytick.major.pad": 6.0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


@contextmanager
def styled() -> Iterator[None]:
    """Within it plots look the same whatever the user's own matplotlib settings say."""
    import matplotlib

    plain = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that matplotlib's font lacks: the reader's browser has them
        with matplotlib.rc_context({**plain, **_STYLE}):
            yield


def blank(width: float, height: float) -> Figure:
    """A figure of this size in CSS pixels, outside of matplotlib's global state."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=6 / 72, h_pad=6 / 72, wspace=0.03, hspace=0.06)
    return Figure(figsize=(width / 72, height / 72), layout=layout)


def legend(figure: Figure, handles: Sequence[object], *, width: float = WIDTH) -> None:
    """A legend below all panels, in as many columns as its words leave room for."""
    if handles:
        columns = _legend_columns([handle.get_label() for handle in handles], width)  # type: ignore[attr-defined]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(handles)))


def legend_height(names: Sequence[str], *, width: float = WIDTH) -> float:
    """What `legend` takes of a figure's height."""
    if not names:
        return 0.0
    return 18.0 * -(-len(names) // _legend_columns(names, width)) + 14


def _legend_columns(names: Sequence[str], width: float) -> int:
    """How many of the longest name stand side by side."""
    return max(int((width - 20) // (max(map(len, names)) * 7.2 + 50)), 1)


def quiet_grid(axes: Axes, axis: Literal["x", "y"]) -> None:
    """Lines across one axis, and no frame but the other's."""
    axes.grid(axis=axis)
    axes.spines[:].set_visible(False)


def outer_labels(panels: Sequence[Axes], columns: int, *, x: str, y: str) -> None:
    """What the axes are, said below the last panel of each column and beside the first of each row."""
    for k, axes in enumerate(panels):
        if k + columns >= len(panels):
            axes.set_xlabel(x)
            axes.tick_params(labelbottom=True)
        if k % columns == 0:
            axes.set_ylabel(y)


def mark(k: int) -> tuple[str, str]:
    """Colour and marker of the k-th of several: as many as there are, no two look the same before the 30th."""
    return SERIES[k % len(SERIES)], MARKERS[k % len(MARKERS)]


def shown(text: object, length: int = 34) -> str:
    """A stranger's text as one short line of letters that XML may hold."""
    plain = "".join(" " if unicodedata.category(c) in _UNSEEN else c for c in str(text))
    line = " ".join(plain.split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"


def svg_text(figure: Figure, *, title: str) -> str:
    """A figure as SVG that can stand inside a page or in a file of its own.

    Args:
        title: what a screen reader says of it.
    """
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    root = ElementTree.fromstring(out.getvalue())
    names = _names(root)
    for parent in root.iter():
        parent.tag = parent.tag.rpartition("}")[2]
        parent.text, parent.tail = (text if text and text.strip() else None for text in (parent.text, parent.tail))
        for child in [c for c in parent if c.tag.endswith(("}metadata", "}style"))]:
            parent.remove(child)
        parent.attrib = dict(_attributes(parent.attrib, names))
    box = root.get("viewBox", "0 0 0 0").split()
    root.attrib = {
        "xmlns": "http://www.w3.org/2000/svg",
        "class": "plot",
        "viewBox": " ".join(box),
        "width": box[2],
        "height": box[3],
        "role": "img",
        "aria-label": shown(title, 300),
        "stroke-linejoin": "round",
        "font-family": "system-ui, sans-serif",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _names(root: ElementTree.Element) -> dict[str, str]:
    """A name that is the figure's own for each id that something in it refers to."""
    values = [value for element in root.iter() for value in element.attrib.values()]
    used = dict.fromkeys(name for value in values for name in re.findall(r"^#(.+)$|url\(#(.+?)\)", value))
    found = [one or other for one, other in used]
    digest = f"{_checksum(root):08x}"
    return {name: f"p{digest}-{k}" for k, name in enumerate(found)}


def _checksum(root: ElementTree.Element) -> int:
    import zlib

    return zlib.crc32(ElementTree.tostring(root))


def _attributes(given: dict[str, str], names: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Attributes without styles; what has a colour of the theme gets its class."""
    style = given.get("style", "")
    pairs = (part.split(":", 1) for part in style.split(";") if ":" in part)
    flat = {key.strip(): value.strip() for key, value in pairs} | {k: v for k, v in given.items() if k != "style"}
    classes = []
    for key, value in flat.items():
        key = key.rpartition("}")[2]
        if key == "id":
            if value in names:
                yield key, names[value]
        elif key == "href":
            yield key, f"#{names[value[1:]]}"
        elif key == "clip-path":
            yield key, f"url(#{names[value[5:-1]]})"
        elif key in ("fill", "stroke") and value in _CLASSES:
            classes.append(f"{key[0]}-{_CLASSES[value]}")
            yield key, value
        elif key in _ROUNDED:
            if not value.startswith("rotate(-0 "):
                yield key, " ".join(re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.2f}", value).split())
        elif key != "font-family":
            yield key, value
    if classes:
        yield "class", " ".join(classes)
