"""Compares the original forward of a module with the accelerated one, on random inputs."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_kernels.accelerate.layer import Accelerated, Family, restore_class

# The largest relative differences that count as rounding. float32 is for layers that compute in it for any input.
_LIMITS = {torch.float64: 1e-8, torch.float32: 1e-4}
# Sizes of x and of the condition.
_SIZES = [((6, 8), (12, 16)), ((6, 8), (6, 8)), ((8, 8), (4, 4))]


class Differs(Exception):
    """Raised if the results of the accelerated module differ from those of its original forward."""


def probe(module: nn.Module, accelerate: Callable[[nn.Module], None], family: Family, channels: Sequence[int]) -> float:
    """Returns the largest relative difference of results, gradients and buffers, in evaluation and training.

    A copy of the module with random parameters is called, so the difference depends on the module's structure only.

    Args:
        accelerate: accelerates the copy in place.
        channels: numbers of channels of x and of each condition.

    Raises:
        Differs: the difference is more than rounding, or the module cannot be called.
    """
    # The caller's modes, default device and random state must not change the result, and must stay as they are.
    modes = torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False)
    with contextlib.ExitStack() as stack:
        for mode in (*modes, torch.random.fork_rng(devices=[]), torch.device("cpu")):
            stack.enter_context(mode)
        torch.manual_seed(0)
        copied = copied_module(module).cpu()
        for part in copied.modules():
            if isinstance(part, Accelerated):
                restore_class(part)
        _randomize(copied)
        for dtype, limit in _LIMITS.items():
            error = _difference(copied.to(dtype), accelerate, family, channels)
            if error is not None and error < limit:
                return error
    raise Differs("it cannot be called with (x, condition)" if error is None else f"its results differ by {error:.1e}")


def copied_module(module: nn.Module) -> nn.Module:
    """Returns a deep copy, also of modules that hold tensors with a gradient history, which `deepcopy` refuses.

    Spectral norm and weight norm leave such tensors in a module that was called.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for value in part.__dict__.values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(module, memo)


def _randomize(module: nn.Module) -> None:
    """Replaces values that would hide a difference: zero weights, and the statistics of a new norm."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) / max(parameter[0].numel(), 1) ** 0.5)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)


def _difference(
    stock: nn.Module, accelerate: Callable[[nn.Module], None], family: Family, channels: Sequence[int]
) -> float | None:
    """Returns the largest relative difference; None if the module's original forward refuses all inputs."""
    ours = copy.deepcopy(stock)
    accelerate(ours)
    dtype, errors = next(stock.parameters()).dtype, []
    for training in (False, True):
        for size, condition_size in _SIZES:
            for conditions in _conditions(channels[1:], condition_size, dtype):
                x = torch.randn(2, channels[0], *size, dtype=dtype)
                try:
                    expected = _results(stock.train(training), family, x, conditions)
                except Exception:  # any that the original forward raises
                    continue
                errors.append(_error(_results(ours.train(training), family, x, conditions), expected))
    return max(errors, default=None)


def _conditions(channels: Sequence[int], size: tuple[int, int], dtype: torch.dtype) -> list[list[Tensor]]:
    """Returns one-hot conditions, in which some pixels have no class, and dense ones."""
    shown = (torch.rand(2, 1, *size) < 0.9).to(dtype)
    labels = [torch.randint(count, (2, *size)) for count in channels]
    one_hot = [F.one_hot(ids, count).permute(0, 3, 1, 2) * shown for ids, count in zip(labels, channels, strict=True)]
    return [one_hot, [torch.rand(2, count, *size, dtype=dtype) for count in channels]]


def _results(module: nn.Module, family: Family, x: Tensor, conditions: Sequence[Tensor]) -> dict[str, Tensor]:
    module.zero_grad()
    torch.manual_seed(0)
    x, conditions = x.clone().requires_grad_(), [condition.clone() for condition in conditions]
    for condition in conditions:
        if not ((condition == 0) | (condition == 1)).all():
            condition.requires_grad_()
    args, kwargs = family.example(module, x, *conditions)
    y = module(*args, **kwargs)
    if not isinstance(y, Tensor) or y.dim() != 4:
        raise Differs("its result is not one tensor (N, C, h, w)")
    (y * torch.arange(y.numel(), dtype=y.dtype).view(y.shape).sin()).sum().backward()
    found = {"the result": y, "the gradient of x": x.grad}
    found |= {f"the gradient of condition {i}": condition.grad for i, condition in enumerate(conditions)}
    found |= {f"the gradient of {name}": parameter.grad for name, parameter in module.named_parameters()}
    found |= {f"the buffer {name}": buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}
    return {name: value.detach().clone() for name, value in found.items() if value is not None}


def _error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    largest = 0.0
    # Tensors of tiny values are not compared on their own scale: the gradient of a bias before a norm is rounding only.
    least = 1e-3 * max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        if name not in found or found[name].shape != value.shape:
            raise Differs(f"{name} is not of shape {tuple(value.shape)}")
        scale = max(value.abs().max().item(), least)
        difference = (found[name] - value).abs().max().item() / scale
        # `max` would skip a NaN.
        largest = max(largest, math.inf if math.isnan(difference) else difference)
    return largest
