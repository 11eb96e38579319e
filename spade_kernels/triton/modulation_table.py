"""The modulation table as a gather-GEMM on tensor cores, and its gradients as a segment sum and two plain GEMMs.

Both take weights as (2C, taps, D), gamma's columns first, like channels-last convolution weights in memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spade_kernels import reference
from spade_kernels.triton.segments import segment_sum
from spade_kernels.triton.variants import launch

# A gather takes two loads, and the second waits for the first: five stages keep two gathers ahead of the product.
_STAGES = 5
_ENOUGH_TILES = 128  # about one for each multiprocessor
_SCRATCH = 64 << 20  # bytes of tap gradients worked on at a time


@triton.jit(do_not_specialize=["num_rows"])
def _gather_gemm(
    table,
    hidden,
    weight,
    bias,
    windows,
    num_rows,
    columns,
    NUM_TAPS: tl.constexpr,
    ALL_TAPS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Tiles of the same rows run together, so that the hidden rows that they gather stay in L2, where all of the weights
    # are, too.
    tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(0) % tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_mask, column_mask = row < num_rows, column < columns
    window = windows + row * NUM_TAPS
    # Columns past the last one read the last one's weights, so that loads need no mask; their results are not stored.
    column_weight = weight + tl.minimum(column, columns - 1)[None, :] * (NUM_TAPS * DEPTH)
    blocks: tl.constexpr = (DEPTH + BLOCK_DEPTH - 1) // BLOCK_DEPTH
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    # Spare rows of a static label map have empty windows. A tile of them skips the products and stores the bias only.
    taps = tl.arange(0, ALL_TAPS)
    numbers = tl.load(window[:, None] + taps[None, :], row_mask[:, None] & (taps < NUM_TAPS)[None, :], other=0)
    steps = tl.where(tl.max(tl.max(numbers, 1), 0) > 0, NUM_TAPS * blocks, 0)
    for step in range(steps):
        tap = step // blocks
        d = step % blocks * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
        d_mask = d < DEPTH
        number = tl.load(window + tap, row_mask, other=0)[:, None]
        gathered = tl.load(hidden + (number - 1) * DEPTH + d[None, :], (number > 0) & d_mask[None, :], other=0)
        tap_weight = tl.load(column_weight + tap * DEPTH + d[:, None], d_mask[:, None], other=0)
        total = tl.dot(gathered, tap_weight, total, input_precision=PRECISION)
    total += tl.load(bias + column, column_mask, other=0).to(tl.float32)[None, :]
    place = table + row[:, None] * columns + column[None, :]
    tl.store(place, total.to(table.dtype.element_ty), row_mask[:, None] & column_mask[None, :])


class Tile(NamedTuple):
    """The part of the table that one program computes, and the number of its warps."""

    rows: int
    columns: int
    warps: int


# Tiles are ordered by size, because a larger tile reads less per product.
_TILES = (Tile(128, 256, 8), Tile(128, 128, 8), Tile(64, 128, 4), Tile(64, 64, 4))


def _tile_for(rows: int, columns: int, dtype: torch.dtype, precision: str) -> Tile:
    """The largest tile that is not wider than the table, fits into registers, and leaves no multiprocessor idle."""
    fitting = _TILES[0 if dtype.itemsize == 2 else 1 if precision == "tf32" else -1 :]
    for tile in fitting:
        tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
        if columns >= tile.columns and tiles >= _ENOUGH_TILES:
            return tile
    return fitting[-1]


def _precision(dtype: torch.dtype) -> str:
    """The input_precision of products: PyTorch's setting for convolutions. 16-bit dtypes are exact under tf32."""
    convolution = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return "tf32" if dtype != torch.float32 or convolution.fp32_precision == "tf32" else "ieee"


def _rounded_to_tf32(t: Tensor) -> Tensor:
    """Rounds to tf32. Tensor cores would truncate, which has twice the error and is always towards 0."""
    nearest = (t.view(torch.int32) + 0x1000).bitwise_and_(-0x2000).view(torch.float32)
    return torch.where(t.isnan(), t, nearest)


