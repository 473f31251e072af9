"""Settings of a probe, and the paper's protocols by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from embedcache.settings import STRICT, check, fix
from embedcache.stage_two.heads import TRAINED, HeadConfig

HEADS = (*TRAINED, "logistic", "knn")
CONTROLS = (
    "no-adaptor",
    "untrained-adaptor",
    "random-encoder",
    "shuffled-labels",
    "metadata-only",
    "text-as-label",
)
Protocol = Literal["", "paper-rsna", "paper-covidx"]
Unit = Literal["image", "study", "patient"]
Pool = Literal["embedding_mean", "prob_mean", "prob_max"]
Views = Literal["all", "frontal", "frontal+lateral"]


@dataclass(frozen=True)
class ProbeConfig:
    """What is probed and how often.

    Args:
        protocol: the paper's, for RSNA or COVIDx: fixes `heads`, `subsets`, `valid_labels`, `standardise`,
            `threshold` and `head`.
        heads: `linear`, `mlp`, `logistic` (regression), `knn` (nearest neighbours).
        fractions: shares of the training labels, at least two labels of each class.
        shots: numbers of labels of each class, each drawn `n_shot_draws` times; nothing is chosen by validation there.
        subsets: which labels a fraction is: `drawn` for each seed, stratified by the label; or the `manifest`'s own
            column `fraction`, the same for each seed (under a `paper` split, what the published code draws).
        valid_labels: how many validation labels a fraction may use: its `matched` share, or the `full` split.
        class_weight: `balanced` makes all classes count alike in sum.
        standardise: each feature to mean 0 and deviation 1 over all training rows; `knn` takes them as they are.
        threshold: at which a label is called present: chosen by `youden`'s J, or `half` throughout.
        unit: what is scored: an `image`, a `study` or a `patient`.
        pool: how images become a unit: the mean of their features, or the mean or largest of their probabilities.
        views: `all` images, the `frontal` ones, or `frontal+lateral`: features of both side by side, with a mask for
            one that is missing.
        as_published: also the evaluation of the published code, in which attention ran across the images of a batch,
            as setting `as-published`: one image's score then depends on its neighbours in the file.
        n_seeds: runs with other label draws, head weights and batch orders.
        n_draws: bootstrap draws.
        n_left_out: groups that the training patients are dealt into, each left out once, where all runs learn from the
            same labels: how much the result rests on these patients. 0 for none; by default 10 where encoders are
            compared, else none.
        prevalence: share of positives at the place of use: calibrated probabilities for it stand in the predictions.
        controls: which controls stand beside the result, of `CONTROLS`, where what they need is given.
    """

    protocol: Protocol = ""
    heads: tuple[str, ...] = ("linear", "mlp")
    fractions: tuple[Annotated[float, Gt(0), Le(1)], ...] = (0.01, 0.1, 1.0)
    shots: tuple[Annotated[int, Ge(1)], ...] = ()
    n_shot_draws: Annotated[int, Ge(1)] = 20
    subsets: Literal["drawn", "manifest"] = "drawn"
    valid_labels: Literal["matched", "full"] = "matched"
    class_weight: Literal["none", "balanced"] = "none"
    standardise: bool = True
    threshold: Literal["youden", "half"] = "youden"
    unit: Unit = "image"
    pool: Pool = "embedding_mean"
    views: Views = "all"
    as_published: bool = False
    n_seeds: Annotated[int, Ge(1)] = 5
    n_draws: Annotated[int, Ge(1)] = 2000
    n_left_out: Annotated[int, Ge(0)] | None = None
    prevalence: Annotated[float, Gt(0), Lt(1)] | None = None
    controls: tuple[str, ...] = CONTROLS
    head: HeadConfig = field(default_factory=HeadConfig)
    device: str = "auto"

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check(self)
        if self.protocol:
            fix(self, _PROTOCOLS[self.protocol], self.protocol)
        for name, known in (("heads", HEADS), ("controls", CONTROLS)):
            unknown = [value for value in getattr(self, name) if value not in known]
            if unknown:
                raise ValueError(f"unknown {name} {', '.join(unknown)}; expected some of {', '.join(known)}")
        if not self.heads or not all(0 < fraction <= 1 for fraction in self.fractions):
            raise ValueError("expected at least one head, and fractions above 0 and at most 1")
        if any(shots < 1 for shots in self.shots):
            raise ValueError(f"shots are {', '.join(map(str, self.shots))}; expected each to be at least 1")
        if self.n_left_out == 1:
            raise ValueError("n_left_out is 1: expected at least 2 groups, or 0 for none")
        if not self.fractions and not self.shots:
            raise ValueError("expected label fractions, or shots")
        if self.views == "frontal+lateral" and self.unit == "image":
            raise ValueError("views frontal+lateral put images side by side: expected unit study or patient")
        if self.views == "frontal+lateral" and self.pool != "embedding_mean":
            raise ValueError(f"views frontal+lateral join features: expected pool embedding_mean, not {self.pool}")
        for name in ("heads", "fractions", "shots", "controls"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} {', '.join(map(str, getattr(self, name)))}: one stands there twice")
        if self.subsets == "manifest" and self.unit != "image":
            raise ValueError(f"subsets of the manifest are of images: expected unit image, not {self.unit}")
        if self.as_published and self.unit != "image":
            raise ValueError(f"as_published is of the images of a batch: expected unit image, not {self.unit}")


def _published(**head: Any) -> dict[str, Any]:
    """What both protocols have in common; source: the paper's code and its shell scripts."""
    return {
        "heads": ("mlp",),
        "subsets": "manifest",
        "valid_labels": "full",
        "standardise": False,
        "threshold": "half",
        "head": HeadConfig(min_steps=0, dropout=0.1, reshuffle=False, restarts_by="epoch", **head),
    }


_PROTOCOLS = {
    "paper-rsna": _published(lr=5e-5, weight_decay=1e-4, batch_size=512, epochs=100),
    "paper-covidx": _published(lr=5e-4, weight_decay=0.05, batch_size=128, epochs=50, patience=5),
}
