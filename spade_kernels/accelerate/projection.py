"""The convolutions that compute gamma and beta from a condition, found in the modules of other people's layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from spade_kernels.functional import Weights
from spade_kernels.normalization import has_hooks


class Unsupported(Exception):
    """Raised for a module that looks like a layer of a family but cannot be accelerated; the message is the reason."""


@dataclass(frozen=True)
class Projection:
    """Description of the convolutions that compute gamma and beta from one condition.

    Attributes:
        features, channels: channels of x and of the condition.
        work: multiplications for each pixel of x if the convolutions are evaluated at every pixel.
        weights: function that returns the present weights. It has to be called once in each forward, because spectral
            norm in training changes them in each call.
        table_eps: eps of an instance norm of gamma and beta; None if there is none.
    """

    features: int
    channels: int
    work: int
    weights: Callable[[], Weights]
    table_eps: float | None = None

    @classmethod
    def of(
        cls,
        module: nn.Module,
        shared: str | None,
        gamma: str | None,
        beta: str,
        pad: nn.Module | None = None,
        scales: bool = True,
    ) -> Projection:
        """Returns the projection whose convolutions are the submodules with the given names.

        Args:
            shared: name of a convolution and its activation; None if there is no hidden layer.
            gamma: name of gamma's convolution; None if that of `beta` has 2C channels, first those of gamma.
            pad: a module that is applied to the hidden layer before gamma and beta.
            scales: False if the layer only adds beta.

        Raises:
            Unsupported: a submodule is something else than a convolution that the kernels support.
        """
        find = module.get_submodule
        first = None if shared is None else hidden_layer(shared, find(shared))
        second = None if gamma is None else output_layer(gamma, find(gamma), pad)
        third = output_layer(beta, find(beta), pad)
        return cls.joined(first, second, third, scales)

    @classmethod
    def joined(
        cls, shared: HiddenLayer | None, gamma: OutputLayer | None, beta: OutputLayer, scales: bool = True
    ) -> Projection:
        """Returns the projection of the given layers; see `of`."""
        outputs = [beta] if gamma is None else [gamma, beta]
        if len({one.eps for one in outputs}) > 1:
            raise Unsupported("gamma and beta are normalized differently")
        layers = ([shared.convolution] if shared else []) + [one.convolution for one in outputs]
        modes = {one.padding_mode for one in layers if one.kernel_size > 1} or {"zeros"}
        if len(modes) > 1:
            raise Unsupported("its convolutions pad differently")
        if len(modes - {"zeros"}) and len({one.kernel_size for one in layers}) > 1:
            raise Unsupported("its convolutions have reflection padding and kernels of different sizes")
        inputs, features = {one.module.in_channels for one in layers[-len(outputs) :]}, beta.convolution.features
        if shared and inputs != {shared.convolution.features}:
            raise Unsupported("gamma and beta do not take the number of channels that the hidden layer has")
        if gamma is None and features % 2:
            raise Unsupported("the convolution for gamma and beta has an odd number of channels")
        if len({one.convolution.features for one in outputs}) > 1 or len(inputs) > 1:
            raise Unsupported("gamma and beta have different numbers of channels")
        (mode,) = modes
        slope = shared.negative_slope if shared else 0.0
        side = max(one.kernel_size for one in layers)

        def weights() -> Weights:
            pairs = [one.weight_and_bias(side) for one in layers]
            of_shared = pairs.pop(0) if shared else None
            if gamma is None:
                pairs = list(zip(*(t.chunk(2) for t in pairs[0]), strict=True))
            of_gamma, of_beta = pairs
            if not scales:
                of_gamma = torch.zeros_like(of_gamma[0]), torch.zeros_like(of_gamma[1])
            return Weights(of_shared, of_gamma, of_beta, slope, padding_mode=mode)

        channels, work = layers[0].module.in_channels, sum(one.work for one in layers)
        return cls(features if gamma else features // 2, channels, work, weights, beta.eps)


class Convolution(NamedTuple):
    """A convolution with stride 1 that keeps height and width, with padding by zeros or by reflection."""

    module: nn.Conv2d
    padding_mode: str

    @property
    def kernel_size(self) -> int:
        return self.module.kernel_size[0]

    @property
    def features(self) -> int:
        return self.module.out_channels

    @property
    def work(self) -> int:
        """Multiplications for each pixel."""
        return self.kernel_size**2 * self.module.in_channels * self.features

    def weight_and_bias(self, side: int) -> tuple[Tensor, Tensor]:
        """Returns the weight, padded with zeros to a side x side kernel, and the bias, zeros if there is none."""
        weight = weight_of(self.module)
        if self.kernel_size < side:
            weight = F.pad(weight, [(side - self.kernel_size) // 2] * 4)
        bias = self.module.bias
        return weight, weight.new_zeros(len(weight)) if bias is None else bias


class HiddenLayer(NamedTuple):
    """A convolution and its leaky ReLU; the slope is 0 for a ReLU, and 1 if there is no activation."""

    convolution: Convolution
    negative_slope: float


class OutputLayer(NamedTuple):
    """The convolution of gamma or beta, and eps of the instance norm after it; None if there is no norm."""

    convolution: Convolution
    eps: float | None


def leaves(module: nn.Module) -> Iterator[nn.Module]:
    """Yields the modules without children inside a module, in order, except identities. A Conv2d is never split."""
    children = [] if isinstance(module, nn.Conv2d) else list(module.children())
    if not children and not isinstance(module, nn.Identity):
        yield module
    for child in children:
        yield from leaves(child)


def hidden_layer(name: str, module: nn.Module) -> HiddenLayer:
    """Returns the hidden layer that a module consists of.

    Args:
        name: the module's name, for messages.

    Raises:
        Unsupported: the module is not a convolution, optionally with reflection padding before it and a ReLU or leaky
            ReLU after it.
    """
    *before, last = list(leaves(module)) or [module]
    if isinstance(last, nn.Conv2d):
        return HiddenLayer(_convolution(name, module, [*before, last]), 1.0)
    if not before or has_hooks(last) or has_hooks(module):
        raise Unsupported(f"{name} is not a convolution and an activation")
    if type(last) is nn.ReLU:
        return HiddenLayer(_convolution(name, module, before), 0.0)
    if type(last) is nn.LeakyReLU:
        return HiddenLayer(_convolution(name, module, before), last.negative_slope)
    raise Unsupported(f"{name} has the activation {type(last).__name__}, not a ReLU or leaky ReLU")


def output_layer(name: str, module: nn.Module, pad: nn.Module | None = None) -> OutputLayer:
    """Returns the convolution that a module consists of, optionally with an instance norm after it.

    Args:
        name: the module's name, for messages.
        pad: a module that is applied before it.

    Raises:
        Unsupported: the module is something else.
    """
    found = ([] if pad is None else list(leaves(pad))) + list(leaves(module))
    norm = found[-1] if found else None
    if type(norm) is not nn.InstanceNorm2d:
        return OutputLayer(_convolution(name, module, found), None)
    if norm.affine or norm.track_running_stats or has_hooks(norm) or has_hooks(module):
        raise Unsupported(f"{name} has an instance norm with weights, running statistics or hooks")
    return OutputLayer(_convolution(name, module, found[:-1]), norm.eps)


def _convolution(name: str, module: nn.Module, found: list[nn.Module]) -> Convolution:
    """Returns the convolution in `found`, the leaves of the module: a convolution, optionally after its padding.

    Raises:
        Unsupported: they are something else, or the kernels do not support the convolution.
    """
    *before, conv = found or [module]
    if not isinstance(conv, nn.Conv2d) or len(before) > 1:
        raise Unsupported(f"{name} is not one 2-d convolution")
    if not can_read_weight(conv) or any(has_hooks(one) for one in (module, *before) if one is not conv):
        raise Unsupported(f"{name} has hooks, or is of a class derived from Conv2d")
    side = conv.kernel_size[0]
    settings = conv.kernel_size, conv.stride, conv.dilation, conv.groups
    if side % 2 and settings == ((side, side), (1, 1), (1, 1), 1):
        keeps_size, mode = conv.padding in ((side // 2,) * 2, "same"), conv.padding_mode
        if before:
            reflects = type(before[0]) is nn.ReflectionPad2d and before[0].padding == (side // 2,) * 4
            keeps_size, mode = reflects and conv.padding == (0, 0), "reflect"
        if keeps_size and mode in ("zeros", "reflect"):
            return Convolution(conv, mode if side > 1 else "zeros")
    raise Unsupported(
        f"{name} is a convolution of another kind: it must have an odd square kernel, stride 1, no groups, no "
        "dilation, and zero or reflection padding that keeps height and width"
    )


def can_read_weight(conv: nn.Conv2d) -> bool:
    """Returns True if a call of the module does nothing but `F.conv2d` with the weight that `weight_of` returns."""
    is_parametrized = parametrize.is_parametrized(conv)
    if type(conv) is not nn.Conv2d and not (is_parametrized and type(conv).__bases__ == (nn.Conv2d,)):
        return False
    before = list(conv._forward_pre_hooks.values())
    if any((conv._forward_hooks, conv._backward_hooks, conv._backward_pre_hooks)) or "forward" in conv.__dict__:
        return False
    return not before or (len(before) == 1 and type(before[0]) in (SpectralNorm, WeightNorm))


def weight_of(conv: nn.Conv2d) -> Tensor:
    """Returns the weight of a convolution for which `can_read_weight` is True.

    `torch.nn.utils.spectral_norm` and `weight_norm` compute the weight in a hook, which is called here and stores it in
    the module. In training, spectral norm makes one power iteration.
    """
    for hook in conv._forward_pre_hooks.values():
        hook(conv, ())
    return conv.weight
