"""SPADE as a drop-in layer with the original's module names and state_dict keys, and the convolution after it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import nn

from spade_kernels import functional
from spade_kernels.condition import Segmap, as_condition
from spade_kernels.convolution import Conv2d, is_plain
from spade_kernels.freezing import Freezable
from spade_kernels.functional import Gain, PackedWeights, Weights
from spade_kernels.label_map import LabelMap
from spade_kernels.modulation import DeferredModulation, ModulationTable
from spade_kernels.normalization import Moments, SyncBatchNorm2d, apply_norm, check_input, has_hooks

_HIDDEN = 128


class SPADE(Freezable):
    """Spatially-adaptive normalization (Park et al., CVPR 2019, section 3.1).

    Args:
        config_text: contains `spade<norm><k>x<k>`, for example "spadesyncbatch3x3". The norm, which has no parameters,
            is instance, batch or syncbatch; k is the kernel size of the convolutions, an odd digit. The second digit is
            ignored.
        norm_nc: channels C of the normalized tensor.
        label_nc: channels of the condition: classes, plus one for the instance boundary plane when it is used.

    The layer's modules can be wrapped, hooked or replaced. Unless they are three convolutions of one kernel size with
    zero padding and a ReLU, they are called as they are, at every pixel: `mlp_shared` with the condition (N, label_nc,
    h, w), `mlp_gamma` and `mlp_beta` with its result. The results of these two must broadcast to (N, norm_nc, h, w). A
    norm that has parameters or is of another class is called with x.

    Raises:
        ValueError: config_text names no norm or an even kernel size.
    """

    def __init__(self, config_text: str, norm_nc: int, label_nc: int):
        super().__init__()
        self.norm_nc, self.label_nc = norm_nc, label_nc
        norm, kernel_size = _parse(config_text)
        padding = kernel_size // 2
        self.param_free_norm = norm(norm_nc, affine=False)
        self.mlp_shared = nn.Sequential(nn.Conv2d(label_nc, _HIDDEN, kernel_size, padding=padding), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(_HIDDEN, norm_nc, kernel_size, padding=padding)
        self.mlp_beta = nn.Conv2d(_HIDDEN, norm_nc, kernel_size, padding=padding)

    def forward(
        self,
        x: torch.Tensor,
        segmap: Segmap,
        negative_slope: float = 1.0,
        *,
        gain: Gain | None = None,
        upsample: int = 1,
        moments: Moments | None = None,
    ) -> torch.Tensor:
        """normalize(x) * (1 + gamma) + beta, with gamma and beta from the condition; see `functional.spade`.

        Args:
            x: (N, norm_nc, h, w).
            segmap: LabelMap, integer label map (N, H, W), or one-hot / dense float tensor (N, label_nc, H, W). A
                one-hot tensor is converted once, and again after an in-place change that raises its version counter.
                Writes through `.data` or NumPy do not raise the counter: pass a new tensor or a LabelMap after those.
            negative_slope: slope of a leaky ReLU that is applied to the result; 1 for none.
            gain: factor of the result: a positive number, or a tensor with one element, whose value is not checked. It
                is applied before the leaky ReLU, which matters for negative values only.
            upsample: 1, or 2 for a result of twice the height and width, as if x had been upsampled (nearest) before.
            moments: `normalization.moments(norm, x)`, if the caller has it already.

        Raises:
            TypeError, ValueError: an argument, or the result of `mlp_gamma` or `mlp_beta`, does not fit.
        """
        return self.defer(x, segmap, negative_slope, gain=gain, upsample=upsample, moments=moments).tensor()

    def defer(
        self,
        x: torch.Tensor,
        segmap: Segmap,
        negative_slope: float = 1.0,
        *,
        gain: Gain | None = None,
        upsample: int = 1,
        moments: Moments | None = None,
    ) -> DeferredModulation:
        """`forward` without its last pass over x, the modulation, which a convolution can fuse."""
        if self._is_as_built():
            return functional.defer_spade(
                x,
                segmap,
                self.param_free_norm,
                self._weights(),
                negative_slope=negative_slope,
                gain=gain,
                upsample=upsample,
                moments=moments,
                packed=self.packed(),
            )
        gain = functional.as_gain(gain)
        check_input(x, self.norm_nc)
        functional.check_upsample(upsample)
        segmap = as_condition(segmap, self.label_nc, like=x)
        rows = functional.times(self._rows_by_modules(segmap, x, upsample), gain)
        normalized = apply_norm(self.param_free_norm, x, moments, upsample)
        return functional.deferred(normalized, ModulationTable(rows), negative_slope)

    def pack(self) -> PackedWeights | None:
        return PackedWeights(self._weights()) if self._is_as_built() else None

    def _is_as_built(self) -> bool:
        """True if the condition passes through three convolutions and a ReLU only, as the kernels require."""
        shared, gamma, beta = self.mlp_shared, self.mlp_gamma, self.mlp_beta
        if type(shared) is not nn.Sequential or len(shared) != 2 or type(shared[1]) is not nn.ReLU:
            return False
        if has_hooks(shared) or has_hooks(shared[1]):
            return False
        sizes = {_kernel_size(module) for module in (shared[0], gamma, beta)}
        return len(sizes) == 1 and None not in sizes and gamma.out_channels == beta.out_channels == self.norm_nc

    def _rows_by_modules(self, segmap: Segmap, x: torch.Tensor, upsample: int) -> torch.Tensor:
        """(N*h*w, 2C): the scale and shift of every pixel of the result. The modules are called as they are."""
        n, c, h, w = x.shape
        shape = (n, c, h * upsample, w * upsample)
        modules = self.mlp_shared, self.mlp_gamma, self.mlp_beta
        planes = as_planes(segmap, parameter_dtype(modules, x.dtype))
        hidden = self.mlp_shared(F.interpolate(planes, shape[2:]))
        gamma = _fitted("mlp_gamma", self.mlp_gamma(hidden), hidden, shape)
        beta = _fitted("mlp_beta", self.mlp_beta(hidden), hidden, shape)
        return torch.cat((1 + gamma, beta), 1).permute(0, 2, 3, 1).flatten(0, 2)

    def _weights(self) -> Weights:
        convolutions = (self.mlp_shared[0], self.mlp_gamma, self.mlp_beta)
        return Weights(*((c.weight, c.bias) for c in convolutions))  # type: ignore[arg-type]


def as_planes(segmap: Segmap, dtype: torch.dtype) -> torch.Tensor:
    """The condition (N, channels, H, W) in `dtype`, for modules that take tensors only."""
    return segmap.one_hot(dtype) if isinstance(segmap, LabelMap) else segmap.to(dtype)


def parameter_dtype(modules: Iterable[nn.Module], default: torch.dtype) -> torch.dtype:
    """The dtype of the modules' first floating-point parameter; `default` if there is none."""
    parameters = (parameter for module in modules for parameter in module.parameters())
    return next((parameter.dtype for parameter in parameters if parameter.is_floating_point()), default)


