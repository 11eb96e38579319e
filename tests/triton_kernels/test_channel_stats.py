"""Channel statistics and their gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spade_kernels import reference
from spade_kernels.testing import assert_within_budget, relative_error
from spade_kernels.triton.channel_stats import channel_stats, channel_stats_grad

pytestmark = pytest.mark.usefixtures("_poisoned")

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Shapes of one part and of several, of full tiles and not.
SHAPES = [(2, 3, 5, 7), (1, 20, 29, 31), (2, 16, 64, 64), (2, 130, 19, 18), (1, 1, 97, 101), (2, 1, 1, 1)]


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def named(stats: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return dict(zip(("mean", "m2"), stats, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_error(shape, dtype, device):
    x = torch.randn(shape).mul(3).add(1).to(device, dtype)
    got = named(channel_stats(x))
    assert {t.dtype for t in got.values()} == {acc_dtype(dtype)}
    assert_within_budget(got, named(reference.channel_stats(x)), named(reference.channel_stats(x.double())))


@pytest.mark.parametrize("shape", SHAPES[:5])
def test_mean_far_from_zero(shape, device):
    x = torch.randn(shape).add(1e4).to(device)
    mean, m2 = channel_stats(x)
    exact_mean, exact_m2 = reference.channel_stats(x.double())
    assert relative_error(mean, exact_mean) < 1e-7
    assert relative_error(m2, exact_m2) < 1e-6


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 16, 64, 64)])
def test_constant_channels_do_not_deviate(shape, device):
    values = torch.randn(shape[:2]).to(device)
    mean, m2 = channel_stats(values[:, :, None, None].expand(shape))
    rounding = torch.finfo(values.dtype).eps * values.abs()
    assert ((mean - values).abs() <= rounding).all()
    assert (m2 <= rounding.square() * shape[2] * shape[3]).all()


@pytest.mark.parametrize("pixel", [0, 4000])
def test_nan_stays_in_its_image_and_channel(pixel, device):
    x = torch.randn(2, 16, 64, 64).to(device)
    x[1, 5].view(-1)[pixel] = float("nan")
    where = torch.zeros(2, 16, dtype=torch.bool, device=device)
    where[1, 5] = True
    assert all(torch.equal(t.isnan(), where) for t in channel_stats(x))


@pytest.mark.parametrize("shape", SHAPES)
def test_same_bits_every_time_and_in_every_layout(shape, device):
    x = torch.randn(shape).to(device)
    first = channel_stats(x)
    for layout in (*LAYOUTS.values(), *LAYOUTS.values()):
        again = channel_stats(x.contiguous(memory_format=layout))
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 20, 5, 7), (1, 130, 4, 5), (1, 1, 1, 1)])
def test_gradient(shape, dtype, layout, device):
    x = torch.randn(shape).to(device, dtype).contiguous(memory_format=LAYOUTS[layout])
    stats = [torch.randn(shape[:2]).to(device, acc_dtype(dtype)) for _ in range(3)]
    got = channel_stats_grad(x, *stats)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=LAYOUTS[layout])
    exact = reference.channel_stats_grad(x.double(), *(t.double() for t in stats))
    stock = reference.channel_stats_grad(x, *stats)
    assert_within_budget({"x": got}, {"x": stock}, {"x": exact})
