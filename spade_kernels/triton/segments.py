"""Segment sums in a fixed order, fast if a few segments hold most entries and most segments hold one entry.

The list of entries is cut at every multiple of the length of a *piece*, counted from the first entry. A segment of at
least that length contains a cut. Each of its cuts starts a *slot*: the segment's entries from there to the next cut;
the first slot also has the entries before its cut. One program sums one slot, and a second kernel adds up the slots of
a segment. Shorter segments are not cut: one program sums a *tile* of neighbours. The cuts do not depend on the
segments, so grids follow from shapes alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spade_kernels.triton.tiles import ptr
from spade_kernels.triton.variants import launch

PIECE = 64  # least number of entries
_PROBES = 128
_SCRATCH = 32 << 20  # most bytes, unless pieces would be longer than all entries

# Most segments hold one entry or two. The segments of a tile are summed together, and all wait for the longest. A
# segment with more than TOGETHER entries is therefore summed alone afterwards, BLOCK_E entries at a time.
_SHORT = {"TOGETHER": 16, "BLOCK_S": 8, "BLOCK_E": 8, "num_warps": 1}
# Nearly all entries are in slots. Finding a slot's segment takes as long as a few loads, so pieces are four times as
# long here.
_LONG = {"TOGETHER": 0, "BLOCK_S": 1, "BLOCK_E": 32, "num_warps": 4}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def segment_sum(
    values: Tensor,
    indices: Tensor | None,
    offsets: Tensor,
    divisor: int = 1,
    dtype: torch.dtype | None = None,
    long: bool = False,
) -> Tensor:
    """(S, D) in `dtype`, the accumulation dtype: sums of values[indices[e] // divisor] over each segment's entries.

    Args:
        values: (V, D).
        indices: None for indices[e] = e.
        offsets: (S + 1,); a slice of longer offsets sums only its segments.
        long: True if the segments hold many entries on average; it affects speed only.
    """
    values = values.contiguous()
    width, segments = values.shape[1], offsets.shape[0] - 1
    places = divisor * values.shape[0]
    entries = places if indices is None else indices.numel()
    acc = accumulator(values.dtype)
    sums = torch.empty((segments, width), dtype=dtype or acc, device=values.device)
    constexprs: dict[str, Any] = _LONG if long else _SHORT
    scratch, pieced = pieces(entries, segments, width, acc, values.device, 4 * PIECE if long else PIECE)
    block = min(128, max(16, triton.next_power_of_2(width)))
    launch(
        _sum_pieces,
        (triton.cdiv(segments, constexprs["BLOCK_S"]) + len(scratch), triton.cdiv(width, block)),
        *(values, indices, offsets, sums, scratch, segments, width),
        **pieced,
        **constexprs,
        BLOCK_D=block,
        DIVISOR=divisor,
        INDEX=tl.int32 if places < 2**31 else tl.int64,
    )
    merge_pieces(offsets, sums, scratch, **pieced)
    return sums


def pieces(
    entries: int, segments: int, width: int, dtype: torch.dtype, device: torch.device, piece: int = PIECE
) -> tuple[Tensor, dict[str, int]]:
    """Scratch memory for the sums of slots, (slots, width), and the constants of the kernels that share it.

    Kernels that call `piece_of_program` write it, and `merge_pieces` reads it. `piece` is the least length of a piece.
    """
    while triton.cdiv(entries, piece) * width * dtype.itemsize > _SCRATCH and piece < entries:
        piece *= 2
    scratch = torch.empty((triton.cdiv(entries, piece), width), dtype=dtype, device=device)
    rounds = 1
    while _PROBES**rounds < segments:
        rounds += 1
    return scratch, {"PIECE": piece, "PROBES": _PROBES, "ROUNDS": rounds}


def merge_pieces(offsets: Tensor, sums: Tensor, scratch: Tensor, **constexprs: int) -> None:
    """Writes the sums of all segments that have several slots."""
    segments, width = sums.shape
    block = {"BLOCK_K": 32, "BLOCK_D": 128}
    grid = (triton.cdiv(len(scratch), 2), triton.cdiv(width, block["BLOCK_D"]))
    launch(_merge_pieces, grid, offsets, sums, scratch, segments, width, **constexprs, **block)


@triton.jit
def piece_of_program(offsets, segments, PIECE: tl.constexpr, PROBES: tl.constexpr, ROUNDS: tl.constexpr):
    """(segment, begin, stop, row): the entries that program_id(0) sums, and the row of the scratch for their sum.

    There is one program for each segment, then one for each slot. A row below 0 means that the sum goes to the
    segment's row of the result. begin > stop means that there is nothing to do.
    """
    program = tl.program_id(0)
    if program < segments:
        segment = program
        begin, stop = _whole(offsets, segment, True, PIECE)
        row = tl.full((), -1, tl.int64)
    else:
        segment, begin, stop, row = _slot(offsets, segments, program - segments, PIECE, PROBES, ROUNDS)
    return segment, begin, stop, row


@triton.jit
def _whole(offsets, segment, there, PIECE: tl.constexpr):
    """(begin, stop) of segments' entries; begin > stop for segments that are not there or are summed by slots."""
    begin = tl.load(offsets + segment, there, other=0)
    end = tl.load(offsets + segment + 1, there, other=0)
    return begin, tl.where(there & (end - begin < PIECE), end, begin - 1)


@triton.jit
def _slot(offsets, segments, slot, PIECE: tl.constexpr, PROBES: tl.constexpr, ROUNDS: tl.constexpr):
    """Returns for a slot what `piece_of_program` returns for a program."""
    slot = slot.to(tl.int64)
    cut = tl.load(offsets) + slot * PIECE
    segment = tl.full((), 0, tl.int32)
    if cut < tl.load(offsets + segments):
        segment = _segment_of(offsets, segments, cut, PROBES, ROUNDS)
    begin, end, first_slot, last_slot = _slots(offsets, segment, PIECE)
    stop = tl.where((cut < end) & (end - begin >= PIECE), tl.minimum(end, cut + PIECE), begin - 1)
    row = tl.where(first_slot < last_slot, slot, -1)
    return segment, tl.where((slot == first_slot) | (stop < begin), begin, cut), stop, row


@triton.jit
def _slots(offsets, segment, PIECE: tl.constexpr):
    """(begin, end, first slot, last slot) of a segment that holds a cut."""
    first, begin, end = tl.load(offsets), tl.load(offsets + segment), tl.load(offsets + segment + 1)
    return begin, end, (begin - first + PIECE - 1) // PIECE, (end - first - 1) // PIECE


@triton.jit
def store_sum(value, sums, scratch, segment, row, width, columns, mask):
    """Stores the sum of a piece where `piece_of_program` says."""
    if row < 0:
        tl.store(sums + segment.to(tl.int64) * width + columns, value, mask)
    else:
        tl.store(scratch + row * width + columns, value, mask)


@triton.jit
def _segment_of(offsets, segments, entry, PROBES: tl.constexpr, ROUNDS: tl.constexpr):
    """The segment that holds the entry: the last one that does not start after it."""
    probe = tl.arange(0, PROBES)
    segment = 0
    for i in tl.static_range(ROUNDS):
        stride = PROBES ** (ROUNDS - 1 - i)
        at = segment + probe * stride
        start = tl.load(offsets + at, at < segments, other=0)
        segment += stride * (tl.sum(((at < segments) & (start <= entry)).to(tl.int32), 0) - 1)
    return segment


@triton.jit
def _values(
    values,
    indices,
    entry,
    entry_mask,
    columns,
    column_mask,
    width,
    DIVISOR: tl.constexpr,
    INDEX: tl.constexpr,
    dtype: tl.constexpr,
):
    """Loads the values of the entries that the mask selects, and 0 for the others."""
    if indices is not None:
        entry = tl.load(indices + entry, entry_mask, other=0)
    row = entry.to(INDEX) // DIVISOR
    value = (values + row.to(tl.int64) * width)[:, None] + columns[None, :]
    return tl.load(value, entry_mask[:, None] & column_mask[None, :], other=0).to(dtype)


@triton.jit
def _sum_of_piece(
    values,
    indices,
    begin,
    stop,
    columns,
    column_mask,
    width,
    DIVISOR: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    dtype: tl.constexpr,
):
    total = tl.zeros((BLOCK_E, BLOCK_D), dtype)
    for e in range(begin, stop, BLOCK_E):
        entry = e + tl.arange(0, BLOCK_E)
        total += _values(values, indices, entry, entry < stop, columns, column_mask, width, DIVISOR, INDEX, dtype)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["segments"], do_not_specialize_on_alignment=["offsets"])
