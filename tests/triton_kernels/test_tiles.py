"""Sizes that follow from shapes."""

from __future__ import annotations

import itertools

import torch
import triton

from spade_kernels.triton.channel_stats import _MOST_PARTS, _steps
from spade_kernels.triton.tiles import channel_tile, tile_grid

CHANNELS = (1, 3, 8, 16, 20, 64, 130, 1024)


def test_tiles_cover_everything():
    for channels, size, steps in itertools.product(CHANNELS, (1, 7, 64), (1, 8)):
        x = torch.empty(2, channels, size, size, device="meta")
        tile = channel_tile(channels)
        blocks, images = tile_grid(x, tile, steps)
        columns = triton.cdiv(channels, tile["BLOCK_C"])
        assert images == 2
        assert blocks % columns == 0
        assert 0 <= blocks // columns * steps * tile["BLOCK_P"] - size * size < steps * tile["BLOCK_P"]


def test_parts_of_an_image_fit_one_merge():
    for images, channels, size in itertools.product((1, 8, 64), CHANNELS, (1, 8, 16, 64, 256, 512, 1024, 4096)):
        tile = channel_tile(channels, widest=64)
        part = _steps(images, size * size, channels, tile) * tile["BLOCK_P"]
        assert 1 <= triton.cdiv(size * size, part) <= _MOST_PARTS
