"""The command `manifest`: datasets by name, audits with exit codes, label maps, previews."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from embedcache import Manifest
from embedcache.cli import main
from embedcache.data.datasets.load import LAYOUTS


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["manifest", *map(str, arguments)])


def covidx(root: Path) -> Path:
    """60 images; every patient has two, so the published split leaks."""
    for part, n in (("train", 60), ("test", 6)):
        (root / part).mkdir(parents=True)
        lines = []
        for k in range(n):
            Image.new("L", (8, 8), k + 100 * (part == "test")).save(root / part / f"{part}-{k:012d}.png")
            kind = ("normal", "pneumonia", "COVID-19")[k % 3]
            lines.append(f"{part}{k // 2} {part}-{k:012d}.png {kind} {('fig1', 'sirm')[k % 3 == 2]}")
        (root / f"{part}_COVIDx9A.txt").write_text("\n".join(lines) + "\n")
    return root


def test_help_shows_every_layout_as_a_tree() -> None:
    shown = call("--help").output
    for layout in LAYOUTS.values():
        assert f"\n  {layout.name} " in shown
        assert f"\n{layout.name}: {layout.title}\n" in shown
        for line in layout.tree.splitlines():
            assert f"  {line}\n" in shown


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_datasets_help_shows_its_tree_and_its_options_alone(name: str) -> None:
    shown = call(name, "--help").output
    assert all(line in shown for line in LAYOUTS[name].tree.splitlines())
    assert ("--uncertain" in shown) == any(option.name == "uncertain" for option in LAYOUTS[name].options)
    assert ("--split [patient|paper]" in shown) == LAYOUTS[name].published


def test_from_a_folder_to_a_manifest_with_what_stayed_out(tmp_path: Path) -> None:
    root = covidx(tmp_path / "covidx")
    (root / "train/train-000000000007.png").rename(root / "train/stray.png")
    made = call("covidx", root, "-o", tmp_path / "m.parquet")
    assert made.exit_code == 0, made.output
    assert "m.parquet: 65 images, split 'patient': " in made.output
    assert "labels: covidx (multi-class)" in made.output
    assert (
        "note: 1 of 66 listed images are absent and were left out, such as train/train-000000000007.png" in made.output
    )
    assert (tmp_path / "m.absent.txt").read_text() == "train/train-000000000007.png\n"
    assert (tmp_path / "m.extra.txt").read_text() == "train/stray.png\n"
    read = Manifest.read(tmp_path / "m.parquet")
    assert len(read) == 65
    assert read.root.resolve() == root.resolve()
    (root / "train/stray.png").rename(root / "train/train-000000000007.png")
    again = json.loads(call("covidx", root, "-o", tmp_path / "m.parquet", "--json").stdout)
    assert again["notes"] == []
    assert again["audit"]["n_rows"]["test"] == 6
    assert not (tmp_path / "m.absent.txt").exists()


def test_leaks_end_a_strict_command_with_3(tmp_path: Path) -> None:
    root = covidx(tmp_path / "covidx")
    leaky, sound = tmp_path / "leaky.parquet", tmp_path / "sound.parquet"
    assert call("covidx", root, "-o", leaky, "--split", "paper").exit_code == 0
    strict = call("covidx", root, "-o", leaky, "--split", "paper", "--strict")
    assert strict.exit_code == 3
    assert "warning: covidx: " in strict.output
    assert "valid images share their patient with train: scores on valid are too good" in strict.output
    assert call("covidx", root, "-o", sound, "--strict").exit_code == 0
    found = call("audit", leaky, "--strict")
    assert found.exit_code == 3
    assert "LEAK " in found.output
    assert "covidx: split rule 'paper', every row names its patient" in found.output
    assert "covidx  by source  accuracy" in found.output
    assert call("audit", leaky).exit_code == 0
    assert call("audit", sound, "--strict").exit_code == 0
    told = json.loads(call("audit", leaky, "--json").stdout)
    assert told["audits"][0]["leaks"] is True


def test_unknown_patients_and_overlaps_end_a_strict_audit(tmp_path: Path) -> None:
    root = covidx(tmp_path / "covidx")
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    call("covidx", root, "-o", one)
    rows = "".join(f"{k},train/train-{k:012d}.png\n" for k in range(60))
    (root / "t.csv").write_text("id,image\n" + rows + "last,test/test-000000000000.png\n")
    made = call("table", root, "-o", two)
    assert "split 'exam'" in made.output
    alone = call("audit", two, "--strict")
    assert alone.exit_code == 3
    assert "patients unknown in t: no split of it is known to be free of leaks" in alone.output
    both = call("audit", one, two)
    assert both.exit_code == 0
    assert call("audit", one, "--strict").exit_code == 0
    (root / "t.csv").unlink()
    call("covidx", root, "-o", tmp_path / "again.parquet", "--seed", 1)
    twins = call("audit", one, tmp_path / "again.parquet", "--strict")
    assert twins.exit_code == 3  # by the overlap alone
    assert "one:train" in twins.output
    assert call("audit", one, one).exit_code == 2
    lines = [line.split() for line in both.output.splitlines()]
    assert any(line[:2] == ["file", "covidx:train"] for line in lines)
    assert any(line[:2] == ["name", "covidx:test"] for line in lines)


def test_a_table_with_columns_of_other_names(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for k in range(20):
        Image.new("L", (8, 8), k).save(tmp_path / f"mine/{k}.png")
    rows = "".join(f"{k},{k}.png,{k % 2}\n" for k in range(20))
    (tmp_path / "mine/t.csv").write_text("key,file,tb\n" + rows)
    arguments = (
        "table",
        tmp_path / "mine",
        "-o",
        tmp_path / "m.parquet",
        "--column",
        "id=key",
        "--column",
        "image=file",
    )
    made = call(*arguments, "--column", "label.tb=tb", "--test", "0.4", "--seed", 3)
    assert made.exit_code == 0, made.output
    assert "20 images, split 'exam': 10 train, 2 valid, 8 test" in made.output
    whole = call(*arguments, "--column", "label.tb=tb", "--test", "0", "--valid", "0")
    assert "20 train, 0 valid, 0 test" in whole.output
    wrong = call(*arguments, "--column", "tb")
    assert wrong.exit_code == 2
    assert "'tb', expected <the manifest's column>=<the table's column>" in wrong.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rnsa", "."), "no dataset 'rnsa'; did you mean 'rsna'?"),
        (("audti", "."), "did you mean 'audit'?"),
        (("rsna", ".", "-o", "m.parquet", "--seed", "-1"), "-1 is not in the range x>=0"),
        (("rsna", "nowhere", "-o", "m.parquet"), "nowhere: no folder there; name the folder of the RSNA"),
        (("nih", ".", "-o", "m.parquet", "--split", "paper"), "'paper' is not 'patient'"),
        (("rsna", ".", "-o", "m.parquet", "--uncertain", "ones"), "No such option"),
        (("audit", "none.parquet"), "none.parquet: no manifest there"),
    ],
)
def test_mistakes_end_with_2_and_say_what_to_do(arguments: tuple[str, ...], message: str) -> None:
    done = call(*arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


def test_labels_are_mapped_and_a_page_is_written(tmp_path: Path) -> None:
    call("covidx", covidx(tmp_path / "covidx"), "-o", tmp_path / "m.parquet")
    shown = call("preview", tmp_path / "m.parquet", "--per-split", 2)
    assert shown.output == f"{tmp_path / 'm.html'}\n"
    page = (tmp_path / "m.html").read_text()
    assert page.count("<article") == 6
    assert "COVID-19" in page
    (tmp_path / "map.yaml").write_text("from: covidx\nto: rsna\nlabels:\n  covidx: drop\n")
    mapped = call("map", tmp_path / "m.parquet", tmp_path / "map.yaml", "-o", tmp_path / "n.parquet")
    assert mapped.exit_code == 0, mapped.output
    assert Manifest.read(tmp_path / "n.parquet").labels == []
    (tmp_path / "map.yaml").write_text("labels: {}")
    wrong = call("map", tmp_path / "m.parquet", tmp_path / "map.yaml", "-o", tmp_path / "x.parquet")
    assert "expected 'from' and 'to'" in wrong.output
    assert call("covidx", tmp_path / "covidx", "-o", tmp_path / "m.csv").exit_code == 2
