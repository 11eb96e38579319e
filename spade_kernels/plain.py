"""Differentiable operators in plain PyTorch, for every kind of derivative: any order, both modes, torch.func.

Kernels have first derivatives in reverse mode only. These functions take the arguments of the operators and share the
arithmetic of `reference.py`, but for sums that PyTorch can differentiate more than once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from spade_kernels import reference, transforms
from spade_kernels.reference import accumulator, channel_stats

__all__ = ["channel_stats", "conv3x3", "gather_sum", "modulate", "modulation_table"]


def _sum_of_taps(taps: Tensor, windows: Tensor) -> Tensor:
    """(rows, D): sum over t of taps[windows[:, t], t]."""
    first, *others = map(F.embedding, windows.unbind(1), taps.unbind(1))
    return sum(others, first)


gather_sum = partial(reference.gather_sum, sum_of_taps=_sum_of_taps)
modulation_table = partial(reference.modulation_table, sum_of_taps=_sum_of_taps)


def modulate(x: Tensor, mean: Tensor, rstd: Tensor, table: Tensor, pixel_row: Tensor | None, *others: Any) -> Tensor:
    *_, negative_slope, upsample, stats_scope = others
    if stats_scope != "none":
        mean, rstd = _following(accumulator(x), mean, rstd, stats_scope)
    return reference.modulate(x, mean, rstd, table, pixel_row, None, None, None, negative_slope, upsample, "none")


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    acc = accumulator(x)
    return F.conv2d(acc, weight.to(acc.dtype), bias.to(acc.dtype), padding=1).to(x.dtype)


def _following(x: Tensor, mean: Tensor, rstd: Tensor, stats_scope: str) -> tuple[Tensor, Tensor]:
    """mean and rstd, whose values were taken from x without derivatives, with all of those that they have."""
    if stats_scope == "image":
        variance, centre = torch.var_mean(x, (2, 3), correction=0)
    elif stats_scope == "batch":
        variance, centre = (t.unsqueeze(0) for t in torch.var_mean(x, (0, 2, 3), correction=0))
    else:
        variance, centre = _moments_of_world(x)
    variance = variance - variance.detach()
    return mean + (centre - centre.detach()), (rstd.pow(-2) + variance).rsqrt()


def _moments_of_world(x: Tensor) -> tuple[Tensor, Tensor]:
    """(1, C) variance and mean of all processes' x. Derivatives are of the sum of all processes' results."""
    transforms.require_one_process()
    count = x.new_tensor(x.numel() // x.shape[1])
    dist.all_reduce(count)
    mean = _AllReduce.apply(x.sum((0, 2, 3))) / count
    variance = _AllReduce.apply((x - mean[:, None, None]).square().sum((0, 2, 3))) / count
    return variance.unsqueeze(0), mean.unsqueeze(0)


class _AllReduce(torch.autograd.Function):
    """The sum of all processes' tensors, which has derivatives of every order."""

    @staticmethod
    def forward(ctx, t: Tensor) -> Tensor:
        total = t.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _AllReduce.apply(grad.contiguous())
