"""Which labels a run may use: of training, and to choose by."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from made import BINARY, BOTH, KIND, manifest

from embedcache import Manifest, ProbeConfig
from embedcache.errors import ManifestError
from embedcache.stage_two.label_budget import Budget, budgets, grouped_folds, without_groups
from embedcache.stage_two.samples import Samples
from embedcache.stage_two.targets import Target

NO_VALID = (0, 0)


def made(
    train: tuple[int, ...] = (800, 400), valid: tuple[int, ...] = (200, 100), *, blank: int = 0, per_patient: int = 1
) -> Manifest:
    """So many rows of each class in train and valid, `blank` more of train and valid without a label, and a test."""
    parts = {"train": train, "valid": valid, "test": (3,) * len(train)}
    labels = [(s, c) for s, counts in parts.items() for c, n in enumerate(counts) for _ in range(n)]
    labels += [(s, None) for s in ("train", "valid") for _ in range(blank)]  # type: ignore[list-item]
    labels = [labels[k] for k in np.random.default_rng(0).permutation(len(labels))]
    place: Counter = Counter()
    patients = []
    for key in labels:  # patients of one class and split
        patients.append(f"{key}{place[key] // per_patient}")
        place[key] += 1
    values = [c for _, c in labels]
    return manifest({"split": [s for s, _ in labels], "patient": patients, "label.y": values, "label.kind": values})


def of(table: Manifest, target: Target = BINARY, **config: object) -> list[Budget]:
    settings = ProbeConfig(**{"n_seeds": 2, "fractions": (0.1, 0.5, 1.0), **config})  # type: ignore[arg-type]
    return budgets(table, Samples.of(table, np.arange(len(table)), target, settings), target, settings)


def counts(labels: np.ndarray) -> list[int]:
    return [int((labels == c).sum()) for c in (0, 1)]


def test_a_budget_for_each_fraction_and_seed_then_for_shots() -> None:
    found = of(made(), shots=(1, 4), n_shot_draws=3)
    assert [(b.fraction, b.shots, b.seed) for b in found[:6]] == [
        (f, 0, s) for f in (0.1, 0.5, 1.0) for s in range(2)
    ]  # fmt: skip
    assert [(b.shots, b.seed) for b in found[6:]] == [(n, s) for n in (1, 4) for s in range(3)]
    assert all(np.isnan(b.fraction) for b in found[6:])
    assert [b.amount for b in found[5:7]] == [(1.0, 0), (-1.0, 1)]


def test_labels_are_stratified_known_and_of_the_training_split() -> None:
    table = made(blank=100)
    values, train = table.label("y"), table.in_split("train")
    sample = Samples.of(table, np.arange(len(table)), BINARY, ProbeConfig()).frame["id"]
    for budget in of(table):
        rows = sample.iloc[budget.rows].str[1:].astype(int).to_numpy()
        assert train[rows].all()
        np.testing.assert_array_equal(values[rows], budget.labels[:, 0])
        assert counts(budget.labels) == [round(800 * budget.fraction), round(400 * budget.fraction)]
        assert len(set(rows.tolist())) == len(rows) == sum(counts(budget.labels))
        valid = sample.iloc[budget.valid].str[1:].astype(int).to_numpy()
        assert table.in_split("valid")[valid].all()
        np.testing.assert_array_equal(values[valid], budget.valid_labels[:, 0])


def test_validation_shrinks_with_the_fraction() -> None:
    matched, full = of(made(blank=50)), of(made(blank=50), valid_labels="full")
    assert [counts(b.valid_labels) for b in matched[::2]] == [[20, 10], [100, 50], [200, 100]]
    assert [counts(b.valid_labels) for b in full] == [[200, 100]] * 6
    assert {b.choice for b in matched + full} == {"valid"}
    assert all(len(b.folds) == 0 for b in matched + full)


def test_smaller_fractions_are_within_larger_ones_and_seeds_differ() -> None:
    found = of(made())
    for seed in range(2):
        few, half, everything = found[seed::2]
        for name in ("rows", "valid"):
            few_of, half_of, all_of = (set(getattr(b, name).tolist()) for b in (few, half, everything))
            assert few_of < half_of < all_of
    for one, two in zip(found[:4:2], found[1:4:2], strict=True):
        assert set(one.rows.tolist()) != set(two.rows.tolist())
        assert set(one.valid.tolist()) != set(two.valid.tolist())
    assert found[4].rows.tolist() == found[5].rows.tolist()
    again = of(made())
    assert all(
        np.array_equal(a.rows, b.rows) and np.array_equal(a.valid, b.valid) for a, b in zip(found, again, strict=True)
    )


def test_few_validation_labels_give_way_to_folds() -> None:
    found = of(made(valid=(300, 40)), fractions=(0.1, 0.125, 1.0), n_seeds=1)
    assert [b.choice for b in found] == ["folds", "valid", "valid"]
    assert [counts(b.valid_labels) for b in found] == [[0, 0], [38, 5], [300, 40]]
    assert found[0].valid_labels.shape == (0, 1)
    assert len(found[0].folds) == len(found[0].rows) == 120
    of_full = of(made(valid=(300, 40)), fractions=(0.1,), n_seeds=1, valid_labels="full")
    assert [b.choice for b in of_full] == ["valid"]
    assert {b.choice for b in of(made(valid=NO_VALID))} == {"folds"}
    assert {b.choice for b in of(made(valid=(4, 400)), valid_labels="full")} == {"folds"}


def test_patients_are_in_one_fold_and_classes_in_all() -> None:
    table = made(valid=NO_VALID, per_patient=8)
    one, two = of(table, fractions=(1.0,))
    patients = Samples.of(table, np.arange(len(table)), BINARY, ProbeConfig()).groups[one.rows]
    for budget in (one, two):
        assert set(budget.folds) == set(range(5))
        for patient in set(patients):
            assert len(set(budget.folds[patients == patient])) == 1
        for fold in range(5):
            assert counts(budget.labels[budget.folds == fold]) == [160, 80]
    assert (one.folds != two.folds).any()


@pytest.mark.parametrize(("n_patients", "choice"), [(4, "fixed"), (5, "folds")])
def test_few_patients_choose_nothing(n_patients: int, choice: str) -> None:
    table = made(train=(200, n_patients * 10), valid=NO_VALID, per_patient=10)
    (budget,) = of(table, fractions=(1.0,), n_seeds=1)
    assert budget.choice == choice
    assert len(budget.folds) == (0 if choice == "fixed" else len(budget.rows))
    assert counts(budget.labels) == [200, n_patients * 10]


def test_few_labels_are_all_trained_on_and_choose_nothing() -> None:
    (budget,) = of(made(valid=NO_VALID), fractions=(0.001,), n_seeds=1)
    assert (budget.choice, counts(budget.labels), len(budget.valid), len(budget.folds)) == ("fixed", [2, 2], 0, 0)


def test_shots_are_labels_of_each_class_and_choose_nothing() -> None:
    found = of(made(train=(800, 7)), fractions=(), shots=(1, 5, 10), n_shot_draws=4)
    assert [counts(b.labels) for b in found] == [[n, min(n, 7)] for n in (1, 5, 10) for _ in range(4)]
    assert {b.choice for b in found} == {"fixed"}
    assert all(len(b.valid) == len(b.folds) == 0 for b in found)
    assert len({tuple(b.rows.tolist()) for b in found}) == 12
    classes = of(made((60, 50, 2), (9, 9, 9)), KIND, fractions=(), shots=(3,), n_shot_draws=1)
    assert sorted(classes[0].labels[:, 0]) == [0] * 3 + [1] * 3 + [2] * 2


def test_subsets_of_the_manifest_are_its_own_for_every_seed() -> None:
    table = made(blank=40)
    train = np.flatnonzero(table.in_split("train"))
    fraction = np.full(len(table), np.nan)
    fraction[train[::2]], fraction[train[::20]] = 1.0, 0.1
    given = table.with_frame(table.frame.assign(fraction=fraction))
    found = of(given, subsets="manifest", fractions=(0.1, 1.0))
    known = ~np.isnan(table.label("y"))
    for budget, rows in zip(found, [train[::20]] * 2 + [train[::2]] * 2, strict=True):
        expected = [f"i{k}" for k in rows if known[k]]
        ids = Samples.of(given, np.arange(len(given)), BINARY, ProbeConfig()).frame["id"].iloc[budget.rows]
        assert ids.tolist() == expected
    with pytest.raises(ManifestError, match=r"no label fraction 0\.3 in its column 'fraction', which has 0\.1, 1"):
        of(given, subsets="manifest", fractions=(0.3,))
    one_class = np.where(table.label("y") == 0, fraction, np.nan)
    with pytest.raises(
        ManifestError, match=r"has classes 0 in the \d+ rows that its column 'fraction' gives to 0\.1 of the labels"
    ):
        of(table.with_frame(table.frame.assign(fraction=one_class)), subsets="manifest", fractions=(0.1,))


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("label", "found"), [(1.0, "1"), (np.nan, "none")])
def test_a_split_without_two_classes_is_refused(split: str, label: float, found: str) -> None:
    table = made()
    frame = table.frame.assign(**{"label.y": table.frame["label.y"].mask(table.in_split(split), label)})
    with pytest.raises(
        ManifestError, match=f"made: label 'y' has classes {found} in split '{split}', expected at least"
    ):
        of(table.with_frame(frame))


# several labels, several classes


def rare_labels(n_patients: int = 12) -> tuple[Manifest, Target]:
    """Six rows of twelve have label l0, and no rarest label is that of more than two rows."""
    values = np.zeros((12, 7))
    values[:6, 0] = 1
    values[np.arange(12), 1 + np.arange(12) // 2] = 1
    columns = {f"label.l{k}": np.concatenate([values[:, k], [0, 1]]) for k in range(7)}
    patients = [f"p{k % n_patients}" for k in range(12)] + ["t0", "t1"]
    labels = tuple(f"l{k}" for k in range(7))
    table = manifest({"split": ["train"] * 12 + ["test"] * 2, "patient": patients, **columns})
    return table, Target("many", "multi-label", labels, labels)


def test_rare_labels_are_in_folds_too() -> None:
    table, target = rare_labels()
    (budget,) = of(table, target, fractions=(1.0,), n_seeds=1)
    assert budget.choice == "folds"
    assert max(Counter(budget.folds.tolist()).values()) <= 4
    assert 2 <= len(set(budget.folds.tolist())) <= 5


def test_several_labels_have_validation_if_one_of_them_is_frequent() -> None:
    rng = np.random.default_rng(0)
    split = np.repeat(["train", "valid", "test"], 100)
    labels = {"label.a": rng.integers(0, 2, 300), "label.b": (np.arange(300) % 50 == 0).astype(float)}
    labels["label.b"][100:110] = np.nan
    found = of(manifest({"split": split, **labels}), BOTH, fractions=(0.2, 1.0), n_seeds=1)
    assert [b.choice for b in found] == ["valid", "valid"]
    assert [len(b.valid) for b in found] == [20, 100]
    assert found[0].labels.shape == (len(found[0].rows), 2)
    assert np.nansum(found[0].labels[:, 1]) == 2  # the rare label is not left to chance


def test_classes_have_validation_if_one_of_them_is_frequent() -> None:
    found = of(made((100, 100, 10), (50, 50, 3)), KIND, fractions=(0.2, 1.0), n_seeds=1)
    assert [b.choice for b in found] == ["valid", "valid"]
    assert [sorted(Counter(b.valid_labels[:, 0]).items()) for b in found] == [
        [(0, 10), (1, 10), (2, 1)], [(0, 50), (1, 50), (2, 3)]
    ]  # fmt: skip


def test_folds_of_samples_that_are_given() -> None:
    table = made(valid=NO_VALID, per_patient=3)
    samples = Samples.of(table, np.arange(len(table)), BINARY, ProbeConfig())
    rows = np.arange(50, 150)
    folds = grouped_folds(samples, rows, samples.values[rows], BINARY, 3)
    assert np.array_equal(folds, grouped_folds(samples, rows, samples.values[rows], BINARY, 3))
    assert folds.shape == (100,)
    assert set(folds) == set(range(5))


def test_a_unit_of_several_images_counts_once() -> None:
    table = made(per_patient=4)
    found = of(table, unit="patient", fractions=(0.1, 1.0), n_seeds=1)
    assert [counts(b.labels) for b in found] == [[20, 10], [200, 100]]
    assert [counts(b.valid_labels) for b in found][1] == [50, 25]


def test_groups_of_patients_are_left_out_whole_and_once() -> None:
    rows, groups = np.arange(40, 80), np.repeat([f"p{k}" for k in range(40)], 2)
    budget = Budget(1.0, 0, 0, rows, np.ones((40, 1)), "folds", rows[:0], np.empty((0, 1)), np.arange(40) % 5)
    without = without_groups(budget, groups, 7)
    assert len(without) == 7
    gone = [sorted(set(rows) - set(less.rows)) for less in without]
    assert sorted(row for left in gone for row in left) == rows.tolist()
    for less, left in zip(without, gone, strict=True):
        assert not set(groups[less.rows]) & set(groups[left])
        assert len(less.labels) == len(less.folds) == len(less.rows)
    assert len(without_groups(budget, groups, 100)) == 20  # no more than there are patients
