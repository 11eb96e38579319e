"""The fused pass over x, and the two passes of its backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spade_kernels import ops, reference
from spade_kernels.testing import assert_within_budget
from spade_kernels.triton import modulate as kernels
from spade_kernels.triton import segments
from spade_kernels.triton.segments import PIECE

pytestmark = pytest.mark.usefixtures("_poisoned")

# The interpreter cuts bfloat16 off where a GPU rounds: one unit in the last place, which the budget allows.
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(2, 3, 5, 7), (1, 20, 9, 4), (2, 16, 6, 5), (1, 130, 3, 5), (3, 1, 4, 3)]
ROWS = ("one", "many", "long", "every pixel")


class Problem:
    """Random arguments of the three operators.

    Args:
        shape: of x.
        rows: which pixels share a row of the table: "one": all; "many": every row has few, or none; "long": one row has
            most, of all images; "every pixel": pixel_row is None.
        stats: (N, C) statistics if "image", else (1, C).
        whole: whole numbers, on which every result is exact.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        device: str,
        rows: str = "many",
        *,
        dtype: torch.dtype = torch.float32,
        table_dtype: torch.dtype | None = None,
        stats: str = "image",
        negative_slope: float = 0.2,
        upsample: int = 1,
        whole: bool = False,
    ):
        acc_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.how = (negative_slope, upsample)
        n, c, h, w = shape
        size = (n, upsample * h, upsample * w)
        pixels = n * size[1] * size[2]

        def random(*of: int, dtype: torch.dtype = acc_dtype) -> Tensor:
            values = torch.randn(of)
            return (values.mul(2).round() if whole else values).to(device, dtype)

        self.x, self.grad = random(n, c, h, w, dtype=dtype), random(n, c, *size[1:], dtype=dtype)
        of_stats = (n if stats == "image" else 1, c)
        self.mean, self.rstd = random(*of_stats), random(*of_stats).abs() + 1
        self.mean_shift, self.mean_scale = random(*of_stats), random(*of_stats)
        count = {"one": 1, "many": 25, "long": 9, "every pixel": pixels}[rows]
        self.table = random(count, 2 * c, dtype=table_dtype or acc_dtype)
        self.pixel_row = self.indices = self.offsets = None
        if rows != "every pixel":
            # The last row is no pixel's, as rows that only fill up a batch are not.
            row = torch.randint(max(1, count - 1), size)
            if rows == "long":
                row = torch.where(torch.rand(size) < 0.9, 4, row)
            self.pixel_row = row.to(device)
            self.indices, self.offsets = ops.segments_by_value(self.pixel_row, count)

    def results(self, backend, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        def cast(*tensors: Tensor) -> tuple[Tensor, ...]:
            return tuple(t if dtype is None else t.to(dtype) for t in tensors)

        normalized = (*cast(self.x, self.mean, self.rstd, self.table), self.pixel_row)
        (grad,) = cast(self.grad)
        means = cast(self.mean_shift, self.mean_scale)
        return {
            "y": backend.modulate(*normalized, None, None, None, *self.how, "none"),
            "table": backend.modulate_table_grad(grad, *normalized, self.indices, self.offsets, *self.how),
            "x": backend.modulate_input_grad(grad, *normalized, None, None, *self.how),
            "x, statistics of x": backend.modulate_input_grad(grad, *normalized, *means, *self.how),
        }


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    wrong = [name for name in expected if not torch.equal(got[name], expected[name])]
    assert not wrong, f"not the same: {', '.join(wrong)}"


def assert_right(problem: Problem) -> None:
    got, stock = problem.results(kernels), problem.results(reference)
    assert [t.dtype for t in got.values()] == [t.dtype for t in stock.values()]
    assert_within_budget(got, stock, problem.results(reference, torch.float64))


@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_error(shape, rows, upsample, device):
    assert_right(Problem(shape, device, rows, upsample=upsample))


@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize("negative_slope", [1.0, 0.2, 0.0])
@pytest.mark.parametrize("stats", ["image", "batch"])
@pytest.mark.parametrize("rows", ["many", "every pixel"])
def test_error_of_every_option(rows, stats, negative_slope, upsample, device):
    assert_right(Problem((2, 20, 3, 4), device, rows, stats=stats, negative_slope=negative_slope, upsample=upsample))


@pytest.mark.parametrize("table", ["like x", "wide"])
@pytest.mark.parametrize("rows", ["many", "every pixel"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_of_every_dtype(dtype, rows, table, device):
    assert_right(Problem((2, 20, 3, 4), device, rows, dtype=dtype, table_dtype=dtype if table == "like x" else None))


@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_exact(shape, rows, upsample, device):
    problem = Problem(shape, device, rows, negative_slope=0.5, upsample=upsample, whole=True)
    assert_equal(problem.results(kernels), problem.results(reference))


@pytest.mark.parametrize("probes", [128, 4])
def test_long_rows_are_cut(probes, monkeypatch, device):
    """Into several pieces, whose sums are exact for whole numbers; of few probes, a piece's row is found in rounds."""
    monkeypatch.setattr(segments, "_PROBES", probes)
    problem = Problem((2, 3, 24, 25), device, "long", negative_slope=0.5, whole=True)
    assert problem.offsets.diff().max() > 4 * PIECE
    assert_equal(problem.results(kernels), problem.results(reference))


def test_rows_without_pixels_have_no_gradient(device):
    problem = Problem((2, 16, 8, 8), device, "many")
    empty = problem.offsets.diff() == 0
    table = problem.results(kernels)["table"]
    assert empty[-1]
    assert (table[empty] == 0).all()
    assert (table[~empty] != 0).any(1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_gathered_exactly(dtype, device):
    """A row for every pixel is the row that the pixels share."""
    problem = Problem((2, 20, 5, 4), device, "many", dtype=dtype)
    shared = problem.results(kernels)
    problem.table, problem.pixel_row = problem.table[problem.pixel_row].flatten(0, 2), None
    each = problem.results(kernels)
    del shared["table"]
    assert_equal(each, shared)


@pytest.mark.parametrize("rows", ["many", "every pixel"])
def test_upsampling_is_that_of_x(rows, device):
    problem = Problem((2, 20, 5, 4), device, rows, upsample=2)
    folded = problem.results(kernels)
    problem.x, problem.how = problem.x.repeat_interleave(2, 2).repeat_interleave(2, 3), (0.2, 1)
    unfolded = problem.results(kernels)
    assert_equal(unfolded, {name: folded[name] for name in ("y", "table")})


@pytest.mark.parametrize("rows", ["many", "every pixel"])
@pytest.mark.parametrize("upsample", [1, 2])
def test_same_bits_every_time_and_in_every_layout(rows, upsample, device):
    problem = Problem((2, 20, 5, 4), device, rows, upsample=upsample)
    first = problem.results(kernels)
    for name in ("y", "x", "x, statistics of x"):
        assert first[name].is_contiguous(memory_format=torch.channels_last)
    for layout in (torch.channels_last, torch.contiguous_format, torch.channels_last):
        problem.x = problem.x.contiguous(memory_format=layout)
        problem.grad = problem.grad.contiguous(memory_format=layout)
        assert_equal(problem.results(kernels), first)


def test_parts_of_larger_tensors(device):
    problem = Problem((2, 20, 5, 4), device, "many")
    first = problem.results(kernels)
    problem.x = torch.nn.functional.pad(problem.x, (1, 2, 3, 1, 2, 0))[:, 2:, 3:-1, 1:-2]
    problem.mean = torch.stack((problem.mean, problem.rstd), 2)[..., 0]
    problem.table = torch.cat((problem.table, problem.table), 1)[:, :40]
    assert_equal(problem.results(kernels), first)


def test_nan_stays_at_its_pixel(device):
    problem = Problem((2, 16, 8, 8), device, "many")
    problem.x[1, 3, 2, 5] = float("nan")
    problem.table[-1] = float("nan")  # no pixel's
    where = torch.zeros(2, 16, 8, 8, dtype=torch.bool, device=device)
    where[1, 3, 2, 5] = True
    got = problem.results(kernels)
    assert torch.equal(got["y"].isnan(), where)
    rows = torch.zeros_like(problem.table, dtype=torch.bool)
    rows[problem.pixel_row[1, 2, 5], 3] = True
    assert torch.equal(got["table"].isnan(), rows)
