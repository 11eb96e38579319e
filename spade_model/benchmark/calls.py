"""Calls of single operators are recorded from a layer, and repeated with arguments that no cache holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

Calls = dict[str, tuple[Callable[..., Any], tuple]]
"""(operator, arguments) by name."""

_CACHES, _MOST = 2, 64


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every call of one of our operators; a second call has the name "operator 2"."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "spade_kernels":
            name, same = func._opname, sum(key.split()[0] == func._opname for key in self.calls)
            self.calls[f"{name} {same + 1}" if same else name] = func, args
        return func(*args, **(kwargs or {}))

    def first_calls(self) -> Calls:
        """Returns the first call of each operator."""
        return {name: call for name, call in self.calls.items() if " " not in name}


def moved(arguments: tuple, outputs: object) -> int:
    """Returns the bytes of all tensors that go in and come out, each once: the least that must be moved."""
    return sum(t.nbytes for t in tree_leaves((arguments, outputs)) if isinstance(t, Tensor))


def copies_beyond_cache(nbytes: int, device: torch.device) -> int:
    """Returns how many copies of `nbytes` bytes are more than twice the L2 cache: 2 to 64."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return min(_MOST, max(2, -(-_CACHES * cache // max(nbytes, 1)) + 1))


def rotated(arguments: tuple, count: int) -> list[tuple]:
    """Returns the arguments and copies of them, `count` in all."""
    return [arguments] + [tree_map(_copied, arguments) for _ in range(count - 1)]


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
