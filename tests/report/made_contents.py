"""Made-up contents of a run's page, small but with every part of it; any word can be turned into a hostile one."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from embedcache.report.contents import Contents, EmbeddingMap, Found, MaskExample, RetrievalExample

IMAGES, TEXT = ("vit", "resnet"), "bert"
NOT_SHOWN = {"folds", "the picture"}  # a column that no table shows, and a picture that is none
ENDS = ("value", "low", "high")


def picture() -> str:
    out = io.BytesIO()
    Image.fromarray(np.full((24, 24), 90, np.uint8)).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def contents(word: Callable[[str], str] = str, **changes: Any) -> Contents:
    """A run of two image encoders, one text encoder and two labels on two datasets; `word` changes every text."""
    w, rng = word, np.random.default_rng(0)
    pairs = [(w(image), w(TEXT)) for image in IMAGES]

    def scored(middle: float) -> dict[str, float]:
        value = float(np.clip(middle + rng.normal(0, 0.03), 0, 1))
        return {"value": value, "low": value - 0.04, "high": value + 0.05}

    places = [{"data": w(data), "label": w(label)} for data, label in (("ward", "opacity"), ("clinic", "effusion"))]
    controls = ("", "no-adaptor", w("a control"))
    where = {"test": "internal", "class": "", "shots": 0, "n_valid": 3}
    scores, gains, groups, calibration, prompts = [], [], [], [], []
    for place, (image, text) in product(places, pairs):
        at = {**place, **where, "image": image, "text": text, "head": w("a head")}
        for control, (fraction, n), (metric, headline) in product(
            controls, [(0.1, 20), (1.0, 2000)], [(w("auroc"), True), ("f1", False)]
        ):
            counts = {"fraction": fraction, "n_train": n, "n_test": 40, "n_positive": 9, "choice": w("folds")}
            row = {**at, "control": control, "metric": metric, "headline": headline, **counts}
            scores.append(row | scored(0.7 if control else 0.8))
            if control and headline:
                gains.append(row | scored(0.1) | {"p_value": 0.03, "p_holm": 0.2, "method": "bootstrap"})
        rest = {f"{m}_{end}": 0.5 for m in ("auroc", "brier", "slope", "intercept") for end in ("low", "high")}
        for group in ("F", "M"):
            counts = {"n": 20.0, "n_positive": 4.0, "suppressed": group == "M", "auroc": 0.8, "brier": 0.1}
            of = {"attribute": w("sex"), "group": w(group), "fraction": 1.0, "n_train": 200}
            groups.append(at | of | counts | rest)
        numbers = {"ece": 0.1, "brier": 0.2, "slope": 1.0, "intercept": 0.0, "fraction": 1.0, "n_train": 200}
        calibration.append(at | {"method": w("platt")} | rest | numbers)
        wordings = {"n_wordings": 4, "worst_wording": 0.4, "best_wording": 0.7, "inverted": True, "n_test": 40}
        for metric in ("auroc", w("some precision")):
            prompts.append({**at, "metric": metric, "n_positive": 9} | wordings | scored(0.6))
    masks, mask_gains, found = [], [], []
    for (image, text), control in product(pairs, controls):
        at = {"data": w("ward"), "image": image, "text": text, "control": control}
        counts = {"fraction": 1.0, "n_train": 20, "n_train_positive": 7, "n_test": 40, "n_positive": 9, "n_valid": 3}
        for metric in ("dice", "empty_mask_dice", "dice_on_positives", w("iou")):
            row = {**at, "decoder": w("a decoder"), "metric": metric, **counts} | scored(0.4)
            masks.append(row)
            if control:
                mask_gains.append(row | {"p_holm": 0.2})
        for metric, label in (("recall@10", ""), (w("precision"), w("opacity"))):
            asked = {"n_queries": 40, "n_candidates": 30, "chance": 0.1, "one_order": np.nan}
            row = {**at, "direction": w("image to report"), "metric": metric, "label": label}
            found.append(row | asked | scored(0.3))
    differences = [
        {**place, "task": w("probe"), "setting": w(setting), "metric": w("auroc"), "a": w("vit + bert")}
        | {"b": w("resnet + bert"), "p_value": 0.01, "p_adjusted": p, "method": w("permuted"), "fairness": w("fair")}
        | {"verdict": w("real")}
        | scored(0.05)
        for place, (setting, p) in product(places, [("all labels", 0.02), ("few labels", 0.4)])
    ]
    encoders = [
        {"name": w(name), "modality": w("image"), "model": w("a model"), "weights": w("learnt"), "dim": 384}
        | {"parameters": 22_000_000, "disk_bytes": 88_000_000, "seconds_per_1000": 31.5}
        | {"exposure": w("has seen them"), "said": w("its card")}
        for name in (*IMAGES, TEXT)
    ]
    curves = [(*pair, k, 3 / (k + 1), 3.5 / (k + 1)) for pair in pairs for k in range(4)]
    hit = (Found(1, w("r1"), w("Clear."), True), Found(2, w("r2"), w("Not clear."), False))
    query = RetrievalExample(pairs[0], w("q1"), w("Clear lungs."), 1, 30, hit, w("the picture"))
    drawn = MaskExample(pairs[0], w("a decoder"), w("m1"), 0.5, 90, 80, w("the picture"))
    of = EmbeddingMap(
        w("vit"), w("opacity"), rng.normal(size=(30, 2)), np.r_[np.arange(28) % 2, np.nan, np.nan],
        (w("absent"), w("present")), w("two components"),
    )  # fmt: skip
    made = Contents(
        name=w("a run"),
        made=w("today, here"),
        data=[w("40 images")],
        verdicts=[w("vit is better")],
        warnings=[w("a leak")],
        notes=[w("a note")],
        tables={
            "scores": pd.DataFrame(scores),
            "gains": pd.DataFrame(gains),
            "calibration": pd.DataFrame(calibration),
            "subgroups": pd.DataFrame(groups),
            "mask_scores": pd.DataFrame(masks),
            "mask_gains": pd.DataFrame(mask_gains),
            "retrieval_scores": pd.DataFrame(found),
            "zeroshot_scores": pd.DataFrame(prompts),
        },
        differences=pd.DataFrame(differences),
        encoders=pd.DataFrame(encoders),
        curves=pd.DataFrame(curves, columns=["image", "text", "epoch", "train_loss", "valid_loss"]),
        audit=[(w("patients in two splits"), w("none"))],
        provenance=[(w("version"), w("1.0"))],
        commands=[w("embedcache run a.yaml"), w("embedcache ls")],
        maps=[of],
        retrieval=[query, replace(query, query=w("q2"), own_rank=30, found=hit[1:])],
        masks=[drawn],
        has_images=True,
    )
    return replace(made, **changes)


def nothing(**changes: Any) -> Contents:
    """A run of which nothing is known but its name."""
    none = pd.DataFrame()
    bare = Contents("bare", "", (), (), (), (), {}, none, none, none, (), (), ())
    return replace(bare, **changes)
