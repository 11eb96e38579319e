"""Batch, synchronized batch and instance normalization, with statistics merged from `channel_stats`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeGuard

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from spade_kernels import ops, transforms
from spade_kernels.transforms import channels_last

Moments = tuple[Tensor, Tensor]


class Statistics(NamedTuple):
    """Mean and 1/std by which a norm normalizes x, for `ops.modulate`.

    mean, rstd: (N, C) or (1, C) in the accumulation dtype; stats_scope: see `ops.modulate`.
    """

    mean: Tensor
    rstd: Tensor
    stats_scope: str


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.SyncBatchNorm` on any device: batch norm whose training statistics cover all processes.

    With one process it is plain batch norm. It has the parameters, buffers and state_dict keys of `nn.BatchNorm2d`.
    Derivatives exist for the input, weight and bias.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and world_size() > 1):
            return super().forward(input)
        check_input(input, self.num_features)
        stats = statistics(self, input)
        n, channels, h, w = input.shape
        scale = self.weight if self.affine else input.new_ones(channels)
        shift = self.bias if self.affine else input.new_zeros(channels)
        table = torch.cat((scale, shift)).unsqueeze(0)
        pixel_row = torch.zeros(n, h, w, dtype=torch.int64, device=input.device)
        uses = torch.arange(n * h * w, device=input.device), torch.arange(2, device=input.device) * (n * h * w)
        return ops.modulate(input, stats.mean, stats.rstd, table, pixel_row, None, *uses, 1.0, 1, stats.stats_scope)


# `nn.SyncBatchNorm.convert_sync_batchnorm` replaces all other batch norms by `nn.SyncBatchNorm`.
_BATCH_NORMS, _SYNC_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm), (SyncBatchNorm2d, nn.SyncBatchNorm)


def is_fusable(norm: Callable[[Tensor], Tensor]) -> TypeGuard[nn.Module]:
    """True if a call of the norm is normalization by `statistics`, then perhaps an affine map, and nothing else."""
    if not isinstance(norm, nn.Module) or has_hooks(norm):
        return False
    if type(norm) is nn.InstanceNorm2d:
        return not norm.track_running_stats
    of_some = type(norm) is nn.SyncBatchNorm and norm.process_group is not None
    return type(norm) in (nn.BatchNorm2d, nn.GroupNorm, *_SYNC_BATCH_NORMS) and not of_some


def has_hooks(module: nn.Module) -> bool:
    """True if a call of the module does more than its class's forward."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or "forward" in module.__dict__


def moments(norm: nn.Module, x: Tensor) -> Moments | None:
    """`ops.channel_stats` of x (N, C, h, w), or None if the norm uses its running statistics.

    Layers that normalize the same x can share the result.
    """
    return None if _goes_by_running_statistics(norm) else ops.channel_stats(x.detach())


def statistics(norm: nn.Module, x: Tensor, taken: Moments | None = None, upsample: int = 1) -> Statistics:
    """Mean and 1/std of x under a norm module, without its affine map; updates its running statistics in training.

    Args:
        norm: nn.InstanceNorm2d, nn.GroupNorm, nn.BatchNorm2d, nn.SyncBatchNorm or SyncBatchNorm2d. x: (N, C, h, w).
        taken: `moments(norm, x)`, if the caller has it already.
        upsample: the statistics are those of x with every pixel repeated upsample x upsample times.

    Raises:
        TypeError: the norm is of another class.
        ValueError: x has only one value per channel in training, so that there is no variance; or moments or running
            statistics have another shape than x requires.
    """
    if not isinstance(norm, (nn.InstanceNorm2d, nn.GroupNorm, *_BATCH_NORMS)):
        raise TypeError(f"cannot take the statistics of {type(norm).__name__}")
    _check_fits(norm, x, taken)
    if isinstance(norm, nn.GroupNorm):
        return group_statistics(x, norm.num_groups, norm.eps, taken, upsample)
    if isinstance(norm, nn.InstanceNorm2d):
        return instance_statistics(x, norm.eps, taken, upsample)
    if not _goes_by_running_statistics(norm):
        return _batch_statistics(norm, x, taken, upsample)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, var = norm.running_mean.to(dtype), norm.running_var.to(dtype)
    return Statistics(mean.unsqueeze(0), (var + norm.eps).rsqrt().unsqueeze(0), "none")