def _sum_pieces(
    values,
    indices,
    offsets,
    sums,
    scratch,
    segments,
    width,
    DIVISOR: tl.constexpr,
    INDEX: tl.constexpr,
    PIECE: tl.constexpr,
    PROBES: tl.constexpr,
    ROUNDS: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    column_mask = columns < width
    dtype: tl.constexpr = scratch.dtype.element_ty
    program, tiles = tl.program_id(0), tl.cdiv(segments, BLOCK_S)
    if program >= tiles:
        segment, begin, stop, row = _slot(offsets, segments, program - tiles, PIECE, PROBES, ROUNDS)
        if begin <= stop:
            total = _sum_of_piece(
                values, indices, begin, stop, columns, column_mask, width, DIVISOR, INDEX, BLOCK_E, BLOCK_D, dtype
            )
            store_sum(total, sums, scratch, segment, row, width, columns, column_mask)
        return
    segment = program * BLOCK_S + tl.arange(0, BLOCK_S)
    begin, stop = _whole(offsets, segment, segment < segments, PIECE)
    entries = (stop - begin).to(tl.int32)
    short = entries <= TOGETHER
    total = tl.zeros((BLOCK_S, BLOCK_D), dtype)
    for e in range(tl.max(tl.where(short, entries, 0), 0)):
        entry_mask = short & (e < entries)
        total += _values(values, indices, begin + e, entry_mask, columns, column_mask, width, DIVISOR, INDEX, dtype)
    tl.store(ptr(sums, segment, columns, width), total, (short & (entries >= 0))[:, None] & column_mask[None, :])
    if tl.max(entries, 0) > TOGETHER:
        for i in range(BLOCK_S):
            s = program * BLOCK_S + i
            s_begin, s_stop = _whole(offsets, s, s < segments, PIECE)
            if s_stop - s_begin > TOGETHER:
                s_total = _sum_of_piece(
                    values,
                    indices,
                    s_begin,
                    s_stop,
                    columns,
                    column_mask,
                    width,
                    DIVISOR,
                    INDEX,
                    BLOCK_E,
                    BLOCK_D,
                    dtype,
                )
                tl.store(sums + s.to(tl.int64) * width + columns, s_total, column_mask)


@triton.jit(do_not_specialize=["segments"], do_not_specialize_on_alignment=["offsets"])
def _merge_pieces(
    offsets,
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
    # This program takes an even slot. Of the first two slots of a segment one is even: its program merges all of them.
    slot = 2 * tl.program_id(0).to(tl.int64)
    cut = tl.load(offsets) + slot * PIECE
    if cut >= tl.load(offsets + segments):
        return
    segment = _segment_of(offsets, segments, cut, PROBES, ROUNDS)
    begin, end, first_slot, last_slot = _slots(offsets, segment, PIECE)
    if (end - begin < PIECE) | (first_slot == last_slot) | (slot > first_slot + 1):
        return
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    column_mask = columns < width
    total = tl.zeros((BLOCK_K, BLOCK_D), scratch.dtype.element_ty)
    for s in range(first_slot, last_slot + 1, BLOCK_K):
        slots = s + tl.arange(0, BLOCK_K)
        value = (scratch + slots * width)[:, None] + columns[None, :]
        total += tl.load(value, (slots <= last_slot)[:, None] & column_mask[None, :], other=0)
    tl.store(sums + segment.to(tl.int64) * width + columns, tl.sum(total, 0), column_mask)
