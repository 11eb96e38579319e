"""Tiles of pixels and channels of channels-last images: a program reads and writes one, within one image."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def channel_tile(channels: int, widest: int = 128) -> dict[str, int]:
    """BLOCK_P pixels by BLOCK_C channels, for programs of four warps.

    A thread takes 16 elements: two 16-byte loads of a 16-bit dtype. If the channels do not fill such loads, every
    element needs its own address. A thread then takes 8, because registers do not hold 16 addresses.
    """
    elements = 2048 if channels % 8 == 0 else 1024
    block = min(widest, triton.next_power_of_2(channels))
    return {"BLOCK_P": elements // block, "BLOCK_C": block}


def tile_grid(x: Tensor, tile: dict[str, int], pixels_per_program: int = 1) -> tuple[int, int]:
    """The grid of programs that covers x; each program covers `pixels_per_program` times BLOCK_P pixels."""
    images, channels, height, width = x.shape
    pixel_blocks = triton.cdiv(height * width, tile["BLOCK_P"] * pixels_per_program)
    return pixel_blocks * triton.cdiv(channels, tile["BLOCK_C"]), images


def channels_last(x: Tensor) -> Tensor:
    """x (N, C, h, w), laid out as (N, h, w, C)."""
    return x.contiguous(memory_format=torch.channels_last)


def empty_channels_last(x: Tensor, upsample: int = 1) -> Tensor:
    """An uninitialized channels-last tensor like x, with `upsample` times its height and width."""
    n, c, h, w = x.shape
    return torch.empty((n, upsample * h, upsample * w, c), dtype=x.dtype, device=x.device).permute(0, 3, 1, 2)


@triton.jit
def block_of_program(channels, BLOCK_C: tl.constexpr):
    """(image, block of pixels, channels) of the program. Neighbours have the same pixels and different channels."""
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    return tl.program_id(1).to(tl.int64), program // blocks, program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def ptr(pointer, row, columns, width):
    """Pointers to (row, column) of a dense matrix, for all rows and columns; offsets are in 64 bits."""
    return (pointer + row.to(tl.int64) * width)[:, None] + columns[None, :]
