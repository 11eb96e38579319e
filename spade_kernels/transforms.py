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
    """Context manager outside all transforms: tensors made in it from plain ones can be cached for later calls."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return contextlib.nullcontext()
    return temporarily_clear_interpreter_stack()


def unwrapped(t: Tensor) -> Tensor | None:
    """The plain tensor that a transform wraps, without derivatives; None if torch.func.vmap maps over it."""
    if torch.compiler.is_compiling() or not isinstance(t, Tensor):
        return t
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        if torch._C._functorch.is_batchedtensor(t):
            return None
        t = torch._C._functorch.get_unwrapped(t)
    return t


def constant(t: Tensor) -> Tensor:
    """`unwrapped`, for the integers and booleans of a label map.

    Raises:
        ValueError: torch.func.vmap maps over the tensor.
    """
    value = unwrapped(t)
    if value is None:
        raise ValueError(
            "torch.func.vmap cannot map over label maps: they differ in their numbers of windows. Make them one batch "
            "(N, H, W) outside of it, or loop"
        )
    return value


def require_one_process() -> None:
    """Raises NotImplementedError within a transform: statistics over several processes cannot be transformed."""
    if are_active():
        raise NotImplementedError(
            "synchronized batch norm over several processes has no forward mode and no torch.func transforms; use "
            "backward or torch.autograd.grad, which have second derivatives (create_graph=True)"
        )


def channels_last(x: Tensor) -> Tensor:
    """x, channels-last, as kernels read it; within a transform, x as it is."""
    # torch.func.vmap does not support the channels-last memory format.
    return x if are_active() else x.contiguous(memory_format=torch.channels_last)
