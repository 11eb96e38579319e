"""Packing of an object's many small tensors into one, for one transfer to another device or process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor

_ALIGNMENT = 64
_T = TypeVar("_T")


class Packable:
    """Base class of objects that hold tensors, packables, and tuples and dicts of them.

    Such an object is pickled with all tensors packed into one, because each tensor that a data-loader worker sends
    costs both processes a file descriptor.
    """

    def __getstate__(self) -> tuple[Tensor | None, dict]:
        return pack(self.__dict__)

    def __setstate__(self, state: tuple[Tensor | None, dict]) -> None:
        self.__dict__.update(unpack(*state))


@dataclass(frozen=True)
class Slot:
    """The place of a tensor in the buffer: offset in bytes, dtype and shape."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def of(self, buffer: Tensor) -> Tensor:
        size = prod(self.shape) * self.dtype.itemsize
        return buffer[self.offset : self.offset + size].view(self.dtype).view(self.shape)


# The buffer is made outside inference mode, because training may need its tensors later.
@torch.inference_mode(False)
def pack(nest: _T, pinned: bool = False) -> tuple[Tensor | None, _T]:
    """Returns (buffer, layout): one uint8 tensor with all tensors of `nest`, and `nest` with a `Slot` for each.

    The buffer is None if `nest` has no tensors.

    Args:
        nest: a packable, or a tuple or dict, whose tensors are on one device.
        pinned: True puts the buffer into page-locked memory.
    """
    tensors: dict[int, Tensor] = {}
    slots: dict[int, Slot] = {}
    end = 0

    def place(t: Tensor) -> Slot:
        nonlocal end
        if id(t) not in slots:
            tensors[id(t)], slots[id(t)] = t, Slot(end, t.dtype, tuple(t.shape))
            end += -(-t.nbytes // _ALIGNMENT) * _ALIGNMENT
        return slots[id(t)]

    layout = _changed(nest, Tensor, place)
    if not tensors:
        return None, layout
    device = next(iter(tensors.values())).device
    buffer = torch.zeros(end, dtype=torch.uint8, device=device, pin_memory=pinned)
    for key, t in tensors.items():
        slots[key].of(buffer).copy_(t)
    return buffer, layout


@torch.inference_mode(False)
def unpack(buffer: Tensor | None, layout: _T) -> _T:
    """Reverses `pack`; the tensors of the result are views of `buffer`."""
    return layout if buffer is None else _changed(layout, Slot, lambda slot: slot.of(buffer))


def _changed(nest: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """A copy of the nest in which `change` replaces every object of class `kind`."""
    if isinstance(nest, kind):
        return change(nest)
    if isinstance(nest, dict):
        return {key: _changed(value, kind, change) for key, value in nest.items()}
    if isinstance(nest, tuple):
        return tuple(_changed(value, kind, change) for value in nest)
    if isinstance(nest, Packable):
        twin = object.__new__(type(nest))
        twin.__dict__.update(_changed(nest.__dict__, kind, change))
        return twin
    return nest
