"""Normalize, modulate and activate in one pass over x, and the two passes of its backward.

A program processes pixels of x. Each stands for `upsample` x `upsample` pixels of y, which are processed one after the
other. Only the table's gradient is different: it is a segment sum over the pixels of each row, see `segments`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spade_kernels.triton.segments import accumulator, merge_pieces, piece_of_program, pieces, store_sum
from spade_kernels.triton.tiles import (
    block_of_program,
    channel_tile,
    channels_last,
    empty_channels_last,
    ptr,
    tile_grid,
)
from spade_kernels.triton.variants import launch


def modulate(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    table: Tensor,
    pixel_row: Tensor | None,
    image_offsets: Tensor | None,
    indices: Tensor | None,
    offsets: Tensor | None,
    negative_slope: float,
    upsample: int,
    stats_scope: str,
) -> Tensor:
    """`reference.modulate`."""
    x, y = channels_last(x), empty_channels_last(x, upsample)
    arguments = (x, *_stats(mean, rstd), table.contiguous(), _dense(pixel_row), y)
    _over_pixels(_modulate, x, *arguments, *_sizes(x), _stride(mean), SLOPE=negative_slope, UPSAMPLE=upsample)
    return y


def modulate_table_grad(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    table: Tensor,
    pixel_row: Tensor | None,
    indices: Tensor | None,
    offsets: Tensor | None,
    negative_slope: float,
    upsample: int,
) -> Tensor:
    """`reference.modulate_table_grad`."""
    x, table = channels_last(x), table.contiguous()
    arguments = (channels_last(grad), x, *_stats(mean, rstd), table)
    out = torch.empty(table.shape, dtype=accumulator(x.dtype), device=x.device)
    constexprs: dict[str, Any] = {"SLOPE": negative_slope, "UPSAMPLE": upsample}
    if pixel_row is None:
        _over_pixels(_table_grad_of_pixels, x, *arguments, out, *_sizes(x), _stride(mean), **constexprs)
        return out
    assert indices is not None
    assert offsets is not None
    rows, width = table.shape
    scratch, pieced = pieces(indices.numel(), rows, width, out.dtype, x.device)
    block = {"BLOCK_E": 8, "BLOCK_C": channel_tile(x.shape[1])["BLOCK_C"]}
    launch(
        _table_grad_pieces,
        (rows + len(scratch), triton.cdiv(x.shape[1], block["BLOCK_C"])),
        *(*arguments, indices.contiguous(), offsets, out, scratch, rows, *_sizes(x)),
        **constexprs,
        **block,
        **pieced,
        PER_IMAGE=len(mean) > 1,
        INDEX=tl.int32 if indices.numel() < 2**31 else tl.int64,
        num_warps=2,
    )
    merge_pieces(offsets, out, scratch, **pieced)
    return out


def modulate_input_grad(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    table: Tensor,
    pixel_row: Tensor | None,
    mean_shift: Tensor | None,
    mean_scale: Tensor | None,
    negative_slope: float,
    upsample: int,
) -> Tensor:
    """`reference.modulate_input_grad`."""
    x, out = channels_last(x), empty_channels_last(x)
    means = (_dense(mean_shift), _dense(mean_scale))
    arguments = (channels_last(grad), x, *_stats(mean, rstd), table.contiguous(), _dense(pixel_row), *means, out)
    strides = (_stride(mean), 0 if mean_shift is None else _stride(mean_shift))
    # With upsampling a tile has fewer pixels, because the sum over pixels of y needs registers, too.
    constexprs: dict[str, Any] = {"SLOPE": negative_slope, "UPSAMPLE": upsample}
    _over_pixels(_input_grad, x, *arguments, *_sizes(x), *strides, **constexprs, fraction=upsample)
    return out


def _over_pixels(kernel, x: Tensor, *arguments, fraction: int = 1, **constexprs) -> None:
    tile = channel_tile(x.shape[1])
    tile["BLOCK_P"] //= fraction
    launch(kernel, tile_grid(x, tile), *arguments, **constexprs, **tile)


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _stats(mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return mean.contiguous(), rstd.contiguous()


def _stride(stats: Tensor) -> int:
    """The distance from one image's statistics to the next's, in elements; 0 if all images share them."""
    return stats.shape[1] if len(stats) > 1 else 0


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Number of pixels of an image, width and number of channels."""
    return x.shape[2] * x.shape[3], x.shape[3], x.shape[1]


