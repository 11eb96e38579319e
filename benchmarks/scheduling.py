"""The order of the timed calls in the pytest suites.

A suite is a class whose `schedule(config)` lists the parameters of its test in the order in which they run. Repeats are
the outermost loop, so that a temporary slowdown of the machine affects all providers. A fixture of the class builds,
checks and thereby warms up the providers; every test is then one timed call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from spade_kernels import LabelMap
from spade_model.benchmark.masks import bench_masks, coco_or_toy


def masks(config: pytest.Config) -> dict[str, list[LabelMap]]:
    """Returns a dict from the kind to its masks; the main kind is the first."""
    return _masks(*(config.getoption(name) for name in ("dataroot", "masks", "crop_size")))


@cache
def _masks(dataroot: str, count: int, crop_size: int) -> dict[str, list[LabelMap]]:
    return bench_masks(coco_or_toy(dataroot, crop_size), count)


def first_mask(config: pytest.Config) -> LabelMap:
    """Returns the first mask of the main kind."""
    return masks(config)[main_kind(config)][0]


def main_kind(config: pytest.Config) -> str:
    """Returns the kind of masks that all suites use: "real", or "toy" without a folder of masks."""
    return next(iter(masks(config)))


def long_repeats(config: pytest.Config) -> int:
    """Returns the number of repeats of suites whose calls take several seconds."""
    return max(1, config.getoption("repeats") // 2)


def generate(metafunc: pytest.Metafunc, names: str) -> None:
    """Parametrizes the test of a suite with the schedule of its class."""
    metafunc.parametrize(names, metafunc.cls.schedule(metafunc.config))


def timed(benchmark, run: Callable[[], object], suite: str, case: str, provider: str, **extra: float) -> None:
    """Times one call. `report.py` combines all calls with the same suite, case and provider.

    Args:
        extra: other numbers about the case. From "MB", the memory that a call moves, the throughput is computed;
            "layers", the number of layers with this shape, is the weight of the case in the sum over all layers.
    """
    benchmark.extra_info.update(suite=suite, case=case, provider=provider, extra=extra)
    benchmark.pedantic(run, rounds=1, iterations=1)


def noted(benchmark, value: float, unit: str, suite: str, case: str, provider: str) -> None:
    """Records a value that is not a time as a result."""
    benchmark.extra_info.update(value=value, unit=unit)
    timed(benchmark, lambda: None, suite, case, provider)
