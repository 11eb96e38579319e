"""Makes Triton's interpreter strict: by itself it checks no bounds, and multiplies the bit patterns of bfloat16."""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def make_strict() -> None:
    """Every access has to lie within a tensor that the kernel was given, and bfloat16 is multiplied as numbers."""
    builder, extents = interpreter.InterpreterBuilder, _Extents()
    execute, load, store, dot = (
        interpreter.GridExecutor.__call__,
        builder.create_masked_load,
        builder.create_masked_store,
        builder.create_dot,
    )

    def checked_execute(self, *args, **kwargs):
        extents.set(args)
        return execute(self, *args, **kwargs)

    def checked_load(self, pointers, mask, *rest):
        extents.check("reads", pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        extents.check("writes", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def exact_dot(self, a, b, *rest):
        return dot(self, _widened(a), _widened(b), *rest)

    interpreter.GridExecutor.__call__ = checked_execute
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    builder.create_dot = exact_dot


class _Extents:
    """First and last addresses of the tensors a kernel was given, all on the CPU."""

    def set(self, arguments: tuple) -> None:
        tensors = [t for t in arguments if isinstance(t, torch.Tensor) and t.numel()]
        self.begin = np.array([t.data_ptr() for t in tensors], dtype=np.uint64)
        # The bounds are the tensor's, not those of its storage, which in tests is wider.
        last = [sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) for t in tensors]
        bytes_ = [(at + 1) * t.element_size() for at, t in zip(last, tensors, strict=True)]
        self.end = self.begin + np.array(bytes_, dtype=np.uint64)

    def check(self, verb: str, pointers: interpreter.TensorHandle, mask: interpreter.TensorHandle) -> None:
        width = np.uint64(pointers.get_element_ty().primitive_bitwidth // 8)
        address = np.broadcast_to(pointers.data, mask.data.shape).astype(np.uint64)[mask.data.astype(bool)]
        inside = (address[:, None] >= self.begin) & (address[:, None] + width <= self.end)
        strays = int((~inside.any(1)).sum())
        assert not strays, f"{verb} {strays} of {len(address)} elements outside of tensors"


def _widened(factor: interpreter.TensorHandle) -> interpreter.TensorHandle:
    if factor.dtype.scalar != tl.bfloat16:
        return factor
    return interpreter.TensorHandle((factor.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
