"""Encoders compared over their stores."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from worlds import QUICK, World

import embedcache
from embedcache.comparing.compare import Comparison
from embedcache.comparing.study import Study, Task
from embedcache.comparing.study_file import read_study
from embedcache.errors import ManifestError, RunNotFoundError, RunStateError, SettingsError
from embedcache.stage_two.config import TrainConfig
from embedcache.stage_two.retrieve_config import RetrieveConfig
from embedcache.workers.chosen import Workers

HERE = Workers(n=1)
SMALL = TrainConfig(epochs=3, batch_size=32, projection_dim=24, n_layers=1, ff_dim=32, lr=1e-3)


def compared(world: World, stores: list[Path], run: Path, **more: object) -> Comparison:
    given = {"labels": ["opacity"], "probe": QUICK, "workers": HERE, "train": SMALL} | more
    return embedcache.compare(world.manifest, stores, run, **given)  # type: ignore[arg-type]


def test_a_store_with_noise_added_compares_as_worse(tmp_path: Path) -> None:
    world = World(tmp_path, 400)
    found = compared(world, [world.store("clear"), world.store("noisy", noise=6.0)], tmp_path / "run")
    (row,) = found.differences.to_dict("records")
    assert (row["a"], row["b"], row["verdict"]) == ("clear", "noisy", "a")
    assert row["value"] > 0.1
    assert (row["method"], row["n_runs"], row["n_units"]) == ("bootstrap", 3, 160)
    assert row["p_adjusted"] == row["p_value"] < 0.01
    scores = found.scores.set_index(["image", "metric"])["value"]
    assert row["value"] == pytest.approx(scores["clear", "auroc"] - scores["noisy", "auroc"], abs=1e-6)
    assert "opacity (linear, 100% of the labels): clear is better than noisy by" in found.verdicts[0]
    assert "not known to be fair: exposure to made is clear unknown, noisy unknown" in found.verdicts[0]


def test_one_run_calls_nothing_real_unless_nothing_in_it_is_drawn(tmp_path: Path) -> None:
    world = World(tmp_path, 400)
    stores = [world.store("clear"), world.store("noisy", noise=6.0)]
    once = replace(QUICK, n_seeds=1, heads=("linear", "logistic"))
    found = compared(world, stores, tmp_path / "run", probe=once)
    rows = found.differences.set_index("head")
    assert (rows["method"] == "delong").all()  # one image a patient
    assert (rows["p_adjusted"] < 0.01).all()
    assert (rows.loc["linear", "verdict"], rows.loc["linear", "n_runs"]) == ("", 1)
    assert (rows.loc["logistic", "verdict"], rows.loc["logistic", "n_runs"]) == ("a", 0)
    first, second = found.verdicts
    assert "(logistic, 100% of the labels): clear is better than noisy by" in first
    assert "(linear, 100% of the labels): clear and noisy differ by +" in second
    assert "in one run each: not called real, as other runs may differ; take three at least" in second


def test_adaptors_are_trained_from_as_many_seeds_as_heads_have_runs(tmp_path: Path) -> None:
    world = World(tmp_path, 400)
    stores, texts = [world.store("clear"), world.store("noisy", noise=6.0)], [world.texts()]
    asked = {"text_stores": texts, "retrieve": RetrieveConfig(n_draws=100)}
    found = compared(world, stores, tmp_path / "run", **asked)
    assert read_study(tmp_path / "run").train.n_seeds == 3
    assert (tmp_path / "run" / "clear+words" / "seeds" / "2" / "adaptor.safetensors").is_file()
    assert set(found.differences["task"]) == {"probe", "retrieval"}
    assert (found.differences["n_runs"] == 3).all()
    assert not any("trained once" in note for note in found.notes)
    (tmp_path / "run" / "clear+words" / "seeds" / "1" / "adaptor.safetensors").unlink()
    again = compared(world, stores, tmp_path / "run", **asked)
    assert (tmp_path / "run" / "clear+words" / "seeds" / "1" / "adaptor.safetensors").is_file()
    pd.testing.assert_frame_equal(again.differences, found.differences)

    once = compared(world, stores, tmp_path / "once", train=replace(SMALL, n_seeds=1), **asked)
    assert (once.differences["n_runs"] == 1).all()
    assert (once.differences["verdict"] == "").all()
    assert any("each pair's Adaptor was trained once" in note for note in once.notes)


def test_a_store_and_its_copy_compare_as_equal(tmp_path: Path) -> None:
    world = World(tmp_path)
    store = world.store("one")
    other = embedcache.save_store(
        tmp_path / "stores" / "two", world.frame["id"].tolist(), np.array(embedcache.open_store(store).embeddings)
    )
    found = compared(world, [store, other.path], tmp_path / "run", labels=["opacity", "effusion"])
    assert (found.differences["value"] == 0).all()
    assert (found.differences["p_adjusted"] == 1).all()
    assert (found.differences["verdict"] == "").all()
    assert all("no difference between one and two is shown" in line for line in found.verdicts)


def test_p_values_are_adjusted_for_all_comparisons(tmp_path: Path) -> None:
    world = World(tmp_path)
    stores = [world.store(f"s{k}", noise=1.0 + k) for k in range(3)]
    found = compared(
        world, stores, tmp_path / "run", labels=(), probe=replace(QUICK, n_seeds=2, fractions=(0.5, 1.0))
    ).differences
    assert len(found) == 3 * 2 * 2  # pairs, labels, fractions
    assert (found["method"] == "bootstrap").all()
    smallest = found.loc[found["p_value"].idxmin()]
    assert smallest["p_adjusted"] == pytest.approx(min(12 * smallest["p_value"], 1))


def test_pairs_that_differ_in_both_encoders_are_not_compared(tmp_path: Path) -> None:
    world = World(tmp_path)
    images, texts = [world.store("a"), world.store("b")], [world.texts("u"), world.texts("v")]
    found = compared(world, images, tmp_path / "run", text_stores=texts)
    assert len(found.scores["image"].unique()) * len(found.scores["text"].unique()) == 4
    both = set(zip(found.differences["a"], found.differences["b"], strict=True))
    assert both == {("a + u", "a + v"), ("a + u", "b + u"), ("a + v", "b + v"), ("b + u", "b + v")}
    assert set(found.encoders["name"]) == {"a", "b", "u", "v"}
    assert (tmp_path / "run" / "a+u" / "adaptor.safetensors").is_file()


def test_unequal_exposure_is_called_not_a_fair_comparison(tmp_path: Path) -> None:
    world = World(tmp_path, 400)
    stores = [world.store("clear"), world.store("noisy", noise=6.0)]
    found = compared(world, stores, tmp_path / "run", exposure={"clear": "seen", "noisy": "none"})
    assert found.differences["fairness"].tolist() == ["not a fair comparison"]
    assert "not a fair comparison: exposure to made is clear seen, noisy none" in found.verdicts[0]
    assert any("not a fair comparison: clear (seen) and noisy (none)" in line for line in found.warnings)
    fair = compared(world, stores, tmp_path / "fair", exposure={"clear": "none", "noisy": "none"})
    assert fair.differences["fairness"].tolist() == ["fair"]
    assert fair.warnings == ()
    with pytest.raises(SettingsError, match="exposure 'much' of clear, expected one of seen"):
        compared(world, stores, tmp_path / "x", exposure={"clear": "much"})
    with pytest.raises(SettingsError, match="exposure of other, and encoders are clear, noisy"):
        compared(world, stores, tmp_path / "x", exposure={"other": "none"})


def test_only_rows_that_every_store_has_are_used(tmp_path: Path) -> None:
    world = World(tmp_path)
    said: list[str] = []
    stores = [world.store("whole"), world.store("part", rows=slice(20, None))]
    found = compared(world, stores, tmp_path / "run", say=said.append)
    assert "rows made: 220 that every store has, 20 left out" in said
    assert any("made: 20 of 240 rows left out" in note for note in found.notes)
    assert found.scores["n_test"].nunique() == 1
    first, second = (
        pd.read_parquet(tmp_path / "run" / name / "probes" / "opacity" / "predictions.parquet")
        for name in ("whole", "part")
    )
    assert first["id"].tolist() == second["id"].tolist()
    assert not {f"i{k}" for k in range(20)} & set(first["id"])
    with pytest.raises(ManifestError, match="none is in all of"):
        compared(world, [world.store("x", rows=slice(0, 50)), world.store("y", rows=slice(50, 99))], tmp_path / "none")


def test_what_makes_no_comparison_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path)
    a, words = world.store("a"), world.texts()
    for stores, texts, said in (
        ([a], [], "1 image stores and 0 text stores, expected two pairs at least"),
        ([a, a], [], "have one name; give each its own as NAME=PATH"),
        ([a, words], [], "a store of modality 'text', expected 'image'"),
        ([a], [a, words], "a names an image and a text encoder"),
    ):
        with pytest.raises(SettingsError, match=said):
            compared(world, stores, tmp_path / "run", text_stores=texts)
    with pytest.raises(ManifestError, match="no label 'efusion'"):
        compared(world, [a, world.store("b")], tmp_path / "run", labels=["efusion"])
    assert not (tmp_path / "run").exists()
    with pytest.raises(RunNotFoundError, match="no run of a recipe or of 'embedcache compare' there"):
        read_study(tmp_path)


def test_a_directory_of_another_comparison_is_refused_and_its_steps_are_taken_over(tmp_path: Path) -> None:
    world = World(tmp_path)
    stores = [world.store("a"), world.store("b")]
    compared(world, stores, tmp_path / "runs" / "1")
    with pytest.raises(RunStateError, match="holds another run; name another run directory beside it"):
        compared(world, stores, tmp_path / "runs" / "1", labels=["effusion"])
    said: list[str] = []
    more = compared(world, [*stores, world.store("c")], tmp_path / "runs" / "2", say=said.append)
    assert sum("as in 1, copied" in line for line in said) == 2
    assert len(more.differences) == 3


def test_a_finished_comparison_is_read_back(tmp_path: Path) -> None:
    world = World(tmp_path)
    found = compared(world, [world.store("a"), world.store("b")], tmp_path / "run")
    again = Comparison.read(tmp_path / "run")
    pd.testing.assert_frame_equal(again.differences, found.differences, check_dtype=False)
    pd.testing.assert_frame_equal(again.scores, found.scores)
    assert again.verdicts == found.verdicts
    study = read_study(tmp_path / "run")
    assert study.tasks[0].probe == replace(QUICK, n_left_out=10)
    assert study.train == SMALL
    assert study.tasks[0].digest == world.manifest_digest()
    assert json.loads(json.dumps(found.to_json()))["differences"][0]["a"] == "a"


def test_what_cannot_be_scored_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    world = World(tmp_path)
    stores = [world.store("a"), world.store("b")]
    for more, said in (
        ({"retrieve": RetrieveConfig()}, "name text stores as well"),
        ({"labels": ["opacity", "opacity"]}, "one stands there twice"),
        ({"random_stores": {"typo": stores[0]}}, "random weights for typo, and image encoders are a, b"),
    ):
        with pytest.raises(SettingsError, match=said):
            compared(world, stores, tmp_path / "run", **more)
    world.frame["label.rare"] = 0
    found = compared(world, stores, tmp_path / "run", labels=())
    assert set(found.scores["label"]) == {"opacity", "effusion"}
    world.frame = world.frame.drop(columns=["label.rare", "label.opacity", "label.effusion"])
    with pytest.raises(SettingsError, match="no label to probe"):
        compared(world, stores, tmp_path / "none", labels=())


def test_processes_are_as_many_as_there_are_cores_and_memory_for(tmp_path: Path, monkeypatch) -> None:
    world, embedded = World(tmp_path), tmp_path / "stores"
    world.store("a"), world.store("b"), world.texts()
    images, texts = {"a": embedded / "a", "b": embedded / "b"}, {"words": embedded / "words"}
    wide = replace(SMALL, projection_dim=12 * 83_000)  # what an Adaptor gives of 240 images takes 0.96 GB
    monkeypatch.setattr("embedcache.comparing.study.available_bytes", lambda: 26 * 10**9)

    def fitting(n_cores: int, n_seeds: int, *, text: bool = True) -> int | None:
        monkeypatch.setattr("embedcache.comparing.study.count_cores", lambda: n_cores)
        task = Task("made", world.manifest, images, texts if text else {}, labels=("opacity", "effusion"))
        return Study([task], tmp_path / "run", replace(wide, n_seeds=n_seeds)).fitting(Workers()).n

    assert fitting(2, 5) == 2
    assert fitting(64, 5) == 4  # of 1.5 GB and 5 x 0.96 each
    assert fitting(64, 1) == 5  # of 1.5 GB and 3 x 0.96 each
    assert fitting(64, 1, text=False) == 4  # there are no more steps


def test_a_run_whose_data_changed_is_done_again_where_it_stopped(tmp_path: Path) -> None:
    world = World(tmp_path)
    stores, texts = [world.store("a"), world.store("b")], [world.texts()]
    compared(world, stores, tmp_path / "run", text_stores=texts)
    study = read_study(tmp_path / "run")
    fewer = replace(study.tasks[0], manifest=study.tasks[0].manifest.with_frame(world.frame.iloc[5:]))
    Study([fewer], tmp_path / "run", study.train).run(HERE)
    trained = pd.read_parquet(tmp_path / "run" / "a+words" / "trained_on.parquet")
    assert not set(world.frame["id"][:5]) & set(trained["id"])


def test_groups_that_hold_all_of_a_class_are_not_counted(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.frame.loc[world.frame["split"] == "train", "label.opacity"] = 0
    world.frame.loc[world.frame.index[world.frame["split"] == "train"][:1], "label.opacity"] = 1
    found = compared(world, [world.store("a"), world.store("b")], tmp_path / "run").differences
    assert np.isfinite(found[["value", "low", "high", "p_value"]]).all().all()
    left_out = pd.read_csv(tmp_path / "run" / "a" / "probes" / "opacity" / "left_out.csv")
    assert len(left_out) == 9


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from worlds import World
from test_compare import KILLED, compared
world = World(Path({root!r}), 240, seed=1)
stores = [Path({root!r}) / "stores" / name for name in ("a", "b")]
compared(world, stores, Path(sys.argv[1]), text_stores=[Path({root!r}) / "stores" / "words"], **KILLED)
"""
KILLED = {
    "train": replace(SMALL, epochs=6, checkpoint_s=0.0),
    "probe": replace(QUICK, n_seeds=2, fractions=(0.5, 1.0)),
    "labels": ["opacity", "effusion"],
}


