"""Values that are built once and reused by later calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from spade_kernels import backends, transforms
from spade_kernels.packing import Packable


class Cache(Packable):
    """A dict of values that are built at first use; the package keeps everything that it reuses in such caches.

    A value is built outside inference mode and the transforms of torch.func, so that a later call may train with it. It
    is not stored while a CUDA graph is captured, because tensors have no values before the graph runs.

    Args:
        shared: True if the values do not belong to one label map, so that calls on other CUDA streams and in other
            compiled functions use them, too. A call that builds such a value waits for its CUDA stream, and compiled
            code stores no such value.
    """

    def __init__(self, shared: bool = False):
        self._shared = shared
        self._values: dict[Any, Any] = {}

    def get(self, key: Any, build: Callable[[], Any], like: Tensor) -> Any:
        """Returns the value of the key, built first if it is missing; `like` is a tensor on the value's device."""
        if key in self._values:
            return self._values[key]
        with torch.inference_mode(False), transforms.outside():
            value = build()
        if backends.is_captured(like) or (self._shared and torch.compiler.is_compiling()):
            return value
        if self._shared:
            backends.synchronize(like)
        self._values[key] = value
        return value

    def __contains__(self, key: Any) -> bool:
        return key in self._values

    def __getitem__(self, key: Any) -> Any:
        return self._values[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._values[key] = value

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values)