def _check_fits(norm: nn.Module, x: Tensor, taken: Moments | None) -> None:
    running = {name: getattr(norm, name, None) for name in ("running_mean", "running_var")}
    if len({t is None for t in running.values()}) > 1:
        raise ValueError("the norm has one of running_mean and running_var; it must have both or neither")
    for name, t in running.items():
        if t is not None and t.shape != x.shape[1:2]:
            raise ValueError(f"{name} of the norm has shape {tuple(t.shape)}, x has {x.shape[1]} channels")
    if taken is not None and not (len(taken) == 2 and all(_is_moment(t, x) for t in taken)):
        got = [
            f"{t.dtype} {tuple(t.shape)} on {t.device}" if isinstance(t, Tensor) else type(t).__name__ for t in taken
        ]
        raise ValueError(
            f"moments must be two float tensors of shape {tuple(x.shape[:2])} on {x.device}, got {got}; take them "
            "from this x with normalization.moments"
        )


def _is_moment(t: Tensor, x: Tensor) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point() and t.shape == x.shape[:2] and t.device == x.device


class Normalized(NamedTuple):
    """A tensor to modulate: x, its statistics, the upsampling that is left to do, and the norm's weight and bias.

    weight, bias: (C,), applied to the normalized x before it is modulated; None for a norm without an affine map.
    """

    x: Tensor
    stats: Statistics
    upsample: int = 1
    weight: Tensor | None = None
    bias: Tensor | None = None


def apply_norm(
    norm: Callable[[Tensor], Tensor] | Statistics, x: Tensor, taken: Moments | None = None, upsample: int = 1
) -> Normalized:
    """Takes x's statistics under a norm that can be fused, or those given; calls any other module or function with x.

    A norm that is called gets x at its full size, and its result has the statistics that leave it as it is.

    Args:
        taken, upsample: see `statistics`.
    """
    if isinstance(norm, Statistics):
        return Normalized(channels_last(x), norm, upsample)
    if not is_fusable(norm):
        x = channels_last(norm(F.interpolate(x, scale_factor=upsample) if upsample > 1 else x))
        return Normalized(x, identity_statistics(x))
    # Kernels read channels-last. One conversion here serves statistics, modulation and their gradients.
    x = channels_last(x)
    stats = statistics(norm, x, taken, upsample)
    return Normalized(x, stats, upsample, getattr(norm, "weight", None), getattr(norm, "bias", None))


