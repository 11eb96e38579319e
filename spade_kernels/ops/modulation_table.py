"""modulation_table: scale and shift of every distinct window, the second convolution of a SPADE layer."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from spade_kernels import reference
from spade_kernels.ops._arguments import NOT_EMPTY, PANEL_COLUMNS, num_panels, size_of
from spade_kernels.ops._register import (
    acc_dtype,
    call,
    operators,
    plain_gradients,
    register,
    require_segments,
    stand_in,
)
from spade_kernels.ops.gather_sum import differentiable_sum_of_taps


def modulation_table(
    hidden: Tensor,
    gamma: Tensor,
    beta: Tensor,
    bias: Tensor,
    windows: Tensor,
    packed_weight: Tensor | None = None,
    indices: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Scale and shift of every distinct window: `reference.modulation_table`."""
    return call(operators.modulation_table, hidden, gamma, beta, bias, windows, packed_weight, indices, offsets)


def pack_modulation_weight(gamma: Tensor, beta: Tensor) -> Tensor:
    """Packs weights for `modulation_table`: `reference.pack_modulation_weight`. Not differentiable."""
    return call(operators.pack_modulation_weight, gamma, beta)


def _check(a, hidden, gamma, beta, bias, windows, packed_weight, indices, offsets):
    a.floats("hidden", hidden, (size_of(hidden, 0), NOT_EMPTY))
    num_taps = _check_weights(a, gamma, beta, hidden.shape[1])
    columns = 2 * gamma.shape[0]
    a.floats("bias", bias, (columns,))
    a.index("windows", windows, (size_of(windows, 0), num_taps), 0, hidden.shape[0] + 1)
    a.floats("packed_weight", packed_weight, (num_panels(columns), num_taps, hidden.shape[1], PANEL_COLUMNS))
    a.segments(indices, offsets, (hidden.shape[0] + 1) * num_taps, windows.numel())


def _check_weights(a, gamma: Tensor, beta: Tensor, depth: int | None) -> int:
    """Checks the weights (C, depth, k, k) of gamma and beta, and returns their number of taps."""
    a.floats("gamma", gamma, (NOT_EMPTY, depth, NOT_EMPTY, NOT_EMPTY))
    a.floats("beta", beta, gamma.shape)
    return gamma.shape[2] * gamma.shape[3]


def _fake(hidden, gamma, beta, bias, windows, packed_weight, indices, offsets):
    return hidden.new_empty(windows.shape[0], bias.shape[0])


def _setup(ctx, inputs, output):
    hidden, gamma, beta, bias, windows, _, indices, offsets = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(hidden, gamma, beta, windows, indices, offsets)


def _backward(ctx, grad):
    hidden, gamma, beta, windows, indices, offsets = ctx.saved_tensors
    if torch.is_grad_enabled():
        bias = stand_in(grad.shape[1:], ctx.bias_dtype, hidden)
        arguments = (hidden, gamma, beta, bias, windows, None, indices, offsets)
        return plain_gradients("modulation_table", arguments, ctx.needs_input_grad, (grad,))
    require_segments("modulation_table", indices, offsets)
    d_hidden, d_gamma, d_beta, d_bias = operators.modulation_table_grad(grad, hidden, gamma, beta, indices, offsets)
    d_weights = d_gamma.to(gamma.dtype), d_beta.to(beta.dtype), d_bias.to(ctx.bias_dtype)
    return d_hidden.to(hidden.dtype), *d_weights, None, None, None, None


register(
    "modulation_table(Tensor hidden, Tensor gamma, Tensor beta, Tensor bias, Tensor windows, Tensor? packed_weight,"
    " Tensor? indices, Tensor? offsets) -> Tensor",
    check=_check,
    fake=_fake,
    kernels=("triton", "cpu"),
    setup=_setup,
    backward=_backward,
    plain=partial(reference.modulation_table, sum_of_taps=differentiable_sum_of_taps),
)


def _check_grad(a, grad, hidden, gamma, beta, indices, offsets):
    a.floats("hidden", hidden, (size_of(hidden, 0), NOT_EMPTY))
    num_taps = _check_weights(a, gamma, beta, hidden.shape[1])
    a.floats("grad", grad, (size_of(grad, 0), 2 * gamma.shape[0]))
    a.segments(indices, offsets, (hidden.shape[0] + 1) * num_taps, grad.shape[0] * num_taps)


def _fake_grad(grad, hidden, gamma, beta, indices, offsets):
    shapes = (hidden.shape, gamma.shape, beta.shape, grad.shape[1:])
    return tuple(grad.new_empty(shape, dtype=acc_dtype(grad)) for shape in shapes)


register(
    "modulation_table_grad(Tensor grad, Tensor hidden, Tensor gamma, Tensor beta, Tensor indices, Tensor offsets)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    check=_check_grad,
    fake=_fake_grad,
    kernels=("triton", "cpu"),
)


def _check_pack(a, gamma, beta):
    _check_weights(a, gamma, beta, NOT_EMPTY)


def _fake_pack(gamma, beta):
    channels, depth, height, width = gamma.shape
    panels, num_taps = num_panels(2 * channels), height * width
    if gamma.is_cuda:
        return gamma.new_empty(panels, PANEL_COLUMNS, num_taps, depth).permute(0, 2, 3, 1)
    return gamma.new_empty(panels, num_taps, depth, PANEL_COLUMNS, dtype=acc_dtype(gamma))


register(
    "pack_modulation_weight(Tensor gamma, Tensor beta) -> Tensor",
    check=_check_pack,
    fake=_fake_pack,
    kernels=("triton", "cpu"),
)
