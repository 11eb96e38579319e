"""channel_stats: mean and sum of squared deviations of every image and channel."""

from __future__ import annotations

import torch
from torch import Tensor

from spade_kernels import reference
from spade_kernels.ops._arguments import NOT_EMPTY
from spade_kernels.ops._register import acc_dtype, call, operators, plain_gradients, register


def channel_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of every image and channel: `reference.channel_stats`."""
    return call(operators.channel_stats, x)


def _check(a, x):
    a.floats("x", x, (NOT_EMPTY,) * 4)


def _fake(x):
    stats = x.new_empty(x.shape[:2], dtype=acc_dtype(x))
    return stats, torch.empty_like(stats)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[0])


def _backward(ctx, grad_mean, grad_m2):
    x, mean = ctx.saved_tensors
    if torch.is_grad_enabled():
        return plain_gradients("channel_stats", (x,), (True,), (grad_mean, grad_m2))[0]
    return operators.channel_stats_grad(x, mean, grad_mean, grad_m2)


register(
    "channel_stats(Tensor x) -> (Tensor, Tensor)",
    check=_check,
    fake=_fake,
    kernels=("cuda", "triton", "cpu"),
    setup=_setup,
    backward=_backward,
    plain=reference.channel_stats,
)


def _check_grad(a, x, mean, grad_mean, grad_m2):
    a.floats("x", x, (NOT_EMPTY,) * 4)
    for name, stats in (("mean", mean), ("grad_mean", grad_mean), ("grad_m2", grad_m2)):
        a.floats(name, stats, x.shape[:2])


def _fake_grad(x, mean, grad_mean, grad_m2):
    return torch.empty_like(x)


register(
    "channel_stats_grad(Tensor x, Tensor mean, Tensor grad_mean, Tensor grad_m2) -> Tensor",
    check=_check_grad,
    fake=_fake_grad,
    kernels=("cuda", "triton"),
)
