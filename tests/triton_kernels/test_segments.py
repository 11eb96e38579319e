"""Segment sums, whatever the lengths of the segments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spade_kernels import reference
from spade_kernels.testing import assert_within_budget
from spade_kernels.triton import segments
from spade_kernels.triton.segments import PIECE, segment_sum

pytestmark = pytest.mark.usefixtures("_poisoned")

LENGTHS = {
    "mixed": [1, 0, 2 * PIECE + 40, 5, 0, PIECE, 1, 5 * PIECE + 3, 2, 0],
    "one": [9 * PIECE - 1],
    "cut where they meet": [PIECE, PIECE, 2 * PIECE],
    "single entries": [1] * (PIECE // 2),
    "nearly empty": [0, 0, 3, 0],
    "empty": [0, 0, 0],
    "unlike neighbours": [1, PIECE - 1, 0, 17, 16, 3 * PIECE, 2, 40, 1, PIECE, 15, 0, PIECE - 1, 1, PIECE + 1, 2, 30],
    "many": [3] * 20 + [PIECE] + [0] * 130 + [1, 2],
}


class Problem:
    """Values, and their groups of the given lengths in random order; whole numbers sum up exactly."""

    def __init__(self, lengths: list[int], width: int, divisor: int, device: str, dtype=torch.float32, whole=False):
        offsets = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0))
        entries = int(offsets[-1])
        values = torch.randn((entries + divisor - 1) // divisor, width)
        self.divisor = divisor
        self.values = (values.mul(4).round() if whole else values).to(device, dtype)
        self.indices = torch.randperm(divisor * len(values))[:entries].to(device)
        self.offsets = offsets.to(device)

    def run(self, **how) -> Tensor:
        return segment_sum(self.values, self.indices, self.offsets, self.divisor, **how)

    def expected(self, dtype: torch.dtype) -> Tensor:
        return reference.segment_sum(self.values.to(dtype), self.indices // self.divisor, self.offsets)


@pytest.fixture(params=[128, 4])
def _probes(request, monkeypatch):
    """With few probes, a search for a segment takes many rounds, as it does among tens of thousands of segments."""
    monkeypatch.setattr(segments, "_PROBES", request.param)


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", LENGTHS)
def test_error(name, dtype, long, device):
    problem = Problem(LENGTHS[name], 20, 1, device, dtype)
    acc_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    got = problem.run(long=long)
    assert got.dtype == acc_dtype
    assert_within_budget(
        {"sums": got}, {"sums": problem.expected(acc_dtype)}, {"sums": problem.expected(torch.float64)}
    )


@pytest.mark.usefixtures("_probes")
@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("width", [1, 16, 130])
@pytest.mark.parametrize("name", LENGTHS)
def test_exact(name, width, long, device):
    problem = Problem(LENGTHS[name], width, 9, device, whole=True)
    assert torch.equal(problem.run(long=long), problem.expected(torch.float32))


@pytest.mark.parametrize(("first", "last"), [(0, 1), (2, 7), (1, 3), (4, 10)])
@pytest.mark.parametrize("long", [False, True])
def test_slice_of_the_segments(first, last, long, device):
    problem = Problem(LENGTHS["mixed"], 3, 9, device, whole=True)
    expected = problem.expected(torch.float32)[first:last]
    problem.offsets = problem.offsets[first : last + 1]
    assert torch.equal(problem.run(long=long), expected)


def test_short_segments_are_summed_alike_beside_any_others(device):
    problem = Problem(LENGTHS["unlike neighbours"], 5, 1, device)
    lengths, offsets, sums = problem.offsets.diff(), problem.offsets, problem.run()
    for first in range(1, 9):
        problem.offsets = offsets[first:]
        short = lengths[first:] < PIECE
        assert short.sum() > 4
        assert torch.equal(problem.run()[short], sums[first:][short])


def test_pieces_grow_with_the_entries(monkeypatch, device):
    """So that the scratch does not."""
    problem = Problem(LENGTHS["mixed"], 3, 9, device, whole=True)
    monkeypatch.setattr(segments, "_SCRATCH", 2 * 3 * 4)
    assert segments.pieces(problem.indices.numel(), 10, 3, torch.float32, device)[1]["PIECE"] == 8 * PIECE
    assert torch.equal(problem.run(), problem.expected(torch.float32))


@pytest.mark.parametrize("entries", [1, PIECE, 3 * PIECE + 7])
def test_entries_that_stand_in_order(entries, device):
    values = torch.randn(entries, 5).mul(4).round().to(device)
    offsets = torch.tensor([0, entries // 2, entries], device=device)
    expected = torch.stack((values[: entries // 2].sum(0), values[entries // 2 :].sum(0)))
    assert torch.equal(segment_sum(values, None, offsets), expected)


def test_result_is_rounded_once(device):
    problem = Problem(LENGTHS["mixed"], 5, 1, device)
    assert torch.equal(problem.run(dtype=torch.float16), problem.run().half())


def test_no_values(device):
    offsets = torch.zeros(4, dtype=torch.int64, device=device)
    assert torch.equal(segment_sum(torch.randn(0, 5).to(device), None, offsets), torch.zeros(3, 5, device=device))


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("segment", [1, 3, 5])
def test_nan_stays_in_its_segment(segment, long, device):
    lengths = LENGTHS["unlike neighbours"]
    problem = Problem(lengths, 5, 1, device)
    problem.values[problem.indices[problem.offsets[segment + 1] - 1], 2] = float("nan")
    where = torch.zeros(len(lengths), 5, dtype=torch.bool, device=device)
    where[segment, 2] = True
    assert torch.equal(problem.run(long=long).isnan(), where)


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("name", ["mixed", "unlike neighbours"])
def test_same_bits_every_time(name, long, device):
    problem = Problem(LENGTHS[name], 20, 9, device)
    first = problem.run(long=long)
    assert all(torch.equal(problem.run(long=long), first) for _ in range(2))
