"""Registration and calls of operators: every operator's file uses `register` and `call`.

`register` gives an operator its schema, the checks of its arguments, its fake kernel and its derivatives. Kernels have
first derivatives in reverse mode. All other derivatives (second ones, forward mode, the transforms of torch.func) come
from the operator's *plain form*: a function of PyTorch operators, which PyTorch differentiates.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from spade_kernels import backends, transforms
from spade_kernels.ops._arguments import Arguments

operators = torch.ops.spade_kernels

_library = torch.library.Library("spade_kernels", "DEF")
_plain_forms: dict[str, Callable] = {}
# The class is private to torch. If it is missing, every call passes through the operator's Python autograd function.
_below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", contextlib.nullcontext)


def register(
    schema: str,
    *,
    check: Callable[..., None],
    fake: Callable,
    kernels: Sequence[str] = (),
    setup: Callable[..., None] | None = None,
    backward: Callable | None = None,
    plain: Callable | None = None,
) -> None:
    """Registers an operator, with the function of its name in `reference.py` as the kernel of every device.

    Args:
        schema: as PyTorch writes it, "name(arguments) -> results".
        check: takes an `Arguments` object and the operator's arguments; raises if they do not fit. Compiled kernels
            have checks of their own, in csrc/, in the file of the same stem.
        fake: takes arguments without values; returns empty results of the right shape, dtype and layout.
        kernels: backends that have a kernel, the preferred one first. The Triton kernel is in triton/, in the module
            with the name of the one that defines `check`.
        setup, backward: passed to `torch.library.register_autograd`; None if the operator has no derivatives.
        plain: takes the operator's arguments and computes its result with operators of PyTorch that have derivatives of
            every kind; None if the operator has no derivatives.
    """
    name = schema.partition("(")[0]
    _library.define(schema)

    def checked(*arguments: Any) -> None:
        check(Arguments(name, arguments[0].device, fake=False), *arguments)

    @functools.wraps(fake)
    def checked_fake(*arguments: Any) -> Any:
        check(Arguments(name, arguments[0].device, fake=True), *arguments)
        return fake(*arguments)

    def refuse(ctx: Any, *grads: Any) -> None:
        raise _without_derivatives(name)

    torch.library.register_fake(f"spade_kernels::{name}", checked_fake, lib=_library)
    torch.library.register_autograd(
        f"spade_kernels::{name}", backward or refuse, setup_context=setup or _save_nothing, lib=_library
    )
    if plain is not None:
        _plain_forms[name] = plain
    backends.register(_library, name, check.__module__.rpartition(".")[2], kernels, checked)


def _save_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def call(operator: Any, *arguments: Any) -> Any:
    """Calls one of the `operators`; without its Python autograd function where no gradient can be asked for."""
    if transforms.are_active() and operator is not operators.window_index:
        return _by_plain_form(operator.__name__, arguments)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return operator.default(*arguments)
    with _below_autograd():
        return operator.default(*arguments)


def _by_plain_form(name: str, arguments: Sequence[Any]) -> Any:
    if name not in _plain_forms:
        raise _without_derivatives(name)
    # Kernels run without autocast, too: it would round the factors of float32 products.
    with torch.autocast(arguments[0].device.type, enabled=False):
        return _plain_forms[name](*arguments)


def _without_derivatives(name: str) -> NotImplementedError:
    why = "differentiate the operator it belongs to" if name.endswith("_grad") else "it is for frozen weights"
    return NotImplementedError(f"{name} has no derivatives and no torch.func transforms: {why}")


def plain_gradients(
    name: str, arguments: Sequence[Any], needed: Sequence[bool], grads: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients of the arguments that need one, by the operator's plain form.

    They can be differentiated again: a backward calls this when it runs with gradients enabled (create_graph=True).
    """
    # Views separate the arguments: if one was computed from another, its gradient must not flow into that one here.
    inputs = [a.view_as(a) if isinstance(a, Tensor) else a for a in arguments]
    wanted = [a for a, needs in zip(inputs, needed, strict=True) if needs]
    found = iter(torch.autograd.grad(_by_plain_form(name, inputs), wanted, grads, create_graph=True))
    return tuple(next(found) if needs else None for needs in needed)


def stand_in(shape: Sequence[int], dtype: torch.dtype | None, like: Tensor) -> Tensor | None:
    """Zeros for an argument that was not saved, because no gradient depends on it; None if dtype is None."""
    if dtype is None:
        return None
    with transforms.outside():
        return torch.zeros(shape, dtype=dtype, device=like.device, requires_grad=True)


def require_segments(name: str, indices: Tensor | None, offsets: Tensor | None) -> None:
    """Raises RuntimeError unless the segments that the backward of this operator needs were given."""
    if indices is None or offsets is None:
        raise RuntimeError(f"{name}: pass `indices` and `offsets` to be able to run the backward")


def acc_dtype(t: Tensor) -> torch.dtype:
    """The dtype in which kernels sum up: float64 for float64, else float32."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def channels_last_like(x: Tensor, upsample: int = 1, channels: int | None = None) -> Tensor:
    """An uninitialized (N, channels, upsample * h, upsample * w), channels-last, with x's dtype and device."""
    n, c, h, w = x.shape
    return x.new_empty(n, upsample * h, upsample * w, c if channels is None else channels).permute(0, 3, 1, 2)
