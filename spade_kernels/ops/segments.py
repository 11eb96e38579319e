"""Segments for deterministic sums: the positions of equal values, as (indices, offsets)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


def segments_by_value(values: Tensor, num_values: int) -> tuple[Tensor, Tensor]:
    """(indices, offsets): positions in the flattened `values`, grouped by value 0 .. num_values - 1, ascending."""
    flat = values.flatten()
    return flat.argsort(stable=True), _segment_offsets(flat, num_values)


def _segment_offsets(flat: Tensor, num_values: int) -> Tensor:
    # bincount would make the host wait for a GPU to find the largest value.
    return flat.new_zeros(num_values + 1).scatter_add_(0, flat + 1, torch.ones_like(flat)).cumsum(0)


def segments_of_each(values: Sequence[Tensor], num_values: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """`segments_by_value` of several tensors on one device; on a GPU together, in a tenth of the launches."""
    if not values or not values[0].is_cuda:
        return [segments_by_value(*one) for one in zip(values, num_values, strict=True)]
    return segments_at_once(values, num_values)


def segments_at_once(values: Sequence[Tensor], num_values: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """`segments_of_each` with one sort: the tensors are joined into one, in which each has its own range of values."""
    lengths = [value.numel() for value in values]
    first_value, first_entry = ([0, *accumulate(counts)] for counts in (num_values, lengths))
    own = torch._foreach_add([value.flatten() for value in values], first_value[:-1])
    keys = torch.cat(own)
    # A radix sort of int32 keys takes half the passes of one of int64 keys.
    indices = (keys.int() if first_value[-1] < 2**31 else keys).argsort(stable=True)
    offsets = _segment_offsets(keys, first_value[-1])
    all_indices = torch._foreach_sub(indices.split(lengths), first_entry[:-1])
    bounds = [offsets[first : first + count + 1] for first, count in zip(first_value[:-1], num_values, strict=True)]
    return list(zip(all_indices, torch._foreach_sub(bounds, first_entry[:-1]), strict=True))


def tap_keys(windows: Tensor) -> Tensor:
    """(rows, T): the keys id * T + tap of all entries of windows (rows, T), for `segments_by_tap`."""
    num_taps = windows.shape[1]
    return torch.add(torch.arange(num_taps, device=windows.device), windows, alpha=num_taps)


def segments_by_tap(windows: Tensor, num_ids: int) -> tuple[Tensor, Tensor]:
    """(indices, offsets): the uses of each (id, tap) pair in windows (rows, T), grouped by id * T + tap."""
    return segments_by_value(tap_keys(windows), windows.shape[1] * num_ids)
