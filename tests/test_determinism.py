"""Results have the same bits in every run: of layers on one thread and on two, of generators on one thread or on two.

A generator's plain convolutions are oneDNN's, whose sums need not be the same on one thread and on two.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import spade_kernels as sk
from spade_kernels import LabelMap
from spade_kernels.testing import forward_backward, random_label_map, random_spade
from spade_model.networks import SPADEGenerator

pytestmark = pytest.mark.usefixtures("backend", "_restored_threads")

CLASSES, CHANNELS, REPEATS = 6, 24, 20
CONDITIONS = ("label map", "dense")


@pytest.fixture
def _restored_threads():
    threads = torch.get_num_threads()
    # cuDNN promises the same bits on request only.
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        yield
    torch.set_num_threads(threads)


def condition(kind: str) -> LabelMap | Tensor:
    """Made anew, its index too."""
    label_map = random_label_map("blobs", (2, 40, 40), CLASSES, edges=True)
    if kind == "label map":
        return label_map
    planes = label_map.one_hot()
    return planes + torch.linspace(-1, 1, planes.numel()).view_as(planes)


def assert_same_bits(run: Callable[[], dict[str, Tensor]], threads: tuple[int, ...], but: str = "nothing") -> None:
    """Over REPEATS runs, the numbers of threads taking turns. Names that start with `but`: on each number its own."""
    first: dict[str, Tensor] = {}
    for repeat in range(REPEATS):
        count = threads[repeat % len(threads)]
        torch.set_num_threads(count)
        for name, value in run().items():
            key = f"{name}, {count} threads" if name.startswith(but) else name
            assert torch.equal(value, first.setdefault(key, value.clone())), f"{key}, repeat {repeat}"


@pytest.mark.parametrize("kind", CONDITIONS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("upsample", [1, 2])
def test_layer(upsample, training, kind):
    layer = random_spade("spadesyncbatch3x3", CHANNELS, CLASSES + 1)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    x, grad = torch.randn(2, CHANNELS, 21, 19), torch.randn(2, CHANNELS, 21 * upsample, 19 * upsample)

    def run() -> dict[str, Tensor]:
        layer.load_state_dict(state)
        layer.train(training)
        found = forward_backward(lambda x: layer(x, condition(kind), 0.2, upsample=upsample), layer, x, grad)
        return found | dict(layer.named_buffers())

    # oneDNN sums the weight gradients of a dense condition in an order that depends on the number of threads.
    assert_same_bits(run, (1, 2), but="gradient of mlp" if kind == "dense" else "nothing")


@pytest.mark.parametrize("kind", CONDITIONS)
@torch.no_grad()
def test_frozen_layer(kind):
    layer = random_spade("spadesyncbatch3x3", CHANNELS, CLASSES + 1)
    x = torch.randn(2, CHANNELS, 40, 40)

    def run() -> dict[str, Tensor]:
        layer.train()
        sk.freeze(layer)
        return {"first": layer(x, condition(kind)), "second": layer(x, condition(kind))}

    assert_same_bits(run, (1, 2))


@pytest.mark.parametrize("kind", CONDITIONS)
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
def test_generator(mode, kind):
    network = SPADEGenerator(CLASSES + 1, ngf=2, crop_size=32)
    state = {name: value.clone() for name, value in network.state_dict().items()}

    def run() -> dict[str, Tensor]:
        network.load_state_dict(state)
        network.train(mode == "train")
        if mode == "frozen":
            network.freeze()
            with torch.no_grad():
                return {"images": network(condition(kind))}
        network.zero_grad()
        images = network(condition(kind))
        images.square().sum().backward()
        gradients = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
        return {"images": images.detach(), **gradients, **network.state_dict()}

    assert_same_bits(run, (1, 2), but="")
