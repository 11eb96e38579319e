"""The public stages of SPADE, composed as layers of other models compose them, against stock operators."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spade_kernels as sk
from spade_kernels.functional import (
    Statistics,
    Weights,
    modulate,
    modulation_table,
    spade,
    statistics,
    use_path,
)
from spade_kernels.testing import random_label_map, relative_error

CLASSES, HIDDEN, CHANNELS, SIZE = 4, 6, 5, (7, 9)


@pytest.fixture
def weights() -> Weights:
    torch.manual_seed(0)

    def convolution(out: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
        conv = nn.Conv2d(channels, out, 3).double()
        return conv.weight, conv.bias

    return Weights(convolution(HIDDEN, CLASSES), convolution(CHANNELS, HIDDEN), convolution(CHANNELS, HIDDEN))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, CHANNELS, *SIZE, dtype=torch.float64, requires_grad=True)


def scale_and_shift(condition: torch.Tensor, size: tuple[int, ...], weights: Weights) -> tuple[torch.Tensor, ...]:
    hidden = F.conv2d(F.interpolate(condition, size), *weights.shared, padding=1).relu()
    return 1 + F.conv2d(hidden, *weights.gamma, padding=1), F.conv2d(hidden, *weights.beta, padding=1)


@pytest.mark.parametrize("path", ["windows", "dense"])
def test_stages_with_arithmetic_on_the_rows(path, weights, x):
    """A layer without "1 +", whose shift is halved: values and gradients of stock operators."""
    label_map = random_label_map("blobs", (2, 14, 18), CLASSES)
    with use_path(path):
        table = modulation_table(label_map, SIZE, weights)
    assert table.is_per_pixel == (path == "dense")
    scale, shift = table.rows.chunk(2, 1)
    table = table.with_rows(torch.cat((scale - 1, 0.5 * shift), 1))
    norm = nn.InstanceNorm2d(CHANNELS)
    ours = modulate(x, statistics(norm, x), table, negative_slope=0.2)

    scale, shift = scale_and_shift(label_map.one_hot(torch.float64), SIZE, weights)
    stock = F.leaky_relu(F.instance_norm(x) * (scale - 1) + 0.5 * shift, 0.2)
    assert relative_error(ours, stock) < 1e-12
    grad, inputs = torch.randn_like(stock), [x, *(t for pair in weights[:3] for t in pair)]
    pairs = zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(stock, inputs, grad), strict=True)
    assert all(relative_error(mine, theirs) < 1e-11 for mine, theirs in pairs)


def test_group_norm_by_its_statistics(weights, x):
    """Statistics of the caller's own, here those of a group norm, as constants."""
    label_map = random_label_map("blobs", (2, 14, 18), CLASSES)
    group = x.detach().view(2, 1, -1)
    mean = group.mean(2).expand(2, CHANNELS)
    rstd = (group.var(2, correction=0) + 1e-5).rsqrt().expand(2, CHANNELS)
    ours = spade(x.detach(), label_map, Statistics(mean, rstd, "none"), weights)
    scale, shift = scale_and_shift(label_map.one_hot(torch.float64), SIZE, weights)
    assert relative_error(ours, F.group_norm(x, 1) * scale + shift) < 1e-12


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS, affine=False), nn.Tanh()])
def test_spade_composes_the_stages(norm, weights, x):
    label_map, upsample = random_label_map("blobs", (2, 14, 18), CLASSES), 2
    found = spade(x, label_map, norm, weights, upsample=upsample, gain=3.0)
    scale, shift = scale_and_shift(label_map.one_hot(torch.float64), (14, 18), weights)
    expected = 3 * (norm.double()(F.interpolate(x, scale_factor=upsample)) * scale + shift)
    assert relative_error(found, expected) < 1e-12


def test_float_conditions_have_derivatives(weights):
    condition = torch.rand(2, CLASSES, 14, 18, dtype=torch.float64, requires_grad=True)
    table = modulation_table(condition, SIZE, weights)
    assert table.is_per_pixel
    (grad,) = torch.autograd.grad(table.rows.sum(), condition)
    (expected,) = torch.autograd.grad(sum(t.sum() for t in scale_and_shift(condition, SIZE, weights)), condition)
    assert relative_error(grad, expected) < 1e-12


def test_refused_calls_leave_the_running_statistics(weights, x):
    norm = nn.BatchNorm2d(CHANNELS, affine=False)
    before = norm.running_mean.clone()
    good = {"x": x, "segmap": torch.zeros(2, 7, 9, dtype=torch.int64), "norm": norm, "weights": weights}
    for name, bad in (("upsample", 3), ("gain", -1.0), ("segmap", torch.zeros(2, 7, 9, dtype=torch.float64))):
        with pytest.raises(ValueError, match=name):
            spade(**good | {name: bad})
    assert torch.equal(norm.running_mean, before)


def test_the_table_refuses_sizes_that_are_none(weights):
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    for size in ((4,), (4, 4, 4), (4.0, 4)):
        with pytest.raises(TypeError, match=r"size must be a pair|must be an integer"):
            modulation_table(labels, size, weights)
        with pytest.raises(TypeError, match=r"size must be a pair|must be an integer"):
            modulation_table(torch.rand(1, CLASSES, 4, 4), size, weights)
    with pytest.raises(ValueError, match="height must be at least 1"):
        modulation_table(sk.LabelMap(labels, CLASSES), (0, 4), weights)
