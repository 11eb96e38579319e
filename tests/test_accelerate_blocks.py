"""Residual blocks of other people's models before and after `accelerate`."""

from __future__ import annotations

import copy

import pytest
import torch
from stand_ins import CLASSES, HIDDEN, SIZE, Block, Clade, VirtualTryOn, X, batch_norm, conv, plain, planes, results
from torch import nn

import spade_kernels as sk
from spade_kernels.accelerate.block import AcceleratedBlock
from spade_kernels.testing import relative_error

pytestmark = pytest.mark.usefixtures("kernels_for_any_work")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("channels", [(8, 8), (8, 4)])
@pytest.mark.parametrize(
    "options",
    [{}, {"wrap": plain}, {"slope": 0.0}, {"norm": batch_norm}],
    ids=["spectral", "plain", "ReLU", "batch norm"],
)
def test_residual_blocks_equal_the_original_ones(options, channels, training):
    torch.manual_seed(0)
    stock = Block(*channels, **options).double().train(training)
    fast = copy.deepcopy(stock)
    report = sk.accelerate(fast)
    assert report.replaced[-1].family == "residual block"
    assert isinstance(fast, AcceleratedBlock)
    for condition in (planes(dtype=torch.float64), torch.rand(2, CLASSES, *SIZE, dtype=torch.float64)):
        expected, found = (results(block, condition, torch.float64) for block in (stock, fast))
        for key, value in expected.items():
            assert relative_error(found[key], value) < 1e-9 or value.abs().max() < 1e-9, key
    if not training:
        sk.freeze(fast)
        x = torch.randn(X, dtype=torch.float64)
        with torch.no_grad():
            assert relative_error(fast(x, condition), stock(x, condition)) < 1e-10


def test_a_block_with_another_activation_keeps_its_forward():
    block = Block(8, 8, slope=0.1)
    report = sk.accelerate(block)
    assert [one.name for one in report.replaced] == ["norm_0", "norm_1"]
    assert not report.left


def test_hooks_of_layers_in_blocks_run():
    block = Block(8, 4).double().eval()
    stock = copy.deepcopy(block)
    for one in (block, stock):
        one.norm_1.register_forward_hook(lambda module, args, y: 2 * y)
        one.conv_0.register_forward_hook(lambda module, args, y: y + 1)
    sk.accelerate(block)
    x = torch.randn(X, dtype=torch.float64)
    assert relative_error(block(x, planes(dtype=x.dtype)), stock(x, planes(dtype=x.dtype))) < 1e-10


def test_layers_that_change_their_arguments_share_nothing_in_a_block():
    """CLADE reads classes from the condition, and HR-VITON adds noise to x, which norm_0 and norm_s cannot share."""

    def clade(norm: nn.Module, channels: int) -> nn.Module:
        layer = Clade(norm)
        affine = layer.class_specified_affine
        affine.weight, affine.bias = (nn.Parameter(torch.randn(CLASSES, channels)) for _ in range(2))
        return layer

    def noisy(norm: nn.Module, channels: int) -> nn.Module:
        layer = VirtualTryOn(norm)
        layer.noise_scale = nn.Parameter(torch.randn(channels))
        layer.conv_gamma, layer.conv_beta = conv(HIDDEN, channels), conv(HIDDEN, channels)
        return layer

    for build, size in ((clade, SIZE), (noisy, X[2:])):
        torch.manual_seed(0)
        stock = Block(8, 4, layer=build).double()
        fast = copy.deepcopy(stock)
        assert [one.name for one in sk.accelerate(fast).replaced] == ["norm_0", "norm_1", "norm_s", ""]
        given = planes(size=size, dtype=torch.float64)
        expected, found = (results(block, given, torch.float64) for block in (stock, fast))
        for key, value in expected.items():
            assert relative_error(found[key], value) < 1e-9 or value.abs().max() < 1e-9, key


def test_a_block_is_accelerated_after_a_step_with_spectral_norm():
    """The hook leaves a weight with a gradient in the module, which `copy.deepcopy` refuses."""
    block = Block(8, 4)
    block(torch.randn(X), planes()).sum().backward()
    assert len(sk.accelerate(block).replaced) == 4
