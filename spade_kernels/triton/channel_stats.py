"""Mean and sum of squared deviations of every image and channel, in one read of x.

Every lane of a program's tile runs Welford's update over its own pixels, relative to the first of them, the origin. The
statistics of lanes, and then of programs, are merged by the formula of Chan et al. (1979). Until the last merge a mean
is kept as the sum of two numbers, origin + mean: the squared deviations then lose no digits if the mean is far from 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spade_kernels.triton.segments import accumulator
from spade_kernels.triton.tiles import (
    block_of_program,
    channel_tile,
    channels_last,
    empty_channels_last,
    ptr,
    tile_grid,
)
from spade_kernels.triton.variants import launch

_PROGRAMS = 2048  # enough for several on every multiprocessor of a large GPU
_MOST_PARTS = 512  # parts of an image, which are merged as one tile
_FEWEST_STEPS = 8


def channel_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.channel_stats`."""
    x = channels_last(x)
    images, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    tile = channel_tile(channels, widest=64)
    steps = _steps(images, pixels, channels, tile)
    part = steps * tile["BLOCK_P"]
    parts = triton.cdiv(pixels, part)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=accumulator(x.dtype), device=x.device)

    mean, m2 = empty(images, channels), empty(images, channels)
    scratch = (None, mean, m2) if parts == 1 else empty(3, images, parts, channels).unbind()
    sizes = (pixels, channels, parts)
    launch(_part_stats, tile_grid(x, tile, steps), x, *scratch, *sizes, steps, **tile)
    if parts > 1:
        block = {"BLOCK_K": triton.next_power_of_2(parts), "BLOCK_C": 16}
        grid = (triton.cdiv(channels, block["BLOCK_C"]), images)
        launch(_merge_parts, grid, *scratch, mean, m2, *sizes, part, num_warps=8, **block)
    return mean, m2


def channel_stats_grad(x: Tensor, mean: Tensor, grad_mean: Tensor, grad_m2: Tensor) -> Tensor:
    """`reference.channel_stats_grad`."""
    given, x, out = x, channels_last(x), empty_channels_last(x)
    tile = channel_tile(x.shape[1])
    stats = (t.contiguous() for t in (mean, grad_mean, grad_m2))
    launch(_stats_grad, tile_grid(x, tile), x, *stats, out, x.shape[2] * x.shape[3], x.shape[1], **tile)
    return out if given is x else torch.empty_like(given).copy_(out)


def _steps(images: int, pixels: int, channels: int, tile: dict[str, int]) -> int:
    """The number of tiles that a program processes one after the other."""
    columns = images * triton.cdiv(channels, tile["BLOCK_C"])
    parts = min(_MOST_PARTS, max(1, _PROGRAMS // columns))
    return max(_FEWEST_STEPS, triton.cdiv(triton.cdiv(pixels, tile["BLOCK_P"]), parts))


@triton.jit
def _merge(count, origin, mean, m2):
    """Merges rows of statistics, each of count (rows,) values, into one (origin, mean, m2)."""
    share = count / tl.sum(count, 0)
    rough = tl.sum((origin + mean) * share[:, None], 0)
    # Differences of nearly equal numbers are exact, so the mean of the deviations is the rounding error of the mean.
    deviation = origin - rough[None, :] + mean
    missing = tl.sum(deviation * share[:, None], 0)
    deviation -= missing[None, :]
    return rough, missing, tl.sum(m2 + deviation * deviation * count[:, None], 0)


@triton.jit(do_not_specialize=["pixels", "parts", "steps"])
def _part_stats(
    x,
    origins,
    means,
    m2s,
    pixels,
    channels,
    parts,
    steps,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image, part, channel = block_of_program(channels, BLOCK_C)
    channel_mask = channel < channels
    x += image * pixels * channels
    dtype = means.dtype.element_ty
    pixel = part * steps * BLOCK_P + tl.arange(0, BLOCK_P)
    pixel_mask = pixel < pixels
    origin = tl.load(ptr(x, pixel, channel, channels), pixel_mask[:, None] & channel_mask[None, :], other=0).to(dtype)
    count = pixel_mask.to(dtype)
    mean = tl.zeros((BLOCK_P, BLOCK_C), dtype)
    m2 = tl.zeros((BLOCK_P, BLOCK_C), dtype)
    for _ in range(1, steps):
        pixel += BLOCK_P
        pixel_mask = pixel < pixels
        value = tl.load(ptr(x, pixel, channel, channels), pixel_mask[:, None] & channel_mask[None, :], other=0).to(
            dtype
        )
        count += pixel_mask.to(dtype)
        delta = tl.where(pixel_mask[:, None], value - origin - mean, 0)
        share = 1 / tl.maximum(count, 1)
        mean += delta * share[:, None]
        m2 += delta * delta * (1 - share)[:, None]
    origin, mean, m2 = _merge(count, origin, mean, m2)
    to = (image * parts + part) * channels + channel
    if origins is None:
        mean += origin
    else:
        tl.store(origins + to, origin, channel_mask)
    tl.store(means + to, mean, channel_mask)
    tl.store(m2s + to, m2, channel_mask)


@triton.jit(do_not_specialize=["pixels", "parts", "part"])
def _merge_parts(
    origins, means, m2s, mean, m2, pixels, channels, parts, part, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr
):
    image = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channel < channels
    k = tl.arange(0, BLOCK_K)
    count = tl.minimum(tl.maximum(pixels - k * part, 0), part).to(mean.dtype.element_ty)
    row, mask = image * parts + k, (k < parts)[:, None] & channel_mask[None, :]
    origin, average, total = _merge(
        count,
        tl.load(ptr(origins, row, channel, channels), mask, other=0),
        tl.load(ptr(means, row, channel, channels), mask, other=0),
        tl.load(ptr(m2s, row, channel, channels), mask, other=0),
    )
    to = image * channels + channel
    tl.store(mean + to, origin + average, channel_mask)
    tl.store(m2 + to, total, channel_mask)


@triton.jit(do_not_specialize=["pixels"])
def _stats_grad(x, mean, grad_mean, grad_m2, out, pixels, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    image, block, channel = block_of_program(channels, BLOCK_C)
    channel_mask = channel < channels
    pixel = block * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = (pixel < pixels)[:, None] & channel_mask[None, :]
    stats = image * channels + channel
    centre = tl.load(mean + stats, channel_mask)
    offset = tl.load(grad_mean + stats, channel_mask) / pixels
    factor = 2 * tl.load(grad_m2 + stats, channel_mask)
    value = tl.load(ptr(x, image * pixels + pixel, channel, channels), mask).to(centre.dtype)
    value = offset[None, :] + factor[None, :] * (value - centre[None, :])
    tl.store(ptr(out, image * pixels + pixel, channel, channels), value, mask)