def identity_statistics(x: Tensor) -> Statistics:
    """Statistics that leave x as it is, for an x that is normalized already."""
    zero = x.new_zeros(1, x.shape[1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return Statistics(zero, torch.ones_like(zero), "none")


def _goes_by_running_statistics(norm: nn.Module) -> bool:
    """True if the norm uses its running statistics, which do not depend on x."""
    return isinstance(norm, _BATCH_NORMS) and not norm.training and norm.running_mean is not None


def check_input(x: Tensor, channels: int) -> None:
    """Raises ValueError unless x is a float tensor (N, channels, h, w) in memory, not empty."""
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x must be a float tensor (N, C, h, w), got {x.dtype} of shape {tuple(x.shape)}")
    if x.shape[1] != channels:
        raise ValueError(f"x has {x.shape[1]} channels, the layer was built for {channels}")
    if x.numel() == 0:
        raise ValueError(f"x holds no pixels, its shape is {tuple(x.shape)}")
    ops.require_storage("x", x)


def instance_statistics(x: Tensor, eps: float, taken: Moments | None = None, upsample: int = 1) -> Statistics:
    """Statistics of each image's channels, from the biased variance plus eps; see `statistics` for the arguments."""
    pixels = x.shape[2] * x.shape[3]
    if pixels * upsample == 1:
        raise ValueError(f"instance norm needs more than one pixel per channel, got x of shape {tuple(x.shape)}")
    mean, m2 = taken or ops.channel_stats(x.detach())
    return Statistics(mean, (m2 / pixels + eps).rsqrt(), "image")


def group_statistics(
    x: Tensor, num_groups: int, eps: float, taken: Moments | None = None, upsample: int = 1
) -> Statistics:
    """Statistics of each image's groups of channels (biased variance); arguments as of `statistics`."""
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    if channels % num_groups:
        raise ValueError(f"{num_groups} groups do not divide the {channels} channels of x")
    mean, m2 = (t.unflatten(1, (num_groups, -1)) for t in taken or ops.channel_stats(x.detach()))
    between, centre = torch.var_mean(mean, 2, correction=0, keepdim=True)
    variance = between + m2.mean(2, keepdim=True) / pixels
    rstd = (variance + eps).rsqrt()
    return Statistics(centre.expand_as(mean).flatten(1), rstd.expand_as(mean).flatten(1), f"group:{num_groups}")


def _batch_statistics(norm: _BatchNorm, x: Tensor, taken: Moments | None, upsample: int) -> Statistics:
    mean, m2 = taken or ops.channel_stats(x.detach())
    pixels = x.shape[2] * x.shape[3]
    over_world = isinstance(norm, _SYNC_BATCH_NORMS) and norm.training and world_size() > 1
    values = x.shape[0] * pixels * upsample**2
    count: float | Tensor = values
    # Few operations are used, because on a GPU each of them takes the time of a launch.
    if len(mean) > 1:
        between, total = torch.var_mean(mean, 0, correction=0, keepdim=True)
        variance = between + m2.sum(0, keepdim=True) / (len(mean) * pixels)
    else:
        total, variance = mean, m2 / pixels
    if over_world:
        total, variance, count = _merge_over_processes(total, variance, values)
    elif values == 1:
        raise ValueError(
            f"batch norm in training needs more than one value per channel, got x of shape {tuple(x.shape)}"
        )
    _update_running(norm, total[0], variance[0], count)
    return Statistics(total, (variance + norm.eps).rsqrt(), "world" if over_world else "batch")


def _merge_over_processes(mean: Tensor, variance: Tensor, count: float) -> tuple[Tensor, Tensor, Tensor]:
    """Merges the statistics of all processes after one all-gather of a few numbers per channel.

    Merging in rank order gives the same bits on every rank, and merging squared deviations avoids cancellation.
    """
    transforms.require_one_process()
    mine = torch.cat((mean[0], variance[0] * count, mean.new_full((1,), count)))
    gathered = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(gathered, mine)
    channels = mean.shape[1]
    means, m2s, counts = torch.stack(gathered).split((channels, channels, 1), 1)
    whole = counts.sum()
    mean = (means * counts).sum(0, keepdim=True) / whole
    return mean, (m2s + counts * (means - mean).square()).sum(0, keepdim=True) / whole, whole


@torch.no_grad()
def _update_running(norm: _BatchNorm, mean: Tensor, variance: Tensor, count: float | Tensor) -> None:
    if not norm.track_running_stats or norm.running_mean is None:
        return
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked += 1
    for running, value in ((norm.running_mean, mean), (norm.running_var, variance * (count / (count - 1)))):
        assert running is not None
        momentum = norm.momentum if norm.momentum is not None else 1 / norm.num_batches_tracked.to(running.dtype)
        running.lerp_(value.to(running.dtype), momentum)


def world_size() -> int:
    """The number of processes in the default group; 1 if there is no group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
