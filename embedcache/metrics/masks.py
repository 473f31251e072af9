"""Scores of masks: Dice and IoU of each image, and what an empty mask everywhere would score.

Shape notation: s runs, n images, k weightings of the images, as a bootstrap needs them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from embedcache.metrics.classification import ratio, totals

NAMES = (
    "dice",
    "empty_mask_dice",
    "dice_on_positives",
    "iou",
    "iou_on_positives",
    "predicted_empty",
    "positives_predicted_empty",
)


@dataclass(frozen=True, eq=False)
class Overlap:
    """Pixels in which predicted and true masks meet.

    Args:
        both: pixels in the predicted and in the true mask, (s, n) int64.
        predicted: pixels in the predicted one, (s, n) int64.
        true: pixels in the true one, (n,) int64.
    """

    both: np.ndarray
    predicted: np.ndarray
    true: np.ndarray

    def __post_init__(self) -> None:
        if self.both.shape != self.predicted.shape or self.both.shape[1:] != self.true.shape:
            raise ValueError(
                f"both {self.both.shape}, predicted {self.predicted.shape} and true {self.true.shape}, expected "
                "(s, n), (s, n) and (n,)"
            )

    @property
    def dice(self) -> np.ndarray:
        """Twice the common pixels over the sum of both, (s, n); 1 where both are empty, as the paper's code has it."""
        return _or_one(2 * self.both, self.predicted + self.true)

    @property
    def iou(self) -> np.ndarray:
        """Common pixels over those of either, (s, n); 1 where both are empty."""
        return _or_one(self.both, self.predicted + self.true - self.both)

    @property
    def says_nothing(self) -> np.ndarray:
        """Runs that predict an empty mask for every image, (s,) bool."""
        return (self.predicted == 0).all(axis=1)

    def scores(self, weights: np.ndarray) -> np.ndarray:
        """Means over images, (k, s, len(NAMES)); NaN on positives where no image has a mask.

        `dice`, `iou`: over all images. `empty_mask_dice`: the Dice score of an empty mask for every image, which is the
        share of images without a mask. `..._on_positives`: over images with a mask. `predicted_empty`: share of images
        for which an empty mask is predicted. `positives_predicted_empty`: the same among those with a mask.

        Args:
            weights: how often each image counts, (k, n).
        """
        s, positive = len(self.both), self.true > 0
        everywhere = [*self.dice, *self.iou, *(self.predicted == 0).astype(np.float64), 1.0 * ~positive]
        on_positives = [column * positive for column in everywhere[: 3 * s]]
        sums = totals(weights, *everywhere, *on_positives, np.ones(len(positive)), 1.0 * positive)
        n_images, n_positive = sums[:, -2, None], sums[:, -1, None]
        dice, iou, silent = (ratio(sums[:, j * s : (j + 1) * s], n_images) for j in range(3))
        empty = np.repeat(ratio(sums[:, 3 * s, None], n_images), s, axis=1)
        rest = sums[:, 3 * s + 1 :]
        dice_on, iou_on, missed = (ratio(rest[:, j * s : (j + 1) * s], n_positive) for j in range(3))
        return np.stack([dice, empty, dice_on, iou, iou_on, silent, missed], axis=2)


def _or_one(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.ones(np.shape(whole), np.float64), where=whole > 0)
