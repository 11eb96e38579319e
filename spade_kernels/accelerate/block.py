"""Accelerates residual blocks: their layers share statistics and condition, their convolutions are fused or faster.

    y = shortcut + conv_1(act(norm_1(conv_0(act(norm_0(x, condition))), condition)))

The shortcut is x, or conv_s(norm_s(x, condition)) (Park et al. 2019, figure 12).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from spade_kernels.accelerate.layer import Accelerated, AcceleratedLayer, Family, in_layout_of
from spade_kernels.accelerate.projection import Unsupported, can_read_weight, weight_of
from spade_kernels.condition import Segmap, as_condition
from spade_kernels.convolution import PackedConv2d, convolve_channels_last, has_stride_1_and_zero_padding
from spade_kernels.modulation import DeferredModulation
from spade_kernels.normalization import Moments, has_hooks, is_fusable, moments
from spade_kernels.transforms import channels_last

_CONVOLUTIONS = ("conv_0", "conv_1", "conv_s")
# Negative slopes of the activation, in the order in which the probe tries them.
SLOPES = (0.2, 0.0)


class ResidualBlock(Family):
    """Takes x and the condition from the arguments of a block. It has no candidates, since a block has no `Parts`."""

    name = "residual block"


_ARGUMENTS = ResidualBlock()


def is_block(module: nn.Module) -> bool:
    """Returns True if the module has the convolutions of a residual block, and accelerated layers as its norms."""
    norms = [getattr(module, name, None) for name in ("norm_0", "norm_1")]
    convolutions = [getattr(module, name, None) for name in ("conv_0", "conv_1")]
    if not all(isinstance(norm, AcceleratedLayer) for norm in norms):
        return False
    if hasattr(module, "conv_s") != isinstance(getattr(module, "norm_s", None), AcceleratedLayer):
        return False
    return all(isinstance(conv, nn.Conv2d) for conv in [*convolutions, getattr(module, "conv_s", convolutions[0])])


class AcceleratedBlock(Accelerated):
    """A residual block whose layers share statistics and whose convolutions are packed when it is frozen."""

    _spade_choice: int
    norm_0: AcceleratedLayer
    norm_1: AcceleratedLayer
    norm_s: AcceleratedLayer
    conv_0: nn.Conv2d
    conv_1: nn.Conv2d
    conv_s: nn.Conv2d

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            x, (condition,) = _ARGUMENTS.inputs(self, *args, **kwargs)
        except Unsupported:
            return self._stock.forward(self, *args, **kwargs)
        parts = self.norm_0.parts() if is_block(self) else None
        if parts is None or condition is None or not self.norm_0.is_worth(parts, x) or len(condition) != len(x):
            return self._stock.forward(self, *args, **kwargs)
        # Families that are not plain change the condition themselves, so they get it unchanged.
        is_plain = self.norm_0._spade_family.is_plain
        segmap = as_condition(condition, parts.channels[1], like=x) if is_plain else condition
        pixels, packed, slope = channels_last(x), self.packed() or {}, SLOPES[self._spade_choice]
        taken = self._moments(pixels)
        shortcut = pixels
        if hasattr(self, "conv_s"):
            shortcut = _convolve(self.conv_s, _modulated(self.norm_s, pixels, segmap, 1.0, taken), packed.get("conv_s"))
        dx = _convolve(self.conv_0, _modulated(self.norm_0, pixels, segmap, slope, taken), packed.get("conv_0"))
        y = _convolve(self.conv_1, _modulated(self.norm_1, dx, segmap, slope, None), packed.get("conv_1"), shortcut)
        return in_layout_of(x, y)

    def _moments(self, x: Tensor) -> Moments | None:
        """Returns the moments of x that norm_0 and norm_s share; None if they cannot share any."""
        layers = [getattr(self, name) for name in ("norm_0", "norm_s") if hasattr(self, name)]
        parts = [layer.parts() for layer in layers if layer._spade_family.is_plain]
        if len(parts) < len(layers) or not all(part is not None and is_fusable(part.norm) for part in parts):
            return None
        return moments(parts[0].norm, x)

    def pack(self) -> _PackedBlock:
        packed = _PackedBlock()
        for name in _CONVOLUTIONS:
            conv = getattr(self, name, None)
            if isinstance(conv, nn.Conv2d) and _is_readable(conv):
                packed[name] = PackedConv2d(weight_of(conv).detach(), conv.bias, conv.padding)  # type: ignore[arg-type]
        return packed


class _PackedBlock(dict):
    """Packed convolutions by name."""

    @property
    def is_traceable(self) -> bool:
        return all(conv.is_traceable for conv in self.values())


def _modulated(
    norm: AcceleratedLayer, x: Tensor, segmap: Segmap, negative_slope: float, taken: Moments | None
) -> Tensor | DeferredModulation:
    """Returns leaky_relu(norm(x, segmap), negative_slope), deferred if the norm supports it."""
    if not has_hooks(norm):
        deferred = norm.defer(x, segmap, negative_slope, taken)
        if deferred is not None:
            return deferred
    y = norm(x, segmap if isinstance(segmap, Tensor) else segmap.one_hot(x.dtype))
    return y if negative_slope == 1 else F.leaky_relu(y, negative_slope)


def _convolve(
    conv: nn.Conv2d, x: Tensor | DeferredModulation, packed: PackedConv2d | None, add: Tensor | None = None
) -> Tensor:
    if packed is not None:
        return packed(x, add)
    x = x.tensor() if isinstance(x, DeferredModulation) else x
    padding: Any = conv.padding
    y = convolve_channels_last(x, weight_of(conv), conv.bias, padding) if _is_readable(conv) else conv(x)
    return y if add is None else y + add


def _is_readable(conv: nn.Conv2d) -> bool:
    """Returns True if `convolve_channels_last` can compute the convolution."""
    return can_read_weight(conv) and has_stride_1_and_zero_padding(conv)
