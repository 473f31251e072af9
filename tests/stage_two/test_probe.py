from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import embedcache
from embedcache import Manifest, ProbeConfig, TrainConfig
from embedcache.errors import FingerprintMismatchError, ManifestError
from embedcache.stage_two.heads import HeadConfig, build_head, fit_predict

QUICK = ProbeConfig(n_seeds=2, n_draws=200, head=HeadConfig(steps=60, lr=1e-2))


def score(table: pd.DataFrame, **where: object) -> pd.Series:
    where = {"metric": "auroc", "head": "linear", "fraction": 1.0, "control": "", **where}
    found = table[np.logical_and.reduce([table[k] == v for k, v in where.items()])]
    assert len(found) == 1
    return found.iloc[0]


@pytest.fixture
def run_dir(world, tmp_path: Path) -> Path:
    config = TrainConfig(epochs=5, batch_size=64, lr=3e-3, projection_dim=48, n_heads=4, ff_dim=64)
    embedcache.train(world.manifest, world.image, world.text, tmp_path / "run", config=config)
    return tmp_path / "run"


def test_embeddings_alone(world) -> None:
    result = embedcache.probe(world.manifest, world.image, label="y", config=QUICK)
    assert set(result.scores["control"]) == {"", "shuffled-labels"}
    full = score(result.scores)
    assert (full["n_train"], full["n_valid"], full["n_test"], full["n_seeds"]) == (240, 0, 80, 2)
    assert full["low"] < full["value"] < full["high"]
    train, test = world.manifest.in_split("train"), world.manifest.in_split("test")
    y = world.manifest.label("y")
    reference = LogisticRegression().fit(world.values[train], y[train]).decision_function(world.values[test])
    assert full["value"] == pytest.approx(roc_auc_score(y[test], reference), abs=0.02)
    assert score(result.scores, control="shuffled-labels")["value"] < full["value"] - 0.15


def test_all_controls_stand_beside_the_adaptor(world, run_dir: Path) -> None:
    result = embedcache.probe(
        world.manifest, world.image, label="y", run_dir=run_dir, text_store=world.text, config=QUICK
    )
    table = result.scores
    assert list(table["control"].unique()) == [
        "", "no-adaptor", "untrained-adaptor", "shuffled-labels", "text-as-label"
    ]  # fmt: skip
    assert len(table) == 5 * 2 * 3 * 3
    few, full = (score(table, control="text-as-label", fraction=f)["value"] for f in (0.01, 1.0))
    assert abs(few - full) < 0.08  # the text tells the label, so four labels are as good as all
    assert score(table, control="no-adaptor", fraction=0.01)["n_train"] == 4


def test_without_a_text_store_its_control_is_left_out(world, run_dir: Path) -> None:
    result = embedcache.probe(world.manifest, world.image, label="y", run_dir=run_dir, config=QUICK)
    assert "text-as-label" not in set(result.scores["control"])


def test_controls_can_be_chosen(world, run_dir: Path) -> None:
    config = ProbeConfig(n_seeds=1, n_draws=20, controls=(), head=HeadConfig(steps=5), heads=("linear",))
    result = embedcache.probe(world.manifest, world.image, label="y", run_dir=run_dir, config=config)
    assert set(result.scores["control"]) == {""}


def test_it_is_reproducible(world) -> None:
    one, two = (embedcache.probe(world.manifest, world.image, label="y", config=QUICK).scores for _ in range(2))
    pd.testing.assert_frame_equal(one, two)


def test_test_labels_and_blank_labels_choose_nothing(world, tmp_path: Path) -> None:
    """Canary: other test labels change the scores, never the fitted predictions."""
    frame = world.manifest.frame.copy()
    test = world.manifest.in_split("test")
    flipped = frame.copy()
    flipped.loc[test, "label.y"] = 1 - flipped.loc[test, "label.y"]
    config = ProbeConfig(n_seeds=1, n_draws=20, controls=(), head=HeadConfig(steps=40))
    first, second = (
        score(embedcache.probe(Manifest(f, name="m", root="."), world.image, label="y", config=config).scores)
        for f in (frame, flipped)
    )
    assert first["value"] == pytest.approx(1 - second["value"])
    blanked = frame.copy()
    blanked.loc[np.flatnonzero(world.manifest.in_split("train"))[:100], "label.y"] = np.nan
    result = embedcache.probe(Manifest(blanked, name="m", root="."), world.image, label="y", config=config)
    assert score(result.scores)["n_train"] == 140


def test_multi_class_labels_are_scored_per_class(world) -> None:
    frame = world.manifest.frame.copy()
    frame["label.three"] = np.arange(400) % 3
    config = ProbeConfig(n_seeds=1, n_draws=20, heads=("linear",), fractions=(1.0,), head=HeadConfig(steps=20))
    table = embedcache.probe(Manifest(frame, name="m", root="."), world.image, label="three", config=config).scores
    assert set(table.loc[table["metric"] == "auroc", "class"]) == {"0", "1", "2"}
    assert len(table[(table["metric"] == "accuracy") & (table["control"] == "")]) == 1


