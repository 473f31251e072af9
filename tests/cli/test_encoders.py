"""Commands for encoders: the list, a look at one of each source, conversion."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from calling import call

sys.path.append(str(Path(__file__).parent.parent / "encoders"))
from checkpoints import write_all


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    return write_all(tmp_path_factory.mktemp("made"))


def test_the_list_names_exposure_and_says_where_more_is() -> None:
    listed = call("encoders").output
    assert "rad-dino" in listed
    assert "unknown of all" in listed
    assert "embedcache encoders NAME" in listed
    one = call("encoders", "rad-dino")
    assert "train_only" in one.output
    assert "as said in" in one.output
    assert json.loads(call("encoders", "rad-dino", "--json").stdout)[0]["exposure"]["nih"] == "seen"
    unknown = call("encoders", "no-such")
    assert unknown.exit_code == 2
    assert "embedcache encoders --check no-such" in unknown.output


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("hf-image/dinov2", ["--token-grid", 2]),
        ("hf-text/bert", ["--report", "unit=sentence"]),
        ("open_clip/native", ["--modality", "image"]),
        ("open_clip/biomed", ["--modality", "text"]),
        ("timm/resnet", ["--decode", "background=9", "--decode", "jpeg_min_side=null"]),
        ("xrv/101-elastic", []),
    ],
)
def test_check_loads_a_directory_of_each_source_and_prints_its_record(made, source: str, options: list) -> None:
    library, _, name = source.partition("/")
    prefix = library.removesuffix("-image").removesuffix("-text")
    arguments = ["encoders", "--check", f"{prefix}:{made[library][name]}", "--device", "cpu", *options]
    shown = call(*arguments)
    assert shown.exit_code == 0, shown.output
    record = json.loads(call(*arguments, "--json").stdout)
    assert record["fingerprint"] in shown.output
    assert record["identity"]["source"] == prefix
    assert record["dim"] == record["identity"]["dim"]
    if "background=9" in options:
        assert record["identity"]["decode"]["background"] == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--check"], "--check needs NAME"),
        (["--convert", "hf:x"], "--convert needs NAME and --out"),
        (["--check", "hf:./nowhere"], "no such directory"),
        (["--check", "minilm", "--report", "unit=word"], "unit is 'word', expected one of report"),
        (["--check", "minilm", "--report", "colour=red"], "expected FIELD=VALUE with one of unit, rule"),
        (["--check", "minilm", "--decode", "background=9"], "was given for an encoder of texts"),
        (["--convert", "py:a:b", "--out", "x"], "expected hf:, open_clip:, timm: or xrv:"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    done = call("encoders", *arguments)
    assert done.exit_code == 2
    assert message in done.output
