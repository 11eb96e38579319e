"""The layers of MONAI and diffusers themselves, before and after `accelerate`."""

from __future__ import annotations

import copy

import pytest
import torch
from stand_ins import CHANNELS, CLASSES, planes, results
from torch import nn

import spade_kernels as sk
from spade_kernels.testing import relative_error

REASON = 'is not installed; pip install "spade-kernels[others]" installs it'
pytestmark = pytest.mark.usefixtures("kernels_for_any_work")


def monai_layer(norm: str, **norm_params: object) -> nn.Module:
    blocks = pytest.importorskip("monai.networks.blocks.spade_norm", reason=f"monai {REASON}")
    return blocks.SPADE(CLASSES, CHANNELS, hidden_channels=6, norm=norm, norm_params=norm_params)


def spatial_norm() -> nn.Module:
    module = pytest.importorskip("diffusers.models.attention_processor", reason=f"diffusers {REASON}")
    return module.SpatialNorm(32, CLASSES)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", ["INSTANCE", "BATCH", "GROUP"])
def test_monai(norm, training):
    params = {"num_groups": 4, "affine": True} if norm == "GROUP" else {"affine": norm == "BATCH"}
    _compare(monai_layer(norm, **params), planes(), training)


def test_monai_in_three_dimensions_is_left_alone():
    blocks = pytest.importorskip("monai.networks.blocks.spade_norm", reason=f"monai {REASON}")
    ((_, _, reason),) = sk.accelerate(blocks.SPADE(CLASSES, CHANNELS, spatial_dims=3)).left
    assert "mlp_shared" in reason


@pytest.mark.parametrize("training", [False, True])
def test_diffusers(training):
    layer = spatial_norm()
    x = torch.randn(2, 32, 6, 8, dtype=torch.float64)
    for latent in (torch.randn(2, CLASSES, 3, 4, dtype=torch.float64), torch.randn(2, CLASSES, 6, 8).double()):
        stock = copy.deepcopy(layer).double().train(training)
        fast = copy.deepcopy(stock)
        assert len(sk.accelerate(fast, strict=True).replaced) == 1
        given = [(x.clone().requires_grad_(), latent.clone().requires_grad_()) for _ in range(2)]
        found, expected = (one(*tensors) for one, tensors in zip((fast, stock), given, strict=True))
        assert relative_error(found, expected) < 1e-12
        for y in (found, expected):
            (y * torch.arange(y.numel()).view(y.shape).sin()).sum().backward()
        pairs = [*zip(*given, strict=True), *zip(fast.parameters(), stock.parameters(), strict=True)]
        assert all(relative_error(one.grad, other.grad) < 1e-11 for one, other in pairs)


def _compare(layer: nn.Module, condition: torch.Tensor, training: bool) -> None:
    stock = layer.double().train(training)
    fast = copy.deepcopy(stock)
    assert len(sk.accelerate(fast, strict=True).replaced) == 1
    expected, found = (results(one, condition, torch.float64) for one in (stock, fast))
    largest = max(value.abs().max() for value in expected.values())
    for key, value in expected.items():
        assert (found[key] - value).abs().max() < 1e-10 * largest, key
