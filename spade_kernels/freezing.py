"""Modules that keep what they derive from their weights while the weights stand still."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from spade_kernels import transforms


class Freezable(nn.Module):
    """Base of modules with something to derive from their weights: `derive()` says what.

    `freeze()` keeps it; `train()`, loading a state dict and moving, of the module or one that contains it, let it go,
    and a change of a weight that PyTorch counts has it derived again. What is kept has no derivatives, so it is used
    where no gradients are recorded only.
    """

    _kept: Any = None
    _kept_of: tuple[tuple[dict, str, Any, int], ...] = ()

    def derive(self) -> Any:
        """What `kept` returns while the module is frozen: an object that says whether it `is_traceable`."""
        raise NotImplementedError

    @property
    def kept(self) -> Any:
        """What the weights come to, or None where they have to be read: not frozen, recording gradients, in a
        transform of torch.func, or exported.

        Compiled code reads it as long as it `is_traceable`.
        """
        if self._kept is None or torch.is_grad_enabled() or transforms.are_active():
            return None
        if not torch.compiler.is_compiling() and not self._is_current():
            self.freeze()
        if torch.compiler.is_compiling() and (_is_exporting() or not self._kept.is_traceable):
            return None
        return self._kept

    def freeze(self) -> None:
        """Keeps what the weights come to.

        A change that PyTorch does not count, through `.data` or in inference mode, goes unnoticed until `train()`, and
        compiled code notices none.
        """
        with torch.no_grad():
            self._kept = self.derive()
        self._kept_of = tuple((of, name, of[name], _version(of[name])) for of, name in self._sources())

    def _sources(self) -> Iterator[tuple[dict, str]]:
        """Where a module has its parts and weights: what `derive` can have read."""
        for module in self.modules():
            for of in (module._modules, module._parameters):
                yield from ((of, name) for name in of)
        yield from ((self._buffers, name) for name in self._buffers)

    def _is_current(self) -> bool:
        return all(of.get(name) is value and _version(value) == at for of, name, value, at in self._kept_of)

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

    def __getstate__(self):
        return self.__dict__ | {"_kept": None, "_kept_of": ()}


def _version(value: Any) -> int:
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else 0


def _is_exporting() -> bool:
    # Code that torch 2.11 compiles is told that it is exported. Of export, only the strict one goes that way.
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def freeze(module: nn.Module) -> None:
    """Puts the module into eval mode and keeps what its layers derive from their weights, for inference.

    SPADE layers keep their weights packed; `Conv2d` keeps its weight with the spectral norm folded in and, on CPU, laid
    out for the fastest convolution there: a 3 x 3 one with transformed weights (`reference.conv`), which take 16/9 of
    the memory and spread an Inf or NaN by one more pixel. Undone by `module.train()`.
    """
    module.eval()
    for part in module.modules():
        if isinstance(part, Freezable):
            part.freeze()
