"""Records the operator calls of a layer, and copies arguments so that timed calls do not find them in a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

Calls = dict[str, tuple[Callable[..., Any], tuple]]
"""Maps the name of a call to its operator and its arguments."""

_CACHES, _MOST = 2, 64


class Recorder(TorchDispatchMode):
    """Records every call of a spade_kernels operator within this context. A second call is named "operator 2"."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "spade_kernels":
            name, same = func._opname, sum(key.split()[0] == func._opname for key in self.calls)
            self.calls[f"{name} {same + 1}" if same else name] = func, args
        return func(*args, **(kwargs or {}))

    def first_calls(self) -> Calls:
        """Returns only the first call of each operator."""
        return {name: call for name, call in self.calls.items() if " " not in name}


def moved(arguments: tuple, outputs: object) -> int:
    """Returns the bytes of all argument and output tensors: a call moves at least this much memory."""
    return sum(t.nbytes for t in tree_leaves((arguments, outputs)) if isinstance(t, Tensor))


def copies_beyond_cache(nbytes: int, device: torch.device) -> int:
    """Returns how many copies of `nbytes` bytes together exceed twice the L2 cache; at least 2 and at most 64."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return min(_MOST, max(2, -(-_CACHES * cache // max(nbytes, 1)) + 1))


def rotated(arguments: tuple, count: int) -> list[tuple]:
    """Returns a list of `count` argument tuples: the given one and copies of it."""
    return [arguments] + [tree_map(_copied, arguments) for _ in range(count - 1)]


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
