"""SPADE layers whose modules are not the ones they were built of: the stock layer's results all the same."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm

import spade_kernels as sk
from spade_kernels.testing import random_label_map, random_spade, relative_error

CHANNELS, CLASSES, SIZE = 4, 5, (9, 10)


def stock(layer: sk.SPADE, x: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
    """The paper's equation 1, by whatever modules the layer has."""
    hidden = layer.mlp_shared(F.interpolate(planes, x.shape[2:]))
    return layer.param_free_norm(x) * (1 + layer.mlp_gamma(hidden)) + layer.mlp_beta(hidden)


def with_spectral_norm(layer: sk.SPADE) -> None:
    layer.mlp_gamma, layer.mlp_beta = spectral_norm(layer.mlp_gamma), spectral_norm(layer.mlp_beta)
    layer.mlp_shared[0] = spectral_norm(layer.mlp_shared[0])


def with_parametrization(layer: sk.SPADE) -> None:
    parametrizations.weight_norm(layer.mlp_gamma)


def pruned(layer: sk.SPADE) -> None:
    prune.l1_unstructured(layer.mlp_gamma, "weight", amount=0.5)
    with torch.no_grad():
        layer.mlp_gamma.weight_orig.mul_(2)


def hooked(layer: sk.SPADE) -> None:
    layer.mlp_beta.register_forward_hook(lambda module, args, result: 2 * result)


def with_hooked_norm(layer: sk.SPADE) -> None:
    layer.param_free_norm.register_forward_hook(lambda module, args, result: result + 1)


def with_silu(layer: sk.SPADE) -> None:
    layer.mlp_shared[1] = nn.SiLU()


def with_more_layers(layer: sk.SPADE) -> None:
    layer.mlp_shared = nn.Sequential(*layer.mlp_shared, nn.Conv2d(128, 128, 1).double())


def reflecting(layer: sk.SPADE) -> None:
    layer.mlp_gamma = nn.Conv2d(128, CHANNELS, 3, padding=1, padding_mode="reflect").double()


def dilated(layer: sk.SPADE) -> None:
    layer.mlp_gamma.dilation = layer.mlp_gamma.padding = (2, 2)


def without_bias(layer: sk.SPADE) -> None:
    layer.mlp_gamma.bias = None


def with_affine_norm(layer: sk.SPADE) -> None:
    layer.param_free_norm = nn.BatchNorm2d(CHANNELS).double()
    nn.init.uniform_(layer.param_free_norm.weight)


def with_tracking_instance_norm(layer: sk.SPADE) -> None:
    layer.param_free_norm = nn.InstanceNorm2d(CHANNELS, track_running_stats=True).double()


def with_group_norm(layer: sk.SPADE) -> None:
    layer.param_free_norm = nn.GroupNorm(2, CHANNELS).double()


def wider(layer: sk.SPADE) -> None:
    layer.mlp_shared[0] = nn.Conv2d(CLASSES, 20, 3, padding=1).double()
    layer.mlp_gamma, layer.mlp_beta = (nn.Conv2d(20, CHANNELS, 3, padding=1).double() for _ in range(2))


def with_small_kernels(layer: sk.SPADE) -> None:
    layer.mlp_gamma, layer.mlp_beta = (nn.Conv2d(128, CHANNELS, 1).double() for _ in range(2))


def with_kernels_of_two_sizes(layer: sk.SPADE) -> None:
    layer.mlp_gamma = nn.Conv2d(128, CHANNELS, 5, padding=2).double()


def with_sequences(layer: sk.SPADE) -> None:
    layer.mlp_gamma = nn.Sequential(nn.Conv2d(128, 7, 1), nn.Tanh(), nn.Conv2d(7, CHANNELS, 3, padding=1)).double()
    layer.mlp_beta = nn.Sequential(nn.Identity(), layer.mlp_beta)


class OverChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(128, CHANNELS).double()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden.movedim(1, -1)).movedim(-1, 1)


def with_linear_layers(layer: sk.SPADE) -> None:
    layer.mlp_gamma, layer.mlp_beta = OverChannels(), OverChannels()


def with_one_value_per_channel(layer: sk.SPADE) -> None:
    layer.mlp_gamma = nn.Sequential(nn.AdaptiveAvgPool2d(1), layer.mlp_gamma)


