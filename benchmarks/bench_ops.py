"""Each operator at the shape of up_3.norm_0, the largest layer, and the window indexes of a whole mask."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import interleaving
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import spade_kernels as sk
from spade_kernels.convolution import Conv2d
from spade_kernels.layers import spade_conv
from spade_kernels.testing import random_spade, relative_error
from spade_model.benchmark import results
from spade_model.benchmark.masks import KERNEL_SIZE, fresh, resolutions

LIMIT = 1e-3


class _Recorder(TorchDispatchMode):
    """Keeps the arguments of every call of one of our operators: (operator, arguments) by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "spade_kernels":
            name, same = func._opname, sum(key.split()[0] == func._opname for key in self.calls)
            self.calls[f"{name} {same + 1}" if same else name] = func, args
        return func(*args, **(kwargs or {}))


@cache
def recorded(mask: sk.LabelMap, ngf: int) -> dict[str, tuple]:
    """The operators' calls of a layer and its convolution: forward and backward, and frozen."""
    layer = random_spade("spadesyncbatch3x3", 2 * ngf, mask.channels).train()
    convolution = Conv2d(2 * ngf, ngf, 3, padding=1)
    x = torch.randn(1, 2 * ngf, *mask.shape[1:], requires_grad=True)
    with _Recorder() as recorder:
        spade_conv(convolution, layer, x, fresh(mask), negative_slope=0.2).square().mean().backward()
    sk.freeze(layer)
    sk.freeze(convolution)
    with torch.no_grad(), _Recorder() as frozen:
        convolution(layer(x, fresh(mask), negative_slope=0.2))
        spade_conv(convolution, layer, x, fresh(mask), negative_slope=0.2)
    return recorder.calls | {name: call for name, call in frozen.calls.items() if "conv" in name}


def calls(config) -> dict[str, tuple]:
    return recorded(interleaving.masks(config)[interleaving.main_kind(config)][0], config.getoption("ngf"))


def moved(args: tuple, outputs: object) -> float:
    """MB (1e6 bytes) of all tensors that go in and come out, each once: the least that must be moved."""
    return sum(t.nbytes for t in tree_leaves((args, outputs)) if isinstance(t, Tensor)) / 1e6


@pytest.fixture
def backend(provider) -> Iterator[None]:
    sk.use_backend("cpu" if provider == "ours" else "reference")
    yield
    sk.use_backend("auto")


def pytest_generate_tests(metafunc):
    interleaving.generate(metafunc, "repeat, case, provider")


class TestOps:
    @staticmethod
    def schedule(config):
        # "ours" here are the compiled kernels.
        names = ["reference"] + ["ours"] * (sk.build_info()["backends"]["cpu"] is None)
        return [(r, c, name) for r in range(config.getoption("repeats")) for c in calls(config) for name in names]

    @pytest.fixture(scope="class")
    @classmethod
    def expected(cls, pytestconfig):
        sk.use_backend("reference")
        outputs = {case: func(*args) for case, (func, args) in calls(pytestconfig).items()}
        sk.use_backend("auto")
        return outputs

    def test_op(self, benchmark, pytestconfig, expected, backend, repeat, case, provider):
        func, args = calls(pytestconfig)[case]
        if repeat == 0:
            for got, exact in zip(tree_leaves(func(*args)), tree_leaves(expected[case]), strict=True):
                assert relative_error(got, exact) < LIMIT
        traffic = moved(args, expected[case])
        interleaving.timed(benchmark, lambda: func(*args), "operator", case, provider, MB=traffic)


class TestWindowIndex:
    @staticmethod
    def schedule(config):
        kind = interleaving.main_kind(config)
        numbers = range(len(interleaving.masks(config)[kind]))
        return [(repeat, number, "ours") for repeat in range(config.getoption("repeats")) for number in numbers]

    def test_all_resolutions(self, benchmark, pytestconfig, repeat, case, provider):
        kind = interleaving.main_kind(pytestconfig)
        mask, threads = interleaving.masks(pytestconfig)[kind][case], torch.get_num_threads()

        def index() -> None:
            fresh(mask).prepare(resolutions(mask), KERNEL_SIZE, gradients=False)

        torch.set_num_threads(1)
        if repeat == 0:
            index()
        interleaving.timed(benchmark, index, results.INDEX, kind, provider)
        torch.set_num_threads(threads)
