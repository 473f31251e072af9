"""Where the test images of each encoder lie, in two dimensions.

Shape notation: n test images, d embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from embedcache.comparing.study import Study
from embedcache.report.contents import EmbeddingMap
from embedcache.stage_two.targets import Target
from embedcache.stage_two.tensors import join, read_rows

_MOST = 500  # images on a map
_STEPS = 500
_LEAST = 8
_MOST_LABELS = 2


def embedding_maps(study: Study) -> Iterator[EmbeddingMap]:
    """Maps of each image encoder, coloured by each of the first labels.

    Source: t-SNE (van der Maaten and Hinton 2008), from principal components, over standardised embeddings.
    """
    task = study.tasks[0]
    targets = [Target.of(task.manifest, label) for label in task.labels]
    binary = [target for target in targets if target.task != "multi-label"][:_MOST_LABELS]
    if not binary:
        return
    for name, path in task.images.items():
        store = study.store(path)
        joined = join(task.manifest, store, allow_missing=True)
        test = np.flatnonzero(task.manifest.in_split("test")[joined.rows])
        if len(test) > _MOST:
            test = np.sort(np.random.default_rng(0).choice(test, _MOST, replace=False))
        if len(test) < _LEAST:
            return
        x = read_rows(store, joined.image_rows[test]).float().numpy()
        points, how = _flattened(x), f"t-SNE of {len(test)} test images"
        for target in binary:
            values = target.values(task.manifest)[joined.rows[test]][:, 0]
            classes = target.classes if target.task == "multi-class" else (f"no {target.name}", target.name)
            yield EmbeddingMap(name, target.name, points, values, classes, how)


def _flattened(x: np.ndarray) -> np.ndarray:
    """(n, d) to (n, 2)."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    deviation = x.std(axis=0)
    x = (x - x.mean(axis=0)) / np.where(deviation > 0, deviation, 1)
    if not np.ptp(x):
        return np.zeros((len(x), 2))
    perplexity = min(30.0, (len(x) - 1) / 3)
    with threadpool_limits(1):  # its short loops wait for each other where cores are shared
        return TSNE(perplexity=perplexity, max_iter=_STEPS, init="pca", random_state=0).fit_transform(x)
