"""The 3 x 3 convolution of frozen networks against `F.conv2d`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import spade_kernels as sk
from spade_kernels import backends, ops
from spade_kernels.convolution import Conv2d, PackedConv2d
from spade_kernels.testing import relative_error

SIZES = [(1, 1), (1, 7), (2, 2), (5, 3), (12, 12), (17, 9), (40, 33)]
CHANNELS = [(1, 1), (3, 33), (16, 32), (31, 5), (65, 64), (130, 31)]


def problem(channels: int, out: int, size: tuple[int, int], images: int = 2, dtype=torch.float64) -> tuple[Tensor, ...]:
    """x, weight, bias and something to add."""
    torch.manual_seed(0)
    shapes = (images, channels, *size), (out, channels, 3, 3), (out,), (images, out, *size)
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("channels", "out"), CHANNELS)
def test_equals_the_direct_convolution(channels, out, size):
    x, weight, bias, add = problem(channels, out, size)
    y = F.conv2d(x, weight, bias, padding=1)
    weights = ops.conv3x3_weights(weight)
    assert relative_error(ops.conv3x3(x, weights, bias), y) < 1e-12
    got = ops.conv3x3(x.contiguous(memory_format=torch.channels_last), weights, bias, add, relu=True)
    assert relative_error(got, (y + add).relu()) < 1e-12
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "out", "size"), [(64, 32, 40), (256, 64, 16), (1024, 32, 12)])
def test_error_is_within_twice_the_direct_convolutions(channels, out, size, dtype):
    tensors = [t.to(dtype) for t in problem(channels, out, (size, size))]
    exact = F.conv2d(*(t.double() for t in tensors[:3]), padding=1)
    stock = F.conv2d(
        *(t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors[:3]), padding=1
    )
    x, weight, bias, _ = tensors
    got = ops.conv3x3(x, ops.conv3x3_weights(weight), bias)
    assert got.dtype == dtype
    for worst in (lambda y: (y.double() - exact).norm(), lambda y: (y.double() - exact).abs().max()):
        assert worst(got) <= 2 * worst(stock)


@pytest.mark.usefixtures("backend")
def test_weights_in_any_layout():
    weight = problem(20, 40, (1, 1))[1]
    expected = ops.conv3x3_weights(weight)
    assert torch.equal(ops.conv3x3_weights(weight.contiguous(memory_format=torch.channels_last)), expected)
    assert torch.equal(ops.conv3x3_weights(weight.transpose(2, 3).contiguous().transpose(2, 3)), expected)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_tiles(value):
    x, weight, bias, _ = problem(16, 32, (20, 20), images=1)
    weights = ops.conv3x3_weights(weight)
    finite = ops.conv3x3(x, weights, bias)
    x[0, 3, 9, 10] = value
    got = ops.conv3x3(x, weights, bias, relu=False)
    bad = ~got.isfinite()[0].any(0)
    assert bad[8:11, 9:12].all(), "stock has it there"
    assert torch.equal(got[..., :8, :], finite[..., :8, :])
    assert torch.equal(got[..., 12:, :], finite[..., 12:, :])
    if value != value:
        assert ops.conv3x3(x, weights, bias, relu=True)[0, :, 9, 10].isnan().all()


@pytest.fixture
def _restored_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("backend", "_restored_threads")
@pytest.mark.parametrize(("channels", "out", "size"), [(48, 80, (31, 33)), (512, 256, (12, 12))])
def test_same_bits_every_time(channels, out, size):
    x, weight, bias, add = problem(channels, out, size, dtype=torch.float32)
    weights = ops.conv3x3_weights(weight)
    torch.set_num_threads(1)
    first = ops.conv3x3(x, weights, bias, add)
    for repeat in range(20):
        torch.set_num_threads(1 + repeat % 2)
        assert torch.equal(ops.conv3x3(x, weights, bias, add), first)


@pytest.mark.usefixtures("backend")
def test_bad_shapes_raise():
    x, weight, bias, add = problem(16, 32, (8, 8))
    weights = ops.conv3x3_weights(weight)
    for arguments in ((x[:, :15], weights, bias), (x, weights, bias, add[:, :31])):
        with pytest.raises(RuntimeError):
            ops.conv3x3(*arguments)


def packed(weight: Tensor, bias: Tensor | None, x: Tensor, **how) -> PackedConv2d:
    convolution = PackedConv2d(weight, bias, [1, 1], **how)
    convolution(x)
    return convolution


@pytest.mark.skipif(backends.can_run_cpu() is not None, reason=f"{backends.can_run_cpu()}")
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@torch.no_grad()
def test_packed_convolutions_take_every_input(has_bias, relu):
    """Laid out for this operator, and asked for what only the weight itself can do."""
    x, weight, bias, add = problem(16, 33, (16, 16), dtype=torch.float32)
    bias = bias if has_bias else None
    convolution = packed(weight, bias, x, relu=relu)
    assert type(convolution._weight).__name__ == "_Winograd"

    def expected(x: Tensor, add: Tensor) -> Tensor:
        y = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1) + add.double()
        return y.relu() if relu else y

    assert relative_error(convolution(x, add), expected(x, add)) < 1e-6
    assert (
        relative_error(convolution(x[:, :, :3, :2], add[:, :, :3, :2]), expected(x[:, :, :3, :2], add[:, :, :3, :2]))
        < 1e-6
    )
    assert relative_error(convolution(x.double(), add.double()), expected(x, add)) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(convolution(x, add), expected(x, add)) < 1e-2


@pytest.mark.skipif(backends.can_run_cpu() is not None, reason=f"{backends.can_run_cpu()}")
@torch.no_grad()
def test_a_frozen_convolution_follows_the_backend():
    x, *_ = problem(16, 32, (16, 16), dtype=torch.float32)
    convolution = Conv2d(16, 32, 3, padding=1).eval()
    expected = convolution(x)
    sk.freeze(convolution)
    try:
        for name in ("cpu", "reference", "auto"):
            sk.use_backend(name)
            assert relative_error(convolution(x), expected) < 1e-6
    finally:
        sk.use_backend("auto")
