"""These suites compile ours like the baseline, and baselines ahead of time into the compiler's caches."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu_suites.evaluation import Evaluation
from benchmarks.gpu_suites.layers import Layers
from benchmarks.gpu_suites.training import Training
from spade_model.benchmark.clock import float32_products
from spade_model.benchmark.results import Result
from spade_model.benchmark.shapes import input_shapes
from spade_model.benchmark.workload import Workload, release


def both_compiled(work: Workload, precision: str, batch: int) -> Iterator[Result]:
    """Measures the main masks as `evaluation` and `training` do, with ours compiled too, once everything is."""
    with torch.no_grad(), float32_products(precision):
        evaluated = Evaluation(work, precision, batch)
        evaluated.add("baseline")
        evaluated.compile_ours()
        yield from evaluated.measured(work.main_masks)
        del evaluated
    release(work.device)
    with float32_products(precision):
        trained = Training(work, precision, batch)
        trained.add("ours", "baseline")
        trained.compile_ours()
        yield from trained.measured()


def compile_networks(work: Workload, precision: str, batch: int, *, gradients: bool) -> Iterator[Result]:
    """Calls the baseline once, after which the compiler has it in its caches; yields nothing."""
    with torch.set_grad_enabled(gradients), float32_products(precision):
        (Training if gradients else Evaluation)(work, precision, batch).stock_step("baseline")()
    yield from ()


def compile_layers(work: Workload, precision: str) -> Iterator[Result]:
    """Calls the baseline of every layer once, for the compiler's caches; yields nothing."""
    with float32_products(precision):
        for training in (False, True):
            every = Layers(work, precision, training)
            for shape in input_shapes(work.ngf, work.size[1]):
                every.call("baseline", every.ours(shape))(every.input(shape, 0))
    yield from ()