def test_killed_anywhere_it_ends_in_the_same_table(tmp_path: Path) -> None:
    """SIGKILL between and within steps; the same command goes on."""
    world = World(tmp_path, 240, seed=1)
    stores, texts = [world.store("a"), world.store("b")], [world.texts()]
    whole = compared(world, stores, tmp_path / "whole", text_stores=texts, **KILLED)
    script = SCRIPT.format(tests=str(Path(__file__).parent), root=str(tmp_path))
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "")}
    run, n_killed = tmp_path / "killed" / "run", 0
    notes = run / ".steps"
    for wanted in (0, 1, 2, 3, 4, 5):  # after so many steps, and a moment later
        process = subprocess.Popen([sys.executable, "-c", script, str(run)], env=environment)
        ends = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < ends:
            begun = (run / "a+words").exists() if wanted == 0 else len(list(notes.glob("*.json"))) >= wanted
            if begun:
                time.sleep(0.2 * (wanted % 3))
                break
            time.sleep(0.01)
        if process.poll() is None:
            n_killed += 1
            process.send_signal(signal.SIGKILL)
        process.wait()
    assert n_killed >= 4
    again = compared(world, stores, run, text_stores=texts, **KILLED)
    pd.testing.assert_frame_equal(again.differences, whole.differences)
    pd.testing.assert_frame_equal(again.scores, whole.scores)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "n_seeds", "texts", "noise"), [("logistic", 1, 0, 2.0), ("linear", 3, 0, 2.0), ("linear", 3, 1, 6.0)]
)
def test_false_positives_are_at_most_five_in_a_hundred(
    tmp_path: Path, head: str, n_seeds: int, texts: int, noise: float
) -> None:
    """200 pairs of encoders that see equally well, each with noise of its own; and as many where one sees less."""
    called = found_worse = 0
    more = {"labels": ["opacity", "effusion"], "probe": replace(QUICK, heads=(head,), n_seeds=n_seeds)}
    for k in range(200):
        world = World(tmp_path / str(k), 600, seed=k)
        stores = [world.store("a", noise=0.5), world.store("b", noise=0.5), world.store("c", noise=noise)]
        more["text_stores"] = [world.texts()][:texts]
        equal = compared(world, stores[:2], tmp_path / str(k) / "equal", **more)
        called += bool((equal.differences["verdict"] != "").any())
        worse = compared(world, [stores[0], stores[2]], tmp_path / str(k) / "worse", **more)
        assert not (worse.differences["verdict"] == "b").any()
        found_worse += bool((worse.differences["verdict"] == "a").any())
    of = f"{head}, {n_seeds} runs, {texts} text encoders"
    print(f"\n{of}: {called} of 200 equal ones called different, {found_worse} of 200 worse ones found")
    assert called <= 10
    assert found_worse >= 180
