"""Families of SPADE layers in other people's code, and the class that an accelerated layer gets."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spade_kernels import functional
from spade_kernels.condition import Segmap
from spade_kernels.convolution import is_plain
from spade_kernels.freezing import Freezable
from spade_kernels.functional import PackedWeights, Weights
from spade_kernels.modulation import DeferredModulation
from spade_kernels.normalization import Moments, apply_norm, has_hooks

# Attributes that only an accelerated module has.
_OWN = ("_packed", "_spade_family", "_spade_choice")


class Unsupported(Exception):
    """A module looks like a layer of the family and cannot be accelerated; the message is the reason."""


@dataclass(frozen=True)
class Parts:
    """The parts of a SPADE layer: y = norm(x) * (scale_offset + gamma) + beta.

    Attributes:
        norm: the norm of x.
        weights: of the convolutions that make gamma and beta of the condition, which is resized (nearest) to x.
        table_eps: eps of an instance norm of gamma and beta; None if there is none.
    """

    norm: nn.Module
    weights: Weights
    table_eps: float | None = None

    @property
    def channels(self) -> tuple[int, int]:
        """Channels of x and of the condition."""
        return self.weights.gamma[0].shape[0], self.weights.shared[0].shape[1]


class Family:
    """Recognizes the layers of a kind by their structure and says where their parts are.

    A subclass sets `name` and defines `candidates`; it overrides `inputs` and `example` if the layer's forward takes
    other arguments than (x, condition).
    """

    name = ""

    def candidates(self, module: nn.Module) -> list[Parts]:
        """Returns the formulas that the module may have; a probe finds the one that equals its forward.

        The list is empty if the module is not of this family. The method is called in every forward, with the module as
        it is then, so it must be quick, and its order must not change.

        Raises:
            Unsupported: it is of this family, but a part of it is not supported.
        """
        raise NotImplementedError

    def inputs(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Segmap]:
        """Returns (x, condition), taken from the arguments of the module's forward.

        Raises:
            Unsupported: there are others; the module's own forward then takes the call.
        """
        arguments = bound_arguments(module, args, kwargs)
        if len(arguments) < 2 or any(other is not None for other in arguments[2:]):
            raise Unsupported("it was called with other arguments than x and a condition")
        return arguments[0], arguments[1]

    def example(self, module: nn.Module, x: Tensor, condition: Tensor) -> tuple[tuple, dict[str, Any]]:
        """Returns the arguments (args, kwargs) with which the module's forward takes this x and condition."""
        return (x, condition), {}

    # One object serves all copies of a layer.
    def __deepcopy__(self, memo: dict) -> Family:
        return self


def bound_arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
    """Returns the arguments of a call of the module's own forward, in the order of its parameters."""
    if not kwargs:
        return list(args)
    return list(inspect.signature(stock_class(module).forward).bind(module, *args, **kwargs).arguments.values())[1:]


def stock_class(module: nn.Module) -> type[nn.Module]:
    """Returns the class that an accelerated module had before, and the class of any other module."""
    return type(module)._stock if isinstance(module, Accelerated) else type(module)


class Accelerated(Freezable):
    """Base of the classes of accelerated modules; their second base is the class that the module had before.

    Only `forward` changes; parameters, buffers, hooks and state_dict do not. Calls that kernels do not support go to
    the forward that the module had. Copies are accelerated, too; a pickled module is loaded with its former class.
    """

    _stock: type[nn.Module]

    def __deepcopy__(self, memo: dict) -> nn.Module:
        twin = self._stock.__new__(self._stock)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        twin.__class__ = type(self)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name not in _OWN}
        return _new, (self._stock,), state


def _new(stock: type[nn.Module]) -> nn.Module:
    return stock.__new__(stock)


def swap_class(module: nn.Module, base: type[Accelerated], **attributes: Any) -> None:
    """Gives the module a class derived from `base` and its own; its attributes and its identity stay."""
    stock = type(module)
    module.__dict__.update(attributes)
    module.__class__ = type(f"Accelerated{stock.__name__}", (base, stock), {"_stock": stock, "__module__": __name__})


def restore_class(module: nn.Module) -> None:
    """Gives an accelerated module the class that it had before."""
    for name in _OWN:
        module.__dict__.pop(name, None)
    module.__class__ = stock_class(module)


