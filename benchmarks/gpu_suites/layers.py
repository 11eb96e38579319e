"""The SPADE layer with its activation at the shapes of the generator's 18 layers, and all 18 one after the other.

All layers of a generator share the one-hot planes or the window indexes of a mask; here both are there beforehand.
Providers and precision are those of `gpu_suites`; every call of a layer has an x that is not in the device's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_kernels import SPADE, freeze
from spade_kernels.testing import random_spade, relative_error
from spade_model.benchmark.calls import copies_beyond_cache
from spade_model.benchmark.clock import PRECISIONS, Captured, compiled, float32_products
from spade_model.benchmark.results import ALL_LAYERS, LAYER, LAYER_TRAINING, Result
from spade_model.benchmark.shapes import input_shapes, resolutions
from spade_model.benchmark.stock import one_hot, stock_layer
from spade_model.benchmark.workload import Workload, place_for

SLOPE = 0.2
LIMIT = {"bf16": 5e-2, "tf32": 5e-3}
"""Largest difference of an output from float32's, over its largest value."""

Shape = tuple[int, int]


def layers(work: Workload, precision: str, *, training: bool, with_baseline: bool) -> Iterator[Result]:
    """Measures each shape, and all layers in one graph, forward or forward and backward."""
    with float32_products(precision):
        every = Layers(work, precision, training)
        names = ("tuned", *(("baseline",) if with_baseline else ()), "ours")
        for shape in input_shapes(work.ngf, work.size[1]):
            yield from every.of_shape(shape, names)
        yield from every.all_layers(names)


class Layers:
    """Holds the layers of one precision, forward or forward and backward, that agree with the exact ones."""

    def __init__(self, work: Workload, precision: str, training: bool):
        self.work, self.precision, self.training = work, precision, training
        self.suite = LAYER_TRAINING if training else LAYER
        self._dtype = torch.float32 if training else PRECISIONS[precision]
        found = work.batches()[:1]
        place, _ = place_for(found, lambda mask: mask.prepare(resolutions(mask), gradients=training))
        self.mask = place.label_map
        with torch.device(work.device):
            self.planes = one_hot(found[0], None, PRECISIONS[precision], torch.channels_last)
        self.calls: dict[tuple[str, Shape], Callable[[Tensor], Tensor]] = {}

    def of_shape(self, shape: Shape, names: tuple[str, ...]) -> Iterator[Result]:
        example = self.input(shape, 0)
        passes = 4 if self.training else 2
        inputs = [self.input(shape, i) for i in range(copies_beyond_cache(passes * example.nbytes, self.work.device))]
        ours = self.ours(shape)
        expected = self.call("exact", ours)(example)
        case = self.work.case(self.precision, what=f"{shape[0]} x {shape[1]} x {shape[1]}")
        runs: dict[str, Callable[[None], object]] = {}
        for name in names:
            with self.work.may_fail(name, case, runs):
                call = self.call(name, ours)
                error, limit = relative_error(call(example), expected), LIMIT[self.precision]
                assert error <= limit, f"{error:.2g} from float32's output, more than {limit:.2g}"
                runs[name] = self._captured([(call, x) for x in inputs])
                self.calls[name, shape] = call
        times = self.work.times(runs, [None], part=0.1)
        for name, values in times.items():
            yield Result.of(self.suite, case, name, [value / len(inputs) for value in values])

    def all_layers(self, names: tuple[str, ...]) -> Iterator[Result]:
        inputs = [
            (shape, self.input(shape, i))
            for shape, count in input_shapes(self.work.ngf, self.work.size[1]).items()
            for i in range(count)
        ]
        case = self.work.case(self.precision, what=ALL_LAYERS)
        runs: dict[str, Callable[[None], object]] = {}
        for name in names:
            if all((name, shape) in self.calls for shape, _ in inputs):
                with self.work.may_fail(name, case, runs):
                    runs[name] = self._captured([(self.calls[name, shape], x) for shape, x in inputs])
        times = self.work.times(runs, [None])
        yield from (Result.of(self.suite, case, name, values) for name, values in times.items())

    def ours(self, shape: Shape) -> SPADE:
        """Returns the layer whose weights all of its shape have."""
        layer = random_spade("spadesyncbatch3x3", shape[0], self.mask.channels).to(self.work.device, self._dtype)
        return layer.train(self.training)

    def input(self, shape: Shape, seed: int) -> Tensor:
        generator = torch.Generator(self.work.device).manual_seed(seed)
        size = len(self.mask), shape[0], shape[1], shape[1]
        x = torch.randn(size, generator=generator, device=self.work.device, dtype=PRECISIONS[self.precision])
        return x.contiguous(memory_format=torch.channels_last).requires_grad_(self.training)

    def _captured(self, calls: list[tuple[Callable[[Tensor], Tensor], Tensor]]) -> Callable[[None], object]:
        captured = Captured(lambda: [call(x) for call, x in calls], self.work.device)
        return lambda _: captured()

    def call(self, name: str, ours: SPADE) -> Callable[[Tensor], Tensor]:
        """Returns x -> y, after its backward in training."""
        layer, forward = self._forward(name, ours)
        if not self.training:
            return torch.no_grad()(forward)
        parameters = list(layer.parameters())
        in_bf16 = self.precision == "bf16" and name != "exact"

        def call(x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=in_bf16, cache_enabled=False):
                y = forward(x)
            # Any gradient would do that is neither constant nor another pass over memory.
            torch.autograd.grad(y, [x, *parameters], y.detach())
            return y.detach()

        return call

    def _forward(self, name: str, ours: SPADE) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        if name == "ours":
            if not self.training:
                freeze(ours)
            return ours, lambda x: ours(x, self.mask, negative_slope=SLOPE)
        layer = stock_layer(ours, self.mask.channels, joined=name != "exact")
        if name == "exact":
            layer.to(self.work.device)
            planes = self.planes.float()
            return layer, float32_products("ieee")(lambda x: F.leaky_relu(layer(x.float(), planes), SLOPE))
        layer.to(self.work.device, self._dtype, memory_format=torch.channels_last)

        def forward(x: Tensor, planes: Tensor) -> Tensor:
            return F.leaky_relu(layer(x, planes), SLOPE)

        called = compiled(forward, self.work.device) if name == "baseline" else forward
        return layer, lambda x: called(x, self.planes)
