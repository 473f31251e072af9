from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import embedcache
from embedcache import Manifest, ProbeConfig, TrainConfig
from embedcache.data.labelmap import LabelMap
from embedcache.data.labels import LabelSet
from embedcache.errors import FingerprintMismatchError, ManifestError
from embedcache.stage_two.heads import HeadConfig
from embedcache.stage_two.probe_tables import ProbeResult

FEW_STEPS = HeadConfig(epochs=1, min_steps=20)
QUICK = ProbeConfig(n_seeds=2, n_draws=200, head=HeadConfig(epochs=1, min_steps=60, lr=1e-2))
ONE = replace(QUICK, n_seeds=1, n_draws=100, heads=("logistic",), fractions=(1.0,), controls=())


def with_people(world) -> Manifest:
    """Its manifest with a sex, an age, a view and a site for each patient, which tell nothing of the label."""
    rng = np.random.default_rng(1)
    of_patient = rng.integers(0, 8, 200).repeat(2)
    return world.manifest.with_frame(
        world.manifest.frame.assign(
            sex=np.where(of_patient % 2, "F", "M"),
            age=rng.integers(20, 95, 200).repeat(2),
            view=np.where(of_patient // 2 % 2, "AP", "PA"),
            site=np.where(of_patient // 4, "north", "south"),
        )
    )


def score(table: pd.DataFrame, **where: object) -> pd.Series:
    where = {"metric": "auroc", "head": "linear", "fraction": 1.0, "control": "", "test": "internal", **where}
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
    assert (full["n_train"], full["n_valid"], full["n_test"], full["n_seeds"]) == (240, 80, 80, 2)
    assert full["low"] <= full["patients_low"] + 0.02 < full["value"] < full["patients_high"] <= full["high"] + 0.02
    assert full["seeds_low"] <= full["value"] <= full["seeds_high"]
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
    assert len(table) == 5 * 2 * 3 * 7  # controls, heads, fractions, metrics
    few, full = (score(table, control="text-as-label", fraction=f)["value"] for f in (0.01, 1.0))
    assert abs(few - full) < 0.08  # the text tells the label, so four labels are as good as all
    assert score(table, control="no-adaptor", fraction=0.01)["n_train"] == 4


def test_without_a_text_store_its_control_is_left_out(world, run_dir: Path) -> None:
    result = embedcache.probe(world.manifest, world.image, label="y", run_dir=run_dir, config=QUICK)
    assert "text-as-label" not in set(result.scores["control"])


def test_controls_can_be_chosen(world, run_dir: Path) -> None:
    config = ProbeConfig(n_seeds=1, n_draws=20, controls=(), head=FEW_STEPS, heads=("linear",))
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
    config = ProbeConfig(n_seeds=1, n_draws=20, controls=(), head=FEW_STEPS)
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
    config = ProbeConfig(n_seeds=1, n_draws=20, heads=("linear",), fractions=(1.0,), head=FEW_STEPS)
    table = embedcache.probe(Manifest(frame, name="m", root="."), world.image, label="three", config=config).scores
    assert set(table.loc[table["metric"] == "auroc", "class"]) == {"0", "1", "2", "macro"}
    assert len(table[(table["metric"] == "accuracy") & (table["control"] == "") & (table["class"] == "")]) == 1


def test_leaks_of_the_manifest_are_warned_of(world) -> None:
    config = ProbeConfig(n_seeds=1, n_draws=20, heads=("linear",), fractions=(1.0,), head=FEW_STEPS)
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
    with pytest.raises(ManifestError, match=r"label 'y' has classes 1 in split 'test'"):
        embedcache.probe(Manifest(frame, name="m", root="."), world.image, label="y")
    with pytest.raises(ManifestError, match="no label 'z'; it has y"):
        embedcache.probe(world.manifest, world.image, label="z")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": ("svm",)}, "unknown heads svm; expected some of linear, mlp, logistic, knn"),
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


# what a reviewer asks


def test_each_head_says_how_it_was_chosen_and_by_how_many_labels(world) -> None:
    config = replace(QUICK, heads=("linear", "mlp", "logistic", "knn"), controls=())
    table = embedcache.probe(world.manifest, world.image, label="y", config=config).scores
    auroc = table[table["metric"] == "auroc"]
    assert set(zip(auroc["fraction"], auroc["n_train"], auroc["n_valid"], auroc["choice"], strict=True)) == {
        (0.01, 4, 0, "fixed"), (0.1, 24, 0, "folds"), (1.0, 240, 80, "valid")
    }  # fmt: skip
    full = replace(config, valid_labels="full", heads=("knn",))
    generous = embedcache.probe(world.manifest, world.image, label="y", config=full).scores
    assert set(generous["n_valid"]) == {80}
    for head in config.heads:
        assert score(table, head=head)["value"] > 0.9


def test_no_test_label_reaches_a_choice(world) -> None:
    """Canary: turned test labels turn the scores; probabilities, thresholds and calibration stay to the bit."""
    frame = with_people(world).frame
    turned = frame.assign(**{"label.y": frame["label.y"].where(~world.manifest.in_split("test"), 1 - frame["label.y"])})
    config = replace(QUICK, heads=("mlp", "logistic", "knn"), controls=())
    before, after = (
        embedcache.probe(world.manifest.with_frame(f), world.image, label="y", config=config) for f in (frame, turned)
    )
    same = ["id", "head", "fraction", "seed", "probability", "threshold", "calibrated", "setting"]
    pd.testing.assert_frame_equal(before.predictions[same], after.predictions[same])
    assert score(before.scores, head="knn")["value"] == pytest.approx(1 - score(after.scores, head="knn")["value"])


def test_features_of_test_rows_do_not_scale_those_of_training(world, tmp_path: Path) -> None:
    """Canary: other test images change no fitted head, so the first test image's probability stays."""
    test = np.flatnonzero(world.manifest.in_split("test"))
    values = world.values.copy()
    values[test[1:]] *= 100
    other = embedcache.save_store(tmp_path / "other", world.image.ids, values, store_dtype="float32")
    first, second = (
        embedcache.probe(world.manifest, store, label="y", config=ONE).predictions.iloc[0]
        for store in (world.image, other)
    )
    assert first["id"] == second["id"] == world.image.ids[test[0]]
    assert first["probability"] == pytest.approx(second["probability"], abs=1e-6)


def test_wrong_training_labels_cost_score_and_shuffled_ones_give_chance(world) -> None:
    rng = np.random.default_rng(0)
    config = replace(ONE, controls=("shuffled-labels",), n_seeds=5, heads=("logistic",))

    def of(share: float) -> pd.DataFrame:
        frame = world.manifest.frame.copy()
        wrong = ~world.manifest.in_split("test") & (rng.random(len(frame)) < share)
        frame.loc[wrong, "label.y"] = 1 - frame.loc[wrong, "label.y"]
        return embedcache.probe(world.manifest.with_frame(frame), world.image, label="y", config=config).scores

    clean, noisy = of(0.0), of(0.4)
    assert score(noisy, head="logistic")["value"] < score(clean, head="logistic")["value"] - 0.05
    chance = score(clean, head="logistic", control="shuffled-labels")
    assert chance["low"] < 0.5 < chance["high"]


def test_metadata_that_tells_nothing_scores_chance_and_one_that_does_is_seen(world) -> None:
    config = replace(ONE, controls=("metadata-only",))
    manifest = with_people(world)
    blind = score(
        embedcache.probe(manifest, world.image, label="y", config=config).scores,
        head="logistic",
        control="metadata-only",
    )
    assert blind["low"] < 0.5 < blind["high"]
    telling = manifest.with_frame(manifest.frame.assign(source=manifest.frame["label.y"].map({0: "clinic", 1: "ward"})))
    result = embedcache.probe(telling, world.image, label="y", config=config)
    assert score(result.scores, head="logistic", control="metadata-only")["value"] == 1
    own = score(result.scores, head="logistic")["value"]
    assert result.gains.iloc[0]["value"] == pytest.approx(own - 1)
    assert result.gains.iloc[0]["method"] == "bootstrap"  # two images a patient


def test_gains_are_paired_and_adjusted(world, run_dir: Path) -> None:
    config = replace(ONE, controls=embedcache.ProbeConfig().controls)
    alone = world.manifest.with_frame(world.manifest.frame.assign(patient=world.manifest.frame["id"]))
    gains = embedcache.probe(alone, world.image, label="y", run_dir=run_dir, text_store=world.text, config=config).gains
    assert set(gains["control"]) == {"no-adaptor", "untrained-adaptor", "shuffled-labels", "text-as-label"}
    assert set(gains["method"]) == {"delong"}
    assert (gains["p_holm"] >= gains["p_value"]).all()
    over_chance = gains[gains["control"] == "shuffled-labels"].iloc[0]
    assert over_chance["low"] > 0
    assert over_chance["p_holm"] < 0.01


def test_a_random_encoder_stands_beside(world, tmp_path: Path) -> None:
    noise = np.random.default_rng(3).normal(size=(400, 8)).astype(np.float32)
    store = embedcache.save_store(tmp_path / "noise", world.image.ids, noise)
    config = replace(ONE, controls=("random-encoder",))
    result = embedcache.probe(world.manifest, world.image, label="y", random_store=store, config=config)
    assert abs(score(result.scores, head="logistic", control="random-encoder")["value"] - 0.5) < 0.15
    fewer = embedcache.save_store(tmp_path / "fewer", world.image.ids[:300], noise[:300])
    some = world.manifest.with_frame(world.manifest.frame)
    with pytest.raises(embedcache.EmbedCacheError, match="neither embedded nor recorded as failed"):
        embedcache.probe(some, world.image, label="y", random_store=fewer, config=config)


def test_subgroups_are_scored_counted_and_suppressed(world) -> None:
    table = embedcache.probe(with_people(world), world.image, label="y", config=ONE).subgroups
    assert set(table["attribute"]) == {"sex", "age", "view", "site", "sex x age"}
    of_sex = table[(table["attribute"] == "sex") & table["n"].notna()]
    assert of_sex["n"].sum() == 80
    assert (of_sex.loc[~of_sex["suppressed"], "auroc_low"] <= of_sex.loc[~of_sex["suppressed"], "auroc"]).all()
    small = table[table["n_positive"] < 20]
    assert len(small)
    assert small["suppressed"].all()
    assert small["auroc"].isna().all()
    gaps = table[table["group"].str.startswith("largest gap")]
    assert len(gaps)
    assert (gaps["auroc"] >= 0).all()


def test_calibration_is_better_after_it_than_before(world) -> None:
    """Votes of near neighbours are too sure of labels of which a fifth is wrong."""
    frame = world.manifest.frame.copy()
    wrong = np.random.default_rng(5).random(len(frame)) < 0.2
    frame.loc[wrong, "label.y"] = 1 - frame.loc[wrong, "label.y"]
    narrow = embedcache.save_store(world.manifest.root / "narrow", world.image.ids, world.values[:, :3] + 3)
    table = embedcache.probe(
        world.manifest.with_frame(frame), narrow, label="y", config=replace(ONE, heads=("knn",))
    ).calibration
    before, after = (table[table["method"] == m].iloc[0] for m in ("none", "platt"))
    assert after["brier"] < before["brier"]
    assert before["brier_low"] < before["brier"] < before["brier_high"]


def test_predictions_stand_by_id_and_give_the_scores(world, tmp_path: Path) -> None:
    result = embedcache.probe(with_people(world), world.image, label="y", config=replace(ONE, prevalence=0.1))
    result.write(tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "scores.csv", "gains.csv", "calibration.csv", "subgroups.csv", "predictions.parquet",
        "head-logistic.safetensors",
    }  # fmt: skip
    rows = pd.read_parquet(tmp_path / "out" / "predictions.parquet")
    test = world.manifest.frame[world.manifest.in_split("test")]
    assert sorted(rows["id"]) == sorted(test["id"])
    truth = test.set_index("id")["label.y"]
    np.testing.assert_array_equal(rows["label"], truth[rows["id"]])
    auroc = score(result.scores, head="logistic")["value"]
    assert roc_auc_score(rows["label"], rows["probability"]) == pytest.approx(auroc)
    assert rows["at_prevalence"].mean() < rows["calibrated"].mean()
    called = rows["probability"] >= rows["threshold"]
    assert called[rows["label"] == 1].mean() == pytest.approx(
        score(result.scores, head="logistic", metric="sensitivity")["value"]
    )


@pytest.mark.parametrize("pool", ["embedding_mean", "prob_mean", "prob_max"])
def test_the_unit_is_what_is_counted_and_scored(world, pool: str) -> None:
    result = embedcache.probe(world.manifest, world.image, label="y", config=replace(ONE, unit="patient", pool=pool))
    full = score(result.scores, head="logistic")
    assert full["n_test"] == 40 == len(result.predictions)
    assert full["n_train"] == (120 if pool == "embedding_mean" else 240)
    assert set(result.predictions["id"]) == {f"p{k}" for k in range(200) if k % 5 == 4}


def test_shots_are_drawn_many_times(world) -> None:
    config = replace(ONE, fractions=(), shots=(1, 16), n_shot_draws=6, heads=("logistic", "knn"))
    table = embedcache.probe(world.manifest, world.image, label="y", config=config).scores
    auroc = table[(table["metric"] == "auroc") & (table["head"] == "logistic")].set_index("shots")
    assert auroc["n_train"].to_dict() == {1: 2, 16: 32}
    assert set(auroc["n_seeds"]) == {6}
    assert auroc.loc[16, "value"] > auroc.loc[1, "value"]


def test_several_labels_at_once_with_blanks(world) -> None:
    frame = world.manifest.frame.copy()
    rng = np.random.default_rng(2)
    frame["label.noise"] = rng.integers(0, 2, 400).astype(float)
    frame.loc[rng.random(400) < 0.3, "label.noise"] = np.nan
    manifest = world.manifest.with_frame(frame, label_sets=(LabelSet("both", "multi-label", ("y", "noise")),))
    config = replace(QUICK, heads=("mlp", "logistic", "knn"), fractions=(1.0,), controls=("shuffled-labels",))
    table = embedcache.probe(manifest, world.image, label="both", config=config).scores
    for head in config.heads:
        of_y, of_noise, macro = (score(table, head=head, **{"class": c})["value"] for c in ("y", "noise", "macro"))
        assert of_y > 0.9
        assert abs(of_noise - 0.5) < 0.2
        assert macro == pytest.approx((of_y + of_noise) / 2)
    alone = embedcache.probe(manifest, world.image, label="y", config=config).scores
    assert score(alone, head="logistic")["value"] == pytest.approx(
        score(table, head="logistic", **{"class": "y"})["value"], abs=0.03
    )


def another_dataset(world, tmp_path: Path) -> tuple[Manifest, embedcache.store.store.Store]:
    """100 images elsewhere, on which the label shows less."""
    rng = np.random.default_rng(9)
    test = np.flatnonzero(world.manifest.in_split("test"))[rng.integers(0, 80, 100)]
    values = world.values[test] + 2 * rng.normal(size=(100, 16)).astype(np.float32)
    ids = [f"other{k}" for k in range(100)]
    frame = pd.DataFrame(
        {"id": ids, "image": ids, "patient": ids, "label.finding": world.manifest.label("y")[test].astype(int)}
    )
    record = world.image.encoder
    store = embedcache.save_store(tmp_path / "elsewhere", ids, values, record=record, store_dtype="float32")
    return Manifest(frame, name="elsewhere", root=tmp_path), store


def test_another_dataset_is_scored_through_a_label_map(world, tmp_path: Path) -> None:
    manifest, store = another_dataset(world, tmp_path)
    labelmap = LabelMap("elsewhere", "made", {"finding": ("y", "exact")})
    other = embedcache.save_store(tmp_path / "other", store.ids, store.embeddings)
    with pytest.raises(FingerprintMismatchError, match="extract elsewhere with the same one"):
        embedcache.probe(world.manifest, world.image, label="y", test_manifest=manifest, test_store=other, config=ONE)
    with pytest.raises(ManifestError, match="has none of the labels y; it has finding; name a label map"):
        embedcache.probe(world.manifest, world.image, label="y", test_manifest=manifest, test_store=store, config=ONE)
    result: ProbeResult = embedcache.probe(
        world.manifest, world.image, label="y", test_manifest=manifest, test_store=store, labelmap=labelmap,
        config=replace(ONE, controls=("shuffled-labels", "metadata-only")),
    )  # fmt: skip
    inside, outside, apart = (
        score(result.scores, head="logistic", test=t) for t in ("internal", "external", "difference")
    )
    assert outside["n_test"] == 100
    assert outside["value"] < inside["value"] - 0.05
    assert apart["value"] == pytest.approx(inside["value"] - outside["value"])
    assert 0 < apart["low"] < apart["value"] < apart["high"]
    alone = embedcache.probe(world.manifest, world.image, label="y", config=ONE).scores
    assert score(alone, head="logistic")["value"] == inside["value"]
    rows = result.predictions[result.predictions["test"] == "external"]
    assert roc_auc_score(rows["label"], rows["probability"]) == pytest.approx(outside["value"])


def test_the_papers_protocol(world, run_dir: Path) -> None:
    train = np.flatnonzero(world.manifest.in_split("train"))
    fraction = np.full(400, np.nan)
    fraction[train], fraction[train[:100]], fraction[train[:20]] = 1.0, 0.1, 0.01
    manifest = world.manifest.with_frame(world.manifest.frame.assign(fraction=fraction))
    config = ProbeConfig(protocol="paper-covidx", n_seeds=1, n_draws=50, as_published=True, controls=())
    assert (config.head.lr, config.head.weight_decay, config.head.batch_size, config.head.patience) == (
        5e-4,
        0.05,
        128,
        5,
    )
    table = embedcache.probe(manifest, world.image, label="y", run_dir=run_dir, config=config).scores
    auroc = table[table["metric"] == "auroc"]
    assert dict(zip(auroc["fraction"], auroc["n_train"], strict=True)) == {0.01: 20, 0.1: 100, 1.0: 240}
    assert set(auroc["n_valid"]) == {80}
    assert list(auroc["control"].unique()) == ["", "as-published"]
    own, published = (auroc[auroc["control"] == c]["value"].to_numpy() for c in ("", "as-published"))
    assert (own != published).any()
    with pytest.raises(ValueError, match="protocol 'paper-rsna' fixes heads; leave them out, or the protocol"):
        ProbeConfig(protocol="paper-rsna", heads=("knn",))


def test_as_published_an_image_is_scored_by_its_neighbours(world, run_dir: Path) -> None:
    """Why it is no result: the same image, in a file of other images, gets another probability."""
    config = replace(ONE, as_published=True, heads=("logistic",))
    fewer = world.manifest.frame.drop(index=np.flatnonzero(world.manifest.in_split("test"))[1:40])
    found = {}
    for control in ("", "as-published"):
        for name, frame in (("all", world.manifest.frame), ("fewer", fewer)):
            result = embedcache.probe(
                world.manifest.with_frame(frame), world.image, label="y", run_dir=run_dir, config=config
            )
            table = result.scores
            found[control, name] = score(table, head="logistic", control=control)["value"]
    assert found["as-published", "all"] != found["", "all"]
    with pytest.raises(embedcache.EmbedCacheError, match="as_published is a way to apply the paper's Adaptor"):
        embedcache.probe(world.manifest, world.image, label="y", config=config)


def test_a_head_that_says_the_same_of_everyone_is_undefined_and_told(world, tmp_path: Path) -> None:
    constant = embedcache.save_store(tmp_path / "c", world.image.ids, np.ones((400, 4), np.float32))
    result = embedcache.probe(world.manifest, constant, label="y", config=replace(ONE, heads=("logistic",)))
    full = score(result.scores, head="logistic")
    assert np.isnan([full["value"], full["low"], full["high"]]).all()
    assert "says the same of every image for y" in result.notes[0]


def test_an_adaptor_that_learnt_from_the_test_images_is_told(world, run_dir: Path) -> None:
    assert embedcache.probe(world.manifest, world.image, label="y", run_dir=run_dir, config=ONE).warning == ""
    frame = world.manifest.frame
    turned = frame.assign(split=frame["split"].replace({"train": "test", "test": "train"}))
    told = embedcache.probe(
        world.manifest.with_frame(turned),
        world.image,
        label="y",
        run_dir=run_dir,
        config=replace(ONE, valid_labels="full"),
    ).warning
    assert told.startswith("made: of 240 tested 240 are among the images that the Adaptor learnt from")


def test_what_no_head_learnt_has_no_score_and_no_part_in_the_mean(world, tmp_path: Path) -> None:
    """A label that is blank in training, in test, or in the other dataset, is undefined there for every head alike."""
    frame = world.manifest.frame.copy()
    train, test = (world.manifest.in_split(s) for s in ("train", "test"))
    rng = np.random.default_rng(4)
    for name, blank in (("unlearnt", train), ("untested", test), ("noise", np.zeros(400, bool))):
        frame[f"label.{name}"] = np.where(blank, np.nan, rng.integers(0, 2, 400))
    names = ("y", "unlearnt", "untested", "noise")
    manifest = world.manifest.with_frame(frame, label_sets=(LabelSet("four", "multi-label", names),))
    other, store = another_dataset(world, tmp_path)
    other = other.with_frame(other.frame.rename(columns={"label.finding": "label.y"}))
    config = replace(ONE, heads=("mlp", "logistic", "knn"), head=FEW_STEPS)
    table = embedcache.probe(
        manifest, world.image, label="four", test_manifest=other, test_store=store, config=config
    ).scores
    for head in config.heads:
        value = {c: score(table, head=head, **{"class": c})["value"] for c in (*names, "macro")}
        assert np.isnan([value["unlearnt"], value["untested"]]).all()
        assert value["macro"] == pytest.approx((value["y"] + value["noise"]) / 2)
        apart = score(table, head=head, test="difference", **{"class": "macro"})["value"]
        assert apart == pytest.approx(score(table, head=head, test="difference", **{"class": "y"})["value"])
    counts = score(table, head="knn", **{"class": "untested"})
    assert (counts["n_test"], counts["n_positive"]) == (0, 0)
    assert score(table, head="knn", **{"class": "unlearnt"})["n_train"] == 0


def test_a_class_that_training_lacks_is_undefined(world) -> None:
    frame = world.manifest.frame.copy()
    frame["label.three"] = np.where(world.manifest.in_split("train"), frame["label.y"], np.arange(400) % 3)
    config = replace(ONE, heads=("mlp", "logistic", "knn"), head=FEW_STEPS)
    table = embedcache.probe(world.manifest.with_frame(frame), world.image, label="three", config=config).scores
    for head in config.heads:
        assert np.isnan(score(table, head=head, **{"class": "2"})["value"])
        overall = score(table, head=head, metric="accuracy", **{"class": ""})
        assert not np.isnan(overall["value"])
        assert overall["headline"]


def test_labels_of_another_dataset_are_of_the_same_kind(world, tmp_path: Path) -> None:
    other, store = another_dataset(world, tmp_path)
    classes = other.frame.drop(columns="label.finding").assign(**{"label.y": np.arange(100) % 3})
    with pytest.raises(ManifestError, match=r"elsewhere: label 'y' is 2, expected one of 0, 1, as where it was learnt"):
        embedcache.probe(
            world.manifest,
            world.image,
            label="y",
            test_manifest=other.with_frame(classes),
            test_store=store,
            config=ONE,
        )


def test_a_feature_that_does_not_vary_in_training_is_no_feature(world, tmp_path: Path) -> None:
    """Else a spot on one test image would be multiplied by a million."""
    dead = np.where(world.manifest.in_split("train")[:, None], 0.5, world.values[:, :1])
    store = embedcache.save_store(
        tmp_path / "dead", world.image.ids, np.concatenate([world.values, dead], 1), store_dtype="float32"
    )
    config = replace(ONE, heads=("linear",), head=FEW_STEPS)
    with_it, without = (embedcache.probe(world.manifest, s, label="y", config=config) for s in (store, world.image))
    assert score(with_it.scores)["value"] == pytest.approx(score(without.scores)["value"], abs=0.1)
    assert with_it.predictions["probability"].between(0.001, 0.999).all()


def test_a_rare_label_that_texts_tell_is_not_told_absent_of_all(world, tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    rare = (rng.random(400) < 0.08).astype(int)
    values = (rng.normal(size=(400, 16)) + 2.0 * rare[:, None] * np.eye(16)[0]).astype(np.float32)
    texts = (rng.normal(size=(400, 32)) + 3.0 * rare[:, None] * np.eye(32)[:2].sum(0)).astype(np.float32)
    image = embedcache.save_store(tmp_path / "rare", world.image.ids, values, store_dtype="float32")
    text = embedcache.save_store(tmp_path / "told", world.image.ids, texts, modality="text", store_dtype="float32")
    config = replace(ONE, controls=("text-as-label", "shuffled-labels"), fractions=(0.2,), n_seeds=3)
    manifest = world.manifest.with_frame(world.manifest.frame.assign(**{"label.y": rare}))
    table = embedcache.probe(manifest, image, label="y", text_store=text, config=config).scores
    assert score(table, head="logistic", control="text-as-label", fraction=0.2)["value"] > 0.7


def test_texts_of_some_images_are_enough_for_their_control(world, tmp_path: Path) -> None:
    some = world.text.ids[:200]
    store = embedcache.save_store(tmp_path / "some", some, world.text.gather(world.text.rows(some)), modality="text")
    config = replace(ONE, controls=("text-as-label",))
    result = embedcache.probe(world.manifest, world.image, label="y", text_store=store, config=config)
    assert "text-as-label: 120 of 240 training samples have no text there" in result.notes
    assert score(result.scores, head="logistic", control="text-as-label")["value"] > 0.9


def test_images_that_stage_one_could_not_read_are_counted(world, tmp_path: Path) -> None:
    from embedcache.store.layout import Layout, store_document
    from embedcache.store.save import write_store
    from embedcache.store.shard import Failure, ShardRows

    document = store_document(encoder={}, encoder_fingerprint="t", modality="image", store_layout=Layout("float32", 16))
    kept = list(world.image.ids[3:])
    failed = [Failure(i, "empty-file", "the file has no bytes") for i in world.image.ids[:3]]
    rows = ShardRows(kept, np.zeros(397, np.uint16), world.values[3:], np.zeros((397, 16), np.uint8), failed)
    write_store(tmp_path / "s", document, [rows], batch_size=400)
    result = embedcache.probe(world.manifest, tmp_path / "s", label="y", config=ONE)
    assert result.n_failed == 3
    assert "made: 3 images left out, as stage one could not read them" in result.notes


def test_each_group_of_training_patients_is_left_out_once(world) -> None:
    config = replace(ONE, fractions=(0.1, 1.0), n_seeds=2, n_left_out=4)
    found = embedcache.probe(world.manifest, world.image, label="y", config=config)
    assert found.left_out["fraction"].tolist() == [1.0] * 4  # of a tenth each run draws its own labels
    assert found.left_out["group"].tolist() == [0, 1, 2, 3]
    whole = score(found.scores, head="logistic")["value"]
    assert found.left_out["value"].between(whole - 0.1, whole + 0.1).all()
    assert found.left_out["value"].nunique() > 1
    plain = embedcache.probe(world.manifest, world.image, label="y", config=replace(config, n_left_out=0))
    assert len(plain.left_out) == 0
    pd.testing.assert_frame_equal(plain.scores, found.scores)
    with pytest.raises(ValueError, match="n_left_out is 1: expected at least 2 groups"):
        ProbeConfig(n_left_out=1)
