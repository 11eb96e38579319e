"""Freezing: modules that pack their weights for inference, and the rule for when packed weights are valid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from spade_kernels import transforms


class _Packed(NamedTuple):
    """Packed weights, and the parts and weights they were packed from: where these are, and their versions."""

    value: Any
    sources: tuple[tuple[dict, str, Any, tuple[int, int]], ...]

    # A copy of a module is not frozen, however it is made: its parts and weights are others.
    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()


class Freezable(nn.Module):
    """Base of modules that can be frozen: `pack()` returns packed weights, `packed()` the valid ones.

    Packed weights are valid from `freeze()` on, until the module or one that contains it is put into training mode,
    moved, or loads a state dict. Within that time, a weight that is replaced, through `.data` too, or changed in a way
    that PyTorch counts, has them packed again. Writes into `.data` or in inference mode, which PyTorch does not count,
    go unnoticed, and compiled code notices no change.
    """

    _packed: _Packed | None = None

    def pack(self) -> Any:
        """Packed weights: an object with an attribute `is_traceable`; None if this module cannot be packed."""
        raise NotImplementedError

    def packed(self) -> Any:
        """The valid packed weights. They have no derivatives.

        Returns:
            None if the module is not frozen or cannot be packed, and where the weights have to be read: while gradients
            are recorded, within a transform of torch.func, in exported code, and in compiled code unless the packed
            weights are traceable.
        """
        if self._packed is None or torch.is_grad_enabled() or transforms.are_active():
            return None
        if not torch.compiler.is_compiling():
            if not all(of.get(name) is value and _version(value) == at for of, name, value, at in self._packed.sources):
                self.freeze()
        elif _is_exporting() or self._packed.value is None or not self._packed.value.is_traceable:
            return None
        return self._packed.value

    def freeze(self) -> None:
        """Packs the weights."""
        with torch.no_grad():
            value = self.pack()
        self._packed = _Packed(value, tuple((of, name, of[name], _version(of[name])) for of, name in self._sources()))

    def _sources(self) -> Iterator[tuple[dict, str]]:
        """Where the module has the parts and weights that `pack` can have read."""
        for module in self.modules():
            for of in (module._modules, module._parameters, module._buffers):
                yield from ((of, name) for name in of)

    def train(self, mode: bool = True):
        if mode:
            self._packed = None
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self._packed = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self._packed = None
        return super()._load_from_state_dict(*args, **kwargs)


def _version(value: Any) -> tuple[int, int]:
    """A pair that changes if the values are written in a way that PyTorch counts, or replaced through `.data`."""
    if type(value) not in (torch.Tensor, nn.Parameter):
        return 0, 0
    return 0 if value.is_inference() else value._version, value.data_ptr()


def _is_exporting() -> bool:
    # Code that torch 2.11 compiles is told that it is exported. Of export, only the strict one goes that way.
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def freeze(module: nn.Module) -> None:
    """Puts the module into eval mode and packs the weights of its layers, for inference. `module.train()` undoes it.

    SPADE layers pack the weights of their convolutions. `Conv2d` folds the spectral norm into its weight and, on a CPU,
    packs it for the fastest convolution there: a 3 x 3 one with transformed weights (`reference.conv`), which take 16/9
    of the memory and spread an Inf or NaN by one more pixel. Wrapped, hooked and replaced modules pack nothing.

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
