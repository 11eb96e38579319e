"""Providers are interleaved: repeats are the outermost loop, so that what slows the machine down slows all of them.

A suite is a class whose `schedule(config)` lists the parameters of its test in the order in which they run. A fixture
of the class builds and verifies the providers, which also warms them up; then every test is one timed call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from spade_kernels import LabelMap
from spade_model.benchmark.masks import bench_masks, coco_or_toy


def masks(config: pytest.Config) -> dict[str, list[LabelMap]]:
    """Returns the masks by kind, the main kind first."""
    return _masks(*(config.getoption(name) for name in ("dataroot", "masks", "crop_size")))


@cache
def _masks(dataroot: str, count: int, crop_size: int) -> dict[str, list[LabelMap]]:
    return bench_masks(coco_or_toy(dataroot, crop_size), count)


def first_mask(config: pytest.Config) -> LabelMap:
    """Returns the first mask of the main kind."""
    return masks(config)[main_kind(config)][0]


def main_kind(config: pytest.Config) -> str:
    """ "real", or "toy" without a folder of masks."""
    return next(iter(masks(config)))


def long_repeats(config: pytest.Config) -> int:
    """Returns the repeats of runs that take several seconds."""
    return max(1, config.getoption("repeats") // 2)


def generate(metafunc: pytest.Metafunc, names: str) -> None:
    """Parametrizes a test of a suite with its class's schedule."""
    metafunc.parametrize(names, metafunc.cls.schedule(metafunc.config))


def timed(benchmark, run: Callable[[], object], suite: str, case: str, provider: str, **extra: float) -> None:
    """Times one call; report.py puts the calls of a (suite, case, provider) together.

    extra: "MB" becomes a throughput, too; sums over shapes count a case "layers" times.
    """
    benchmark.extra_info.update(suite=suite, case=case, provider=provider, extra=extra)
    benchmark.pedantic(run, rounds=1, iterations=1)


def noted(benchmark, value: float, unit: str, suite: str, case: str, provider: str) -> None:
    """Puts a value that is not a time among the results."""
    benchmark.extra_info.update(value=value, unit=unit)
    timed(benchmark, lambda: None, suite, case, provider)