def _joint_weight(gamma: Tensor, beta: Tensor, dtype: torch.dtype) -> Tensor:
    channels, depth, height, width = gamma.shape
    joint = torch.empty((2, channels, height, width, depth), dtype=dtype, device=gamma.device)
    for part, weight in zip(joint, (gamma, beta), strict=True):
        part.copy_(weight.permute(0, 2, 3, 1))
    return joint.view(2 * channels, height * width, depth)


def _multiply(hidden: Tensor, weight: Tensor, bias: Tensor, windows: Tensor, precision: str) -> Tensor:
    """Computes the table; weight may have more columns than bias, because its last panel is padded."""
    rows, columns, depth = windows.shape[0], bias.shape[0], hidden.shape[1]
    table = torch.empty((rows, columns), dtype=hidden.dtype, device=hidden.device)
    tile = _tile_for(rows, columns, hidden.dtype, precision)
    launch(
        _gather_gemm,
        (triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),),
        *(table, hidden.contiguous(), weight, bias.contiguous(), windows.contiguous(), rows, columns),
        NUM_TAPS=windows.shape[1],
        ALL_TAPS=triton.next_power_of_2(windows.shape[1]),
        DEPTH=depth,
        BLOCK_ROWS=tile.rows,
        BLOCK_COLUMNS=tile.columns,
        BLOCK_DEPTH=min(128 // hidden.element_size(), max(16, triton.next_power_of_2(depth))),
        PRECISION=precision,
        num_warps=tile.warps,
        num_stages=_STAGES,
    )
    return table


def modulation_table(
    hidden: Tensor,
    gamma: Tensor,
    beta: Tensor,
    bias: Tensor,
    windows: Tensor,
    packed_weight: Tensor | None,
    indices: Tensor | None,
    offsets: Tensor | None,
) -> Tensor:
    """`reference.modulation_table`."""
    if hidden.dtype == torch.float64:
        return reference.modulation_table(hidden, gamma, beta, bias, windows, packed_weight, indices, offsets)
    if packed_weight is None:
        weight = _joint_weight(gamma, beta, hidden.dtype)
    else:
        # Weights from pack_modulation_weight are contiguous in this order and are not copied.
        weight = packed_weight.permute(0, 3, 1, 2).to(hidden.dtype).contiguous()
    precision = _precision(hidden.dtype)
    if hidden.dtype == torch.float32 and precision == "tf32":
        hidden, weight = _rounded_to_tf32(hidden), _rounded_to_tf32(weight)
    return _multiply(hidden, weight, bias, windows, precision)


def modulation_table_grad(
    grad: Tensor, hidden: Tensor, gamma: Tensor, beta: Tensor, indices: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.modulation_table_grad`, with PyTorch's setting for matrix products of float32.

    Each hidden row is in several windows. Gradients are summed over these uses first, which leaves fewer products.
    """
    if grad.dtype == torch.float64:
        return reference.modulation_table_grad(grad, hidden, gamma, beta, indices, offsets)
    hidden = hidden.to(grad.dtype)
    weight = _joint_weight(gamma, beta, grad.dtype)
    columns, num_taps, depth = weight.shape
    by_tap = weight.transpose(0, 1).reshape(-1, depth)
    d_hidden = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
    d_by_tap = torch.zeros(by_tap.shape, dtype=torch.float32, device=hidden.device)
    step = max(1, _SCRATCH // (num_taps * columns * grad.element_size()))
    for begin in range(0, len(hidden), step):
        end = min(begin + step, len(hidden))
        # Uses of id 0, outside the image, come first and have no hidden row.
        uses = offsets[(begin + 1) * num_taps : (end + 1) * num_taps + 1]
        d_taps = segment_sum(grad, indices, uses, num_taps, grad.dtype).view(end - begin, -1)
        d_hidden[begin:end] = _product(d_taps, by_tap)
        d_by_tap += _product(d_taps.t(), hidden[begin:end])
    d_weight = d_by_tap.view(num_taps, columns, depth).permute(1, 2, 0)
    d_gamma, d_beta = (part.reshape(gamma.shape).contiguous() for part in d_weight.split(len(gamma)))
    return d_hidden, d_gamma, d_beta, grad.sum(0, dtype=torch.float32)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32: with a narrower result, cuBLAS would add up rounded partial sums."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def pack_modulation_weight(gamma: Tensor, beta: Tensor) -> Tensor:
    """`reference.pack_modulation_weight`."""
    return reference.pack_modulation_weight(gamma, beta)
