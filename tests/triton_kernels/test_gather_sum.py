"""The first convolution at every distinct window, and its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spade_kernels import ops, reference
from spade_kernels.testing import assert_within_budget
from spade_kernels.triton import gather_sum as kernels

pytestmark = pytest.mark.usefixtures("_poisoned")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# rows, codes, taps, width
SIZES = {
    "one row": (1, 2, 9, 3),
    "many rows": (150, 7, 9, 16),
    "odd": (37, 5, 25, 20),
    "wide": (40, 4, 1, 130),
    "narrow": (140, 3, 9, 1),
}


class Problem:
    """Random arguments of both operators. The last code is in no window, and one stands nearly everywhere."""

    def __init__(self, size: tuple[int, int, int, int], device: str, dtype=torch.float32, whole=False):
        rows, codes, self.num_taps, width = size

        def random(*shape: int) -> Tensor:
            values = torch.randn(shape)
            return (values.mul(4).round() if whole else values).to(device, dtype)

        self.taps, self.bias = random(codes, self.num_taps, width), random(width)
        # All values have one sign: where a sum cancels, its error relative to what is left says nothing.
        self.grad = random(rows, width).abs()
        self.taps[0] = 0
        windows = torch.randint(codes - 1, (rows, self.num_taps))
        windows[: rows // 2] = codes - 2
        self.windows = windows.to(device)
        self.segments = ops.segments_by_tap(self.windows, codes)

    def results(self, backend, relu: bool, bias: bool, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        taps, vector, grad = (t.to(dtype or t.dtype) for t in (self.taps, self.bias, self.grad))
        rows = backend.gather_sum(taps, vector if bias else None, self.windows, None, None, relu)
        # In the backward rows are given: those of a wider dtype are not 0 in the same places.
        given = reference.gather_sum(self.taps, self.bias, self.windows, None, None, False).to(taps.dtype)
        gradients = backend.gather_sum_grad(grad, given, *self.segments, self.num_taps, relu)
        return dict(zip(("rows", "taps", "bias"), (rows, *gradients), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("relu", "bias"), [(True, True), (False, False)])
@pytest.mark.parametrize("size", SIZES)
def test_error(size, relu, bias, dtype, device):
    problem = Problem(SIZES[size], device, dtype)
    got = problem.results(kernels, relu, bias)
    stock = problem.results(reference, relu, bias)
    assert [t.dtype for t in got.values()] == [t.dtype for t in stock.values()]
    assert_within_budget(got, stock, problem.results(reference, relu, bias, torch.float64))


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_exact(size, relu, device):
    problem = Problem(SIZES[size], device, whole=True)
    expected = problem.results(reference, relu, True)
    assert all(torch.equal(value, expected[name]) for name, value in problem.results(kernels, relu, True).items())


def test_unused_codes_have_no_gradient(device):
    problem = Problem(SIZES["many rows"], device)
    taps = problem.results(kernels, True, True)["taps"]
    assert (taps[-1] == 0).all()
    assert (taps[-2] != 0).any()


def test_nan_passes_through_relu(device):
    problem = Problem(SIZES["odd"], device)
    problem.taps[1, 2, 3] = float("nan")
    rows = problem.results(kernels, True, True)["rows"]
    where = torch.zeros_like(rows, dtype=torch.bool)
    where[problem.windows[:, 2] == 1, 3] = True
    assert where.any()
    assert torch.equal(rows.isnan(), where)


def test_no_rows(device):
    problem = Problem(SIZES["odd"], device)
    windows, grad = problem.windows[:0], problem.grad[:0]
    assert kernels.gather_sum(problem.taps, None, windows, None, None, True).shape == (0, 20)
    taps, bias = kernels.gather_sum_grad(grad, grad, *ops.segments_by_tap(windows, 5), 25, True)
    assert (taps == 0).all()
    assert (bias == 0).all()


def test_same_bits_every_time(device):
    problem = Problem(SIZES["many rows"], device)
    first = problem.results(kernels, True, True)
    for _ in range(2):
        assert all(torch.equal(value, first[name]) for name, value in problem.results(kernels, True, True).items())