class Constant(nn.Module):
    """8-bit weights: no floating-point parameter."""

    def __init__(self, fin: int, fout: int):
        super().__init__()
        self.register_buffer("weight", torch.randint(-9, 9, (fout, fin, 1, 1), dtype=torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight.to(x.dtype) / 10)


def without_parameters_before(layer: sk.SPADE) -> None:
    layer.mlp_shared = nn.Identity()
    layer.mlp_gamma, layer.mlp_beta = (nn.Conv2d(CLASSES, CHANNELS, 3, padding=1).double() for _ in range(2))


def without_parameters(layer: sk.SPADE) -> None:
    layer.mlp_shared = Constant(CLASSES, 6)
    layer.mlp_gamma, layer.mlp_beta = Constant(6, CHANNELS), Constant(6, CHANNELS)


CHANGES = [
    *(with_small_kernels, with_kernels_of_two_sizes, with_sequences, with_linear_layers, with_one_value_per_channel),
    *(without_parameters_before, without_parameters),
    *(with_spectral_norm, with_parametrization, pruned, hooked, with_hooked_norm, with_silu, with_more_layers),
    *(reflecting, dilated, without_bias, with_affine_norm, with_tracking_instance_norm, with_group_norm, wider),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dense", [False, True])
def test_customized(change: Callable[[sk.SPADE], None], dense: bool):
    layer = random_spade("spadebatch3x3", CHANNELS, CLASSES).double()
    twin, x = copy.deepcopy(layer), torch.randn(2, CHANNELS, *SIZE, dtype=torch.float64)
    for one in (layer, twin):
        torch.manual_seed(1)
        change(one)
    mask = random_label_map("blobs", (2, 16, 20), CLASSES)
    planes = mask.one_hot(torch.float64)
    planes = 0.7 * planes if dense else planes
    for training in (True, True, False):
        layer.train(training)
        twin.train(training)
        got, expected = layer(x, planes if dense else mask), stock(twin, x, planes)
        assert relative_error(got, expected) < 1e-12
        for result in (got, expected):
            if result.requires_grad:
                result.square().sum().backward()
        for (name, mine), theirs in zip(layer.named_parameters(), twin.parameters(), strict=True):
            assert relative_error(mine.grad, theirs.grad) < 1e-11, name
    for (name, mine), theirs in zip(layer.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)
    with torch.no_grad():
        sk.freeze(layer)
        assert relative_error(layer(x, planes if dense else mask), stock(twin, x, planes)) < 1e-12


@pytest.mark.parametrize("change", [with_spectral_norm, with_group_norm])
def test_customized_layers_take_all_arguments(change):
    layer = random_spade("spadebatch3x3", CHANNELS, CLASSES).double().eval()
    change(layer)
    mask, x = random_label_map("blobs", (2, 18, 20), CLASSES), torch.randn(2, CHANNELS, *SIZE, dtype=torch.float64)
    got = layer(x, mask, 0.2, gain=torch.tensor(3.0), upsample=2)
    expected = 3 * F.leaky_relu(stock(layer, F.interpolate(x, scale_factor=2), mask.one_hot(torch.float64)), 0.2)
    assert relative_error(got, expected) < 1e-7


@pytest.mark.parametrize(
    ("replacement", "given"),
    [
        (nn.Conv2d(128, CHANNELS + 1, 1), "(2, 5, 9, 10)"),
        (nn.Conv2d(128, CHANNELS + 1, 3, padding=1), "(2, 5, 9, 10)"),
        (nn.Conv2d(128, CHANNELS, 3), "(2, 4, 7, 8)"),
        (nn.Conv2d(128, CHANNELS, 4, padding=2), "(2, 4, 10, 11)"),
        (nn.Identity(), "(2, 128, 9, 10)"),
    ],
)
@pytest.mark.parametrize("name", ["mlp_gamma", "mlp_beta"])
def test_modules_that_do_not_fit(name, replacement, given):
    layer = random_spade("spadebatch3x3", CHANNELS, CLASSES)
    setattr(layer, name, replacement)
    with pytest.raises(
        ValueError, match=re.escape(f"{name} gives {given} for hidden features (2, 128, 9, 10); x needs")
    ):
        layer(torch.randn(2, CHANNELS, *SIZE), random_label_map("blobs", (2, *SIZE), CLASSES))


@pytest.mark.parametrize("change", [with_linear_layers, None])
@pytest.mark.parametrize("condition", ["label map", "dense"])
def test_gains(change, condition):
    layer = random_spade("spadebatch3x3", CHANNELS, CLASSES).double()
    if change is not None:
        change(layer)
    mask, x = random_label_map("blobs", (2, *SIZE), CLASSES), torch.randn(2, CHANNELS, *SIZE, dtype=torch.float64)
    condition = mask if condition == "label map" else 0.3 * mask.one_hot(torch.float64)
    plain = layer(x, condition)
    for gain in (2, 0.1, torch.tensor(0.1, dtype=torch.float64), torch.full((1, 1, 1, 1), 0.1, dtype=torch.float64)):
        assert relative_error(layer(x, condition, 0.2, gain=gain), float(gain) * F.leaky_relu(plain, 0.2)) < 1e-12
    assert relative_error(layer(x, condition, gain=torch.tensor(-1.0)), -plain) < 1e-12
    for gain in (0, -2.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="gain must be a positive number, got"):
            layer(x, condition, gain=gain)
    for gain in (torch.ones(2), torch.tensor(1)):
        with pytest.raises(ValueError, match="gain must be one floating-point number, got"):
            layer(x, condition, gain=gain)
    with pytest.raises(TypeError, match="gain must be a number or a tensor, got str"):
        layer(x, condition, gain="2")


def test_converted_batch_norm():
    """`nn.SyncBatchNorm`, which takes CPU tensors only here."""
    layer, x = random_spade("spadesyncbatch3x3", CHANNELS, CLASSES), torch.randn(2, CHANNELS, *SIZE)
    mask, twin = random_label_map("blobs", (2, *SIZE), CLASSES), copy.deepcopy(layer)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    assert type(converted.param_free_norm) is nn.SyncBatchNorm
    for training in (True, False):
        assert torch.equal(converted.train(training)(x, mask), twin.train(training)(x, mask))
    for mine, theirs in zip(converted.buffers(), twin.buffers(), strict=True):
        assert torch.equal(mine, theirs)
