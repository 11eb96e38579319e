"""Helpers for code that calls kernels or caches tensors within transforms of torch.func and in forward mode."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad


def are_active() -> bool:
    """True within a transform of torch.func and in forward-mode differentiation, which kernels do not support."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def outside() -> contextlib.AbstractContextManager:
    """Within it, what is made of plain tensors belongs to no transform, and can be kept for calls after it."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return contextlib.nullcontext()
    return temporarily_clear_interpreter_stack()


def constant(t: Tensor) -> Tensor:
    """The plain tensor of a transform's; for integers and booleans, which have no derivatives.

    Raises:
        ValueError: torch.func.vmap maps over the tensor, so there are many.
    """
    if torch.compiler.is_compiling() or not isinstance(t, Tensor):
        return t
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        if torch._C._functorch.is_batchedtensor(t):
            raise ValueError(
                "torch.func.vmap cannot map over label maps: they differ in their numbers of windows. Make them one "
                "batch (N, H, W) outside of it, or loop"
            )
        t = torch._C._functorch.get_unwrapped(t)
    return t


def channels_last(x: Tensor) -> Tensor:
    """x in the layout that kernels read."""
    # torch.func.vmap knows one layout.
    return x if are_active() else x.contiguous(memory_format=torch.channels_last)
