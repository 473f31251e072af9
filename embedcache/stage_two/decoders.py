"""Decoders: feature maps of a token grid to the logits of a mask.

Shape notation: b samples, c channels, g x g' the token grid, H and W pixels of the mask.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from embedcache.errors import SettingsError

_WIDEST, _NARROWEST = 128, 16


class LinearDecoder(nn.Module):
    """A 1 x 1 convolution to one channel, upsampled bilinearly: what the tokens say by themselves."""

    def __init__(self, dim: int, grid: tuple[int, int], size: tuple[int, int]) -> None:
        super().__init__()
        self._size = size
        self.out = nn.Conv2d(dim, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, g, g') to (b, 1, H, W)."""
        return F.interpolate(self.out(x), self._size, mode="bilinear")


class PaperDecoder(nn.Module):
    """The paper's: 16 x 16 tokens to 224 pixels, or 64 x 64 to 896.

    A 3 x 3 convolution at the tokens' width brings the grid to 14 x 14 (no padding), or 56 x 56 (then shrunk); four
    more, of 512, 256, 128 and 64 channels, are each followed by a doubling; BatchNorm and ReLU after every one; a last
    one gives the logits. Source: `ViTDecoder` of the paper's code. Its decoder for ResNet-AE takes feature maps of the
    encoder's earlier layers, which no store has.

    Raises:
        SettingsError: another grid or size.
    """

    def __init__(self, dim: int, grid: tuple[int, int], size: tuple[int, int]) -> None:
        super().__init__()
        if (grid, size) not in (((16, 16), (224, 224)), ((64, 64), (896, 896))):
            raise SettingsError(
                f"the paper's decoder takes 16 x 16 tokens to 224 pixels, or 64 x 64 to 896; found {grid[0]} x "
                f"{grid[1]} tokens and size {size[0]}: use decoder 'conv', or extract at 224 or 896 pixels with a "
                "patch of 14"
            )
        self._shrinks = grid[0] == 64
        self.first = _published_block(dim, dim, padding=int(self._shrinks))
        widths = (dim, 512, 256, 128, 64)
        self.grow = nn.ModuleList(_published_block(a, b, padding=1) for a, b in pairwise(widths))
        self.out = nn.Conv2d(widths[-1], 1, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, g, g') to (b, 1, H, W)."""
        x = self.first(x)
        if self._shrinks:
            x = F.interpolate(x, scale_factor=14 / 16)
        for block in self.grow:
            x = F.interpolate(block(x), scale_factor=2)
        return self.out(x)


class ConvolutionalDecoder(nn.Module):
    """Convolutions that narrow while the grid grows: as many doublings as reach the mask's size, each two 3 x 3
    convolutions with BatchNorm and ReLU, then one logit for each pixel.

    For any grid and size, and at 224 pixels an eighth of the arithmetic of the paper's.
    """

    def __init__(self, dim: int, grid: tuple[int, int], size: tuple[int, int]) -> None:
        super().__init__()
        self._size = size
        n_doublings = max(math.ceil(math.log2(max(s / g for s, g in zip(size, grid, strict=True)))), 0)
        widths = [max(_WIDEST >> k, _NARROWEST) for k in range(n_doublings + 1)]
        self.narrow = _block(dim, widths[0], 1)
        self.grow = nn.ModuleList(nn.Sequential(_block(a, b, 3), _block(b, b, 3)) for a, b in pairwise(widths))
        self.out = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, g, g') to (b, 1, H, W)."""
        x = self.narrow(x)
        for k, block in enumerate(self.grow):
            last = k == len(self.grow) - 1
            target = self._size if last else (2 * x.shape[2], 2 * x.shape[3])
            x = block(F.interpolate(x, target, mode="bilinear"))
        x = self.out(x)
        return x if x.shape[2:] == self._size else F.interpolate(x, self._size, mode="bilinear")


_DECODERS: dict[str, type[nn.Module]] = {"paper": PaperDecoder, "conv": ConvolutionalDecoder, "linear": LinearDecoder}
DECODERS = tuple(_DECODERS)


def make_decoder(name: str, dim: int, grid: tuple[int, int], size: tuple[int, int]) -> nn.Module:
    """A new decoder, weights drawn by torch's generator.

    Args:
        name: `paper`, `conv` or `linear`.
        dim: c.
        grid: rows and columns of the tokens.
        size: H and W.
    """
    if name not in _DECODERS:
        raise ValueError(f"decoder {name!r}, expected one of {', '.join(_DECODERS)}")
    return _DECODERS[name](dim, grid, size)


def _published_block(inward: int, outward: int, *, padding: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inward, outward, 3, padding=padding), nn.BatchNorm2d(outward), nn.ReLU())


def _block(inward: int, outward: int, kernel: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inward, outward, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outward), nn.ReLU()
    )