class AcceleratedLayer(Accelerated):
    """A SPADE layer whose forward is `functional.spade`."""

    _spade_family: Family
    _spade_choice: int

    def parts(self) -> Parts | None:
        """The layer's parts as they are now; None if they have become something that only its own forward can do."""
        try:
            candidates = self._spade_family.candidates(self)
        except Unsupported:
            return None
        return candidates[self._spade_choice] if self._spade_choice < len(candidates) else None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        call = self._call(args, kwargs)
        if call is None:
            return self._stock.forward(self, *args, **kwargs)
        return in_layout_of(call[1], self._defer(*call).tensor())

    def defer(
        self, x: Tensor, condition: Segmap, negative_slope: float = 1.0, moments: Moments | None = None
    ) -> DeferredModulation | None:
        """`forward` without its last pass over x, followed by a leaky ReLU; None if only the own forward can do it."""
        parts = self.parts()
        return None if parts is None else self._defer(parts, x, condition, negative_slope, moments)

    def _call(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Parts, Tensor, Segmap] | None:
        """Returns the parts, x and the condition of a call; None if it goes to the own forward."""
        parts = self.parts()
        if parts is None:
            return None
        try:
            x, condition = self._spade_family.inputs(self, *args, **kwargs)
        except Unsupported:
            return None
        return None if x.dim() != 4 or x.numel() == 0 or len(condition) != len(x) else (parts, x, condition)

    def _defer(
        self, parts: Parts, x: Tensor, condition: Segmap, negative_slope: float = 1.0, moments: Moments | None = None
    ) -> DeferredModulation:
        if parts.table_eps is None:
            return functional.defer_spade(
                x,
                condition,
                parts.norm,
                parts.weights,
                negative_slope=negative_slope,
                moments=moments,
                packed=self.packed(),
            )
        plain = parts.weights._replace(scale_offset=0.0)
        table = functional.modulation_table(condition, x.shape[2:], plain, x_dtype=x.dtype, packed=self.packed())
        table = table.instance_normalized(len(x), parts.table_eps)
        scale, shift = table.rows.chunk(2, 1)
        table = table.with_rows(torch.cat((scale + parts.weights.scale_offset, shift), 1))
        return functional.deferred(apply_norm(parts.norm, x, moments), table, negative_slope)

    def pack(self) -> PackedWeights | None:
        parts = self.parts()
        if parts is None:
            return None
        plain = parts.weights if parts.table_eps is None else parts.weights._replace(scale_offset=0.0)
        return PackedWeights(plain)


def in_layout_of(x: Tensor, y: Tensor) -> Tensor:
    """y in the memory format of x, which the code around the layer may rely on."""
    return y if x.is_contiguous(memory_format=torch.channels_last) else y.contiguous()


def leaves(module: nn.Module) -> Iterator[nn.Module]:
    """The modules without children inside a module, in order, that do something in evaluation and training."""
    children = list(module.children())
    if not children and not isinstance(module, nn.Identity):
        yield module
    for child in children:
        yield from leaves(child)


def convolution(name: str, module: nn.Module) -> nn.Conv2d:
    """The one convolution that a module consists of.

    Raises:
        Unsupported: it is not a k x k convolution with stride 1, zero padding k // 2 and odd k, or it has hooks.
    """
    found = list(leaves(module))
    if len(found) != 1 or not isinstance(found[0], nn.Conv2d):
        raise Unsupported(f"{name} is not one 2-d convolution")
    conv = found[0]
    if has_hooks(conv) or (conv is not module and has_hooks(module)):
        raise Unsupported(f"{name} has hooks")
    side = conv.kernel_size[0]
    if not is_plain(conv) or side % 2 == 0 or conv.kernel_size != (side, side) or conv.padding != (side // 2,) * 2:
        raise Unsupported(f"{name} is a convolution of another kind than k x k with stride 1 and zero padding k // 2")
    return conv


def shared_convolution(name: str, module: nn.Module) -> tuple[nn.Conv2d, float]:
    """The convolution of a module that is one and a ReLU or leaky ReLU after it, and its negative slope.

    Raises:
        Unsupported: it is something else.
    """
    *before, activation = list(leaves(module)) or [module]
    if len(before) != 1 or has_hooks(activation) or has_hooks(module):
        raise Unsupported(f"{name} is not a convolution and an activation")
    if type(activation) is nn.ReLU:
        return convolution(name, before[0]), 0.0
    if type(activation) is nn.LeakyReLU:
        return convolution(name, before[0]), activation.negative_slope
    raise Unsupported(f"{name} has the activation {type(activation).__name__}, not a ReLU or leaky ReLU")


def normed_convolution(name: str, module: nn.Module) -> tuple[nn.Conv2d, float | None]:
    """The convolution of a module that is one, perhaps with an instance norm after it, and the norm's eps or None.

    Raises:
        Unsupported: it is something else.
    """
    found = list(leaves(module))
    if len(found) != 2 or type(found[1]) is not nn.InstanceNorm2d:
        return convolution(name, module), None
    norm = found[1]
    if norm.affine or norm.track_running_stats or has_hooks(norm) or has_hooks(module):
        raise Unsupported(f"{name} has an instance norm with weights, running statistics or hooks")
    return convolution(name, found[0]), norm.eps
