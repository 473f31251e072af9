"""Images, studies and patients: whose features are averaged, whose probabilities, and what labels they have."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import pytest
import torch
from made import BINARY, BOTH, KIND, SETS, manifest

from embedcache import Manifest, ProbeConfig
from embedcache.errors import ManifestError
from embedcache.stage_two.samples import Samples

#          0     1     2     3     4     5     6       7
STUDIES = ["s1", "s1", "s2", "s2", "s2", "",   "s3",   "s3"]  # fmt: skip
PEOPLE = ["p1", "p1", "p1", "p1", "p1", "p2", "p3", "p3"]
VIEWS = ["PA", "LL", "LL", "AP", "PA", "PA", "LATERAL", "L"]
SPLITS = ["train", "train", "train", "train", "train", "valid", "test", "test"]
A = [0, 1, None, 0, 0, None, None, None]
B = [None, 0, 0, 0, 0, 1, None, 1]


def made(**columns: object) -> Manifest:
    own: Mapping = {
        "study": STUDIES, "patient": PEOPLE, "view": VIEWS, "split": SPLITS, "label.a": A, "label.b": B,
        "label.y": A, "label.kind": [0, 0, 2, 2, 2, 1, 1, 1], **columns,
    }  # fmt: skip
    return manifest(own, *SETS)


ALL = np.arange(8)
X = torch.arange(16.0).view(8, 2) ** 2


def samples(config: ProbeConfig | None = None, target=BOTH, rows: np.ndarray = ALL, **columns: object) -> Samples:
    return Samples.of(made(**columns), rows, target, config or ProbeConfig())


def test_a_sample_is_an_image() -> None:
    found = samples()
    assert len(found) == 8
    assert found.frame["id"].tolist() == [f"i{k}" for k in range(8)]
    assert found.keys.tolist() == [f"i{k}" for k in range(8)]
    assert found.groups.tolist() == [f"patient:{p}" for p in PEOPLE]
    assert [found.in_split(s).tolist() for s in ("train", "valid", "test")] == [[0, 1, 2, 3, 4], [5], [6, 7]]
    np.testing.assert_array_equal(found.values, BOTH.values(made()))
    assert torch.equal(found.features(X), X)


def test_a_row_in_two_splits_is_two_samples() -> None:
    found = samples(split=["train+test", "valid", "train", "test+valid", "", "", "", ""])
    assert found.split.tolist() == ["train", "train", "valid", "valid", "test", "test"]
    assert found.frame["id"].tolist() == ["i0", "i2", "i1", "i3", "i0", "i3"]
    assert torch.equal(found.features(X), X[[0, 2, 1, 3, 0, 3]])
    np.testing.assert_array_equal(found.values, BOTH.values(made())[[0, 2, 1, 3, 0, 3]])


def test_rows_without_features_are_no_samples() -> None:
    found = samples(ProbeConfig(unit="study"), rows=np.array([1, 3, 4, 6]))
    assert found.keys.tolist() == ["s1", "s2", "s3"]
    features = found.features(X[[1, 3, 4, 6]])  # the features of the joined rows
    torch.testing.assert_close(features, torch.stack([X[1], X[3:5].mean(0), X[6]]))
    np.testing.assert_array_equal(found.values, [[1, 0], [0, 0], [np.nan, np.nan]])


@pytest.mark.parametrize(
    ("unit", "by", "keys"),
    [
        ("study", ["s1", "s1", "s2", "s2", "s2", "i5", "s3", "s3"], ["s1", "s2", "id:i5", "s3"]),
        ("patient", PEOPLE, ["patient:p1", "patient:p2", "patient:p3"]),
    ],
)
def test_mean_features_and_largest_labels_of_a_unit(unit: str, by: list[str], keys: list[str]) -> None:
    found = samples(ProbeConfig(unit=unit))  # type: ignore[arg-type]
    assert found.keys.tolist() == keys
    means = pd.DataFrame(X.numpy()).groupby(by, sort=False).mean()
    np.testing.assert_allclose(found.features(X), means, rtol=1e-6)
    labels = pd.DataFrame({"a": A, "b": B}, dtype=float).groupby(by, sort=False).max()
    np.testing.assert_array_equal(found.values, labels)
    firsts = pd.Series([f"i{k}" for k in range(8)]).groupby(by, sort=False).first()
    assert found.frame["id"].tolist() == firsts.tolist()


def test_a_study_in_two_splits_is_two_samples_of_the_images_there() -> None:
    found = samples(ProbeConfig(unit="study"), split=["train", "test", *SPLITS[2:]])
    assert list(zip(found.split, found.keys, strict=True)) == [
        ("train", "s1"), ("train", "s2"), ("valid", "id:i5"), ("test", "s1"), ("test", "s3")
    ]  # fmt: skip
    torch.testing.assert_close(found.features(X)[[0, 3]], X[:2])
    np.testing.assert_array_equal(found.values[[0, 3]], [[0, np.nan], [1, 0]])


def test_without_splits_all_rows_are_tested() -> None:
    found = Samples.of(made(split=[""] * 8), ALL, BOTH, ProbeConfig(unit="patient"), splits=False)
    assert found.split.tolist() == ["test"] * 3


def test_frontal_views_alone() -> None:
    found = samples(ProbeConfig(views="frontal"))
    assert found.frame["id"].tolist() == ["i0", "i3", "i4", "i5"]
    assert torch.equal(found.features(X), X[[0, 3, 4, 5]])
    of_study = samples(ProbeConfig(views="frontal", unit="study"))
    assert of_study.keys.tolist() == ["s1", "s2", "id:i5"]
    torch.testing.assert_close(of_study.features(X), torch.stack([X[0], X[3:5].mean(0), X[5]]))
    np.testing.assert_array_equal(of_study.values, [[0, np.nan], [0, 0], [np.nan, 1]])  # of those views


def test_frontal_and_lateral_views_side_by_side() -> None:
    found = samples(ProbeConfig(views="frontal+lateral", unit="study"), view=[*VIEWS[:7], "OBLIQUE"])
    assert found.keys.tolist() == ["s1", "s2", "id:i5", "s3"]
    none = torch.zeros(2)
    frontal, lateral = (X[0], X[3:5].mean(0), X[5], none), (X[1], X[2], none, X[6])
    expected = [
        torch.cat([f, torch.tensor([float(f is not none)]), s, torch.tensor([float(s is not none)])])
        for f, s in zip(frontal, lateral, strict=True)
    ]
    torch.testing.assert_close(found.features(X), torch.stack(expected))


def test_side_by_side_each_view_may_be_there_once() -> None:
    found = samples(ProbeConfig(views="frontal+lateral", unit="study"), rows=np.arange(2))
    assert found.features(X[:2]).tolist() == [[*X[0].tolist(), 1, *X[1].tolist(), 1]]


def test_no_frontal_view_is_refused() -> None:
    with pytest.raises(ManifestError, match=r"made: no view is a frontal one \(found '', 'LL'\); fill .*'view', or"):
        samples(ProbeConfig(views="frontal"), view=["", "LL"] * 4)


def test_two_classes_in_one_unit_are_refused() -> None:
    study = ProbeConfig(unit="study")
    np.testing.assert_array_equal(samples(study, KIND).values[:, 0], [0, 2, 1, 1])
    with pytest.raises(ManifestError, match="made: the images of 's2' have two classes of 'kind'; probe unit 'image'"):
        samples(study, KIND, **{"label.kind": [0, 0, 2, None, 1, 1, 1, 1]})
    images = samples(ProbeConfig(unit="study", pool="prob_max"), KIND, **{"label.kind": [0, 1, 2, 2, 2, 1, 1, 1]})
    with pytest.raises(ManifestError, match="made: the images of 's1' have two classes"):
        images.units(images.in_split("train"), KIND, "made")


def test_images_of_a_study_are_pooled_when_they_are_scored() -> None:
    config = ProbeConfig(unit="study", pool="prob_mean")
    found = samples(config)
    assert found.frame["id"].tolist() == [f"i{k}" for k in range(8)]  # learnt from as images
    np.testing.assert_array_equal(found.values, BOTH.values(made()))
    chosen = np.array([4, 0, 6, 3, 1, 2])
    units = found.units(chosen, BOTH, "made")
    assert units.keys.tolist() == ["s2", "s1", "s3"]
    assert units.groups.tolist() == ["patient:p1", "patient:p1", "patient:p3"]
    assert units.frame["id"].tolist() == ["i4", "i0", "i6"]
    assert units.index.tolist() == [0, 1, 2, 0, 1, 0]
    np.testing.assert_array_equal(units.values, [[0, 0], [1, 0], [np.nan, np.nan]])
    p = np.random.default_rng(0).random((6, 2))
    by = pd.DataFrame(p).groupby(units.index)
    np.testing.assert_allclose(units.pooled(p, "prob_mean"), by.mean())
    np.testing.assert_allclose(units.pooled(p, "prob_max"), by.max())


def test_units_that_are_samples_are_not_pooled() -> None:
    found = samples(ProbeConfig(unit="study"))
    units = found.units(np.array([2, 0]), BOTH, "made")
    assert units.keys.tolist() == ["id:i5", "s1"]
    p = np.random.default_rng(0).random((2, 2))
    assert units.pooled(p, "embedding_mean") is p


def test_mean_of_classes_still_sums_to_one() -> None:
    found = samples(ProbeConfig(unit="study", pool="prob_mean"), KIND)
    units = found.units(ALL, KIND, "made")
    p = np.random.default_rng(0).dirichlet(np.ones(3), 8).astype(np.float32)
    np.testing.assert_allclose(units.pooled(p, "prob_mean").sum(axis=1), 1, rtol=1e-6)


def test_a_label_by_itself_has_one_column() -> None:
    np.testing.assert_array_equal(samples(ProbeConfig(unit="patient"), BINARY).values, [[1], [np.nan], [np.nan]])
