"""Fake CUDA tensors, with and without a GPU: the devices, dtypes and layouts that compiled code is told of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from spade_kernels import SPADE, ops

N, C, H, W, ROWS, HIDDEN = 2, 16, 6, 5, 9, 7


@pytest.fixture(autouse=True)
def _fake():
    with FakeTensorMode():
        yield


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def ids(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.int64)


def image(channels_last: bool, dtype: torch.dtype, upsample: int = 1) -> Tensor:
    h, w = H * upsample, W * upsample
    return empty(N, h, w, C, dtype=dtype).permute(0, 3, 1, 2) if channels_last else empty(N, C, h, w, dtype=dtype)


def is_channels_last(t: Tensor) -> bool:
    _, channels, height, width = t.shape
    return t.stride() == (channels * height * width, 1, width * channels, channels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("upsample", [1, 2])
def test_passes_over_x(upsample, channels_last, dtype):
    x, grad = image(channels_last, dtype), image(channels_last, dtype, upsample)
    mean, m2 = ops.channel_stats(x)
    assert [(t.shape, t.dtype) for t in (mean, m2)] == [((N, C), torch.float32)] * 2
    table, pixel_row = empty(ROWS, 2 * C), ids(N, H * upsample, W * upsample)
    y = ops.modulate(x, mean, m2, table, pixel_row, upsample=upsample)
    assert y.shape == grad.shape
    calls = torch.ops.spade_kernels
    indices, offsets = ids(pixel_row.numel()), ids(ROWS + 1)
    d_table = calls.modulate_table_grad(grad, x, mean, m2, table, pixel_row, indices, offsets, 0.2, upsample)
    assert (d_table.shape, d_table.dtype) == (table.shape, torch.float32)
    d_x = calls.modulate_input_grad(grad, x, mean, m2, table, pixel_row, mean, mean, 0.2, upsample)
    assert d_x.shape == x.shape
    for t in (y, d_x):
        assert t.dtype == dtype
        assert is_channels_last(t)
    of_stats = calls.channel_stats_grad(x, mean, mean, m2)
    assert (of_stats.dtype, of_stats.stride()) == (dtype, x.stride())
    assert all(t.device.type == "cuda" for t in (mean, m2, y, d_table, d_x, of_stats))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables(dtype):
    calls = torch.ops.spade_kernels
    taps, windows = empty(5, 9, HIDDEN, dtype=dtype), ids(ROWS, 9)
    hidden = ops.gather_sum(taps, empty(HIDDEN), windows, None, None, True)
    assert (hidden.shape, hidden.dtype) == ((ROWS, HIDDEN), dtype)
    d_taps, d_bias = calls.gather_sum_grad(hidden, hidden, ids(ROWS * 9), ids(5 * 9 + 1), 9, True)
    assert [(t.shape, t.dtype) for t in (d_taps, d_bias)] == [
        ((5, 9, HIDDEN), torch.float32),
        ((HIDDEN,), torch.float32),
    ]
    gamma, bias = empty(C, HIDDEN, 3, 3), empty(2 * C)
    for packed_weight in (None, ops.pack_modulation_weight(gamma, gamma)):
        table = ops.modulation_table(hidden, gamma, gamma, bias, windows, packed_weight)
        assert (table.shape, table.dtype) == ((ROWS, 2 * C), dtype)
    groups = ids(ROWS * 9), ids((ROWS + 1) * 9 + 1)
    gradients = calls.modulation_table_grad(table, hidden, gamma, gamma, *groups)
    assert [t.shape for t in gradients] == [hidden.shape, gamma.shape, gamma.shape, bias.shape]
    assert {t.dtype for t in gradients} == {torch.float32}
    assert all(t.device.type == "cuda" for t in (hidden, d_taps, d_bias, table, *gradients))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: gradients of fake tensors ask for their device")
@pytest.mark.parametrize("config", ["spadebatch3x3", "spadeinstance3x3"])
def test_layer_and_its_gradients(config):
    with torch.device("cuda"):
        layer, x = SPADE(config, C, 5), image(True, torch.bfloat16).requires_grad_()
        y = layer(x, torch.empty(N, 5, 12, 12), 0.2)
    assert (y.device.type, y.dtype) == ("cuda", torch.bfloat16)
    assert is_channels_last(y)
    y.float().sum().backward()
    assert is_channels_last(x.grad)
    assert {p.grad.device.type for p in layer.parameters()} == {"cuda"}