def keeps_size(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """True if a call of the module runs only a convolution with a square kernel that keeps height and width."""
    if not is_plain(module):
        return False
    side = module.kernel_size[0]
    return side % 2 == 1 and module.kernel_size == (side, side) and module.padding == (side // 2, side // 2)


def _kernel_size(module: nn.Module) -> int | None:
    """The k of a k x k convolution that has a bias and `keeps_size`; None for other modules."""
    if not keeps_size(module) or module.bias is None:
        return None
    return module.kernel_size[0]


def _fitted(name: str, value: torch.Tensor, hidden: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    try:
        return value.broadcast_to(shape)
    except RuntimeError as error:
        raise ValueError(
            f"{name} gives {tuple(value.shape)} for hidden features {tuple(hidden.shape)}; x needs {tuple(shape)}"
        ) from error


def spade_conv(
    conv: nn.Module,
    norm: nn.Module,
    x: torch.Tensor,
    segmap: Segmap,
    negative_slope: float = 1.0,
    add: torch.Tensor | None = None,
    *,
    upsample: int = 1,
    moments: Moments | None = None,
) -> torch.Tensor:
    """conv(leaky_relu(norm(x, segmap), negative_slope)) + add, with fewer passes over x and the convolution's weight.

    In training, the small modulation table is divided by the convolution's spectral norm instead of the large weight.
    When both modules are frozen, compiled CPU kernels modulate x while the convolution reads it, and never store the
    result.

    Modules of classes other than `Conv2d` and `SPADE`, and modules with hooks, are called as they are: `conv` with a
    tensor, and `norm` with x and the condition, followed by the leaky ReLU. A norm that is not a SPADE layer is called
    with the upsampled x and with the condition as a tensor (N, channels, H, W).
    """
    if not (is_plain(conv, Conv2d) and _is_plain_spade(norm)):
        y = conv(_activated(norm, x, segmap, negative_slope, upsample, moments))
        return y if add is None else y + add
    assert isinstance(conv, Conv2d)
    packed = conv.packed()
    if packed is not None:
        return packed(norm.defer(x, segmap, negative_slope, upsample=upsample, moments=moments), add)
    weight, inv_sigma = conv.weight_and_inv_sigma()
    return conv(norm(x, segmap, negative_slope, gain=inv_sigma, upsample=upsample, moments=moments), weight, add)


def _activated(
    norm: nn.Module, x: torch.Tensor, segmap: Segmap, negative_slope: float, upsample: int, moments: Moments | None
) -> torch.Tensor:
    """leaky_relu(norm(x, segmap), negative_slope), whatever the norm is."""
    if _is_plain_spade(norm):
        return norm(x, segmap, negative_slope, upsample=upsample, moments=moments)
    if isinstance(norm, SPADE) and type(norm).forward is SPADE.forward and "forward" not in norm.__dict__:
        # Hooks may change x, and then the given moments are not those of x.
        y = norm(x, segmap, upsample=upsample)
    else:
        x = F.interpolate(x, scale_factor=upsample) if upsample > 1 else x
        y = norm(x, as_planes(segmap, x.dtype))
    return y if negative_slope == 1 else F.leaky_relu(y, negative_slope)


def _is_plain_spade(norm: nn.Module) -> TypeGuard[SPADE]:
    return isinstance(norm, SPADE) and type(norm).forward is SPADE.forward and not has_hooks(norm)


def _parse(config_text: str) -> tuple[type[nn.Module], int]:
    norms = {"instance": nn.InstanceNorm2d, "batch": nn.BatchNorm2d, "syncbatch": SyncBatchNorm2d}
    match = re.search(r"spade(\D+)(\d)x\d", config_text)
    if match is None:
        raise ValueError(f"{config_text!r} does not hold spade<norm><k>x<k>, for example spadeinstance3x3")
    name, kernel_size = match.group(1), int(match.group(2))
    if name not in norms:
        raise ValueError(f"{config_text!r}: {name!r} is not a SPADE norm; choose one of {', '.join(norms)}")
    if kernel_size % 2 == 0:
        raise ValueError(f"{config_text!r}: the kernel size must be odd, got {kernel_size}")
    return norms[name], kernel_size
