"""Modules that keep what they derive from their weights while the weights stand still."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from spade_kernels import transforms


class _Kept(NamedTuple):
    """What a module keeps, and the parts and weights it was derived from: where they are, and their versions."""

    value: Any
    of: tuple[tuple[dict, str, Any, int], ...]

    # A copy of a module is not frozen, however it is made: its parts and weights are others.
    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()


class Freezable(nn.Module):
    """Base of modules with something to derive from their weights: `derive()` says what.

    `freeze()` keeps it; `train()`, loading a state dict and moving, of the module or one that contains it, let it go,
    and a change of a weight that PyTorch counts has it derived again. What is kept has no derivatives, so it is used
    where no gradients are recorded only.
    """

    _kept: _Kept | None = None

    def derive(self) -> Any:
        """What `kept` returns while the module is frozen: an object that says whether it `is_traceable`, or None."""
        raise NotImplementedError

    @property
    def kept(self) -> Any:
        """What the weights come to, or None where they have to be read: not frozen, recording gradients, in a
        transform of torch.func, or exported.

        Compiled code reads it as long as it `is_traceable`.
        """
        if self._kept is None or torch.is_grad_enabled() or transforms.are_active():
            return None
        if not torch.compiler.is_compiling():
            if not all(of.get(name) is value and _version(value) == at for of, name, value, at in self._kept.of):
                self.freeze()
        elif _is_exporting() or self._kept.value is None or not self._kept.value.is_traceable:
            return None
        return self._kept.value

    def freeze(self) -> None:
        """Keeps what the weights come to.

        A change that PyTorch does not count, through `.data` or in inference mode, goes unnoticed until `train()`, and
        compiled code notices none.
        """
        with torch.no_grad():
            value = self.derive()
        self._kept = _Kept(value, tuple((of, name, of[name], _version(of[name])) for of, name in self._sources()))

    def _sources(self) -> Iterator[tuple[dict, str]]:
        """Where a module has its parts and weights: what `derive` can have read."""
        for module in self.modules():
            for of in (module._modules, module._parameters, module._buffers):
                yield from ((of, name) for name in of)

    def train(self, mode: bool = True):
        if mode:
            self._kept = None
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self._kept = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self._kept = None
        return super()._load_from_state_dict(*args, **kwargs)


def _version(value: Any) -> int:
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else 0


def _is_exporting() -> bool:
    # Code that torch 2.11 compiles is told that it is exported. Of export, only the strict one goes that way.
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def freeze(module: nn.Module) -> None:
    """Puts the module into eval mode and keeps what its layers derive from their weights, for inference.

    SPADE layers keep their weights packed; `Conv2d` keeps its weight with the spectral norm folded in and, on CPU, laid
    out for the fastest convolution there: a 3 x 3 one with transformed weights (`reference.conv`), which take 16/9 of
    the memory and spread an Inf or NaN by one more pixel. Wrapped, hooked and replaced modules keep nothing. Undone by
    `module.train()`.

    Raises:
        TypeError: not a module. ValueError: it holds no such layer.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"freeze takes an nn.Module, got {type(module).__name__}")
    parts = [part for part in module.modules() if isinstance(part, Freezable)]
    if not parts:
        raise ValueError(
            f"{type(module).__name__} holds no SPADE layer and no Conv2d of spade_kernels: there is nothing to freeze; "
            "module.eval() is all it takes for inference"
        )
    module.eval()
    for part in parts:
        part.freeze()
