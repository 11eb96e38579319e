"""Checks that the outputs of all providers agree, before they are timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from spade_kernels import LabelMap
from spade_kernels.testing import relative_error

LIMIT = 2e-3
"""Largest relative error of a float32 image of the generator, compared with that of the eager network."""
SLACK = {"bf16": 2e-3, "tf32": 1e-3}
"""Error that `check_images` allows beyond twice that of the tuned network, which can be very small by chance."""


def verify(runs: Mapping[str, Callable[[Any], Tensor]], argument: Any, limit: float = LIMIT) -> dict[str, float]:
    """Runs every provider once and returns the `relative_error` of its output.

    Outputs are compared with that of "eager", or that of the first provider if there is no "eager". The outputs of
    spade-free providers are not compared, because they are other networks.

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
    assert not wrong, f"outputs differ from that of {base} by more than {limit}, so nothing is timed: {wrong}"
    return errors


def check_images(
    runs: Mapping[str, Callable[[LabelMap], Tensor]],
    exact: Callable[[LabelMap], Tensor],
    tuned: Callable[[LabelMap], Tensor],
    found: Sequence[LabelMap],
    slack: float,
    may_fail: Callable[[str], AbstractContextManager[None]],
) -> None:
    """Compares the images of networks in low precision with exact images.

    The error is the norm of the difference over the norm of the exact image, because single pixels can be far off in
    bfloat16. It must be at most twice that of the tuned network, plus `slack`. A network whose error is larger, except
    spade-free, raises AssertionError within `may_fail(name)` and is not called again.

    Args:
        runs: networks by name; `may_fail` may remove the failed ones.
        exact: network that computes exact images. tuned: the tuned stock network.
        found: the masks.
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
    """Raises AssertionError if a parameter has no gradient, or one that is not finite."""
    wrong = [
        name
        for name, parameter in network.named_parameters()
        if parameter.grad is None or not parameter.grad.isfinite().all()
    ]
    assert not wrong, f"parameters without a finite gradient: {wrong}"


def _distance(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()
