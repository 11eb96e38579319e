"""Launches of kernels, and a record of the compiled variants that they need."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}

_recorded: list[Variant] | None = None


@dataclass(frozen=True)
class Variant:
    """One compiled variant of a kernel: everything that Triton's launcher specializes it on.

    Attributes:
        signature: type of each run-time argument.
        constexprs: value of each compile-time argument; together with `signature` this covers all arguments.
        divisible: run-time arguments that are multiples of 16; for pointers, the address in bytes.
    """

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    divisible: tuple[str, ...]
    num_stages: int = 3


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, num_stages: int = 3, **constexprs: Any
) -> None:
    """Runs `kernel` on `grid`, which may be empty; within `recording`, only records the variant."""
    if _recorded is not None:
        variant = _variant(kernel, arguments, constexprs, num_warps, num_stages)
        if variant not in _recorded:
            _recorded.append(variant)
    elif all(grid):
        kernel[grid](*arguments, **constexprs, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)


@contextlib.contextmanager
def recording() -> Iterator[list[Variant]]:
    """Context manager that records the variants of launches instead of running them; tensors may be meta tensors."""
    global _recorded
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


def _variant(
    kernel: Any, arguments: tuple[Any, ...], constexprs: dict[str, Any], num_warps: int, num_stages: int
) -> Variant:
    signature: dict[str, str] = {}
    fixed = dict(constexprs)
    divisible = []
    for parameter, value in zip(kernel.params, arguments, strict=False):
        if isinstance(value, Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
            if aligned and not parameter.do_not_specialize_on_alignment:
                divisible.append(parameter.name)
        elif value is None or (value == 1 and not parameter.do_not_specialize):
            fixed[parameter.name] = value
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                divisible.append(parameter.name)
    return Variant(kernel, signature, fixed, num_warps, tuple(divisible), num_stages)
