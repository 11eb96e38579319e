"""SPADE as a drop-in layer: the original's constructor, forward, module names and state_dict keys."""

from __future__ import annotations

import re

import torch
from torch import nn

from spade_kernels import functional
from spade_kernels.functional import Segmap
from spade_kernels.normalization import SyncBatchNorm2d, check_input, statistics

_HIDDEN = 128


class SPADE(nn.Module):
    """Spatially-adaptive normalization (Park et al., CVPR 2019, section 3.1).

    Args:
        config_text: holds `spade<norm><k>x<k>`, for example "spadesyncbatch3x3": the parameter-free norm (instance,
            batch or syncbatch) and the size of the convolutions (one odd digit; the first counts).
        norm_nc: channels C of the normalized tensor.
        label_nc: channels of the condition: classes, plus one for the instance boundary plane when it is used.

    Raises:
        ValueError: config_text names no norm or an even kernel size.
    """

    def __init__(self, config_text: str, norm_nc: int, label_nc: int):
        super().__init__()
        norm, kernel_size = _parse(config_text)
        padding = kernel_size // 2
        self.param_free_norm = norm(norm_nc, affine=False)
        self.mlp_shared = nn.Sequential(nn.Conv2d(label_nc, _HIDDEN, kernel_size, padding=padding), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(_HIDDEN, norm_nc, kernel_size, padding=padding)
        self.mlp_beta = nn.Conv2d(_HIDDEN, norm_nc, kernel_size, padding=padding)

    def forward(self, x: torch.Tensor, segmap: Segmap, slope: float = 1.0) -> torch.Tensor:
        """normalize(x) * (1 + gamma) + beta, with gamma and beta from the condition; see `functional.spade`.

        Args:
            x: (N, norm_nc, h, w).
            segmap: LabelMap, integer label map (N, H, W), or one-hot / dense float tensor (N, label_nc, H, W).
            slope: of a leaky ReLU applied to the result; 1 is none.
        """
        shared = self.mlp_shared[0]
        # Checked first: what is refused must not have moved the running statistics.
        check_input(x, self.mlp_gamma.out_channels)
        segmap = functional.as_condition(segmap, shared.in_channels, like=x)  # type: ignore[arg-type]
        # The kernels read channels-last; statistics, modulation and their gradients share one conversion.
        x = x.contiguous(memory_format=torch.channels_last)
        return functional.spade(
            x,
            segmap,
            statistics(self.param_free_norm, x),
            (shared.weight, shared.bias),  # type: ignore[arg-type]
            (self.mlp_gamma.weight, self.mlp_gamma.bias),  # type: ignore[arg-type]
            (self.mlp_beta.weight, self.mlp_beta.bias),  # type: ignore[arg-type]
            slope,
        )


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
