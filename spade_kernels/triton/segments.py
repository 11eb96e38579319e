"""Segment sums in a fixed order, for segments of which a few hold most entries and most hold one.

Entries are cut at every multiple of a piece's length, counted from the first. A cut that falls into a segment starts a
*slot*: the segment's entries from there to the next cut. What a segment holds before its first cut is its *head*.
Heads and slots are summed side by side, one program each, and then the slots are added to their heads. Where the cuts
are does not depend on the segments: grids follow from shapes alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spade_kernels.triton.variants import launch

PIECE = 128  # at the least
_PROBES = 128
_SCRATCH = 32 << 20  # bytes, at the most where pieces of any length can do it


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums of `dtype` are taken in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def segment_sum(
    values: Tensor, order: Tensor | None, starts: Tensor, divisor: int = 1, dtype: torch.dtype | None = None
) -> Tensor:
    """(S, D) in `dtype` (the accumulation dtype): sums of values[order[e] // divisor] over the entries of each segment.

    Args:
        values: (V, D).
        order: None where entry e is just e.
        starts: (S + 1,); a slice of a longer one sums only its segments.
    """
    values = values.contiguous()
    width, segments = values.shape[1], starts.shape[0] - 1
    entries = divisor * values.shape[0] if order is None else order.numel()
    acc = accumulator(values.dtype)
    sums = torch.empty((segments, width), dtype=dtype or acc, device=values.device)
    scratch, how = pieces(entries, segments, width, acc, values.device)
    block = {"BLOCK_E": 8, "BLOCK_D": min(128, max(16, triton.next_power_of_2(width)))}
    launch(
        _sum_pieces,
        (segments + len(scratch) // 2, triton.cdiv(width, block["BLOCK_D"])),
        *(values, order, starts, sums, scratch, segments, width),
        **how,
        **block,
        DIVISOR=divisor,
        num_warps=1,
    )
    merge_pieces(starts, sums, scratch, **how)
    return sums


def pieces(
    entries: int, segments: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, dict[str, int]]:
    """What kernels that call `piece_of_program` leave for `merge_pieces`, and what both are compiled for.

    The former are sums, (2 * slots, width): of every slot, and of the head before.
    """
    piece = PIECE
    while 2 * triton.cdiv(entries, piece) * width * dtype.itemsize > _SCRATCH and piece < entries:
        piece *= 2
    scratch = torch.empty((2 * triton.cdiv(entries, piece), width), dtype=dtype, device=device)
    rounds = 1
    while _PROBES**rounds < segments:
        rounds += 1
    return scratch, {"PIECE": piece, "PROBES": _PROBES, "ROUNDS": rounds}


def merge_pieces(starts: Tensor, sums: Tensor, scratch: Tensor, **how: int) -> None:
    """Writes the sums of all segments that have slots."""
    segments, width = sums.shape
    block = {"BLOCK_K": 64, "BLOCK_D": 32}
    grid = (len(scratch) // 2, triton.cdiv(width, block["BLOCK_D"]))
    launch(_merge_pieces, grid, starts, sums, scratch, segments, width, **how, **block)


@triton.jit
def piece_of_program(starts, segments, PIECE: tl.constexpr, PROBES: tl.constexpr, ROUNDS: tl.constexpr):
    """(segment, begin, stop, row): the entries that program_id(0) sums, and the row of the scratch they go to.

    A row below 0 is the segment's row of the sums; begin > stop: there is nothing to do.
    """
    program = tl.program_id(0)
    first = tl.load(starts)
    if program < segments:
        segment = program
        begin = tl.load(starts + segment)
        end = tl.load(starts + segment + 1)
        slot = (begin - first + PIECE - 1) // PIECE
        cut = first + slot * PIECE
        stop = tl.minimum(end, cut)
        row = tl.where(cut < end, 2 * slot, -1)
    else:
        slot = (program - segments).to(tl.int64)
        begin = first + slot * PIECE
        segment = _segment_of(starts, segments, begin, PROBES, ROUNDS)
        stop = tl.minimum(begin + PIECE, tl.load(starts + segment + 1))
        row = 2 * slot + 1
    return segment, begin, stop, row


@triton.jit
def store_sum(value, sums, scratch, segment, row, width, columns, mask):
    """Stores the sum of a piece where `piece_of_program` says."""
    if row < 0:
        tl.store(sums + segment.to(tl.int64) * width + columns, value, mask)
    else:
        tl.store(scratch + row * width + columns, value, mask)


@triton.jit
def _segment_of(starts, segments, entry, PROBES: tl.constexpr, ROUNDS: tl.constexpr):
    """The segment that holds the entry: the last that does not start after it."""
    probe = tl.arange(0, PROBES)
    segment = 0
    for i in tl.static_range(ROUNDS):
        stride = PROBES ** (ROUNDS - 1 - i)
        at = segment + probe * stride
        start = tl.load(starts + at, at < segments, other=0)
        segment += stride * (tl.sum(((at < segments) & (start <= entry)).to(tl.int32), 0) - 1)
    return segment


@triton.jit(do_not_specialize=["segments"], do_not_specialize_on_alignment=["starts"])
def _sum_pieces(
    values,
    order,
    starts,
    sums,
    scratch,
    segments,
    width,
    DIVISOR: tl.constexpr,
    PIECE: tl.constexpr,
    PROBES: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment, begin, stop, row = piece_of_program(starts, segments, PIECE, PROBES, ROUNDS)
    if begin > stop:
        return
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < width
    total = tl.zeros((BLOCK_E, BLOCK_D), scratch.dtype.element_ty)
    for e in range(begin, stop, BLOCK_E):
        entry = e + tl.arange(0, BLOCK_E)
        held = entry < stop
        if order is not None:
            entry = tl.load(order + entry, held, other=0)
        value = (values + entry // DIVISOR * width)[:, None] + columns[None, :]
        total += tl.load(value, held[:, None] & inside[None, :], other=0).to(total.dtype)
    store_sum(tl.sum(total, 0), sums, scratch, segment, row, width, columns, inside)


@triton.jit(do_not_specialize=["segments"], do_not_specialize_on_alignment=["starts"])
def _merge_pieces(
    starts,
    sums,
    scratch,
    segments,
    width,
    PIECE: tl.constexpr,
    PROBES: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    first = tl.load(starts)
    segment = _segment_of(starts, segments, first + slot * PIECE, PROBES, ROUNDS)
    begin = (tl.load(starts + segment) - first + PIECE - 1) // PIECE
    stop = (tl.load(starts + segment + 1) - first + PIECE - 1) // PIECE
    # One program merges all slots of a segment: that of the first.
    if (slot != begin) | (slot >= stop):
        return
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < width
    total = tl.zeros((BLOCK_K, BLOCK_D), scratch.dtype.element_ty)
    for s in range(begin, stop, BLOCK_K):
        slots = s + tl.arange(0, BLOCK_K)
        value = (scratch + (2 * slots + 1) * width)[:, None] + columns[None, :]
        total += tl.load(value, (slots < stop)[:, None] & inside[None, :], other=0)
    head = tl.load(scratch + 2 * begin * width + columns, inside)
    tl.store(sums + segment.to(tl.int64) * width + columns, head + tl.sum(total, 0), inside)
