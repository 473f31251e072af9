"""Plots as SVG: what is in them, and that odd numbers and odd names neither fail nor become markup."""

from __future__ import annotations

import subprocess
import sys
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas as pd
import pytest
from made_contents import contents

from embedcache.report.contents import EmbeddingMap
from embedcache.report.curve_plots import MOST_POINTS, embedding_map, training_curves
from embedcache.report.plots import (
    MOST_ROWS,
    differences_plot,
    heat_map,
    intervals_plot,
    label_efficiency,
    marks,
)
from embedcache.report.svg import HEAT, shown

ODD = [
    "$x$",
    "a_$",
    "<b>&\"'</b>",
    "\x00\x0b\x1b",
    "\ud800 half",
    "\u202eturned",
    "胸部 🫁",
    "x" * 300,
    "\\frac{1}",
    "",
]


def parsed(svg: str) -> ElementTree.Element:
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        assert "style" not in element.attrib
        assert element.tag.rpartition("}")[2] in {
            "svg",
            "g",
            "path",
            "use",
            "defs",
            "text",
            "tspan",
            "clipPath",
            "rect",
        }
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    uses = [str(element.get("href"))[1:] for element in root.iter() if element.get("href")]
    assert set(uses) <= set(ids)
    return root


def words(svg: str) -> list[str]:
    return ["".join(text.itertext()) for text in parsed(svg).iter("{http://www.w3.org/2000/svg}text")]


def scores(pairs: list[tuple[str, str]], *, controls: tuple[str, ...] = ("", "no-adaptor")) -> pd.DataFrame:
    rows = [
        {"image": image, "text": text, "control": control, "n_train": n, "value": 0.5 + k / 100 + n / 1e5}
        for k, (image, text) in enumerate(pairs)
        for control in controls
        for n in (10, 100, 1000)
    ]
    texts = {name: pd.Series([row[name] for row in rows], dtype=object) for name in ("image", "text")}
    table = pd.DataFrame([{**row, "image": ""} for row in rows]).assign(**texts)
    return table.assign(low=table["value"] - 0.05, high=table["value"] + 0.05)


def many() -> list[tuple[str, str]]:
    return [(f"image {i}", f"text {t}") for i in range(5) for t in range(3)]


def test_dots_lie_where_their_values_are() -> None:
    table = scores([("a", "t"), ("b", "t")], controls=("",)).query("n_train == 10")
    svg = intervals_plot(table.assign(value=[0.2, 0.4], low=[0.1, 0.4], high=[0.3, 0.4]), metric="auroc", title="dots")
    assert {"a + t", "b + t", "AUROC"} <= set(words(svg))
    dots = [e for e in parsed(svg).iter() if e.tag.endswith("use") and "f-c" in e.get("class", "")]
    first, second = (float(str(dot.get("x"))) for dot in dots)
    bars = [e for e in parsed(svg).iter() if e.tag.endswith("path") and "s-c0" in e.get("class", "")]
    left, right = (float(str(bars[0].get("d")).split()[k]) for k in (1, 4))
    assert right - first == pytest.approx(first - left, abs=0.03)
    assert second - first == pytest.approx(right - left, abs=0.03)


def test_a_control_is_a_hollow_mark_with_a_name() -> None:
    svg = intervals_plot(scores([("a", "")]).query("n_train == 10"), metric="auroc", title="t", chance=0.5)
    assert {"a", "no-adaptor", "result, 95% interval"} <= set(words(svg))
    assert "f-card s-quiet" in svg


def test_a_heat_map_says_each_value_and_shades_by_column() -> None:
    values = pd.DataFrame({"opacity\nAUROC": [0.6, 0.9, np.nan], "masks\nDice": [0.31, 0.30, 0.32]}, index=list("abc"))
    svg = heat_map(values, title="heat")
    assert {"0.600", "0.900", "none", "0.310", "opacity", "AUROC", "a"} <= set(words(svg))
    levels = [e.get("class", "") for e in parsed(svg).iter() if "f-h" in e.get("class", "")]
    assert levels[0].split()[0] == "f-h0"
    assert levels[1].split()[0] == f"f-h{len(HEAT) - 1}"
    assert {level.split()[0] for level in levels[2:]} <= {"f-h2", "f-h3", "f-h4"}  # 0.02 apart is hardly a shade
    assert svg.count("f-on-high") == 1 + sum("f-h4" in level for level in levels[2:])


def test_label_efficiency_of_few_and_of_many() -> None:
    few = words(label_efficiency(scores([("a", "t"), ("b", "t")]), metric="auroc", title="t"))
    assert {"10", "100", "1,000", "a + t", "b + t", "without the Adaptor", "labels to learn from"} <= set(few)
    every = label_efficiency(scores(many()), metric="auroc", title="t")
    assert {*(f"image {i}" for i in range(5)), *(f"text {t}" for t in range(3)), "other image encoders"} <= set(
        words(every)
    )
    assert "without the Adaptor" not in words(
        label_efficiency(scores([("a", "")], controls=("",)), metric="f", title="")
    )


