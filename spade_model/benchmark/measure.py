"""Same results first, then times: providers are interleaved within every repeat and mask."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from spade_kernels.testing import relative_error

LIMIT = 2e-3
"""Largest difference of a float32 image from eager's, over its largest value: rounding through a whole generator."""


def verify(runs: Mapping[str, Callable[[Any], Tensor]], argument: Any, limit: float = LIMIT) -> dict[str, float]:
    """`relative_error` of every provider's output from eager's, or else the first provider's.

    Every provider is run, which also warms it up; the spade-free ones are another network and are not compared.

    Raises:
        AssertionError: an output differs by more than `limit`.
    """
    outputs = {name: run(argument) for name, run in runs.items()}
    outputs = {name: output for name, output in outputs.items() if not name.startswith("spade-free")}
    if not outputs:
        return {}
    base = "eager" if "eager" in outputs else next(iter(outputs))
    errors = {name: relative_error(output, outputs[base]) for name, output in outputs.items()}
    wrong = {name: error for name, error in errors.items() if not error <= limit}
    assert not wrong, f"outputs differ from {base}'s by more than {limit}, nothing is timed: {wrong}"
    return errors


def interleave(
    runs: Mapping[str, Callable[[Any], object]], arguments: Sequence[Any], repeats: int
) -> dict[str, list[float]]:
    """Milliseconds of each provider, one value for every repeat and argument. Call `verify` first, to warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for argument in arguments:
            for name, run in runs.items():
                started = time.perf_counter()
                run(argument)
                times[name].append((time.perf_counter() - started) * 1e3)
    return times
