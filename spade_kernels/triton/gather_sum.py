"""The first convolution at every distinct window, as sums of taps."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spade_kernels.triton.segments import PIECE, segment_sum
from spade_kernels.triton.tiles import channel_tile, ptr
from spade_kernels.triton.variants import launch


def gather_sum(
    tap_responses: Tensor,
    bias: Tensor | None,
    windows: Tensor,
    indices: Tensor | None,
    offsets: Tensor | None,
    relu: bool,
) -> Tensor:
    """`reference.gather_sum`."""
    tap_responses, windows = tap_responses.contiguous(), windows.contiguous()
    rows, num_taps, width = windows.shape[0], tap_responses.shape[1], tap_responses.shape[2]
    bias = None if bias is None else bias.contiguous()
    out = torch.empty((rows, width), dtype=tap_responses.dtype, device=tap_responses.device)
    tile = channel_tile(width)
    blocks = {"BLOCK_R": tile["BLOCK_P"], "BLOCK_D": tile["BLOCK_C"]}
    grid = (triton.cdiv(rows, blocks["BLOCK_R"]), triton.cdiv(width, blocks["BLOCK_D"]))
    # A tap takes two loads, and the second waits for the first; unrolled taps wait at the same time. More than nine
    # taps do not fit into registers, nor do unrolled taps if every channel needs its own address.
    unroll = num_taps if num_taps <= 9 and width % 8 == 0 else 1
    constexprs = {"TAPS": num_taps, "RELU": relu, "UNROLL": unroll}
    launch(_gather_sum, grid, tap_responses, bias, windows, out, rows, width, **constexprs, **blocks)
    return out


def gather_sum_grad(
    grad: Tensor, rows: Tensor, indices: Tensor, offsets: Tensor, num_taps: int, relu: bool
) -> tuple[Tensor, Tensor]:
    """`reference.gather_sum_grad`."""
    if relu:
        grad = torch.where(rows > 0, grad, 0)
    # Segments of codes are long, because few codes cover most pixels. On the dense path hidden rows take the place of
    # codes, and most of them are in few windows.
    are_long = indices.numel() >= PIECE * (offsets.numel() - 1)
    d_tap_responses = segment_sum(grad, indices, offsets, num_taps, long=are_long)
    every_row = torch.arange(2, device=grad.device) * grad.shape[0]
    return d_tap_responses.view(-1, num_taps, grad.shape[1]), segment_sum(grad, None, every_row, long=True)[0]


@triton.jit(do_not_specialize=["rows"])
def _gather_sum(
    tap_responses,
    bias,
    windows,
    out,
    rows,
    width,
    TAPS: tl.constexpr,
    RELU: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    column_mask = column < width
    mask = (row < rows)[:, None] & column_mask[None, :]
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float64 if tap_responses.dtype.element_ty == tl.float64 else tl.float32)
    for t in tl.range(TAPS, loop_unroll_factor=UNROLL):
        code = tl.load(windows + row.to(tl.int64) * TAPS + t, row < rows, other=0)
        total += tl.load(ptr(tap_responses, code * TAPS + t, column, width), mask, other=0).to(total.dtype)
    if bias is not None:
        total += tl.load(bias + column, column_mask, other=0).to(total.dtype)[None, :]
    if RELU:
        total = tl.where(total < 0, 0, total)  # keeps NaN
    tl.store(ptr(out, row, column, width), total, mask)
