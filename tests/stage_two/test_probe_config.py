"""Settings of a probe that cannot be meant are refused, and the paper's protocols are what the paper says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from embedcache import ProbeConfig
from embedcache.stage_two.heads import HeadConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": ("linear", "forest")}, "unknown heads forest; expected some of linear, mlp, logistic, knn"),
        ({"controls": ("none",)}, "unknown controls none; expected some of no-adaptor, "),
        ({"heads": ()}, "expected at least one head"),
        ({"fractions": (0.1, 1.5)}, "fractions above 0 and at most 1"),
        ({"fractions": (0.0,)}, "fractions above 0 and at most 1"),
        ({"fractions": (float("nan"),)}, "fractions above 0 and at most 1"),
        ({"fractions": ()}, "expected label fractions, or shots"),
        ({"shots": (0,)}, "shots"),
        ({"shots": (4, -1)}, "shots"),
        ({"n_seeds": 0, "n_draws": 0}, "n_seeds is 0, expected at least 1; n_draws is 0, expected at least 1"),
        ({"unit": "exam"}, "unit is 'exam', expected one of image, study, patient"),
        ({"pool": "max"}, "pool is 'max', expected one of embedding_mean, prob_mean, prob_max"),
        ({"prevalence": 0.0}, r"prevalence is 0\.0, expected above 0"),
        ({"protocol": "paper"}, "protocol is 'paper', expected one of , paper-rsna, paper-covidx"),
        ({"views": "frontal+lateral"}, "side by side: expected unit study or patient"),
        (
            {"views": "frontal+lateral", "unit": "study", "pool": "prob_max"},
            "expected pool embedding_mean, not prob_max",
        ),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProbeConfig(**settings)


def test_shots_alone_are_enough() -> None:
    assert ProbeConfig(fractions=(), shots=(1, 16)).shots == (1, 16)


@pytest.mark.parametrize(
    ("protocol", "head"),
    [
        ("paper-rsna", {"lr": 5e-5, "weight_decay": 1e-4, "batch_size": 512, "epochs": 100, "patience": None}),
        ("paper-covidx", {"lr": 5e-4, "weight_decay": 0.05, "batch_size": 128, "epochs": 50, "patience": 5}),
    ],
)
def test_a_protocol_of_the_paper_fixes_what_it_says(protocol: str, head: dict) -> None:
    config = ProbeConfig(protocol=protocol)  # type: ignore[arg-type]
    assert (config.heads, config.subsets, config.valid_labels) == (("mlp",), "manifest", "full")
    assert not config.standardise
    assert config.fractions == (0.01, 0.1, 1.0)
    assert config.head == HeadConfig(min_steps=0, dropout=0.1, reshuffle=False, restarts_by="epoch", **head)


def test_what_a_protocol_leaves_open_can_be_set() -> None:
    config = ProbeConfig(protocol="paper-rsna", n_seeds=5, controls=(), fractions=(0.01,), heads=("mlp",))
    assert (config.n_seeds, config.controls, config.fractions) == (5, (), (0.01,))
    assert replace(config, n_seeds=7).head == config.head


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"heads": ("logistic",)}, "heads"),
        ({"head": HeadConfig(epochs=7)}, "head"),
        ({"heads": ("knn",), "head": HeadConfig(lr=1.0)}, "heads, head"),
    ],
)
def test_what_contradicts_a_protocol_is_refused(settings: dict, named: str) -> None:
    with pytest.raises(ValueError, match=f"protocol 'paper-covidx' fixes {named}; leave them out, or the protocol"):
        ProbeConfig(protocol="paper-covidx", **settings)
    with pytest.raises(ValueError, match="protocol 'paper-rsna' fixes head"):
        replace(ProbeConfig(protocol="paper-covidx"), protocol="paper-rsna")
