"""Lists the variants of the Triton kernels that a generator launches: all in bfloat16, and some in other dtypes."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from spade_kernels.triton import channel_stats, gather_sum, modulate, modulation_table
from spade_kernels.triton.variants import Variant, recording

# These are (channels and side of a layer's output, upsample) of SPADEGenerator with ngf 64 at 256 x 256. The layer with
# 20 channels is added, because its rows are not a whole number of loads.
_LAYERS = {
    torch.bfloat16: (
        *((1024, 8, 1), (1024, 16, 2), (1024, 16, 1), (1024, 32, 2), (512, 32, 1), (512, 64, 2)),
        *((256, 64, 1), (256, 128, 2), (128, 128, 1), (128, 256, 2), (64, 256, 1), (20, 32, 2)),
    ),
    torch.float32: ((1024, 8, 1), (128, 256, 2), (64, 256, 1)),
    torch.float16: ((128, 256, 2),),
}
_BATCH = 8
_CODES, _HIDDEN = 371, 128


def layer_variants() -> list[Variant]:
    """Returns the variants that the forward and backward of the layers launch.

    Layers run per distinct window and per pixel, and with statistics per image and of the whole batch.
    """
    with recording() as found:
        for dtype, layers in _LAYERS.items():
            for channels, side, upsample in layers:
                _layer(channels, side, upsample, dtype)
    return found


def _layer(channels: int, side: int, upsample: int, dtype: torch.dtype) -> None:
    table_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    pixels = _BATCH * side**2
    # These numbers of windows are similar to those of real masks. On small maps every window is distinct.
    rows, num_hidden = max(64, pixels // 5), max(64, pixels // 10)
    x = _empty(_BATCH, channels, side // upsample, side // upsample, dtype=dtype)
    grad = _empty(_BATCH, channels, side, side, dtype=dtype)
    mean, m2 = channel_stats.channel_stats(x)
    channel_stats.channel_stats_grad(x, mean, mean, m2)
    pixel_row = _ids(_BATCH, side, side)
    for (where, count), taken in product(((pixel_row, rows), (None, pixels)), (1, _BATCH)):
        stats = _empty(taken, channels)
        normalized = x, stats, stats, _empty(count, 2 * channels, dtype=table_dtype), where
        for negative_slope in (0.2, 1.0):
            modulate.modulate(*normalized, None, None, None, negative_slope, upsample, "none")
            modulate.modulate_table_grad(grad, *normalized, _ids(pixels), _ids(count + 1), negative_slope, upsample)
            for means in (stats, None):
                modulate.modulate_input_grad(grad, *normalized, means, means, negative_slope, upsample)
    _table(channels, rows, num_hidden, table_dtype)
    # The first call is that of the network's first convolution, the second that of the dense path.
    _gather_sum(num_hidden, _CODES, 9, channels, table_dtype, relu=False)
    _gather_sum(pixels, num_hidden, 1, channels, torch.float32, relu=False)


def _table(channels: int, rows: int, num_hidden: int, dtype: torch.dtype) -> None:
    _gather_sum(num_hidden, _CODES, 9, _HIDDEN, dtype, relu=True)
    hidden, weight = _empty(num_hidden, _HIDDEN, dtype=dtype), _empty(channels, _HIDDEN, 3, 3)
    for precision in ("tf32", "ieee") if dtype == torch.float32 else ("tf32",):
        joint = _empty(2 * channels, 9, _HIDDEN, dtype=dtype)
        modulation_table._multiply(hidden, joint, _empty(2 * channels), _ids(rows, 9), precision)
    groups = _ids(9 * rows), _ids(9 * (num_hidden + 1) + 1)
    modulation_table.modulation_table_grad(_empty(rows, 2 * channels, dtype=dtype), hidden, weight, weight, *groups)


def _gather_sum(rows: int, ids: int, taps: int, width: int, dtype: torch.dtype, relu: bool) -> None:
    bias = _empty(width) if relu else None
    made = gather_sum.gather_sum(_empty(ids, taps, width, dtype=dtype), bias, _ids(rows, taps), None, None, relu)
    gather_sum.gather_sum_grad(made, made, _ids(rows * taps), _ids(ids * taps + 1), taps, relu)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _ids(*shape: int) -> Tensor:
    return _empty(*shape, dtype=torch.int64)
