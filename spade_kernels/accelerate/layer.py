"""Families of SPADE layers in other people's code, and the class that an accelerated layer gets."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spade_kernels import functional
from spade_kernels.accelerate.projection import Projection, Unsupported
from spade_kernels.condition import Segmap
from spade_kernels.freezing import Freezable
from spade_kernels.functional import ModulationTable, PackedWeights, Weights
from spade_kernels.modulation import DeferredModulation
from spade_kernels.normalization import Moments, Normalized, apply_norm, check_input, identity_statistics

# Attributes that only an accelerated module has.
_OWN = ("_packed", "_spade_family", "_spade_choice", "_spade_least_work")


@dataclass(frozen=True)
class Parts:
    """The parts of a SPADE layer: y = norm(x), then y = y * (scale_offset + gamma) + beta for each condition in turn.

    Attributes:
        norm: the norm of x, a module or a function.
        projections: for each condition the convolutions that compute gamma and beta from it, after it was resized
            (nearest) to the size of x.
        scale_offset: 1, or 0 for layers that scale by gamma alone.
    """

    norm: Callable[[Tensor], Tensor]
    projections: tuple[Projection, ...]
    scale_offset: float = 1.0

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of x, then of each condition."""
        return self.projections[0].features, *(one.channels for one in self.projections)

    def table_weights(self, projection: Projection) -> Weights:
        """Returns the weights for a modulation table.

        If gamma has an instance norm, the weights have no scale offset, because it is added after that norm.
        """
        offset = self.scale_offset if projection.table_eps is None else 0.0
        return projection.weights()._replace(scale_offset=offset)


def formulas(norm: Callable[[Tensor], Tensor], *projections: Projection) -> list[Parts]:
    """Returns a candidate for each of the two formulas in use, which scale by 1 + gamma and by gamma.

    Raises:
        Unsupported: the projections compute different numbers of channels.
    """
    if len({one.features for one in projections}) > 1:
        raise Unsupported("its conditions make gamma and beta of different numbers of channels")
    return [Parts(norm, projections, offset) for offset in (1.0, 0.0)]


