"""Times each operator at the shape of the largest layer, up_3.norm_0, and the window indexes of all resolutions."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch.utils._pytree import tree_leaves

import spade_kernels as sk
from benchmarks import scheduling
from spade_kernels.convolution import Conv2d
from spade_kernels.layers import spade_conv
from spade_kernels.testing import random_spade, relative_error
from spade_model.benchmark import results
from spade_model.benchmark.calls import Calls, Recorder, moved
from spade_model.benchmark.masks import KERNEL_SIZE, fresh
from spade_model.benchmark.shapes import resolutions

LIMIT = 1e-3


@cache
def recorded(mask: sk.LabelMap, ngf: int) -> Calls:
    """Returns the operator calls of a layer and the convolution after it, in training and, for convolutions, frozen."""
    layer = random_spade("spadesyncbatch3x3", 2 * ngf, mask.channels).train()
    convolution = Conv2d(2 * ngf, ngf, 3, padding=1)
    x = torch.randn(1, 2 * ngf, *mask.shape[1:], requires_grad=True)
    with Recorder() as recorder:
        spade_conv(convolution, layer, x, fresh(mask), negative_slope=0.2).square().mean().backward()
    sk.freeze(layer)
    sk.freeze(convolution)
    with torch.no_grad(), Recorder() as frozen:
        convolution(layer(x, fresh(mask), negative_slope=0.2))
        spade_conv(convolution, layer, x, fresh(mask), negative_slope=0.2)
    return recorder.calls | {name: call for name, call in frozen.calls.items() if "conv" in name}


def calls(config) -> Calls:
    return recorded(scheduling.first_mask(config), config.getoption("ngf"))


@pytest.fixture
def backend(provider) -> Iterator[None]:
    sk.use_backend("cpu" if provider == "ours" else "reference")
    yield
    sk.use_backend("auto")


def pytest_generate_tests(metafunc):
    scheduling.generate(metafunc, "repeat, case, provider")


class TestOps:
    @staticmethod
    def schedule(config):
        # In this suite, "ours" names the compiled kernels.
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
        megabytes = moved(args, expected[case]) / 1e6
        scheduling.timed(benchmark, lambda: func(*args), "operator", case, provider, MB=megabytes)


class TestWindowIndex:
    @staticmethod
    def schedule(config):
        kind = scheduling.main_kind(config)
        numbers = range(len(scheduling.masks(config)[kind]))
        return [(repeat, number, "ours") for repeat in range(config.getoption("repeats")) for number in numbers]

    def test_all_resolutions(self, benchmark, pytestconfig, repeat, case, provider):
        kind = scheduling.main_kind(pytestconfig)
        mask, threads = scheduling.masks(pytestconfig)[kind][case], torch.get_num_threads()

        def index() -> None:
            fresh(mask).prepare(resolutions(mask), KERNEL_SIZE, gradients=False)

        torch.set_num_threads(1)
        if repeat == 0:
            index()
        scheduling.timed(benchmark, index, results.INDEX, kind, provider)
        torch.set_num_threads(threads)
