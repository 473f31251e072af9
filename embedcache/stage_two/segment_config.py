"""Settings of segmentation, and the paper's protocols by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from embedcache.settings import STRICT, check, fix

CONTROLS = ("no-adaptor", "untrained-adaptor", "random-encoder", "mean-mask")
DECODERS = ("paper", "conv", "linear")
Protocol = Literal["", "paper-rsna", "paper-siim"]


@dataclass(frozen=True)
class SegmentConfig:
    """How masks are learnt from cached tokens, and scored.

    Args:
        protocol: the paper's, for RSNA (224 pixels) or SIIM (896): fixes `decoders`, `size`, `loss`, `epochs`,
            `min_steps`, `batch_size`, `lr`, `weight_decay`, `subsets`, `valid_labels`, `choose_by` and `threshold`.
            What it augments images by has no counterpart in a cache but stored views (`views: all`).
        decoders: `paper` (the paper's convolutions: 16 x 16 tokens to 224 pixels, or 64 x 64 to 896), `conv` (lighter
            ones, for any grid and size), `linear` (a 1 x 1 convolution, upsampled bilinearly).
        size: rows and columns of pixels that masks are learnt and scored at.
        loss: the Dice term of `mask_loss`. `squared` pulls logits outside a mask to 0, where the threshold lies.
        alpha: weight of its focal loss.
        fractions: shares of the training masks, at least two with and two without a mask where there are such.
        subsets: as of `ProbeConfig`.
        valid_labels: as of `ProbeConfig`: how many validation masks choose the epoch. Where they hold fewer than 5
            images with a mask, none is chosen and training goes to its end.
        epochs, min_steps: passes over the masks; so many steps at least, so that few masks are not also few steps.
        choose_by: which epoch is best: of the lowest validation `loss`, or the highest validation `dice`.
        patience: epochs without a better one after which training stops; None for its end. Where there is
            validation, the weights of the best epoch are kept either way.
        views: `first`: each sample as it is; `all`: each epoch one of its stored views at random, with the mask moved
            as the view was, to the pixel.
        flips: also mirror the token grid, and the mask with it, half of the time. An approximation: an encoder gives a
            mirrored image other tokens than the mirror of its tokens. Left is not right in a radiograph.
        precision: of convolutions and products; the loss is always float32.
        data: tokens `resident` on the device, `streamed`, or `auto`: resident if they fit.
        threshold: of the probability, above which a pixel is in the mask.
        n_seeds: runs with other draws of masks, weights and batch orders.
        n_draws: bootstrap draws of patients.
        controls: which controls stand beside the result, of `CONTROLS`, where what they need is given.
    """

    protocol: Protocol = ""
    decoders: tuple[str, ...] = ("conv",)
    size: Annotated[int, Ge(8), Le(2048)] = 224
    loss: Literal["squared", "log"] = "log"
    alpha: Annotated[float, Ge(0)] = 10.0
    fractions: tuple[Annotated[float, Gt(0), Le(1)], ...] = (0.01, 0.1, 1.0)
    subsets: Literal["drawn", "manifest"] = "drawn"
    valid_labels: Literal["matched", "full"] = "matched"
    epochs: Annotated[int, Ge(1)] = 50
    min_steps: Annotated[int, Ge(0)] = 200
    batch_size: Annotated[int, Ge(1)] = 16
    lr: Annotated[float, Gt(0)] = 5e-4
    weight_decay: Annotated[float, Ge(0)] = 1e-4
    choose_by: Literal["loss", "dice"] = "loss"
    patience: Annotated[int, Ge(1)] | None = 10
    views: Literal["first", "all"] = "first"
    flips: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    data: Literal["auto", "resident", "streamed"] = "auto"
    threshold: Annotated[float, Gt(0), Lt(1)] = 0.5
    n_seeds: Annotated[int, Ge(1)] = 3
    n_draws: Annotated[int, Ge(1)] = 2000
    controls: tuple[str, ...] = CONTROLS
    device: str = "auto"

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check(self)
        if self.protocol:
            fix(self, _PROTOCOLS[self.protocol], self.protocol)
        for name, known in (("decoders", DECODERS), ("controls", CONTROLS)):
            unknown = [value for value in getattr(self, name) if value not in known]
            if unknown:
                raise ValueError(f"unknown {name} {', '.join(unknown)}; expected some of {', '.join(known)}")
        for name in ("decoders", "fractions"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} {', '.join(map(str, values))}: expected one at least, and each once")
        if not all(0 < fraction <= 1 for fraction in self.fractions):
            raise ValueError(f"fractions {', '.join(map(str, self.fractions))}: expected each above 0 and at most 1")

    def n_epochs(self, n_rows: int) -> int:
        """Passes over a set of so many masks."""
        return max(self.epochs, -(-self.min_steps // -(-n_rows // self.batch_size)))


def _published(**own: Any) -> dict[str, Any]:
    """What both protocols have in common; source: the paper's code and its shell scripts.

    It validates every third epoch and stops after three looks without a better Dice; ours looks after each.
    """
    return {
        "decoders": ("paper",),
        "choose_by": "dice",
        "batch_size": 4,
        "lr": 5e-4,
        "weight_decay": 1e-4,
        "epochs": 100,
        "min_steps": 0,
        "subsets": "manifest",
        "valid_labels": "full",
        "threshold": 0.5,
        **own,
    }


_PROTOCOLS = {
    "paper-rsna": _published(size=224, loss="squared"),
    "paper-siim": _published(size=896, loss="log"),
}