def test_leaks_of_the_manifest_are_warned_of(world) -> None:
    config = ProbeConfig(n_seeds=1, n_draws=20, heads=("linear",), fractions=(1.0,), head=HeadConfig(steps=5))
    assert embedcache.probe(world.manifest, world.image, label="y", config=config).warning == ""
    frame = world.manifest.frame.copy()
    frame.loc[frame["patient"] == "p4", "split"] = ["train", "test"]
    leaky = embedcache.probe(world.manifest.with_frame(frame), world.image, label="y", config=config)
    assert leaky.warning == "made: 1 of 79 test images share their patient with train: scores on test are too good"


def test_label_subsets_of_the_manifest_are_the_same_for_every_seed(world) -> None:
    frame = world.manifest.frame.copy()
    train = np.flatnonzero(world.manifest.in_split("train"))
    frame.loc[train[:24], "fraction"] = 0.1
    fixed = replace(QUICK, subsets="manifest", fractions=(0.1,), heads=("linear",))
    table = embedcache.probe(world.manifest.with_frame(frame), world.image, label="y", config=fixed).scores
    assert set(table["n_train"]) == {24}
    only = world.manifest.with_frame(frame.assign(split=frame["split"].mask(frame.index.isin(train[24:]), "")))
    everything = replace(fixed, subsets="drawn", fractions=(1.0,))
    same = embedcache.probe(only, world.image, label="y", config=everything).scores
    assert set(same["n_train"]) == {24}
    with pytest.raises(ManifestError, match=r"no label fraction 0\.01 in its column 'fraction', which has 0\.1"):
        embedcache.probe(
            world.manifest.with_frame(frame), world.image, label="y", config=replace(fixed, fractions=(0.01,))
        )


def test_an_adaptor_of_another_encoder_is_refused(world, run_dir: Path, tmp_path: Path) -> None:
    other = embedcache.save_store(tmp_path / "other", world.image.ids, world.values + 1)
    with pytest.raises(FingerprintMismatchError, match=r"trained on image encoder .*train one on this store"):
        embedcache.probe(world.manifest, other, label="y", run_dir=run_dir)


def test_a_failed_report_takes_no_image_out_of_the_test(world, run_dir: Path, tmp_path: Path) -> None:
    """The text store serves a control alone: what is tested does not depend on it."""
    from embedcache.store.layout import Layout, store_document
    from embedcache.store.save import write_store
    from embedcache.store.shard import Failure, ShardRows

    failed = [*world.text.ids[:5], *world.text.ids[-5:]]
    kept = [i for i in world.text.ids if i not in failed]
    document = store_document(encoder={}, encoder_fingerprint="t", modality="text", store_layout=Layout("float32", 12))
    codes = world.text.embeddings[world.text.rows(kept)]
    shard = ShardRows(
        kept, np.zeros(390, np.uint16), codes, np.zeros((390, 16), np.uint8),
        [Failure(i, "empty-report", "the report is empty") for i in failed],
    )  # fmt: skip
    write_store(tmp_path / "t", document, [shard], batch_size=400)
    result = embedcache.probe(
        world.manifest, world.image, label="y", run_dir=run_dir, text_store=tmp_path / "t", config=QUICK
    )
    assert set(result.scores["n_test"]) == {80}
    assert score(result.scores, control="text-as-label", fraction=0.01)["value"] > 0.6


def test_splits_without_both_classes_are_refused(world) -> None:
    frame = world.manifest.frame.copy()
    frame.loc[world.manifest.in_split("test"), "label.y"] = 1
    with pytest.raises(ManifestError, match=r"label 'y' has classes \[1\.0\] in split 'test'"):
        embedcache.probe(Manifest(frame, name="m", root="."), world.image, label="y")
    with pytest.raises(ManifestError, match="no label 'z'; it has y"):
        embedcache.probe(world.manifest, world.image, label="z")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": ("knn",)}, "unknown heads knn; expected some of linear, mlp"),
        ({"controls": ("magic",)}, "unknown controls magic"),
        ({"fractions": (0.0,)}, "above 0 and at most 1"),
        ({"n_seeds": 0}, "n_seeds is 0, expected at least 1"),
        ({"heads": ()}, "at least one head"),
        ({"subsets": "some"}, "subsets is 'some', expected one of drawn, manifest"),
    ],
)
def test_wrong_settings(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProbeConfig(**fields)


# heads


def test_heads_have_their_stated_shape() -> None:
    x = torch.randn(6, 10)
    assert build_head("linear", 10, 3)(x).shape == (6, 3)
    mlp = build_head("mlp", 10, 3)
    assert mlp(x).shape == (6, 3)
    assert sum(p.numel() for p in mlp.parameters()) == 10 * 512 + 512 + 2 * 512 + 512 * 3 + 3
    with pytest.raises(ValueError, match="expected one of linear, mlp"):
        build_head("knn", 10, 3)


@pytest.mark.parametrize("n", [4, 40, 200])
def test_probabilities_sum_to_one_whatever_the_batch(n: int) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(n, 5), torch.arange(n) % 2
    config = HeadConfig(steps=10, batch_size=32)
    for kind in ("linear", "mlp"):
        got = fit_predict(kind, x, y, torch.randn(7, 5), n_classes=2, config=config, seed=0)
        torch.testing.assert_close(got.sum(1), torch.ones(7))
