"""conv and modulate_conv, with packed weights, and conv3x3, with derivatives: convolutions with stride 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spade_kernels import reference
from spade_kernels.ops._arguments import NOT_EMPTY, PANEL_COLUMNS, WINOGRAD_POINTS, num_panels, size_of
from spade_kernels.ops._register import (
    acc_dtype,
    call,
    channels_last_like,
    operators,
    plain_gradients,
    register,
    stand_in,
)
from spade_kernels.ops.modulate import check_modulation


def pack_conv_weight(weight: Tensor) -> Tensor:
    """Packs a weight for `conv` and `modulate_conv`: `reference.pack_conv_weight`. Not differentiable."""
    return call(operators.pack_conv_weight, weight)


def conv(x: Tensor, packed_weight: Tensor, bias: Tensor, add: Tensor | None = None, relu: bool = False) -> Tensor:
    """A convolution with a packed weight: `reference.conv`. Not differentiable."""
    return call(operators.conv, x, packed_weight, bias, add, relu)


def modulate_conv(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    table: Tensor,
    pixel_row: Tensor | None,
    negative_slope: float,
    upsample: int,
    packed_weight: Tensor,
    bias: Tensor,
    add: Tensor | None = None,
) -> Tensor:
    """`modulate`, then `conv`: `reference.modulate_conv`. Not differentiable."""
    return call(
        operators.modulate_conv, x, mean, rstd, table, pixel_row, negative_slope, upsample, packed_weight, bias, add
    )


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 3 x 3 convolution with padding 1: `reference.conv3x3`."""
    return call(operators.conv3x3, x, weight, bias)


def _check_pack(a, weight):
    side = 1 if size_of(weight, 2) == 1 else 3
    a.floats("weight", weight, (NOT_EMPTY, NOT_EMPTY, side, side))


def _fake_pack(weight):
    out, channels, height, width = weight.shape
    points = 1 if height * width == 1 else WINOGRAD_POINTS
    return weight.new_empty(points, num_panels(out), channels, PANEL_COLUMNS, dtype=acc_dtype(weight))


register("pack_conv_weight(Tensor weight) -> Tensor", check=_check_pack, fake=_fake_pack, kernels=("cpu",))


def _check(a, x, packed_weight, bias, add, relu):
    _check_image(a, "x", x)
    _check_packed(a, packed_weight, bias, add, x.shape)


def _check_image(a, name: str, t: Tensor) -> None:
    a.floats(name, t, (size_of(t, 0), NOT_EMPTY, NOT_EMPTY, NOT_EMPTY))


def _check_packed(a, packed_weight: Tensor, bias: Tensor, add: Tensor | None, shape: Sequence[Any]) -> None:
    """Checks packed weight, bias and `add` of a convolution whose input has this shape."""
    images, channels, height, width = shape
    a.floats("bias", bias, (NOT_EMPTY,))
    out, points = bias.shape[0], 1 if size_of(packed_weight, 0) == 1 else WINOGRAD_POINTS
    a.floats("packed_weight", packed_weight, (points, num_panels(out), channels, PANEL_COLUMNS))
    a.floats("add", add, (images, out, height, width))


def _fake(x, packed_weight, bias, add, relu):
    return channels_last_like(x, channels=bias.shape[0])


register(
    "conv(Tensor x, Tensor packed_weight, Tensor bias, Tensor? add, bool relu) -> Tensor",
    check=_check,
    fake=_fake,
    kernels=("cpu",),
)


def _check_modulate_conv(a, x, mean, rstd, table, pixel_row, negative_slope, upsample, packed_weight, bias, add):
    check_modulation(a, x, mean, rstd, table, pixel_row, upsample)
    images, channels, height, width = x.shape
    if isinstance(height, int) and isinstance(width, int):
        a.require(height > 0 and width > 0, "x holds no pixels")
    _check_packed(a, packed_weight, bias, add, (images, channels, upsample * height, upsample * width))


def _fake_modulate_conv(x, mean, rstd, table, pixel_row, negative_slope, upsample, packed_weight, bias, add):
    return channels_last_like(x, upsample, bias.shape[0])


register(
    "modulate_conv(Tensor x, Tensor mean, Tensor rstd, Tensor table, Tensor? pixel_row, float negative_slope,"
    " int upsample, Tensor packed_weight, Tensor bias, Tensor? add) -> Tensor",
    check=_check_modulate_conv,
    fake=_fake_modulate_conv,
    kernels=("cpu",),
)


def _check_conv3x3(a, x, weight, bias):
    _check_image(a, "x", x)
    a.floats("weight", weight, (NOT_EMPTY, x.shape[1], 3, 3))
    a.floats("bias", bias, weight.shape[:1])


def _fake_conv3x3(x, weight, bias):
    return channels_last_like(x, channels=bias.shape[0])


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.bias_dtype = inputs[2].dtype


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    if torch.is_grad_enabled():
        arguments = (x, weight, stand_in(weight.shape[:1], ctx.bias_dtype, weight))
        return plain_gradients("conv3x3", arguments, ctx.needs_input_grad, (grad,))
    d_x, d_weight, d_bias = None, None, None
    if ctx.needs_input_grad[0]:
        d_x = operators.conv3x3_input_grad(grad, weight).to(x.dtype)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        d_weight, d_bias = operators.conv3x3_weight_grad(grad, x)
        d_weight, d_bias = d_weight.to(weight.dtype), d_bias.to(ctx.bias_dtype)
    return d_x, d_weight, d_bias


def _plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    acc = reference.accumulator(x)
    return F.conv2d(acc, weight.to(acc.dtype), bias.to(acc.dtype), padding=1).to(x.dtype)


register(
    "conv3x3(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    check=_check_conv3x3,
    fake=_fake_conv3x3,
    kernels=("cpu",),
    setup=_setup,
    backward=_backward,
    plain=_plain,
)


def _check_input_grad(a, grad, weight):
    _check_image(a, "grad", grad)
    a.floats("weight", weight, (grad.shape[1], NOT_EMPTY, 3, 3))


def _fake_input_grad(grad, weight):
    return channels_last_like(grad, channels=weight.shape[1])


register(
    "conv3x3_input_grad(Tensor grad, Tensor weight) -> Tensor",
    check=_check_input_grad,
    fake=_fake_input_grad,
    kernels=("cpu",),
)


def _check_weight_grad(a, grad, x):
    _check_image(a, "grad", grad)
    a.floats("x", x, (grad.shape[0], NOT_EMPTY, *grad.shape[2:]))


def _fake_weight_grad(grad, x):
    acc = acc_dtype(grad)
    return grad.new_empty(grad.shape[1], x.shape[1], 3, 3, dtype=acc), grad.new_empty(grad.shape[1], dtype=acc)


register(
    "conv3x3_weight_grad(Tensor grad, Tensor x) -> (Tensor, Tensor)",
    check=_check_weight_grad,
    fake=_fake_weight_grad,
    kernels=("cpu",),
)
