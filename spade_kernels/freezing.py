"""Freezing: modules that pack their weights for inference, and the rule for when packed weights are valid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from spade_kernels import transforms


class _Packed(NamedTuple):
    """Packed weights and their sources: (dict, name, object, version) of each module and tensor they are made from."""

    value: Any
    sources: tuple[tuple[dict, str, Any, tuple[int, int]], ...]

    # A copy of a module, by deepcopy or pickle, is not frozen: it has other submodules and weights.
    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()


class Freezable(nn.Module):
    """Base class of freezable modules: `pack()` packs the weights, and `packed()` returns them while they are valid.

    Packed weights are valid from `freeze()` on, until the module or one that contains it is put into training mode,
    moved, or loads a state dict. In between, `packed()` packs again after a weight was replaced (also through `.data`)
    or changed in place in a way that raises its version counter. Writes into `.data` or in inference mode do not raise
    the counter and go unnoticed, and compiled code notices no change.
    """

    _packed: _Packed | None = None

    def pack(self) -> Any:
        """Packed weights: an object with an attribute `is_traceable`; None if this module cannot be packed."""
        raise NotImplementedError

    def packed(self) -> Any:
        """Returns the valid packed weights, which have no derivatives.

        The result is None if the module is not frozen or cannot be packed, and where the original weights are needed:
        while gradients are recorded, within a transform of torch.func, in exported code, and in compiled code unless
        the packed weights are traceable.
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
        """Yields (dict, name) of every submodule, parameter and buffer that `pack` can read."""
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
    """(version, address) of a tensor. In-place writes that PyTorch counts and a new `.data` change the pair."""
    if type(value) not in (torch.Tensor, nn.Parameter):
        return 0, 0
    return 0 if value.is_inference() else value._version, value.data_ptr()


def _is_exporting() -> bool:
    # torch 2.11 reports `is_exporting` in all code that Dynamo compiles. Of exports, only strict ones use Dynamo.
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def freeze(module: nn.Module) -> None:
    """Puts the module into eval mode and packs the weights of its layers, for inference. `module.train()` undoes it.

    SPADE layers pack the weights of their convolutions. `Conv2d` folds the spectral norm into its weight and, on a CPU,
    packs the weight for the fastest convolution there. For 3 x 3 convolutions the packed weight is transformed
    (`reference.conv`): it takes 16/9 of the memory, and an Inf or NaN in the input spreads by one more pixel. Modules
    that are wrapped, hooked or replaced are not packed.

    Raises:
        TypeError: `module` is not an nn.Module.
        ValueError: it contains no SPADE layer and no `Conv2d` of this package.
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
