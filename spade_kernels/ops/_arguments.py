"""Checks of operator arguments for kernels written in Python; csrc/arguments.h has those of the compiled ones.

Every operator's file has a function that calls these checks for each of its arguments. They raise RuntimeError for a
tensor of the wrong dtype, rank, size or device, for a tensor without memory, and for a number outside its range; the
message names the operator, the argument and the expected value.

Index tensors must hold valid indices. On a CPU their values are always checked, because that costs little beside the
reads that use them. On a GPU the host would have to wait for the values: there they are checked only if the environment
variable SPADE_KERNELS_CHECK_INDICES is set to 1 before the package is imported, and not while a CUDA graph is captured.
The compiled kernels read the same variable.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from spade_kernels import transforms

# This stands in a shape for any size except 0.
NOT_EMPTY: Any = None
# Layout of packed weights, as in csrc/cpu/gemm.h and conv.h: columns of a panel, and points of a 3 x 3 weight.
PANEL_COLUMNS, WINOGRAD_POINTS = 32, 16
# A window index holds at most this many entries.
MOST_ENTRIES = 2**31

Shape = Sequence[Any]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_READS_ON_GPU = os.environ.get("SPADE_KERNELS_CHECK_INDICES") == "1"


class Arguments:
    """The arguments of one call; all tensors must be on one device.

    Args:
        op: the operator's name.
        device: the device of its first argument.
        fake: True if the tensors have no values (fake or meta tensors). Their sizes may be symbols, which are not
            compared here but when the compiled code runs.
    """

    def __init__(self, op: str, device: torch.device, fake: bool):
        self._op, self._device, self._fake = op, device, fake

    def fail(self, what: str) -> NoReturn:
        raise RuntimeError(f"spade_kernels.{self._op}: {what}")

    def require(self, holds: bool, what: str) -> None:
        if not holds:
            self.fail(what)

    def floats(self, name: str, t: Tensor | None, shape: Shape) -> None:
        """Checks that t is a float tensor of this shape, or None."""
        if t is None:
            return
        if t.dtype not in _FLOATS:
            self.fail(f"{name} must be float16, bfloat16, float32 or float64, got {t.dtype}")
        self._tensor(name, t, shape)

    def index(self, name: str, t: Tensor, shape: Shape, low: int, high: int) -> None:
        """Checks that t is an int64 tensor of this shape, with values in low .. high - 1."""
        if t.dtype != torch.int64:
            self.fail(f"{name} must be int64, got {t.dtype}")
        self._tensor(name, t, shape)
        if not (self._reads_values(t) and t.numel()):
            return
        least, most = (int(value) for value in torch.aminmax(t))
        if least < low or most >= high:
            position = ((t < low) | (t >= high)).flatten().nonzero()[0].item()
            self.fail(
                f"{name} holds {t.flatten()[int(position)].item()} at position {position}; values must be at least "
                f"{low} and below {high}"
            )

    def bounds(self, name: str, t: Tensor, count: int, entries: int, exactly: bool = True) -> None:
        """Checks the offsets of `count` segments, which have `entries` entries in all, or fewer if not `exactly`."""
        self.index(name, t, (count + 1,), 0, entries + 1)
        if not self._reads_values(t):
            return
        if t[0] != 0 or bool((t.diff() < 0).any()) or (exactly and t[-1] != entries):
            self.fail(f"{name} must increase from 0 to {entries}")

    def segments(self, indices: Tensor | None, offsets: Tensor | None, count: int, entries: int) -> None:
        """Checks the segments, or that both are None: a forward takes segments only for its backward."""
        if indices is None or offsets is None:
            self.require(indices is offsets, "indices and offsets must be given together")
            return
        self.index("indices", indices, (entries,), 0, entries)
        self.bounds("offsets", offsets, count, entries)

    def integer(self, name: str, value: int, least: int, most: int) -> None:
        if not least <= value <= most:
            self.fail(f"{name} must be {least} to {most}, got {value}")

    def _reads_values(self, t: Tensor) -> bool:
        if self._fake or t.is_cpu:
            return not self._fake
        return _READS_ON_GPU and not torch.cuda.is_current_stream_capturing()

    def _tensor(self, name: str, t: Tensor, shape: Shape) -> None:
        if t.device != self._device:
            self.fail(f"{name} is on {t.device}, the first argument on {self._device}")
        if t.layout != torch.strided:
            self.fail(f"{name} must be a dense tensor, got {t.layout}")
        if t.dim() != len(shape) or any(map(_differs, t.shape, shape)):
            wanted = ", ".join("any" if size is NOT_EMPTY else str(size) for size in shape)
            self.fail(f"{name} must have shape ({wanted}), got {tuple(t.shape)}")
        if not (self._fake or has_storage(t)):
            self.fail(f"{name} has no memory: its storage was freed or resized")


def _differs(size: Any, wanted: Any) -> bool:
    """True if the size differs from the wanted one; False where one of them is a symbol."""
    if wanted is NOT_EMPTY:
        return isinstance(size, int) and size == 0
    return isinstance(size, int) and isinstance(wanted, int) and size != wanted


def size_of(t: Tensor, dim: int) -> Any:
    """The size of a dimension; 0 if t has too few dimensions, which the check of its shape then reports."""
    return t.shape[dim] if dim < t.dim() else 0


def num_panels(columns: Any) -> Any:
    """The number of panels of a packed weight with this many output columns."""
    return (columns + PANEL_COLUMNS - 1) // PANEL_COLUMNS


def require_storage(name: str, t: Tensor) -> None:
    """Raises ValueError if the tensor's storage was freed; PyTorch's own operators would read it all the same."""
    # Traced and transformed tensors have no storage to check; the operators that run in the end check theirs.
    if type(t) is not Tensor or torch.compiler.is_compiling() or transforms.are_active():
        return
    if not has_storage(t):
        raise ValueError(f"{name} has no memory: its storage was freed or resized")


def has_storage(t: Tensor) -> bool:
    """False if the tensor's storage was freed or made smaller; FSDP, for example, frees that of sharded parameters."""
    if not t.numel() or t.layout != torch.strided or t.is_meta:
        return True
    last = t.storage_offset() + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size() <= t.untyped_storage().nbytes()
