"""Normalization of plain convolutions, selected by the original's option values."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import spectral_norm

from spade_kernels import SyncBatchNorm2d
from spade_model.errors import UserError

_NORMS = {
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=False),
    "batch": lambda channels: nn.BatchNorm2d(channels, affine=True),
    "syncbatch": lambda channels: SyncBatchNorm2d(channels, affine=True),
    "sync_batch": lambda channels: SyncBatchNorm2d(channels, affine=True),
}


def normalized(layer: nn.Conv2d | nn.ConvTranspose2d, norm: str) -> nn.Module:
    """Adds the spectral norm and the normalization layer that `norm` names to a convolution.

    Args:
        norm: [spectral]<none|instance|batch|syncbatch>. With a norm layer, the convolution's bias is removed.

    Raises:
        UserError: `norm` is unknown.
    """
    check_norm(norm)
    name = norm.removeprefix("spectral")
    if norm.startswith("spectral"):
        layer = spectral_norm(layer)
    if name in ("", "none"):
        return layer
    layer.register_parameter("bias", None)
    return nn.Sequential(layer, _NORMS[name](layer.out_channels))


def check_norm(norm: str, option: str = "norm") -> None:
    """Raises UserError for a norm that `normalized` does not know; the message begins with `option`."""
    name = norm.removeprefix("spectral")
    if name not in ("", "none", *_NORMS):
        raise UserError(
            f"{option} {norm!r}: {name!r} is not one of none, {', '.join(_NORMS)}, each with or without 'spectral'"
        )
