"""SPADE as a drop-in layer, its names and state_dict keys the original's, and the convolution that follows one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from spade_kernels import functional
from spade_kernels.convolution import Conv2d
from spade_kernels.freezing import Freezable
from spade_kernels.functional import KeptWeights, Segmap, Weights
from spade_kernels.label_map import LabelMap
from spade_kernels.normalization import (
    Moments,
    SyncBatchNorm2d,
    check_input,
    has_hooks,
    identity_statistics,
    is_parameter_free,
    statistics,
)
from spade_kernels.ops import Modulated
from spade_kernels.transforms import channels_last

_HIDDEN = 128


class SPADE(Freezable):
    """Spatially-adaptive normalization (Park et al., CVPR 2019, section 3.1).

    Args:
        config_text: holds `spade<norm><k>x<k>`, for example "spadesyncbatch3x3": the parameter-free norm (instance,
            batch or syncbatch) and the size of the convolutions (one odd digit; the first counts).
        norm_nc: channels C of the normalized tensor.
        label_nc: channels of the condition: classes, plus one for the instance boundary plane when it is used.

    Its modules can be wrapped, hooked or replaced. Others than convolutions with zero padding, a ReLU and a norm
    without parameters are called as they are, at every pixel.

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
        slope: float = 1.0,
        *,
        gain: torch.Tensor | None = None,
        upsample: int = 1,
        moments: Moments | None = None,
    ) -> torch.Tensor:
        """normalize(x) * (1 + gamma) + beta, with gamma and beta from the condition; see `functional.spade`.

        Args:
            x: (N, norm_nc, h, w).
            segmap: LabelMap, integer label map (N, H, W), or one-hot / dense float tensor (N, label_nc, H, W).
            slope: of a leaky ReLU applied to the result; 1 is none.
            gain: positive number the result is multiplied by.
            upsample: 2 for a result twice as large, as if x had been upsampled (nearest) before.
            moments: `normalization.moments` of x, where another layer has taken them already.
        """
        return self.modulated(x, segmap, slope, gain=gain, upsample=upsample, moments=moments).tensor()

    def modulated(
        self,
        x: torch.Tensor,
        segmap: Segmap,
        slope: float = 1.0,
        *,
        gain: torch.Tensor | None = None,
        upsample: int = 1,
        moments: Moments | None = None,
    ) -> Modulated:
        """`forward`, but for the last pass over x."""
        # Checked first: what is refused must not have moved the running statistics.
        as_built = self._is_as_built()
        check_input(x, self.norm_nc)
        condition_channels = self.mlp_shared[0].in_channels if as_built else self.label_nc
        segmap = functional.as_condition(segmap, condition_channels, like=x)  # type: ignore[arg-type]
        parameter_free = is_parameter_free(self.param_free_norm)
        if not parameter_free:
            x, upsample = self.param_free_norm(F.interpolate(x, scale_factor=upsample) if upsample > 1 else x), 1
        # The kernels read channels-last; statistics, modulation and their gradients share one conversion.
        x = channels_last(x)
        stats = statistics(self.param_free_norm, x, moments, upsample) if parameter_free else identity_statistics(x)
        if as_built:
            return functional.modulated(
                x, segmap, stats, self._weights(), slope=slope, gain=gain, upsample=upsample, kept=self.kept
            )
        table = self._table_by_modules(segmap, [side * upsample for side in x.shape[2:]])
        table = table if gain is None else table * gain.to(table.dtype)
        return Modulated(x, stats.mean, stats.rstd, table, None, None, None, None, slope, upsample, stats.stats_over)

    def derive(self) -> KeptWeights | None:
        return KeptWeights(self._weights()) if self._is_as_built() else None

    def _is_as_built(self) -> bool:
        """Whether the condition goes through three convolutions and a ReLU and nothing else, as kernels take it."""
        shared, gamma, beta = self.mlp_shared, self.mlp_gamma, self.mlp_beta
        if type(shared) is not nn.Sequential or len(shared) != 2 or type(shared[1]) is not nn.ReLU:
            return False
        return not (has_hooks(shared) or has_hooks(shared[1])) and all(map(_is_plain, (shared[0], gamma, beta)))

    def _table_by_modules(self, segmap: Segmap, size: Sequence[int]) -> torch.Tensor:
        """(N*h*w, 2C): every pixel's scale and shift, from whatever stands for the convolutions."""
        dtype = next(self.mlp_shared.parameters()).dtype
        planes = segmap.one_hot(dtype) if isinstance(segmap, LabelMap) else segmap.to(dtype)
        hidden = self.mlp_shared(F.interpolate(planes, tuple(size)))
        table = torch.cat((1 + self.mlp_gamma(hidden), self.mlp_beta(hidden)), 1)
        return table.permute(0, 2, 3, 1).flatten(0, 2)

    def _weights(self) -> Weights:
        convolutions = (self.mlp_shared[0], self.mlp_gamma, self.mlp_beta)
        return Weights(*((c.weight, c.bias) for c in convolutions))  # type: ignore[arg-type]


def _is_plain(module: nn.Module) -> bool:
    """Whether a call of the module is nothing but a convolution with its weight and bias that keeps the size."""
    if not isinstance(module, nn.Conv2d) or type(module).forward is not nn.Conv2d.forward or has_hooks(module):
        return False
    how = module.stride, module.dilation, module.groups, module.padding_mode
    half = tuple(side // 2 for side in module.kernel_size)
    return module.bias is not None and module.padding == half and how == ((1, 1), (1, 1), 1, "zeros")


def convolved(
    conv: Conv2d,
    norm: SPADE,
    x: torch.Tensor,
    segmap: Segmap,
    slope: float = 1.0,
    add: torch.Tensor | None = None,
    **how: Any,
) -> torch.Tensor:
    """conv(norm(x, segmap, slope, **how)) + add, with fewer passes over x and the convolution's weight.

    In training the convolution's spectral norm is divided out of the norm's small table. Frozen, compiled CPU kernels
    make the norm's result where the convolution reads it: no tensor of that size exists. The norm's hooks are called.
    """
    if conv.kept is not None and not (norm._forward_hooks or norm._forward_pre_hooks):
        return conv(norm.modulated(x, segmap, slope, **how), add=add)
    weight, gain = conv.weight_and_gain()
    return conv(norm(x, segmap, slope, gain=gain, **how), weight, add)


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
