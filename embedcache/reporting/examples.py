"""Images that say most: those whose report was found first and last, those with the best and the worst masks.

Shape notation: h and w of an image; h' and w' of its thumbnail.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch

from embedcache.comparing.study import Pair, Study, Task
from embedcache.data.frames import Frame, frame_steps
from embedcache.data.manifest import Manifest
from embedcache.data.masks import read_mask, resize_mask
from embedcache.data.pictures import data_uri, overlaid, thumbnail
from embedcache.data.radiograph import DecodePolicy, read_radiograph
from embedcache.device import full_precision
from embedcache.errors import InputError
from embedcache.report.contents import Found, MaskExample, RetrievalExample
from embedcache.stage_two.adaptor import read_adaptor
from embedcache.stage_two.kept import KeptDecoder, mask_folder, read_kept
from embedcache.stage_two.token_feed import TokenFeed

_EACH = 3  # best, and as many worst
_SHOWN_TEXTS = 3
_MOST_PAIRS = 6
_SIZE = 256  # pixels of a thumbnail's longer side


def retrieval_examples(study: Study, *, with_images: bool) -> Iterator[RetrievalExample]:
    """For each pair the images whose own report came first and last."""
    task = study.tasks[0]
    if task.retrieve is None:
        return
    manifest = task.manifest
    text_of = manifest.reports()
    own = dict(zip(manifest.frame["id"], manifest.frame["report_id"], strict=True))
    for pair in [pair for pair in study.pairs if pair.text][:_MOST_PAIRS]:
        table = pd.read_parquet(study.run_dir / study.folder(task, pair) / "retrieval" / "matches.parquet")
        table = table[table["direction"] == "image_to_report"]
        first = table[table["rank"] == 1].sort_values("first_own", kind="stable")
        n_texts = table["match"].nunique()
        for query in _ends(first["query"].tolist()):
            found = table[table["query"] == query].head(_SHOWN_TEXTS)
            yield RetrievalExample(
                (pair.image, pair.text),
                query,
                text_of[own[query]],
                int(found["first_own"].iloc[0]),
                n_texts,
                tuple(Found(int(r.rank), r.match, text_of[r.match], bool(r.is_own)) for r in found.itertuples()),
                _picture(manifest, query) if with_images else "",
            )


def mask_examples(study: Study, *, with_images: bool) -> Iterator[MaskExample]:
    """For each pair the images with a mask whose prediction is best and worst."""
    for task in study.tasks:
        if task.segment is None:
            continue
        for pair in study.pairs[:_MOST_PAIRS]:
            folder = study.run_dir / mask_folder(study.folder(task, pair))
            table = pd.read_parquet(folder / "images.parquet")
            decoder = table["decoder"].iloc[0]
            of_run = (
                (table["decoder"] == decoder) & (table["fraction"] == table["fraction"].max()) & (table["seed"] == 0)
            )
            positive = table[of_run & (table["true_pixels"] > 0)].sort_values("dice", ascending=False, kind="stable")
            chosen = positive.set_index("id").loc[_ends(positive["id"].tolist())]
            pictures = dict.fromkeys(chosen.index, "")
            if with_images and len(chosen):
                pictures = _with_masks(study, task, pair, str(decoder), list(chosen.index))
            for row in chosen.itertuples():
                pixels = int(row.true_pixels), int(row.predicted_pixels)
                yield MaskExample(
                    (pair.image, pair.text), str(decoder), str(row.Index), float(row.dice), *pixels, pictures[row.Index]
                )


def _ends(ids: list[str]) -> list[str]:
    """The first and the last few."""
    return ids[:_EACH] + ids[max(len(ids) - _EACH, _EACH) :]


@torch.inference_mode()
def _with_masks(study: Study, task: Task, pair: Pair, decoder: str, ids: list[str]) -> dict[str, str]:
    """Pictures with the predicted mask tinted and the true one outlined."""
    folder = study.run_dir / mask_folder(study.folder(task, pair))
    kept = read_kept(folder / f"decoder-{decoder}.safetensors")
    assert isinstance(kept, KeptDecoder)  # by its name
    store = study.store(task.images[pair.image])
    adaptor = read_adaptor(study.run_dir / pair.folder) if pair.text else None
    with full_precision:
        feed = TokenFeed(store, store.rows(ids)[:, None], adaptor, "cpu")
        maps = next(iter(feed.batches([(np.arange(len(ids)), 0)])))
        values = kept.module()(maps).sigmoid()[:, 0].numpy()
    steps, manifest = frame_steps(store.encoder), task.manifest
    mask_of = dict(zip(manifest.frame["id"], manifest.frame["mask"], strict=True))
    found = {}
    for sample, probabilities in zip(ids, values, strict=True):
        pixels = _pixels(manifest, sample)
        if pixels is None:
            found[sample] = ""
            continue
        size = (pixels.shape[0], pixels.shape[1])
        predicted = Frame.of(steps, size).to_image(probabilities) > kept.threshold
        small = thumbnail(pixels, _SIZE)
        shape = (small.shape[0], small.shape[1])
        true = read_mask(mask_of[sample], manifest.root, image_size=size)
        found[sample] = data_uri(overlaid(small, resize_mask(predicted, shape), resize_mask(true, shape)))
    return found


def _picture(manifest: Manifest, sample: str) -> str:
    pixels = _pixels(manifest, sample)
    return "" if pixels is None else data_uri(thumbnail(pixels, _SIZE))


def _pixels(manifest: Manifest, sample: str) -> np.ndarray | None:
    """(h, w, 3) uint8; None where the file is gone or bad."""
    image = manifest.frame["image"].to_numpy()[(manifest.frame["id"] == sample).to_numpy().argmax()]
    try:
        return read_radiograph(manifest.path(image), DecodePolicy()).pixels
    except InputError:
        return None
