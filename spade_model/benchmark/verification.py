"""Providers must agree before they are timed: their outputs, images and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from spade_kernels import LabelMap
from spade_kernels.testing import relative_error

LIMIT = 2e-3
"""Largest difference of a float32 image from eager's, over its largest value: rounding through a whole generator."""
SLACK = {"bf16": 2e-3, "tf32": 1e-3}
"""How much more than twice the tuned network's error is allowed: where that happens to be very small."""


def verify(runs: Mapping[str, Callable[[Any], Tensor]], argument: Any, limit: float = LIMIT) -> dict[str, float]:
    """Returns the `relative_error` of every provider's output from eager's, or else the first provider's.

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


def check_images(
    runs: Mapping[str, Callable[[LabelMap], Tensor]],
    exact: Callable[[LabelMap], Tensor],
    tuned: Callable[[LabelMap], Tensor],
    found: Sequence[LabelMap],
    slack: float,
    may_fail: Callable[[str], AbstractContextManager[None]],
) -> None:
    """Takes every network out whose distance from the exact image is more than twice the tuned one's.

    Distances are by norm: whole networks in bfloat16 have single pixels that are far off.
    """
    failed = set()
    for mask in found:
        expected = exact(mask).double()
        limit = 2 * _distance(tuned(mask), expected) + slack
        for name in [name for name in runs if name not in failed]:
            failed.add(name)
            with may_fail(name):
                error = _distance(runs[name](mask), expected)
                assert name == "spade-free" or error <= limit, f"{error:.2g} from the exact image, over {limit:.2g}"
                failed.remove(name)


def check_gradients(network: nn.Module) -> None:
    """Raises AssertionError for a gradient that is missing or not finite."""
    wrong = [
        name
        for name, parameter in network.named_parameters()
        if parameter.grad is None or not parameter.grad.isfinite().all()
    ]
    assert not wrong, f"no gradient, or one that is not finite: {wrong}"


def _distance(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()
