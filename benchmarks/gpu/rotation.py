"""Arguments in so many copies that each call finds its own outside of the device's cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

_CACHES, _MOST = 2, 64


def copies_beyond_cache(nbytes: int, device: torch.device) -> int:
    """How many copies of what a call moves are more than twice the L2 cache; 64 at most, 2 at least."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return min(_MOST, max(2, -(-_CACHES * cache // max(nbytes, 1)) + 1))


def rotated(arguments: tuple, count: int) -> list[tuple]:
    """The arguments and copies of them, `count` in all."""
    return [arguments] + [tree_map(_copied, arguments) for _ in range(count - 1)]


def moved(arguments: tuple, outputs: object) -> int:
    """Bytes of all tensors that go in and come out, each once: the least that must be moved."""
    return sum(t.nbytes for t in tree_leaves((arguments, outputs)) if isinstance(t, Tensor))


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
