"""Zero-shot classification: an image against prompts that speak for a finding and against it.

Shape notation: n images, u prompts, p width of the shared space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge
from torch import Tensor

from embedcache.data.manifest import Manifest
from embedcache.data.prompts import PromptSet, Wordings, prompt_id
from embedcache.device import full_precision, pick_device
from embedcache.errors import JoinError, ManifestError, MissingIdsError, SettingsError, some_ids
from embedcache.metrics.classification import Ranking
from embedcache.metrics.intervals import PatientDraws, Sampled, Score, bootstrap, over_patients_and_seeds
from embedcache.output import write_tables
from embedcache.settings import STRICT, check
from embedcache.stage_two.adaptor import encoded_images, read_adaptors
from embedcache.stage_two.inputs import unit
from embedcache.stage_two.leaks import leak_words
from embedcache.stage_two.targets import Target
from embedcache.stage_two.tensors import changed_texts, join, opened, resident
from embedcache.store.store import Store


@dataclass(frozen=True)
class ZeroShotConfig:
    """What is classified.

    Args:
        split: whose images.
        n_draws: bootstrap draws of patients.
    """

    split: Literal["train", "valid", "test"] = "test"
    n_draws: Annotated[int, Ge(1)] = 2000
    device: str = "auto"

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, eq=False)
class ZeroShotResult:
    """What prompts say of images. Every interval holds 95% over patients and over the run's seeds.

    Args:
        scores: a row per label and metric (`auroc`, `average_precision`): `value`, `low`, `high`, `n_wordings`,
            `worst_wording`, `best_wording` (the metric of single wordings), `inverted` (an AUROC whose interval lies
            wholly below 0.5), `n_test`, `n_positive`.
        wordings: a row per label and single wording: its prompts and its `auroc`.
        predictions: a row per seed, image and label: `seed` (from 0), `id`, `label`, `truth`, `probability`.
        warning: one line where the manifest's splits share patients or files; blank where they do not.
        notes: what is to be known of these scores, inverted prompts among them.
    """

    scores: pd.DataFrame
    wordings: pd.DataFrame
    predictions: pd.DataFrame
    warning: str
    notes: tuple[str, ...] = ()

    def write(self, folder: str | Path) -> None:
        """Writes `scores.csv`, `wordings.csv` and `predictions.parquet`.

        Raises:
            OutputError: they cannot be written there.
        """
        tables = {"scores.csv": self.scores, "wordings.csv": self.wordings, "predictions.parquet": self.predictions}
        write_tables(Path(folder), tables)


def zero_shot(
    manifest: Manifest,
    image_store: Store | str | Path,
    prompt_store: Store | str | Path,
    run_dir: str | Path,
    *,
    prompts: PromptSet | str | Path = "chexzero",
    labels: Sequence[str],
    config: ZeroShotConfig | None = None,
) -> ZeroShotResult:
    """Scores binary labels without a single label to learn from.

    Each prompt is embedded and divided by its norm, each side's prompts averaged and divided by their norm; an image's
    probability is the softmax over its two cosines at the set's temperature. Source: CLIP (Radford et al. 2021) for
    the averaging, CheXzero (Tiu et al. 2022) for the pair.

    Args:
        prompt_store: the set's prompts through the text encoder that the Adaptor was trained on: extract
            `prompts.manifest(labels)`.
        run_dir: a run of `train`.
        prompts: a set, its name or its file.
        labels: of the manifest, or sets of them.

    Raises:
        MissingIdsError: prompts that the store does not hold.
        JoinError: prompts whose text is another than what was encoded.
        FingerprintMismatchError: the Adaptor is of other encoders.
        SettingsError: a multi-class label, or an Adaptor of tokens.
    """
    config = config or ZeroShotConfig()
    prompts = prompts if isinstance(prompts, PromptSet) else PromptSet.named(prompts)
    images, texts, device = opened(image_store), opened(prompt_store), pick_device(config.device)
    adaptors = [adaptor.to(device).eval() for adaptor in read_adaptors(run_dir)]
    for adaptor, store in product(adaptors, (images, texts)):
        adaptor.check_encoder(store, run_dir)
    if any(encoder.get("features") == "tokens" for encoder in adaptors[0].encoders.values()):
        raise SettingsError(f"{run_dir}: its Adaptor is of tokens, expected one of embeddings")
    targets = [Target.of(manifest, label) for label in labels]
    if any(target.task == "multi-class" for target in targets):
        raise SettingsError("a multi-class label has no pair of prompts; name binary labels, or sets of them")
    names = [name for target in targets for name in target.classes]
    if len(set(names)) < len(names):
        raise SettingsError(f"labels {', '.join(labels)}: one stands there twice, or in two sets; name each once")
    joined = join(manifest, images)
    chosen = manifest.in_split(config.split)[joined.rows]
    rows, image_rows = joined.rows[chosen], joined.image_rows[chosen]
    if not len(rows):
        raise ManifestError(f"{manifest.name}: no image in split {config.split!r}; name another")
    values = np.concatenate([target.one_vs_rest(target.values(manifest)[rows]) for target in targets], axis=1)
    with full_precision, torch.inference_mode():
        asked = prompts.texts(names)
        x, u = resident(images, image_rows, device), resident(texts, _rows_of(asked, texts), device)
        spaces = [(encoded_images(adaptor, x).clone(), adaptor.encode_text(u)) for adaptor in adaptors]
        place = {key: k for k, key in enumerate(asked)}
    draws = PatientDraws(manifest.groups()[rows], config.n_draws, seed=0)
    gathered = _Gathered(manifest.frame["id"].to_numpy()[rows], draws)
    for label, y in zip(names, values.T, strict=True):
        gathered.add(label, y, [_Prompted(label, prompts, image, prompt, place) for image, prompt in spaces])
    tested = manifest.frame["id"].iloc[rows] if config.split == "test" else ()
    return gathered.result(leak_words(manifest, images, run_dir, tested))


def _rows_of(texts: dict[str, str], store: Store) -> np.ndarray:
    """The store's row of each prompt, verified by its text, (u,)."""
    found = store.find(list(texts))
    missing = [prompt for prompt, row in zip(texts, found.tolist(), strict=True) if row < 0]
    if missing:
        failed = {f.id: f.message for f in store.failures}
        why = next((f"; stage one said: {failed[m]}" for m in missing if m in failed), "")
        raise MissingIdsError(
            f"{store.path}: {len(missing)} of {len(texts)} prompts are not there: {some_ids(missing)}{why}; write them "
            "with 'embedcache prompts' and run 'embedcache extract' on that manifest"
        )
    changed = changed_texts(store, texts)
    if changed:
        raise JoinError(
            f"{store.path}: {len(changed)} prompts are not the texts that were encoded: {some_ids(changed)}; extract "
            "this set of prompts into a store of its own"
        )
    return found