def test_many_encoders_are_told_apart() -> None:
    assert len(set(marks(many()).values())) == 15
    assert len(set(marks([(f"i{k}", "t") for k in range(15)]).values())) == 15
    assert len(set(marks([("i", f"t{k}") for k in range(8)]).values())) == 8
    svg = intervals_plot(scores(many()).query("n_train == 10"), metric="auroc", title="t")
    assert {f"image {i} + text {t}" for i in range(5) for t in range(3)} <= set(words(svg))
    heights = [float(str(e.get("y"))) for e in parsed(svg).iter() if (e.text or "").startswith("image ")]
    assert min(np.diff(sorted(heights))) > 24


def test_differences_have_a_zero_line_and_fill_what_is_real() -> None:
    table = contents().differences
    table = table.assign(verdict=np.where(table["p_adjusted"] < 0.05, "a", ""))
    svg = differences_plot(table, metric="auroc", title="t")
    assert sum("all labels" in word for word in words(svg)) == 2
    dots = [e.get("class", "") for e in parsed(svg).iter() if e.tag.endswith("use") and "c0" in e.get("class", "")]
    assert sorted(dots) == ["f-c0 s-card"] * 2 + ["f-card s-c0"] * 2
    lots = pd.concat([table] * 30, ignore_index=True)
    lots["p_adjusted"] = np.arange(len(lots)) / len(lots)
    shown_rows = [word for word in words(differences_plot(lots, metric="auroc", title="t")) if "−" in word]
    assert len(shown_rows) == MOST_ROWS + 1  # and the axis


def test_training_of_one_epoch_and_of_many() -> None:
    curves = contents().curves
    many_words = words(training_curves(curves, title="t"))
    assert {"vit + bert", "resnet + bert", "epoch", "0.875 at 3", "validation, lowest marked"} <= set(many_words)
    one = training_curves(curves[curves["epoch"] == 0], title="t")
    assert "3.5 at 0" in words(one)
    assert one.count("<use") >= 4 + 2  # a mark for each loss, and one around the lowest
    assert parsed(training_curves(curves.assign(valid_loss=np.nan), title="t")) is not None


def test_a_map_names_classes_and_thins_many_points() -> None:
    of = EmbeddingMap("e", "l", np.random.default_rng(0).normal(size=(5000, 2)), np.arange(5000) % 3, ("no", "yes"), "")
    svg = embedding_map(of, title="map")
    assert {"no", "yes", "2"} <= set(words(svg))
    assert svg.count("<use") == MOST_POINTS + 3
    assert "blank" in words(embedding_map(contents().maps[0], title="map"))
    unlabelled = EmbeddingMap("e", "l", np.zeros((2, 2)), np.full(2, np.nan), (), "")
    assert words(embedding_map(unlabelled, title="map")) == ["blank"]


@pytest.mark.parametrize("drop", ["all", "ends"])
def test_undefined_values_leave_a_gap(drop: str) -> None:
    nan = {"low": np.nan, "high": np.nan} | ({"value": np.nan} if drop == "all" else {})
    table = scores([("a", "t")]).assign(**nan)
    for svg in (
        intervals_plot(table, metric="auroc", title="t"),
        label_efficiency(table, metric="auroc", title="t"),
        heat_map(pd.DataFrame({"x": [np.nan]}, index=["a"]), title="t"),
        differences_plot(contents().differences.assign(**nan, p_adjusted=np.nan), metric="auroc", title="t"),
    ):
        assert "nan" not in svg


def test_odd_names_are_shown_as_they_are_and_nothing_warns(recwarn: pytest.WarningsRecorder) -> None:
    pairs = [(name, "t") for name in ODD[:5]]
    table = scores(pairs)
    for svg in (
        heat_map(
            pd.DataFrame(np.zeros((len(ODD), 1)), index=pd.Index(ODD, dtype=object), columns=["$a\n$b_"]),
            title="<t> $x$ \x00",
        ),
        intervals_plot(table, metric="a_$", title='"'),
        label_efficiency(table, metric="$", title="'"),
        training_curves(
            table.rename(columns={"n_train": "epoch", "low": "train_loss", "high": "valid_loss"}), title=""
        ),
    ):
        assert any("<b>&\"'</b>" in word for word in words(svg))
        assert any(word.startswith("$x$") for word in words(svg))
        svg.encode("utf-8")
    assert not recwarn.list
    assert shown("x" * 300) == "x" * 33 + "…"
    assert shown(" a\n\tb\u202e ") == "a b"


def test_plots_do_not_change_and_leave_matplotlib_alone() -> None:
    before = dict(matplotlib.rcParams)
    first = heat_map(pd.DataFrame({"x": [0.1]}, index=["a"]), title="t")
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"font.size": 30, "axes.edgecolor": "red", "svg.fonttype": "path"}):
        assert heat_map(pd.DataFrame({"x": [0.1]}, index=["a"]), title="t") == first


def test_the_library_loads_no_matplotlib_until_something_is_drawn() -> None:
    code = "import sys, embedcache, embedcache.report.run_page; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
