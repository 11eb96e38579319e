"""Times the SPADE layer, with its activation, at the shapes of the generator's 18 layers.

The layers of a generator share the one-hot planes or the window indexes of a mask, so both are built before the timed
call. "MB" in the results is the least memory that a layer must move: x and y, and in training their gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import config as inductor_config

from benchmarks import scheduling
from spade_kernels import LabelMap, freeze
from spade_kernels.testing import random_spade
from spade_model.benchmark import results
from spade_model.benchmark.masks import distinct_fraction
from spade_model.benchmark.shapes import input_shapes
from spade_model.benchmark.stock import one_hot, stock_layer
from spade_model.benchmark.verification import verify

PROVIDERS = ("eager", "tuned", "compiled", "ours")
DENSE_PROVIDERS = ("eager", "compiled", "ours")
DENSE_CHANNELS, SLOPE = 64, 0.2

# One function serves all shapes. Beyond the default limit of recompilations it would run uncompiled, silently.
torch._dynamo.config.recompile_limit = 100

Runs = dict[tuple[int, int], dict[str, Callable[[None], Tensor]]]


def shapes(config) -> dict[tuple[int, int], int]:
    return input_shapes(config.getoption("ngf"), config.getoption("crop_size"))


def layer_run(
    provider: str, shape: tuple[int, int], condition: LabelMap | Tensor, *, training: bool
) -> Callable[[None], Tensor]:
    """Returns a function that runs a forward, in training also a backward, and returns y. It ignores its argument."""
    channels, side = shape
    memory_format = torch.contiguous_format if provider == "eager" else torch.channels_last
    x = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=memory_format).requires_grad_(training)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=memory_format)
    forward, layer = _forward(provider, channels, condition, memory_format, training)

    def run(_: None) -> Tensor:
        with torch.set_grad_enabled(training), inductor_config.patch(freezing=not training):
            y = forward(x)
        if training:
            x.grad = None
            layer.zero_grad(set_to_none=True)
            y.backward(grad)
        return y.detach()

    return run


def _forward(provider: str, channels: int, condition: LabelMap | Tensor, memory_format, training: bool):
    if isinstance(condition, Tensor):
        condition = condition.contiguous(memory_format=memory_format)
    planes = condition if isinstance(condition, Tensor) else one_hot(condition)
    ours = random_spade("spadesyncbatch3x3", channels, planes.shape[1]).train(training)
    if provider == "ours":
        if not training:
            freeze(ours)
        return lambda x: ours(x, condition, negative_slope=SLOPE), ours
    layer = stock_layer(ours, planes.shape[1], joined=provider != "eager").to(memory_format=memory_format)
    planes = planes.contiguous(memory_format=memory_format)

    def forward(x: Tensor, planes: Tensor) -> Tensor:
        return F.leaky_relu(layer(x, planes), SLOPE)

    called = torch.compile(forward, dynamic=False) if provider == "compiled" else forward
    return lambda x: called(x, planes), layer


def verified(config, names: tuple[str, ...], condition: LabelMap | Tensor, *, training: bool) -> Runs:
    runs: Runs = {}
    for shape in shapes(config):
        runs[shape] = {name: layer_run(name, shape, condition, training=training) for name in names}
        verify(runs[shape], None)
    return runs


def pytest_generate_tests(metafunc):
    scheduling.generate(metafunc, "repeat, shape, provider")


class _Suite:
    names, suite, passes = PROVIDERS, "", 2

    @classmethod
    def schedule(cls, config):
        repeats = range(config.getoption("repeats"))
        return [(r, shape, name) for r in repeats for shape in shapes(config) for name in cls.names]

    def test_layer(self, benchmark, pytestconfig, runs, repeat, shape, provider):
        channels, side = shape
        notes = self.notes(pytestconfig, side) | {"layers": shapes(pytestconfig)[shape]}
        notes["MB"] = self.passes * 4e-6 * channels * side**2
        case = f"{channels} x {side} x {side}"
        scheduling.timed(benchmark, lambda: runs[shape][provider](None), self.suite, case, provider, **notes)

    def notes(self, config, side: int) -> dict[str, float]:
        return {"distinct": distinct_fraction(scheduling.first_mask(config), (side, side))}


class TestLayer(_Suite):
    suite = results.LAYER

    @pytest.fixture(scope="class")
    @classmethod
    def runs(cls, pytestconfig):
        return verified(pytestconfig, cls.names, scheduling.first_mask(pytestconfig), training=False)


class TestLayerTraining(_Suite):
    # Compiling the backward of ten shapes would take longer than all other suites. bench_generator.py times the
    # compiled backward of the whole generator.
    suite, names, passes = results.LAYER_TRAINING, ("eager", "tuned", "ours"), 4

    @pytest.fixture(scope="class")
    @classmethod
    def runs(cls, pytestconfig):
        return verified(pytestconfig, cls.names, scheduling.first_mask(pytestconfig), training=True)


class TestDense(_Suite):
    """Layers whose condition is a feature map of the image's size, which every layer resizes."""

    suite, names = results.DENSE, DENSE_PROVIDERS

    @pytest.fixture(scope="class")
    @classmethod
    def runs(cls, pytestconfig):
        size = pytestconfig.getoption("crop_size")
        features = torch.randn(1, DENSE_CHANNELS, size, size, generator=torch.Generator().manual_seed(2))
        return verified(pytestconfig, cls.names, features, training=False)

    def notes(self, config, side: int) -> dict[str, float]:
        return {}
