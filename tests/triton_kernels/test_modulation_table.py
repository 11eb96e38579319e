"""The gather-GEMM and its gradients: against the reference in float64, and against the stock convolution's errors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spade_kernels import ops, reference
from spade_kernels.testing import assert_within_budget, relative_error
from spade_kernels.triton import modulation_table as kernels
from spade_kernels.triton import segments


def only_on_a_gpu(dtype: torch.dtype, reason: str):
    return pytest.param(dtype, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason=f"not run: {reason}"))


FLOAT32 = only_on_a_gpu(torch.float32, "without a GPU, the gradients' products are the CPU's, rounded as it likes")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

poisoned = pytest.mark.usefixtures("_poisoned")


class Problem:
    """Random arguments of both operators, in float64; all dtypes hold their values."""

    def __init__(self, windows: Tensor, channels: int, depth: int, device: str):
        def random(*shape: int) -> Tensor:
            return torch.randn(shape).bfloat16().double().to(device)

        num_hidden, side = int(windows.max()), int(windows.shape[1] ** 0.5)
        self.windows = windows.to(device)
        self.hidden = random(num_hidden, depth)
        self.gamma, self.beta = (random(channels, depth, side, side) for _ in range(2))
        self.bias, self.grad = random(2 * channels), random(len(windows), 2 * channels)
        self.segments = ops.segments_by_tap(self.windows, num_hidden + 1)

    def results(self, backend, dtype: torch.dtype) -> dict[str, Tensor]:
        hidden, gamma, beta, bias, grad = (
            t.to(dtype) for t in (self.hidden, self.gamma, self.beta, self.bias, self.grad)
        )
        table = backend.modulation_table(hidden, gamma, beta, bias, self.windows, None, None, None)
        gradients = backend.modulation_table_grad(grad, hidden, gamma, beta, *self.segments)
        return named(table, *gradients)

    def table(self, dtype: torch.dtype, packed_weight: Tensor | None = None) -> Tensor:
        floats = (t.to(dtype) for t in (self.hidden, self.gamma, self.beta, self.bias))
        return kernels.modulation_table(*floats, self.windows, packed_weight, None, None)


def named(*results: Tensor) -> dict[str, Tensor]:
    return dict(zip(("table", "hidden", "gamma", "beta", "bias"), results, strict=True))


def random_windows(rows: int, num_hidden: int, side: int) -> Tensor:
    """Some are nothing but 0, as rows that only fill up a batch are."""
    windows = torch.randint(num_hidden + 1, (rows, side**2))
    windows[rows // 2 :: 7] = 0
    windows[0, 0] = num_hidden
    return windows


SIZES = {
    "one row": (1, 1, 1, 1, 1),
    "odd": (77, 11, 5, 7, 3),
    "blocks that do not fit": (70, 13, 33, 70, 3),
    "the usual depth": (130, 20, 64, 128, 3),
    "one tap": (100, 60, 8, 64, 1),
    "25 taps": (65, 6, 3, 16, 5),
    "few hidden rows with many uses": (700, 2, 40, 24, 3),
}


@poisoned
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "num_hidden", "channels", "depth", "side"), SIZES.values(), ids=SIZES)
def test_agrees_with_the_reference(rows, num_hidden, channels, depth, side, dtype, device):
    problem = Problem(random_windows(rows, num_hidden, side), channels, depth, device)
    exact = problem.results(reference, torch.float64)
    terms = max(side**2 * max(depth, 2 * channels), rows)
    limit = torch.finfo(dtype).eps + terms**0.5 * torch.finfo(torch.float32).eps
    for name, value in problem.results(kernels, dtype).items():
        assert value.is_contiguous()
        assert value.dtype == (dtype if name == "table" else torch.float32)
        assert relative_error(value, exact[name]) <= limit, name


@pytest.mark.parametrize("dtype", [FLOAT32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("size", "channels", "depth", "side"), [((5, 8), 20, 128, 3), ((4, 5), 9, 12, 5)])
def test_errs_no_more_than_the_stock_convolution(size, channels, depth, side, dtype, device):
    """All pixels of the image differ, so rows and hidden rows are pixels."""
    pixels = size[0] * size[1]
    ids = torch.arange(1, pixels + 1).view(1, *size)
    windows, _, _ = reference.window_index(ids, list(size), side, 1, side // 2, 1)
    problem = Problem(windows, channels, depth, device)
    image = problem.hidden.mT.view(1, depth, *size)
    leaves = [t.to(dtype).requires_grad_() for t in (image, problem.gamma, problem.beta, problem.bias)]
    hidden, gamma, beta, bias = leaves
    table = F.conv2d(hidden, torch.cat((gamma, beta)), bias, padding=side // 2)
    gradients = torch.autograd.grad(table, leaves, problem.grad.to(dtype).mT.view_as(table))
    table, d_hidden = (t.detach().flatten(2)[0].mT for t in (table, gradients[0]))
    stock = named(table, d_hidden, *gradients[1:])
    assert_within_budget(problem.results(kernels, dtype), stock, problem.results(reference, torch.float64))


@poisoned
@pytest.mark.parametrize("tile", kernels._TILES)
def test_every_tile(tile, monkeypatch, device):
    problem = Problem(random_windows(tile.rows + 3, 20, 3), tile.columns // 2 + 1, 32, device)
    exact = problem.results(reference, torch.float64)["table"]
    monkeypatch.setattr(kernels, "_TILES", (tile,))
    monkeypatch.setattr(kernels, "_ENOUGH_TILES", 1)
    assert relative_error(problem.table(torch.float16), exact) <= torch.finfo(torch.float16).eps


def test_choice_of_tiles():
    def chosen(rows: int, columns: int, dtype: torch.dtype = torch.float16, precision: str = "tf32") -> tuple[int, int]:
        return kernels._tile_for(rows, columns, dtype, precision)[:2]

    assert chosen(50_000, 256) == (128, 256)
    assert chosen(50_000, 128) == (128, 128)
    assert chosen(50_000, 70) == (64, 64)
    assert chosen(5_000, 256) == (64, 128)
    assert chosen(64, 2048) == (64, 64)
    assert chosen(50_000, 256, torch.float32) == (128, 128)
    assert chosen(50_000, 256, torch.float32, "ieee") == (64, 64)


def test_layout_of_the_weights_does_not_matter(device):
    problem = Problem(random_windows(40, 10, 3), 6, 16, device)
    results = problem.results(kernels, torch.float32)
    problem.gamma = problem.gamma.contiguous(memory_format=torch.channels_last)
    problem.beta = problem.beta.mT.contiguous().mT
    assert_same(problem.results(kernels, torch.float32), results)


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert [name for name, value in wanted.items() if not torch.equal(got[name], value)] == []


@poisoned
def test_strided_arguments(device):
    problem = Problem(random_windows(40, 10, 3), 6, 16, device)
    results = problem.results(kernels, torch.float32)
    for name in ("hidden", "grad", "windows", "bias"):
        value = getattr(problem, name)
        setattr(problem, name, torch.stack((value, value), -1)[..., 0])
    assert_same(problem.results(kernels, torch.float32), results)


@poisoned
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [5, 48])
def test_panels_change_nothing(channels, dtype, device):
    problem = Problem(random_windows(40, 10, 3), channels, 16, device)
    packed_weight = kernels.pack_modulation_weight(problem.gamma.to(dtype), problem.beta.to(dtype))
    assert torch.equal(packed_weight, reference.pack_modulation_weight(problem.gamma, problem.beta))
    assert torch.equal(problem.table(dtype, packed_weight), problem.table(dtype))


@poisoned
def test_gradients_in_chunks(monkeypatch, device):
    problem = Problem(random_windows(90, 11, 3), 6, 16, device)
    whole = problem.results(kernels, torch.float32)
    monkeypatch.setattr(kernels, "_SCRATCH", 4 * 9 * 12 * 4)  # four hidden rows
    in_chunks = problem.results(kernels, torch.float32)
    for name, value in whole.items():
        assert relative_error(in_chunks[name], value) <= 4 * torch.finfo(torch.float32).eps, name


@pytest.mark.parametrize("rows", [5_000, 5_000_000])
def test_scratch_does_not_grow_with_the_batch(rows, monkeypatch):
    """Nothing but the gradient of the hidden rows does."""
    monkeypatch.setattr(segments, "launch", lambda *_, **__: None)
    made: list[int] = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if isinstance(result, Tensor) and not function.is_view:
                made.append(result.nbytes)
            return result

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    num_hidden, weight = rows // 2, empty(64, 128, 3, 3)
    uses = empty(9 * rows, dtype=torch.int64), empty(9 * num_hidden + 10, dtype=torch.int64)
    grad, hidden = empty(rows, 128), empty(num_hidden, 128)
    with Made():
        kernels.modulation_table_grad(grad, hidden, weight, weight, *uses)
    assert hidden.nbytes in made
    assert max(size for size in made if size != hidden.nbytes) <= kernels._SCRATCH


def test_float64_is_exact(device):
    problem = Problem(random_windows(40, 10, 3), 6, 16, device)
    assert_same(problem.results(kernels, torch.float64), problem.results(reference, torch.float64))


@poisoned
@pytest.mark.parametrize("num_hidden", [0, 3])
def test_no_rows(num_hidden, device):
    hidden, gamma, bias = (torch.randn(shape).to(device) for shape in ((num_hidden, 8), (4, 8, 3, 3), (8,)))
    windows = torch.zeros(0, 9, dtype=torch.int64, device=device)
    table = kernels.modulation_table(hidden, gamma, gamma, bias, windows, None, None, None)
    assert table.shape == (0, 8)
    uses = ops.segments_by_tap(windows, num_hidden + 1)
    gradients = kernels.modulation_table_grad(table, hidden, gamma, gamma, *uses)
    assert [g.shape for g in gradients] == [hidden.shape, gamma.shape, gamma.shape, (8,)]
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize(("setting", "precision"), [("ieee", "ieee"), ("tf32", "tf32")])
def test_precision_is_that_of_convolutions(monkeypatch, setting, precision):
    monkeypatch.setattr(torch.backends.cudnn, "conv", SimpleNamespace(fp32_precision=setting))
    assert kernels._precision(torch.float32) == precision
    assert kernels._precision(torch.bfloat16) == "tf32"


def test_rounding_to_tf32():
    values = torch.randn(1000) * torch.tensor(10.0).pow(torch.arange(1000) % 60 - 30)
    values[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    rounded = kernels._rounded_to_tf32(values)
    assert torch.equal(rounded[:4].isnan(), values[:4].isnan())
    assert torch.equal(rounded[1:4], values[1:4])
    assert not (rounded[1:].view(torch.int32) & 0x1FFF).any()
    assert ((rounded - values)[4:].abs() <= 2**-11 * values[4:].abs()).all()