class Family:
    """Describes a kind of SPADE layer: how its modules are recognized, and where their parts are.

    A subclass sets `name`, which the report shows, and defines `candidates`. It overrides `inputs` and `example` if the
    layer's forward takes other arguments than (x, condition), and `output` if it changes the modulated x further.
    """

    name = ""

    def candidates(self, module: nn.Module) -> list[Parts]:
        """Returns the formulas that the module may have; a probe finds the one that equals its forward.

        The list is empty if the module is not of this family. The method is called in every forward, with the module as
        it is then, so it must be quick, and always return the candidates in the same order.

        Raises:
            Unsupported: the module is of this family, but a part of it is not supported.
        """
        raise NotImplementedError

    def inputs(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Sequence[Segmap | None]]:
        """Returns x and one condition for each projection, taken from the arguments of the module's forward.

        A projection whose condition is None is skipped.

        Raises:
            Unsupported: there are further arguments, for which the module's original forward has to run.
        """
        arguments = bound_arguments(module, args, kwargs)
        if len(arguments) < 2 or any(other is not None for other in arguments[2:]):
            raise Unsupported("it was called with other arguments than x and a condition")
        return arguments[0], arguments[1:2]

    def example(self, module: nn.Module, x: Tensor, *conditions: Tensor) -> tuple[tuple, dict[str, Any]]:
        """Returns the arguments (args, kwargs) that pass x and the conditions to the module's forward."""
        return (x, *conditions), {}

    def output(self, module: nn.Module, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the result of the module's forward; y is the modulated x, args and kwargs are those of the call."""
        return y

    @property
    def is_plain(self) -> bool:
        """True if the layers use x and the condition as they are given, and return the modulated x."""
        return (type(self).inputs, type(self).output) == (Family.inputs, Family.output)

    # One object serves all copies of a layer.
    def __deepcopy__(self, memo: dict) -> Family:
        return self


def bound_arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
    """Returns the arguments of a call of the module's original forward, in the order of its parameters."""
    if not kwargs:
        return list(args)
    return list(inspect.signature(stock_class(module).forward).bind(module, *args, **kwargs).arguments.values())[1:]


def stock_class(module: nn.Module) -> type[nn.Module]:
    """Returns the class that the module had before it was accelerated; its present class if it was not."""
    return type(module)._stock if isinstance(module, Accelerated) else type(module)


class Accelerated(Freezable):
    """First base of the classes of accelerated modules; the second one is the class that the module had before.

    Only `forward` changes; parameters, buffers, hooks and state_dict do not. Calls that the kernels do not support run
    the original forward, that of the former class. Copies are accelerated, too; an unpickled module has its former
    class.
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
    """Gives the module a class derived from `base` and its present class, and sets `attributes` beside its own."""
    stock = type(module)
    module.__dict__.update(attributes)
    module.__class__ = type(f"Accelerated{stock.__name__}", (base, stock), {"_stock": stock, "__module__": __name__})


def restore_class(module: nn.Module) -> None:
    """Gives an accelerated module the class that it had before."""
    for name in _OWN:
        module.__dict__.pop(name, None)
    module.__class__ = stock_class(module)


class AcceleratedLayer(Accelerated):
    """A SPADE layer whose forward runs the stages of `functional`.

    Calls with less work than `_spade_least_work`, for which the original forward is faster, run that one.
    `_spade_choice` is the index of the layer's formula among the candidates of its family.
    """

    _spade_family: Family
    _spade_choice: int
    _spade_least_work = 0

    def parts(self) -> Parts | None:
        """Returns the layer's present parts; None if they were replaced by some that the kernels do not support."""
        try:
            candidates = self._spade_family.candidates(self)
        except Unsupported:
            return None
        return candidates[self._spade_choice] if self._spade_choice < len(candidates) else None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        call = self._call(args, kwargs)
        if call is None:
            return self._stock.forward(self, *args, **kwargs)
        y = in_layout_of(call[1], self._defer(*call).tensor())
        return self._spade_family.output(self, y, *args, **kwargs)

    def defer(
        self, x: Tensor, condition: Segmap, negative_slope: float = 1.0, moments: Moments | None = None
    ) -> DeferredModulation | None:
        """Computes `forward` and then a leaky ReLU, but defers the last pass over x.

        Returns None if the layer needs its original forward.
        """
        parts = self.parts() if self._spade_family.is_plain else None
        return None if parts is None else self._defer(parts, x, [condition], negative_slope, moments)

    def is_worth(self, parts: Parts, x: Tensor) -> bool:
        """Returns True if x is a non-empty (N, C, h, w), with enough work for the kernels to be faster."""
        if x.dim() != 4 or x.numel() == 0:
            return False
        pixels = len(x) * x.shape[2] * x.shape[3]
        return pixels * sum(one.work for one in parts.projections) >= self._spade_least_work

    def _call(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Parts, Tensor, Sequence[Segmap | None]] | None:
        """Returns the parts, x and the conditions of a call; None if the original forward has to run."""
        parts = self.parts()
        if parts is None:
            return None
        try:
            x, conditions = self._spade_family.inputs(self, *args, **kwargs)
        except Unsupported:
            return None
        given = [condition for condition in conditions if condition is not None]
        is_usual = given and len(conditions) == len(parts.projections) and self.is_worth(parts, x)
        return (parts, x, conditions) if is_usual and all(len(one) == len(x) for one in given) else None

    def _defer(
        self,
        parts: Parts,
        x: Tensor,
        conditions: Sequence[Segmap | None],
        negative_slope: float = 1.0,
        moments: Moments | None = None,
    ) -> DeferredModulation:
        check_input(x, parts.channels[0])
        packed = self.packed() or (None,) * len(conditions)
        # The norm follows all tables: a call that raises must not have updated the running statistics.
        tables = [
            _table(parts, projection, condition, x, weights)
            for projection, condition, weights in zip(parts.projections, conditions, packed, strict=True)
            if condition is not None
        ]
        normalized = apply_norm(parts.norm, x, moments)
        for table in tables[:-1]:
            y = functional.deferred(normalized, table, 1.0).tensor()
            normalized = Normalized(y, identity_statistics(y))
        return functional.deferred(normalized, tables[-1], negative_slope)

    def pack(self) -> PackedLayer | None:
        parts = self.parts()
        if parts is None:
            return None
        return PackedLayer(PackedWeights(parts.table_weights(projection)) for projection in parts.projections)


class PackedLayer(tuple[PackedWeights, ...]):
    """The packed weights of each of a layer's projections."""

    @property
    def is_traceable(self) -> bool:
        return all(weights.is_traceable for weights in self)


def _table(
    parts: Parts, projection: Projection, condition: Segmap, x: Tensor, packed: PackedWeights | None
) -> ModulationTable:
    weights = packed.weights if packed else parts.table_weights(projection)
    table = functional.modulation_table(condition, x.shape[2:], weights, x_dtype=x.dtype, packed=packed)
    if projection.table_eps is None:
        return table
    table = table.instance_normalized(len(x), projection.table_eps)
    scale, shift = table.rows.chunk(2, 1)
    return table.with_rows(torch.cat((scale + parts.scale_offset, shift), 1))


def in_layout_of(x: Tensor, y: Tensor) -> Tensor:
    """Returns y in the memory format of x, because the code around the layer may rely on it."""
    return y if x.is_contiguous(memory_format=torch.channels_last) else y.contiguous()