@triton.jit
def _out_pixel(image, pixel, i, pixels, width, UPSAMPLE: tl.constexpr):
    """The index, across images, of the i-th pixel of y that each pixel of x stands for."""
    if UPSAMPLE == 1:
        return image * pixels + pixel
    row, column = pixel // width, pixel % width
    return 4 * image * pixels + (2 * row + i // 2) * (2 * width) + 2 * column + i % 2


@triton.jit
def _normalized(x, mean, rstd, pixel, channel, channels, mask):
    """Pixels of x, numbered across images, normalized by mean and rstd (1 or pixels, channels)."""
    return (tl.load(ptr(x, pixel, channel, channels), mask, other=0).to(mean.dtype) - mean) * rstd


@triton.jit
def _tile_of_program(x, mean, rstd, pixels, channels, stats_stride, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """(image, pixels in it, channels, mask of pixels, mask of pixels and channels, normalized x, rstd)."""
    image, block, channel = block_of_program(channels, BLOCK_C)
    pixel = block * BLOCK_P + tl.arange(0, BLOCK_P)
    pixel_mask, channel_mask = pixel < pixels, channel < channels
    mask = pixel_mask[:, None] & channel_mask[None, :]
    stats = image * stats_stride + channel
    mean, rstd = tl.load(mean + stats, channel_mask)[None, :], tl.load(rstd + stats, channel_mask)[None, :]
    xhat = _normalized(x, mean, rstd, image * pixels + pixel, channel, channels, mask)
    return image, pixel, channel, pixel_mask, mask, xhat, rstd


@triton.jit
def _scale_shift(table, pixel_row, out_pixel, pixel_mask, channel, channels, mask, dtype: tl.constexpr):
    row = out_pixel if pixel_row is None else tl.load(pixel_row + out_pixel, pixel_mask, other=0)
    scale = ptr(table, row, channel, 2 * channels)
    return tl.load(scale, mask, other=0).to(dtype), tl.load(scale + channels, mask, other=0).to(dtype)


@triton.jit
def _through_leaky_relu(grad, y, SLOPE: tl.constexpr):
    return grad if SLOPE == 1 else tl.where(y > 0, grad, grad * SLOPE)


@triton.jit(do_not_specialize=["pixels", "width"])
def _modulate(
    x,
    mean,
    rstd,
    table,
    pixel_row,
    y,
    pixels,
    width,
    channels,
    stats_stride,
    SLOPE: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image, pixel, channel, pixel_mask, mask, xhat, rstd = _tile_of_program(
        x, mean, rstd, pixels, channels, stats_stride, BLOCK_P, BLOCK_C
    )
    for i in range(UPSAMPLE * UPSAMPLE):
        out_pixel = _out_pixel(image, pixel, i, pixels, width, UPSAMPLE)
        scale, shift = _scale_shift(table, pixel_row, out_pixel, pixel_mask, channel, channels, mask, xhat.dtype)
        value = xhat * scale + shift
        tl.store(ptr(y, out_pixel, channel, channels), _through_leaky_relu(value, value, SLOPE), mask)


@triton.jit(do_not_specialize=["pixels", "width"])
def _table_grad_of_pixels(
    grad,
    x,
    mean,
    rstd,
    table,
    out,
    pixels,
    width,
    channels,
    stats_stride,
    SLOPE: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image, pixel, channel, pixel_mask, mask, xhat, rstd = _tile_of_program(
        x, mean, rstd, pixels, channels, stats_stride, BLOCK_P, BLOCK_C
    )
    for i in range(UPSAMPLE * UPSAMPLE):
        out_pixel = _out_pixel(image, pixel, i, pixels, width, UPSAMPLE)
        scale, shift = _scale_shift(table, None, out_pixel, pixel_mask, channel, channels, mask, xhat.dtype)
        dy = tl.load(ptr(grad, out_pixel, channel, channels), mask, other=0).to(xhat.dtype)
        d = _through_leaky_relu(dy, xhat * scale + shift, SLOPE)
        d_scale = ptr(out, out_pixel, channel, 2 * channels)
        tl.store(d_scale, d * xhat, mask)
        tl.store(d_scale + channels, d, mask)


@triton.jit(do_not_specialize=["rows", "pixels", "width"], do_not_specialize_on_alignment=["offsets"])
def _table_grad_pieces(
    grad,
    x,
    mean,
    rstd,
    table,
    indices,
    offsets,
    out,
    scratch,
    rows,
    pixels,
    width,
    channels,
    SLOPE: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    INDEX: tl.constexpr,
    PIECE: tl.constexpr,
    PROBES: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row, begin, stop, scratch_row = piece_of_program(offsets, rows, PIECE, PROBES, ROUNDS)
    if begin > stop:
        return
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channel < channels
    dtype = scratch.dtype.element_ty
    scale = table + row.to(tl.int64) * 2 * channels + channel
    shift = tl.load(scale + channels, channel_mask, other=0).to(dtype)[None, :]
    scale = tl.load(scale, channel_mask, other=0).to(dtype)[None, :]
    d_scale = tl.zeros((BLOCK_E, BLOCK_C), dtype)
    d_shift = tl.zeros((BLOCK_E, BLOCK_C), dtype)
    for e in range(begin, stop, BLOCK_E):
        entry = e + tl.arange(0, BLOCK_E)
        pixel_mask = entry < stop
        mask = pixel_mask[:, None] & channel_mask[None, :]
        out_pixel = tl.load(indices + entry, pixel_mask, other=0).to(INDEX)
        pixel = out_pixel
        if UPSAMPLE == 2:
            pixel = out_pixel // (4 * width) * width + out_pixel % (2 * width) // 2
        image = pixel // pixels if PER_IMAGE else tl.zeros((1,), INDEX)
        known = mask if PER_IMAGE else channel_mask[None, :]
        image_mean = tl.load(ptr(mean, image, channel, channels), known, other=0)
        image_rstd = tl.load(ptr(rstd, image, channel, channels), known, other=0)
        xhat = _normalized(x, image_mean, image_rstd, pixel, channel, channels, mask)
        dy = tl.load(ptr(grad, out_pixel, channel, channels), mask, other=0).to(dtype)
        d = _through_leaky_relu(dy, xhat * scale + shift, SLOPE)
        d_scale += d * xhat
        d_shift += d
    store_sum(tl.sum(d_scale, 0), out, scratch, row, scratch_row, 2 * channels, channel, channel_mask)
    store_sum(
        tl.sum(d_shift, 0), out + channels, scratch + channels, row, scratch_row, 2 * channels, channel, channel_mask
    )


@triton.jit(do_not_specialize=["pixels", "width"])
def _input_grad(
    grad,
    x,
    mean,
    rstd,
    table,
    pixel_row,
    mean_shift,
    mean_scale,
    out,
    pixels,
    width,
    channels,
    stats_stride,
    means_stride,
    SLOPE: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image, pixel, channel, pixel_mask, mask, xhat, rstd = _tile_of_program(
        x, mean, rstd, pixels, channels, stats_stride, BLOCK_P, BLOCK_C
    )
    d_xhat = tl.zeros_like(xhat)
    for i in range(UPSAMPLE * UPSAMPLE):
        out_pixel = _out_pixel(image, pixel, i, pixels, width, UPSAMPLE)
        dy = tl.load(ptr(grad, out_pixel, channel, channels), mask, other=0).to(xhat.dtype)
        scale, shift = _scale_shift(table, pixel_row, out_pixel, pixel_mask, channel, channels, mask, xhat.dtype)
        d_xhat += _through_leaky_relu(dy, xhat * scale + shift, SLOPE) * scale
    if mean_shift is not None:
        means, channel_mask = image * means_stride + channel, channel < channels
        mean_d = (
            tl.load(mean_shift + means, channel_mask)[None, :]
            + xhat * tl.load(mean_scale + means, channel_mask)[None, :]
        )
        d_xhat -= UPSAMPLE * UPSAMPLE * mean_d
    tl.store(ptr(out, image * pixels + pixel, channel, channels), d_xhat * rstd, mask)