def _of_known(score: Score, known: np.ndarray) -> Score:
    """A score of known rows as a function of weights of all, (k, n)."""
    return lambda weights: score(np.ascontiguousarray(weights[:, known]))


class _Prompted:
    """What the prompts of one label say of n images."""

    def __init__(self, label: str, prompts: PromptSet, image: Tensor, prompt: Tensor, place: dict[str, int]) -> None:
        self.wordings: Wordings = prompts.wordings(label)
        self._image, self._prompt, self._temperature = image, prompt, prompts.temperature
        self._at = {
            side: [place[prompt_id(label, side, k)] for k in range(len(getattr(self.wordings, side)))]
            for side in ("positive", "negative")
        }

    def probabilities(self, positive: Sequence[int], negative: Sequence[int]) -> np.ndarray:
        """Of the label, by some of its prompts, (n,) float64."""
        sides = [
            unit(self._prompt[[self._at[side][k] for k in chosen]].mean(dim=0))
            for side, chosen in (("positive", positive), ("negative", negative))
        ]
        cosines = (self._image @ torch.stack(sides).T).double()
        share = (cosines / self._temperature).softmax(dim=1).cpu().numpy()
        return np.asarray(share[:, 0 if self.wordings.polarity == "positive" else 1])

    def by_all(self) -> np.ndarray:
        """By all prompts together."""
        return self.probabilities(range(len(self.wordings.positive)), range(len(self.wordings.negative)))


class _Gathered:
    """Rows of a `ZeroShotResult`."""

    def __init__(self, ids: np.ndarray, draws: PatientDraws) -> None:
        self._ids, self._draws = ids, draws
        self._scores: list[dict[str, object]] = []
        self._wordings: list[dict[str, object]] = []
        self._predictions: list[pd.DataFrame] = []
        self._notes: list[str] = []

    def add(self, label: str, y: np.ndarray, seeds: Sequence[_Prompted]) -> None:
        """A label: truth (n,), NaN where blank, and what its prompts say in the space of each seed."""
        known, wordings = ~np.isnan(y), seeds[0].wordings
        truth = y[known].astype(np.int64)

        def mean_of(metric: str, rankings: Sequence[Ranking]) -> float:
            return float(np.mean([getattr(ranking, metric)()[0] for ranking in rankings]))

        singles = []
        for positive, negative in wordings.pairs:
            singles.append([Ranking.of(truth, of.probabilities(positive, negative)[known]) for of in seeds])
            self._wordings.append(
                {
                    "label": label,
                    "positive": " | ".join(wordings.positive[k] for k in positive),
                    "negative": " | ".join(wordings.negative[k] for k in negative),
                    "auroc": mean_of("auroc", singles[-1]),
                }
            )
        p = [of.by_all() for of in seeds]
        rankings = [Ranking.of(truth, of_seed[known]) for of_seed in p]
        for metric in ("auroc", "average_precision"):
            sampled = [bootstrap(_of_known(getattr(ranking, metric), known), self._draws) for ranking in rankings]
            interval = over_patients_and_seeds(Sampled.of_runs(sampled), seed=0).within(0, 1)
            by_wording = [mean_of(metric, single) for single in singles]
            inverted = metric == "auroc" and interval.high < 0.5
            self._scores.append(
                {"label": label, "metric": metric, **asdict(interval), "n_wordings": len(singles)}
                | {"worst_wording": min(by_wording), "best_wording": max(by_wording), "inverted": inverted}
                | {"n_test": int(known.sum()), "n_positive": int(truth.sum())}
            )
            if inverted:
                self._notes.append(
                    f"{label}: AUROC {interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}] lies wholly below "
                    f"0.5: the prompts say the opposite (for it {wordings.positive[0]!r}, against it "
                    f"{wordings.negative[0]!r}); word them otherwise, or set polarity: negative"
                )
        of_label = {"id": self._ids, "label": label, "truth": y}
        self._predictions += [pd.DataFrame({"seed": s, **of_label, "probability": p[s]}) for s in range(len(p))]

    def result(self, warning: str) -> ZeroShotResult:
        """All of them."""
        return ZeroShotResult(
            pd.DataFrame(self._scores),
            pd.DataFrame(self._wordings),
            pd.concat(self._predictions, ignore_index=True),
            warning,
            tuple(self._notes),
        )
