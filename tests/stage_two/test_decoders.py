"""Decoders: shapes, the paper's layers, and files that hold one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from embedcache.errors import SettingsError
from embedcache.stage_two.decoders import make_decoder


@pytest.mark.parametrize(("grid", "size"), [((16, 16), (224, 224)), ((64, 64), (896, 896))])
def test_the_papers_decoder_has_its_layers(grid: tuple[int, int], size: tuple[int, int]) -> None:
    decoder = make_decoder("paper", 96, grid, size).eval()
    assert decoder(torch.randn(1, 96, *grid)).shape == (1, 1, *size)
    convolutions = [m for m in decoder.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels) for m in convolutions] == [
        (96, 96), (96, 512), (512, 256), (256, 128), (128, 64), (64, 1),
    ]  # fmt: skip
    assert all(m.kernel_size == (3, 3) and m.bias is not None for m in convolutions)
    assert convolutions[0].padding == ((0, 0) if grid == (16, 16) else (1, 1))
    wide = make_decoder("paper", 768, grid, size)
    n_convolution = sum(9 * a * b + b for a, b in ((768, 768), (768, 512), (512, 256), (256, 128), (128, 64), (64, 1)))
    assert sum(p.numel() for p in wide.parameters()) == n_convolution + 2 * (768 + 512 + 256 + 128 + 64)


def test_other_grids_are_for_other_decoders() -> None:
    with pytest.raises(SettingsError, match=r"found 14 x 14 tokens and size 224: use decoder 'conv'"):
        make_decoder("paper", 8, (14, 14), (224, 224))
    with pytest.raises(ValueError, match="decoder 'unet', expected one of paper, conv, linear"):
        make_decoder("unet", 8, (14, 14), (224, 224))


@pytest.mark.parametrize("name", ["conv", "linear"])
@pytest.mark.parametrize(
    ("grid", "size"), [((7, 5), (40, 33)), ((1, 1), (8, 8)), ((16, 16), (16, 16)), ((9, 9), (8, 8))]
)
def test_any_grid_goes_to_any_size(name: str, grid: tuple[int, int], size: tuple[int, int]) -> None:
    decoder = make_decoder(name, 6, grid, size)
    logits = decoder(torch.randn(2, 6, *grid))
    assert logits.shape == (2, 1, *size)
    logits.sum().backward()
    assert all(p.grad is not None for p in decoder.parameters())
