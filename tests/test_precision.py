"""The float32 gradients of a whole generator err like those of the stock network.

An activation whose input is within rounding of zero can get the other sign in another order of summation, and then its
slope is another one: a single such pixel moves all gradients by 1e-4 to 1e-2, of our networks and of stock ones. So
each network is compared with the float64 network whose activations are on the same side of zero.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_kernels import LabelMap
from spade_kernels.testing import random_labels
from spade_model.benchmark.stock import StockGenerator, stock_generator
from spade_model.networks import SPADEGenerator

pytestmark = pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")


def generator_of_certain_hidden_signs() -> SPADEGenerator:
    """Every sum of shared weights is an odd multiple of 1/128: no order of summation rounds it, or changes its sign."""
    generator = SPADEGenerator(10, ngf=8, crop_size=64)
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if "mlp_shared" in name:
                parameter.mul_(64).round_().div_(64).add_(1 / 128 if name.endswith("bias") else 0)
    return generator


def run(network: nn.Module, mask: LabelMap, grad: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The image and all gradients; and which inputs of the leaky ReLUs, all in front of convolutions, are positive."""
    activated = {m for name, m in network.named_modules() if name.split(".")[-1] in ("conv_0", "conv_1", "conv_img")}
    positive = []

    def record(module: nn.Module, arguments: tuple) -> None:
        if module in activated:
            positive.append(arguments[0].detach() > 0)

    # A hook on a module would change the way it is computed.
    with nn.modules.module.register_module_forward_pre_hook(record):
        y = network(mask)
    y.backward(grad.to(y.dtype))
    return {"y": y.detach()} | {name: p.grad for name, p in network.named_parameters()}, positive


def exact(network: StockGenerator, mask: LabelMap, grad: Tensor, positive: list[Tensor]) -> dict[str, Tensor]:
    sides = iter(positive)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "leaky_relu", lambda x, slope: torch.where(next(sides), x, slope * x))
        found, _ = run(network, mask, grad)
    assert next(sides, None) is None
    return found


@pytest.mark.usefixtures("backend")
def test_gradients_of_a_generator_keep_the_error_budget():
    """On its large maps at every pixel, for the noise; on the others once per distinct window."""
    ours = generator_of_certain_hidden_signs().train()
    labels = [random_labels(kind, (2, 64, 64), 10) for kind in ("blobs", "noise")]
    mask, grad = LabelMap(torch.cat(labels), 10), torch.randn(4, 3, 64, 64)
    stock, double = (
        stock_generator(copy.deepcopy(ours).to(dtype=t), "eager", training=True) for t in (torch.float32, torch.float64)
    )
    (whole, noise, errors), (their_whole, their_noise, theirs) = (
        errors_of(network, copy.deepcopy(double), mask, grad) for network in (ours, stock)
    )
    assert whole <= 2 * their_whole
    assert noise <= 2 * their_noise
    wrong = {name: (error, theirs[name]) for name, error in errors.items() if error > 2 * theirs[name]}
    assert not wrong


def errors_of(
    network: nn.Module, double: StockGenerator, mask: LabelMap, grad: Tensor
) -> tuple[float, float, dict[str, float]]:
    """The relative error of all gradients together, the size of those that are exactly zero, and each tensor's error.

    A bias in front of a batch norm has no gradient but rounding: an error relative to it says nothing. Of a tensor of
    few numbers a single draw says little: the stock network's may be lucky.
    """
    got, positive = run(network, mask, grad)
    expected = exact(double, mask, grad, positive)
    largest = max(value.norm() for value in expected.values())
    zero = [name for name, value in expected.items() if value.norm() < 1e-9 * largest]
    assert len(zero) == 17
    noise = torch.cat([got.pop(name) for name in zero]).norm().item()
    differences = {name: (value - expected[name]).norm() for name, value in got.items()}
    whole = together(differences.values()) / together(expected[name].norm() for name in got)
    many = [name for name, value in got.items() if value.numel() >= 64]
    return whole, noise, {name: (differences[name] / expected[name].norm()).item() for name in many}


def together(norms: Iterable[Tensor]) -> float:
    return torch.stack(list(norms)).norm().item()
