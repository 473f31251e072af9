"""Tables of a run as files: CSV, Markdown, LaTeX."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from embedcache.errors import OutputError
from embedcache.report.paper_tables import escaped_latex, escaped_markdown
from embedcache.report.run_text import run_text
from embedcache.report.score_files import write_score_files

PLACE = {"image": "dinov2-s", "text": "minilm"}
SCORE = {
    **PLACE, "label": "opacity", "test": "internal", "control": "", "head": "mlp", "fraction": 0.01, "shots": 0,
    "metric": "auroc", "class": "", "value": 0.75, "low": 0.691, "high": 0.812, "n_train": 4, "n_valid": 0,
    "n_test": 80, "headline": True,
}  # fmt: skip
MASK = {
    **PLACE, "control": "", "decoder": "linear", "fraction": 1.0, "n_train": 9, "n_train_positive": 4, "n_valid": 3,
    "n_test": 8, "n_positive": 5, "value": 0.6, "low": 0.5, "high": 0.7,
}  # fmt: skip
MASK_NAMES = ("dice", "empty_mask_dice", "dice_on_positives", "iou", "predicted_empty")
FOUND = {
    **PLACE, "control": "", "direction": "image_to_report", "metric": "recall@1", "label": "", "chance": 0.1,
    "one_order": 0.2, "n_queries": 9, "n_candidates": 7, "value": 0.3, "low": 0.2, "high": 0.4,
}  # fmt: skip
PROMPTED = {
    **PLACE, "label": "opacity", "value": 0.6, "low": 0.5, "high": 0.7, "n_wordings": 4, "worst_wording": 0.4,
    "best_wording": 0.7, "inverted": False, "n_test": 8, "n_positive": 3,
}  # fmt: skip
DIFFERENCE = {
    "data": "mine", "task": "probe", "label": "opacity", "setting": "mlp, 100%", "metric": "auroc", "a": "x + t",
    "b": "y + t", "value": 0.041, "low": 0.01, "high": 0.07, "p_value": 0.001, "p_adjusted": 0.004, "method": "DeLong",
    "fairness": "fair", "verdict": "a",
}  # fmt: skip
HOSTILE = (
    "\\input{/etc/passwd}", "a}{b", "$x_1^2$ & 50% #1 ~ <b>|", "line\none\r\n\nline\u2028two", "*x* _y_ `z` [a](b)",
    "[0]", "*", "Füße 肺 \u202egnp", "\x00\x1b[0m", "<script>alert(1)</script> &lt;", "", "{{{",
)  # fmt: skip


def table(*changes: dict, of: dict) -> pd.DataFrame:
    return pd.DataFrame([of | change for change in changes])


def masks(*changes: dict) -> pd.DataFrame:
    return table(*({"metric": name} | change for change in changes for name in MASK_NAMES), of=MASK)


def written(folder: Path, tables: dict[str, pd.DataFrame]) -> tuple[str, str]:
    """Markdown and LaTeX, LaTeX checked."""
    write_score_files(folder, tables)
    latex = (folder / "tables.tex").read_text("utf-8")
    check_latex(latex)
    return (folder / "tables.md").read_text("utf-8"), latex


def check_latex(text: str) -> None:
    """Braces and environments close, `$` too, and each row has the columns that its table declares."""
    body = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("%"))
    bare = re.sub(r"\\[{}$&#_%]", "", body)  # what stays means something to LaTeX
    depth = 0
    for sign in bare:
        depth += {"{": 1, "}": -1}.get(sign, 0)
        assert depth >= 0
    assert depth == 0
    assert bare.count("$") % 2 == 0
    assert set("#%^~_<>|") & set(bare.replace("$<$", "")) == set()
    opened: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", bare):
        if kind == "begin":
            opened.append(name)
        else:
            assert opened.pop() == name
    assert opened == []
    commands = set(re.findall(r"\\([a-z]+)", bare))
    assert commands <= {
        "begin", "end", "centering", "footnotesize", "caption", "label", "toprule", "midrule", "bottomrule", "textbf",
        "textbackslash", "textasciicircum", "textasciitilde", "textless", "textgreater", "textbar",
    }  # fmt: skip
    for columns, rows in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", bare, re.DOTALL):
        lines = [line for line in rows.splitlines() if line.endswith(r" \\")]
        assert len(lines) >= 2
        assert {line.count("&") + 1 for line in lines} == {len(columns)}
        assert not any(line.startswith(("[", "*")) for line in lines)


def rows_of(markdown: str) -> list[list[str]]:
    return [line.strip("|").split(" | ") for line in markdown.splitlines() if line.startswith("|")]


def test_scores_stand_as_in_a_paper(tmp_path: Path) -> None:
    scores = table(
        {},
        {"fraction": 1.0, "n_train": 240, "n_valid": 60},
        {"control": "no-adaptor", "value": 0.6},
        {"metric": "accuracy", "value": 0.111, "headline": False},
        of=SCORE,
    )
    markdown, latex = written(tmp_path, {"scores": scores})
    assert markdown.startswith(
        "**Table 1.** AUROC of opacity, by the amount of labels. Test set: n = 80. In brackets: "
    )
    heads, _, result, control = rows_of(markdown)
    assert [head.strip() for head in heads] == [
        "image encoder", "text encoder", "setting", "head", "1% (4 labels, 0 to choose by)",
        "100% (240 labels, 60 to choose by)",
    ]  # fmt: skip
    assert [cell.strip() for cell in result] == [
        "**dinov2-s**", "**minilm**", "**result**", "**mlp**", "**0.750 [0.691, 0.812]**", "**0.750 [0.691, 0.812]**",
    ]  # fmt: skip
    assert [cell.strip() for cell in control][2:5] == ["no-adaptor", "mlp", "0.600 [0.691, 0.812]"]
    assert r"\usepackage{booktabs}" in latex.splitlines()[0]
    assert r"\begin{tabular}{llllcc}" in latex
    assert r"\textbf{result} & \textbf{mlp} & \textbf{0.750 [0.691, 0.812]}" in latex
    assert r"dinov2-s & minilm & no-adaptor & mlp & 0.600 [0.691, 0.812] &  \\" in latex
    assert "0.111" not in markdown
    again = pd.read_csv(tmp_path / "scores.csv", keep_default_na=False)
    pd.testing.assert_frame_equal(again, scores, check_dtype=False)


def test_markdown_and_latex_hold_what_the_plain_text_holds(tmp_path: Path) -> None:
    gains = table({"control": "no-adaptor", "value": -0.1, "low": -0.2, "high": 0.0, "p_holm": 0.2}, of=SCORE)
    tables = {
        "scores": table({}, {"control": "no-adaptor"}, of=SCORE),
        "gains": gains,
        "calibration": table(
            {f"{name}{end}": 0.5 for name in ("brier", "slope", "intercept") for end in ("", "_low", "_high")},
            of=SCORE | {"method": "platt", "ece": 0.02},
        ),
        "subgroups": table(
            {"auroc": 0.9, "auroc_low": 0.8, "auroc_high": 1.0},
            of=SCORE | {"attribute": "sex", "group": "F", "n": 40, "n_positive": 30, "suppressed": False},
        ),
        "mask_scores": masks({}, {"control": "mean-mask"}),
        "mask_gains": masks({"control": "mean-mask", "p_holm": 0.001}),
        "retrieval_scores": table({}, {"control": "untrained-adaptor", "value": 0.1}, of=FOUND),
        "zeroshot_scores": table({"metric": "auroc"}, {"metric": "average_precision"}, of=PROMPTED),
    }
    markdown, latex = written(tmp_path, tables)
    plain = [re.split(r" {2,}", line.strip()) for line in run_text(tables).splitlines() if "  " in line]
    assert [
        [cell.strip(" *") for cell in row if cell.strip()] for row in rows_of(markdown) if ":---" not in row[0]
    ] == [[cell.replace("<", "&lt;") for cell in row] for row in plain]
    assert "$-$0.100 [$-$0.200, +0.000] p = 0.20" in latex
    assert "+0.600 [+0.500, +0.700] p $<$ 0.01" in latex
    assert latex.count(r"\begin{table}") == markdown.count("**Table ") == 8
    assert latex.count(r"\textbf{result}") == 3
    assert "n = 9 queries among 7" in markdown
    assert "Test set: n = 8, 5 of them with a mask" in latex


def test_differences_name_what_is_really_better(tmp_path: Path) -> None:
    differences = table(
        {},
        {"setting": "mlp, 1%", "value": -0.01, "low": -0.03, "p_adjusted": 0.4, "verdict": ""},
        {"task": "retrieval", "label": "", "metric": "recall@10", "verdict": "b", "method": "bootstrap"},
        {"setting": "linear", "value": np.nan, "low": np.nan, "high": np.nan, "p_adjusted": np.nan, "verdict": ""},
        of=DIFFERENCE,
    )
    markdown, latex = written(tmp_path, {"differences": differences})
    first, second = markdown.split("**Table 2.**")
    assert "Differences in AUROC of opacity (probe) between two pairs of encoders" in first
    assert "95% interval (DeLong)" in first
    assert "95% interval (bootstrap)" in second
    assert "| mlp, 100% | x + t | y + t | +0.041 [+0.010, +0.070] | p &lt; 0.01 | fair | x + t |" in first
    assert "| mlp, 1% | x + t | y + t | -0.010 [-0.030, +0.070] | p = 0.40 | fair | not told apart |" in first
    assert "| linear | x + t | y + t | undefined |  |  |  |" in first
    assert "| y + t |" in second.splitlines()[-1][-10:]
    assert "$-$0.010 [$-$0.030, +0.070]" in latex


def test_each_dataset_has_tables_of_its_own(tmp_path: Path) -> None:
    scores = table({"data": "mine"}, {"data": "theirs", "value": 0.9, "n_test": 7}, of=SCORE)
    tables = {"scores": scores, "mask_scores": masks({"data": "mine"}), "differences": table({}, of=DIFFERENCE)}
    markdown, latex = written(tmp_path, tables)
    assert [line.split(",")[0] for line in markdown.splitlines() if line.startswith("**Table")][:2] == [
        "**Table 1.** AUROC of opacity on mine",
        "**Table 2.** AUROC of opacity on theirs",
    ]
    assert "Masks on mine." in markdown
    assert "AUROC of opacity on mine (probe)" in markdown
    assert latex.count("0.900 [0.691, 0.812]") == 1
    assert "theirs: auroc of opacity (test 7" in run_text({"scores": scores} | empty_probe())
    markdown, _ = written(tmp_path, {"scores": scores[:1]})
    assert "AUROC of opacity, by" in markdown


def empty_probe() -> dict[str, pd.DataFrame]:
    calibration = table(
        {f"{name}{end}": 0.5 for name in ("brier", "slope", "intercept") for end in ("", "_low", "_high")},
        of=SCORE | {"method": "platt", "ece": 0.02},
    )
    return {"gains": pd.DataFrame(), "calibration": calibration, "subgroups": pd.DataFrame()}


@pytest.mark.parametrize("hostile", HOSTILE, ids=ascii)
def test_no_text_becomes_markup(tmp_path: Path, hostile: str) -> None:
    named = {"image": hostile, "text": hostile}
    tables = {
        "scores": table(
            named | {"label": hostile, "class": hostile, "head": hostile, "test": hostile},
            named | {"label": hostile, "class": hostile, "test": hostile, "control": hostile},
            of=SCORE,
        ),
        "retrieval_scores": table(named, named | {"metric": "precision@1", "label": hostile}, of=FOUND),
        "zeroshot_scores": table(
            named | {"metric": "auroc", "label": hostile}, named | {"metric": "average_precision", "label": hostile},
            of=PROMPTED,
        ),
        "differences": table(dict.fromkeys(("data", "task", "label", "setting", "a", "b"), hostile), of=DIFFERENCE),
    }  # fmt: skip
    markdown, _ = written(tmp_path, tables)
    lines = [line for line in markdown.splitlines() if line]
    assert all(line.startswith(("|", "**Table ")) for line in lines)
    cells = re.sub(r"\\[\\`*_\[\]{}~$#!]", "", markdown).replace("**", "")  # what stays means something to Markdown
    assert set("`<>\\*") & set(cells) == set()
    assert "](" not in cells
    for block in markdown.split("**Table ")[1:]:
        assert len({line.count("|") for line in block.splitlines() if line.startswith("|")}) == 1
    assert {len(line.split("|")) for line in lines if line.startswith("**Table")} == {1}


def test_what_is_escaped_how() -> None:
    assert escaped_latex("\\{}$&#^_~%<>|") == (
        r"\textbackslash{}\{\}\$\&\#\textasciicircum{}\_\textasciitilde{}\%\textless{}\textgreater{}\textbar{}"
    )
    assert escaped_latex("é肺\n\n2") == "é肺 2"
    assert escaped_latex("-0.1 [-0.2, 0.0]") == "$-$0.1 [$-$0.2, 0.0]"
    assert escaped_latex("vit-s") == "vit-s"
    assert escaped_markdown("a|b\\c`d*e_f[g]<h>&i") == r"a&#124;b\\c\`d\*e\_f\[g\]&lt;h&gt;&amp;i"
    assert escaped_markdown("one\ntwo\x00\ud800") == "one two"
    assert escaped_markdown("0.750 [0.691, 0.812]") == "0.750 [0.691, 0.812]"


def test_undefined_scores_and_absent_tables(tmp_path: Path) -> None:
    scores = table({"value": np.nan, "low": np.nan, "high": np.nan, "control": None}, {"fraction": 1.0}, of=SCORE)
    markdown, _ = written(tmp_path, {"scores": scores, "gains": pd.DataFrame(columns=list(SCORE))})
    assert "undefined" in markdown
    assert "nan" not in markdown.lower()
    paths = write_score_files(tmp_path / "none", {})
    assert [path.name for path in paths] == ["tables.md", "tables.tex"]
    assert all(path.is_file() for path in paths)
    paths = write_score_files(tmp_path / "other", {"encoders": pd.DataFrame({"name": ["x"]})})
    assert [path.name for path in paths] == ["encoders.csv", "tables.md", "tables.tex"]
    assert (tmp_path / "other" / "tables.md").read_text() == "\n"


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("x")
    with pytest.raises(OutputError, match=r"scores\.csv: cannot be written"):
        write_score_files(tmp_path / "here", {"scores": table({}, of=SCORE)})
